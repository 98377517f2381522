"""Within torch.autocast the operations compute what they do outside of it, backward too."""

import pytest
import torch
from torch import Tensor

from kernels.cached_attention import prompt_attention, token_attention
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_entropy import cross_entropy
from kernels.forward_kl import forward_kl
from kernels.fp8_linear import fp8_linear, quantize_rows
from kernels.gated_norm import gated_rms_norm, rms_norm
from kernels.mixer import MixerWeights, mix
from kernels.squared_relu import squared_relu
from kernels.ssd import chunk_scan
from kernels.state_update import conv_state_update, ssd_state_update

LABELS, HEADS = torch.arange(6), torch.ones(4)
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 11] * 2, dtype=torch.int32)
OPERATIONS = {
    "causal_conv1d": (lambda x, w, b: causal_conv1d(x, w, b, seq_idx=DOCUMENTS), (2, 20, 8), (8, 4), (8,)),
    "cross_entropy": (lambda x: cross_entropy(1 * x, LABELS), (6, 20)),
    "forward_kl": (lambda x, y: forward_kl(x, y.detach()), (6, 20), (6, 20)),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-5), (5, 16), (16,)),
    "gated_rms_norm": (lambda x, z, w: gated_rms_norm(x, z, w, 2, 1e-5), (5, 16), (5, 16), (16,)),
    "chunk_scan": (lambda x, dt, B, C: chunk_scan(x, dt, -HEADS, B, C, HEADS, HEADS, 8, seq_idx=DOCUMENTS)[0],
                   (2, 20, 4, 8), (2, 20, 4), (2, 20, 2, 8), (2, 20, 2, 8)),
    "mix": (lambda x, w, b, n: mix(x, MixerWeights(w, b, HEADS, HEADS, HEADS, n), 2, 8, 8, 1e-5),
            (2, 20, 100), (64, 4), (64,), (32,)),
    "squared_relu": (squared_relu, (5, 16)),
    "ssd_state_update": (lambda x, dt, B, C: ssd_state_update(
        torch.ones(3, 4, 8, 8), *(one.detach() for one in (x, dt)), -HEADS, B.detach(), C.detach(), HEADS, HEADS),
        (3, 4, 8), (3, 4), (3, 2, 8), (3, 2, 8)),
    "conv_state_update": (lambda x, w, b: conv_state_update(torch.ones(3, 3, 8), x, w, b), (3, 8), (8, 4), (8,)),
    "prompt_attention": (prompt_attention, (1, 4, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16)),
    "token_attention": (lambda q, k, v: token_attention(q, k, v, torch.tensor([4, 2])),
                        (2, 4, 16), (2, 2, 5, 16), (2, 2, 5, 16)),
    "fp8_linear": (lambda x, w: fp8_linear(x.detach(), quantize_rows(w.detach())), (16, 32), (32, 32)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(name):
    operation, *shapes = OPERATIONS[name]

    def results(within: bool) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = [torch.randn(shape).requires_grad_() for shape in shapes]
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            y = operation(*leaves)
            wanted = leaves[:1] if name == "forward_kl" else leaves if y.requires_grad else []
            # Attention is PyTorch's own, and so is its backward: that is not to be called within autocast.
            return [y, *(torch.autograd.grad(y.sum(), wanted) if wanted and "attention" not in name else [])]

    for ours, theirs in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
