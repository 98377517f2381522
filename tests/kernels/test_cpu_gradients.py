"""Norm and activation on a CPU, value and gradients, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.gated_norm import rms_norm
from kernels.squared_relu import squared_relu


def gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Value and input gradients of `function`, started from fixed weights."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_are_pytorchs_in_float64(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(40, 3, 24).to(dtype), torch.randn(24).to(dtype)
    cases = [
        (lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (24,), w, 1e-5), [x, weight]),
        (squared_relu, lambda x: F.relu(x).square(), [x]),
    ]
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for ours, reference, inputs in cases:
        expected = gradients(reference, [t.double() for t in inputs])
        for result, exact in zip(gradients(ours, inputs), expected, strict=True):
            assert (result.double() - exact).abs().max() <= tolerance * exact.abs().max()
