"""On a GPU, what the CUDA kernels do not take runs in PyTorch's operations, and says so; with fake tensors, so that no
GPU is needed: an operation ends at the warning, here an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="`make test` installs Triton")

# imported before tensors are fake
from kernels.arguments import warn_of_slowness
from kernels.cached_attention import token_attention
from kernels.cached_attention import triton as cached_attention_triton  # noqa: F401
from kernels.causal_conv1d import causal_conv1d
from kernels.causal_conv1d import triton as causal_conv1d_triton  # noqa: F401
from kernels.cross_entropy import cross_entropy
from kernels.cross_entropy import triton as cross_entropy_triton  # noqa: F401
from kernels.forward_kl import forward_kl
from kernels.forward_kl import triton as forward_kl_triton  # noqa: F401
from kernels.fp8_linear import quantize_rows
from kernels.fp8_linear import triton as fp8_linear_triton  # noqa: F401
from kernels.gated_norm import gated_rms_norm
from kernels.gated_norm import triton as gated_norm_triton  # noqa: F401
from kernels.mixer import MixerWeights, mix
from kernels.mixer import triton as mixer_triton  # noqa: F401
from kernels.squared_relu import squared_relu
from kernels.squared_relu import triton as squared_relu_triton  # noqa: F401
from kernels.squared_relu_fp8 import quantize_transpose
from kernels.squared_relu_fp8 import triton as squared_relu_fp8_triton  # noqa: F401
from kernels.ssd import chunk_scan
from kernels.ssd import triton as ssd_triton  # noqa: F401
from kernels.state_update import conv_state_update, ssd_state_update
from kernels.state_update import triton as state_update_triton  # noqa: F401

BF16 = torch.bfloat16


def of(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def scan(head_dim: int, state_dim: int, dtype: torch.dtype = BF16) -> Any:
    B, h = of(2, 10, 2, state_dim, dtype=dtype), of(4)
    return chunk_scan(of(2, 10, 4, head_dim, dtype=dtype), of(2, 10, 4), h, B, B, h, h, 8)


def mixer(taps: int) -> Any:
    weights = MixerWeights(of(128, taps), of(128), of(4), of(4), of(4), of(64))
    return mix(of(2, 5, 196), weights, 2, 16, 8, 1e-5)


@pytest.mark.parametrize(("run", "words"), [
    (lambda: scan(256, 256), "chunk_scan: .*head_dim 256, state_dim 256; .*\n.* product at most 32768"),
    (lambda: scan(48, 64), "chunk_scan: .* head_dim 48"), (lambda: scan(64, 80), "chunk_scan: .* state_dim 80"),
    (lambda: scan(64, 64, torch.float32), "chunk_scan: .* torch.float32"),
    (lambda: mixer(3), "causal_conv1d: .* 3 taps; .*\n.* 4 taps"),
    (lambda: causal_conv1d(of(2, 5, 6), of(6, 2), of(6)), "causal_conv1d: .* 2 taps"),
    (lambda: gated_rms_norm(*(of(3, 8, dtype=torch.float32) for _ in range(2)), of(8), 1, 1e-5), "gated_rms_norm: "),
    (lambda: conv_state_update(of(2, 6, 3).mT, of(2, 6), of(6, 4), of(6)), "conv_state_update: .*side by side: False"),
    (lambda: ssd_state_update(of(2, 4, 8, 16), of(2, 4, 8, dtype=torch.float64), of(2, 4), of(4), of(2, 2, 16),
                              of(2, 2, 16), of(4), of(4)), "ssd_state_update: "),
    (lambda: cross_entropy(of(9, 5).t(), of(5, dtype=torch.int64)), r"cross_entropy: .* contiguous: False"),
    (lambda: forward_kl(of(9, 5).t(), of(9, 5).t()), "forward_kl: "),
    (lambda: squared_relu(of(9, 5).t()), r"squared_relu: .* contiguous: False"),
    (lambda: quantize_transpose(of(32, 24), "e4m3"), r"quantize_transpose.*24 channels.*\n.* multiples of 16"),
    (lambda: quantize_rows(of(9, 5).t()), "quantize_rows: "),
    (lambda: token_attention(of(1, 2, 48), of(1, 1, 5, 48), of(1, 1, 5, 48), of(1, dtype=torch.int64)),
     "token_attention: .*head_dim 48"),
])
def test_it_is_told(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any], words: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=words):
            run()


def test_float64_is_no_mistake() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_slowness("chunk_scan", "bfloat16", torch.float64)


def test_once_of_each_and_within_a_compilers_graph() -> None:
    def step(x: Tensor) -> Tensor:
        warn_of_slowness("chunk_scan", "bfloat16", x.dtype, f"contiguous: {x.is_contiguous()}, head_dim {x.shape[1]}")
        return x + 1

    for run in (step, torch.compile(step, fullgraph=True, backend="eager")):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for size in (48, 48, 80, 48):
                assert (run(torch.zeros(3, size)) == 1).all()
        assert [str(warning.message).split(";")[0].rsplit(" ", 1)[1] for warning in told] == ["48", "80"]
