"""relu(x)^2 on any device."""

import pytest
import torch
from triton_device import DEVICE, PRECISIONS

from kernels import squared_relu_triton
from kernels.squared_relu import squared_relu


@pytest.mark.parametrize("dtype", [precision for precision, _ in PRECISIONS])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 1500)])
def test_squared_relu(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.where(x > 0, x.float() ** 2, 0).to(dtype)
    assert torch.equal(squared_relu(x), expected)
    assert torch.equal(squared_relu_triton.apply(x.to(DEVICE)).cpu(), expected)


def test_the_operator_is_well_registered():
    x = torch.randn(3, 20, device=DEVICE)
    torch.library.opcheck(squared_relu_triton.apply, (x,), test_utils=("test_schema", "test_faketensor"))
