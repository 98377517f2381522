"""Squared ReLU to FP8 and its transpose: bit for bit the activation in bfloat16 followed by fp8_quantize.quantize."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_device import DEVICE

from kernels import squared_relu_fp8
from kernels.fp8_quantize import quantize
from kernels.squared_relu_fp8 import triton as kernel

PRECISIONS = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")      # NumPy's, in the interpreter


@pytest.fixture(autouse=True)
def conversions_that_round(monkeypatch):
    """Triton's interpreter rounds wrongly to FP8: convert as PyTorch and the hardware do."""
    if DEVICE == "cuda":
        return
    from triton.runtime import interpreter

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
    largest = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
    carriers = {1: torch.uint8, 2: torch.uint16, 4: torch.float32}

    def convert(source, source_dtype, target_dtype, rounding_mode):
        before, after = dtypes[source_dtype.name], dtypes[target_dtype.name]
        values = torch.from_numpy(source.copy()).view(before).float()
        if after in largest:
            values = values.clamp(-largest[after], largest[after])       # cvt.rn.satfinite
        return values.to(after).view(carriers[after.itemsize]).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def backward(dy: Tensor, h: Tensor) -> Tensor:
    """The gradient autograd gives for relu(h)^2 in h's dtype, composed of PyTorch's own operations."""
    leaf = h.detach().clone().requires_grad_()
    return torch.autograd.grad(F.relu(leaf).square(), leaf, dy)[0]


CASES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "none": ("e4m3", lambda h, dy: h),
    "none ": ("e5m2", lambda h, dy: h),
    "squared_relu": ("e4m3", lambda h, dy: F.relu(h).square()),
    "squared_relu_backward": ("e5m2", lambda h, dy: backward(dy, h)),
}


def public(name: str, h: Tensor, dy: Tensor, format: str) -> tuple[Tensor, ...]:
    if name == "squared_relu":
        return squared_relu_fp8.squared_relu_quantize(h)
    if name == "squared_relu_backward":
        return squared_relu_fp8.squared_relu_backward_quantize(dy, h)
    return squared_relu_fp8.quantize_transpose(h, format)


def triton(name: str, h: Tensor, dy: Tensor, format: str) -> tuple[Tensor, ...]:
    return kernel.quantize_transpose(h, dy if name == "squared_relu_backward" else None, name, format)


def same(result: tuple[Tensor, ...], expected: Tensor, format: str) -> bool:
    values, inverse_scale = quantize(expected.cpu(), format)
    mine, transposed, mine_inverse = (tensor.cpu() for tensor in result)
    assert mine.dtype == transposed.dtype == squared_relu_fp8.DTYPES[format]
    assert transposed.is_contiguous() and mine_inverse.shape == ()
    equal = torch.equal(mine.float().nan_to_num(7.0), values.float().nan_to_num(7.0))
    return (equal and torch.equal(transposed.view(torch.uint8), mine.view(torch.uint8).t())
            and torch.equal(mine_inverse, inverse_scale))


@pytest.fixture(params=["small tiles", "tiles in use"])
def shape(request, monkeypatch):
    """Tokens and channels that take several tiles, the last ones cut."""
    if request.param == "small tiles":
        monkeypatch.setattr(kernel, "LARGEST_TILES", kernel.QuantizeTiles(4, 32, 4))
        monkeypatch.setattr(kernel, "PROGRAMS", 3)
        monkeypatch.setattr(kernel, "QUANTIZE_TILES", kernel.QuantizeTiles(32, 32, 4))
        return 48, 80
    return 144, 144


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("run", [public, triton])
@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_separate_steps(case, run, dtype, shape):
    """Gains from 1e-19 (squares are subnormal) to 1e6; h a slice of a wider tensor."""
    if run is triton and case.startswith("squared") and dtype not in PRECISIONS:
        pytest.skip("Triton's interpreter has no bfloat16 arithmetic")
    generator = torch.Generator().manual_seed(0)
    format, expected = CASES[case]
    tokens, channels = shape
    for gain in (1e-19, 3.7, 1e6):
        wide = gain * torch.randn(tokens, channels + 40, generator=generator)
        h = wide.to(DEVICE, dtype)[:, 8 : channels + 8]
        dy = torch.randn(tokens, channels, generator=generator).to(DEVICE, dtype)
        assert same(run(case.strip(), h, dy, format), expected(h, dy), format)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("run", [public, triton])
@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan, 1e-38, 3e38])
def test_degenerate_tensors_keep_the_rules(run, value, dtype):
    h = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    h[3, 5] = value
    for filled in (h, torch.full_like(h, value)):
        assert same(run("none", filled, filled, "e4m3"), filled, "e4m3")
        assert same(run("squared_relu", filled, filled, "e4m3"), F.relu(filled).square(), "e4m3")


def test_the_operator_is_well_registered():
    h = torch.randn(16, 32).to(DEVICE, PRECISIONS[-1])
    torch.library.opcheck(kernel.quantize_transpose, (h, h, "squared_relu_backward", "e5m2"),
                          test_utils=("test_schema", "test_faketensor"))
