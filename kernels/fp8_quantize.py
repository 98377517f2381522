"""FP8 quantisation with per-tensor current scaling, exact to the bit, without FP8 hardware.

The paper's recipe (section 2.3) is Transformer Engine's `Float8CurrentScaling`: scale = FP8 maximum / largest absolute
value of this very tensor, E4M3 forward and E5M2 for gradients. Every FP8 value is exact in bfloat16, so a bfloat16 GEMM
over quantised values, accumulated in float32 and multiplied by both inverse scales, is what FP8 tensor cores compute.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Format = Literal["e4m3", "e5m2"]


class _FP8Format(NamedTuple):
    largest: float
    mantissa_bits: int
    least_exponent: int          # of a normal number


_FORMATS: dict[str, _FP8Format] = {"e4m3": _FP8Format(448.0, 3, -6), "e5m2": _FP8Format(57344.0, 2, -14)}
_FLOAT32_MANTISSA_BITS = 23
_EXPONENT_FIELD = 0x7F800000
_BLOCK = 65_536                  # elements; the float32 temporaries of one block stay in the second-level cache


def quantize(x: Tensor, format: Format, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round x * scale to FP8, ties to even, saturating.

    Floor: two reads (the largest absolute value comes first) and one write.

    Args:
        x: bfloat16 or float32, any shape.
        format: "e4m3" or "e5m2".
        scale: (), float32; x's own where it is None.

    Returns:
        The FP8 values as bfloat16, shaped like x, and the inverse scale (), float32: x is about values * inverse scale.
    """
    fp8 = _FORMATS[format]
    saturate = True
    if scale is None:
        amax = largest_magnitude(x)
        scale = scale_of(amax, format)
        saturate = not bool(amax.isfinite())     # a finite tensor times its own scale is within the format already
    values = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    flat, out = x.contiguous().view(-1), values.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = slice(start, start + _BLOCK)
        scaled = flat[block].to(torch.float32, copy=True).mul_(scale)
        if saturate:
            scaled.clamp_(-fp8.largest, fp8.largest)
        out[block] = _round(scaled, fp8)
    return values, scale.reciprocal()


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest absolute value, (), float32."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def scale_of(amax: Tensor, format: Format) -> Tensor:
    """Transformer Engine's `compute_scale_from_amax`: 1 where the largest value is zero, infinite or not a number, and
    the largest float32 where the quotient would overflow. PyTorch's number / tensor is a reciprocal and a product, with
    two roundings; the division of two tensors has one."""
    scale = (torch.full_like(amax, _FORMATS[format].largest) / amax).clamp_max(torch.finfo(torch.float32).max)
    return torch.where(amax.isfinite() & (amax > 0), scale, torch.ones_like(scale))


def _round(v: Tensor, fp8: _FP8Format) -> Tensor:
    """Round float32 `v` (overwritten), within the format's range, to the nearest FP8 value, ties to even.

    Adding and subtracting 1.5 * 2^k makes float32's own rounding drop every bit below 2^(k - 23); k is chosen by the
    exponent of each value, held at the least normal exponent so that subnormals share one quantum. A negative value
    that rounds to zero loses its sign.
    """
    shift = _FLOAT32_MANTISSA_BITS - fp8.mantissa_bits
    bits = v.view(torch.int32).bitwise_and(_EXPONENT_FIELD)
    bits += (shift << _FLOAT32_MANTISSA_BITS) | (1 << (_FLOAT32_MANTISSA_BITS - 1))       # times 1.5 * 2^shift
    magic = bits.view(torch.float32).clamp_min_(1.5 * math.ldexp(1.0, fp8.least_exponent + shift))
    return v.add_(magic).sub_(magic)
