"""Emulated FP8 against PyTorch's own fp8 conversions, bit for bit."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.fp8_quantize import quantize

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
FORMATS = pytest.mark.parametrize("format", ["e4m3", "e5m2"])


def converted(x: Tensor, scale: float | Tensor, format: str) -> Tensor:
    """x * scale through PyTorch's conversion, in float32."""
    scaled = (x.float() * scale).clamp(-LARGEST[format], LARGEST[format])
    return scaled.to(DTYPES[format]).float()


@FORMATS
def test_every_bfloat16_under_many_scales(format):
    """The scale follows the largest value, so one element beside all others sets it."""
    every = torch.arange(65_536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite()]
    for exponent in torch.linspace(-30, 30, 41).tolist():
        amax = torch.tensor(1.37 * 2.0**exponent, dtype=torch.bfloat16)
        x = torch.cat([every[every.abs() <= amax], amax[None]])
        values, inverse = quantize(x, format)
        scale = torch.tensor(LARGEST[format]) / amax.float()
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.float(), converted(x, scale, format))
        assert torch.equal(inverse, 1 / scale)


@FORMATS
def test_random_float32(format):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        spread = torch.exp(3 * torch.randn((), generator=generator))
        x = torch.randn(70_000, generator=generator) * torch.exp(spread * torch.randn(70_000, generator=generator))
        x = x[x.isfinite()]
        values, inverse = quantize(x, format)
        scale = torch.from_numpy(np.float32(LARGEST[format]) / x.abs().max().numpy()[None])     # rounded once
        assert torch.equal(values.float(), converted(x, scale, format))
        assert torch.equal(inverse, 1 / scale[0])


@FORMATS
def test_ties_go_to_even(format):
    """Midpoints between neighbours, at a scale of one."""
    codes = torch.arange(127 if format == "e4m3" else 124, dtype=torch.uint8)
    grid = codes.view(DTYPES[format]).float()
    assert grid[-1] == LARGEST[format]
    middle = (grid[1:] + grid[:-1]) / 2
    values, inverse = quantize(torch.cat([middle, grid[-1:]]), format)
    assert inverse == 1
    assert torch.equal(values[:-1].float(), torch.where(codes[:-1] % 2 == 0, grid[:-1], grid[1:]))


@FORMATS
def test_a_bfloat16_product_is_the_fp8_product(format):
    """GEMMs over the returned values need no more than bfloat16's exact products and float32 sums."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 32, generator=generator), torch.randn(32, 24, generator=generator)
    (qa, ia), (qb, ib) = quantize(a, format), quantize(b, "e4m3")
    exact = (converted(a, 1 / ia.double(), format).double() @ converted(b, 1 / ib.double(), "e4m3").double()) * ia * ib
    torch.testing.assert_close((qa.float() @ qb.float()).mul(ia * ib).double(), exact, rtol=1e-5, atol=1e-5)
    assert (exact - a.double() @ b.double()).abs().max() > 1e-2        # the rounding does matter


@FORMATS
def test_dequantised_is_near(format):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, inverse_scale = quantize(x, format)
    back = (values.float() * inverse_scale).bfloat16()
    relative_step = 2.0 ** -(4 if format == "e4m3" else 3)             # half a unit in the last place
    assert not torch.equal(back, x)
    near = (back.float() - x.float()).abs() <= x.float().abs() * (relative_step + 2**-8) + x.abs().max() * 2**-16
    assert near.all()


@FORMATS
def test_scales_of_degenerate_tensors(format):
    """Transformer Engine's rules: an all-zero or non-finite tensor keeps scale 1, a vanishing one the largest scale."""
    values, inverse = quantize(torch.zeros(5), format)
    assert inverse == 1 and not values.any()
    values, inverse = quantize(torch.tensor([math.inf, -1e9, 3.0]), format)
    assert inverse == 1 and values.tolist() == [LARGEST[format], -LARGEST[format], 3.0]
    values, inverse = quantize(torch.tensor([math.nan, 2.0]), format)
    assert inverse == 1 and values[0].isnan() and values[1] == 2
    values, inverse = quantize(torch.tensor([1e-38, 0.0]), format)
    assert values.isfinite().all() and inverse.isfinite() and 1 / inverse > 1e38


def test_shape_and_strides():
    x = torch.randn(6, 8)
    values, _ = quantize(x.T, "e4m3")
    assert torch.equal(values, quantize(x, "e4m3")[0].T)
