"""FP8 linear layers: rows rounded to E4M3, products of the rounded values."""

import pytest
import torch
from triton_device import DEVICE, PRECISIONS

# isort: split
from kernels.fp8_linear import RowScaled, fp8_linear, quantize_rows
from kernels.fp8_linear import triton as fp8_linear_triton
from tests.closeness import relative_error


def rows_of_many_sizes() -> torch.Tensor:
    x = torch.randn(7, 80, generator=torch.Generator().manual_seed(3))
    return x * torch.logspace(-20, 20, 7)[:, None] * (torch.arange(7) != 4)[:, None]


def test_a_rows_largest_value_is_the_formats():
    x = rows_of_many_sizes()
    values, scales = quantize_rows(x)
    largest = values.float().abs().amax(1)
    assert torch.equal(largest, torch.where(torch.arange(7) == 4, 0.0, 448.0))
    restored = values.float() * scales
    nonzero = torch.arange(7) != 4
    assert (restored - x).abs()[nonzero].div(scales[nonzero]).max() <= 16       # half a step at the format's largest
    assert relative_error(restored, x.double()) < 0.04


def test_a_product_is_that_of_the_rounded_values():
    x, w = torch.randn(2, 5, 48), torch.randn(32, 48)
    weight = quantize_rows(w)
    rows = quantize_rows(x.view(10, 48))
    exact = (rows.values.double() * rows.scales) @ (weight.values.double() * weight.scales).t()
    y = fp8_linear(x, weight)
    assert y.shape == (2, 5, 32) and relative_error(y.view(10, 32), exact) < 1e-6
    assert relative_error(y, (x.double() @ w.double().t())) < 0.06


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_on_a_gpu(tokens):
    x, w = torch.randn(tokens, 512).bfloat16(), torch.randn(256, 512).bfloat16()
    weight = quantize_rows(w)
    expected = fp8_linear(x.float(), weight)
    y = fp8_linear(x.cuda(), RowScaled(*(tensor.cuda() for tensor in weight)))
    assert relative_error(y.cpu(), expected.double()) < 6e-3


@pytest.mark.parametrize("dtype", [precision for precision, _ in PRECISIONS])
def test_the_kernel_rounds_as_pytorch_does(dtype):
    """But for a few: a quotient's last bit decides a tie, and the interpreter rounds subnormals in its own way."""
    x = torch.randn(9, 80, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[4] = 0
    values, scales = fp8_linear_triton.quantize_rows(x.to(DEVICE))
    expected = quantize_rows(x)
    torch.testing.assert_close(scales.cpu(), expected.scales, rtol=1e-6, atol=0)
    assert (values.cpu().float() != expected.values.float()).double().mean() < (5e-3 if DEVICE == "cuda" else 3e-2)


@pytest.mark.parametrize(
    "quantize", [quantize_rows, lambda x: RowScaled(*fp8_linear_triton.quantize_rows(x.to(DEVICE)))],
    ids=["PyTorch", "kernel"])
def test_rows_that_are_not_finite_and_rows_of_next_to_nothing(quantize):
    x = torch.tensor([[torch.nan, 2.0, 0.0], [-torch.inf, 1.0, 0.0], [1e-44, 0.0, 0.0], [1.0, 2.0, 0.0]])
    values, scales = quantize(x)
    assert scales.flatten().isfinite().tolist() == [False, False, True, True]
    assert (values.float() * scales)[2:].isfinite().all()


def test_the_operator_is_well_registered():
    x = torch.randn(3, 20, device=DEVICE)
    torch.library.opcheck(fp8_linear_triton.quantize_rows, (x,), test_utils=("test_schema", "test_faketensor"))
