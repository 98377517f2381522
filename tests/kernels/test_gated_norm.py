"""The gated norm against transformers' own, values and gradients."""

import pytest
import torch
from torch import Tensor
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from kernels import gated_norm
from kernels.gated_norm import gated_rms_norm

EPSILON = 1e-5


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, gate, weight = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
                       for shape in ((3, 50, 24), (3, 50, 24), (24,)))
    return x, gate, weight


def reference(x: Tensor, gate: Tensor, weight: Tensor, groups: int) -> Tensor:
    norm = Zamba2RMSNormGated(weight.shape[0], weight.shape[0] // groups, EPSILON)
    return torch.func.functional_call(norm, {"weight": weight}, (x, gate))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("block", [100, 65_536])         # several blocks, the last one ragged; one block
def test_values_and_gradients_equal_transformers(groups, block, monkeypatch):
    monkeypatch.setattr(gated_norm, "_BLOCK", block)
    values = tensors(torch.float32)
    y, expected = gated_rms_norm(*values, groups, EPSILON), reference(*values, groups)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(torch.autograd.grad(y, values, dy), torch.autograd.grad(expected, values, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradcheck():
    x, gate, weight = (tensor.detach().double()[..., :6].requires_grad_() for tensor in tensors(torch.float32))
    x, gate = x[:1, :3], gate[:1, :3]
    assert torch.autograd.gradcheck(lambda *values: gated_rms_norm(*values, 2, EPSILON), (x, gate, weight))


def test_bfloat16_rounds_once():
    """Float32 inside: the result is the float64 one to within bfloat16's rounding."""
    values = tensors(torch.bfloat16)
    y = gated_rms_norm(*values, 2, EPSILON)
    x, gate, weight = (tensor.detach().double() for tensor in values)
    gated = (x * gate * gate.sigmoid()).unflatten(-1, (2, -1))
    exact = (gated / (gated.square().mean(-1, keepdim=True) + EPSILON).sqrt()).flatten(-2) * weight
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-30)
