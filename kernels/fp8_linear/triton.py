"""`kernels.fp8_linear.quantize_rows` on CUDA: a program a row, which stays in registers between its two uses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8_linear import LARGEST, LEAST_SCALE

WIDTH = 1024                # elements a warp takes, up to 16 warps


@triton.jit
def _quantize_kernel(x, values, scales, row_stride, columns, LARGEST: tl.constexpr, LEAST: tl.constexpr,
                     BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    xs = tl.load(x + row * row_stride + column, column < columns, 0.0).to(tl.float32)
    # by its bits, of which those of NaN are the largest; of the numbers Triton's maximum passes over NaN
    largest = tl.max(tl.abs(xs).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    scale = tl.where(largest == 0, 1.0, tl.maximum(largest / LARGEST, LEAST, propagate_nan=tl.PropagateNan.ALL))
    scaled = tl.minimum(tl.maximum(xs / scale, -LARGEST), LARGEST)
    tl.store(values + row * columns + column, scaled.to(values.dtype.element_ty), column < columns)
    tl.store(scales + row, scale)


TAKES = "at most 4 bytes an element, columns side by side"


def supports(x: Tensor) -> bool:
    """Whether the kernel takes these: on a GPU, as `TAKES` says."""
    return x.is_cuda and x.itemsize <= 4 and x.stride(1) == 1


@torch.library.custom_op("nemotron_h::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales; shapes as in `kernels.fp8_linear`."""
    rows, columns = x.shape
    values = x.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(rows, 1, dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    _quantize_kernel[(rows,)](x, values, scales, x.stride(0), columns, LARGEST=LARGEST, LEAST=LEAST_SCALE, BLOCK=block,
                              num_warps=min(16, max(1, block // WIDTH)))
    return values, scales


@quantize_rows.register_fake
def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)
