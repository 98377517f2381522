"""Squared ReLU on CUDA against PyTorch's operations in float64."""

import pytest
import torch
from triton_device import DEVICE, PRECISIONS

from tests.closeness import relative_error

# isort: split
from kernels.squared_relu import triton as kernel


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (4096 * 2 + 1,)])
def test_value_and_gradient_are_pytorchs(dtype, tolerance, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).requires_grad_()
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    exact = x.detach().double().requires_grad_()
    y, expected = kernel.activate(x), exact.relu().square()
    assert y.dtype == dtype and relative_error(y, expected) < tolerance
    (mine,), (true,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, exact, dy.double())
    assert relative_error(mine, true) < tolerance


def test_the_operator_is_well_registered():
    x = torch.randn(3, 32).to(DEVICE, PRECISIONS[0][0])
    torch.library.opcheck(kernel.activate.registered, (x,), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("run", [kernel.activate, kernel.activate.registered])
def test_a_second_derivative_is_refused(run):
    """Of all `kernels.operation`s, eager or of a compiler."""
    x = torch.randn(3, 32, requires_grad=True, device=DEVICE)
    with pytest.raises(RuntimeError, match="differentiable once: create_graph"):
        torch.autograd.grad(run(x).sum(), x, create_graph=True)
