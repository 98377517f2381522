"""`kernels.squared_relu_fp8` on CUDA: one pass for the largest absolute value, one that rounds and transposes.

Both compute the activation from what they read. The first pass walks the rows down, the second up, so that what the
first read last is still in the second-level cache (60 MB on an H200: a tenth of 8192 x 21504 bfloat16). A tile's four
neighbouring rows are read apart and packed into 32-bit words, so that the transposition moves words, not bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.squared_relu_fp8 import DTYPES


class QuantizeTiles(NamedTuple):
    """Part of the matrix a program holds, and its warps."""

    rows: int
    columns: int
    warps: int


LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
INFINITY_BITS = tl.constexpr(0x7F800000)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _values(h, dy, inside, OPERATION: tl.constexpr):
    """The tensor to quantise at these addresses, in float32; the activation is taken in the input's type, as PyTorch
    rounds it, which on Hopper is arithmetic on pairs of bfloat16."""
    values = tl.load(h, inside, 0.0)
    if OPERATION != "none":
        positive = tl.where(values < 0.0, 0.0, values)                 # keeps NaN
        if OPERATION == "squared_relu":
            values = positive * positive
        else:
            values = tl.load(dy, inside, 0.0) * positive * 2.0
    return values.to(tl.float32)


@triton.jit
def _largest_kernel(
    h, dy, partial, h_stride, dy_stride, rows, channels,
    OPERATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """`partial` (programs,): float32 bits of the largest absolute value a program saw; those of NaN are the largest."""
    across = tl.cdiv(channels, COLUMNS)
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)):
        row = tile // across * ROWS + tl.arange(0, ROWS)
        c = tile % across * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        row = row.to(tl.int64)
        values = _values(h + row[:, None] * h_stride + c[None, :], dy + row[:, None] * dy_stride + c[None, :], inside,
                         OPERATION)
        largest = tl.maximum(largest, tl.abs(values).to(tl.int32, bitcast=True))
    tl.store(partial + tl.program_id(0), tl.max(tl.max(largest, 1), 0))


@triton.jit
def _quantize_kernel(
    h, dy, partial, out, transposed, inverse_scale, h_stride, dy_stride, rows, channels, programs,
    LARGEST: tl.constexpr, OPERATION: tl.constexpr, PROGRAMS: tl.constexpr, QUADS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """`transposed` (channels, rows / 4) int32: four rows' values in a word. Hopper's conversions saturate."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    across = tl.cdiv(channels, COLUMNS)
    quad = tile // across * QUADS + tl.arange(0, QUADS)
    c = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    inside = (quad < rows // 4)[:, None] & (c < channels)[None, :]
    bits = tl.max(tl.load(partial + tl.arange(0, PROGRAMS), tl.arange(0, PROGRAMS) < programs, 0), 0)
    amax = bits.to(tl.float32, bitcast=True)
    scale = tl.minimum(tl.div_rn(tl.full((), LARGEST, tl.float32), amax), LARGEST_FLOAT)
    scale = tl.where((bits > 0) & (bits < INFINITY_BITS), scale, 1.0)
    if tile == 0:
        tl.store(inverse_scale, tl.div_rn(tl.full((), 1.0, tl.float32), scale))
    words = tl.zeros((QUADS, COLUMNS), tl.uint32)
    for k in tl.static_range(4):
        row = (4 * quad + k).to(tl.int64)[:, None]
        values = _values(h + row * h_stride + c[None, :], dy + row * dy_stride + c[None, :], inside, OPERATION)
        tl.store(out + row * channels + c[None, :], (values * scale).to(out.dtype.element_ty), inside)
        # The same again, but not so that the compiler knows: where ptxas 12.8 packs four values for the store above, it
        # reads a wrong register (R1) for another use of the first two.
        fp8 = tl.where(inside, values * scale, 0.0).to(out.dtype.element_ty)
        words |= fp8.to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * k)
    at = c.to(tl.int64)[:, None] * (rows // 4) + quad[None, :]
    tl.store(transposed + at, tl.trans(words).to(tl.int32, bitcast=True),
             (c < channels)[:, None] & (quad < rows // 4)[None, :])


# Fastest on an H200 at 8B width.
LARGEST_TILES, PROGRAMS = QuantizeTiles(rows=8, columns=1024, warps=8), 528
QUANTIZE_TILES = QuantizeTiles(rows=128, columns=128, warps=4)


TAKES = "bfloat16 or float32, multiples of 16 tokens and channels, channels side by side, a GPU with FP8 (Ada, Hopper)"


def supports(h: Tensor, dy: Tensor | None) -> bool:
    """Whether the kernels take these: on a GPU, as `TAKES` says."""
    tensors = [h] if dy is None else [h, dy]
    return (h.is_cuda and torch.cuda.get_device_capability(h.device) >= (8, 9)
            and h.dim() == 2 and h.shape[0] % 16 == h.shape[1] % 16 == 0
            and all(t.stride(1) == 1 and t.dtype in (torch.bfloat16, torch.float32) for t in tensors)
            and all(t.dtype == h.dtype for t in tensors))


@torch.library.custom_op("nemotron_h::quantize_transpose", mutates_args=())
def quantize_transpose(h: Tensor, dy: Tensor | None, operation: str, format: str) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 values (tokens, channels), their transpose, the inverse scale (); arguments as `supports` says."""
    rows, channels = h.shape
    out = h.new_empty(rows, channels, dtype=DTYPES[format])
    transposed = h.new_empty(channels, rows, dtype=DTYPES[format])
    inverse_scale = h.new_empty((), dtype=torch.float32)
    gradient = h if dy is None else dy
    arguments = h, gradient
    strides = h.stride(0), gradient.stride(0)
    size = LARGEST_TILES
    programs = min(PROGRAMS, triton.cdiv(rows, size.rows) * triton.cdiv(channels, size.columns))
    partial = h.new_empty(programs, dtype=torch.int32)
    _largest_kernel[(programs,)](
        *arguments, partial, *strides, rows, channels,
        OPERATION=operation, ROWS=size.rows, COLUMNS=size.columns, num_warps=size.warps,
    )
    size = QUANTIZE_TILES
    _quantize_kernel[(triton.cdiv(rows, size.rows) * triton.cdiv(channels, size.columns),)](
        *arguments, partial, out, transposed.view(torch.int32), inverse_scale, *strides, rows, channels, programs,
        LARGEST=LARGEST[format], OPERATION=operation, PROGRAMS=triton.next_power_of_2(programs),
        QUADS=size.rows // 4, COLUMNS=size.columns, num_warps=size.warps,
    )
    return out, transposed, inverse_scale


@quantize_transpose.register_fake
def _like(h: Tensor, dy: Tensor | None, operation: str, format: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, channels = h.shape
    return (h.new_empty(rows, channels, dtype=DTYPES[format]), h.new_empty(channels, rows, dtype=DTYPES[format]),
            h.new_empty((), dtype=torch.float32))
