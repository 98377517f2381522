"""Linear layers of FP8 weights for inference: half the bytes of BF16 to read, twice the rate of its tensor cores.

Weights are rounded to E4M3 once, with a scale for every output; the input as it comes, with a scale for every token, so
that no token's values depend on its neighbours in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import check_shapes, warn_of_slowness
from kernels.operation import outside_autocast

LARGEST = torch.finfo(torch.float8_e4m3fn).max
LEAST_SCALE = torch.finfo(torch.float32).tiny       # a smaller one may be 0, and 0 / 0 is no number


class RowScaled(NamedTuple):
    """A matrix in FP8 with a scale a row."""

    values: Tensor              # (rows, columns) float8_e4m3fn
    scales: Tensor              # (rows, 1) float32: the tensor is about values * scales


def quantize_rows(x: Tensor) -> RowScaled:
    """x (rows, columns) rounded to E4M3, each row scaled so that its largest value is the format's; a row that is not
    finite has a scale that is not.

    Floor: one read of x and one write of an FP8 value an element.
    """
    if x.is_cuda:
        from kernels.fp8_linear import triton as fp8_linear_triton

        if fp8_linear_triton.supports(x):
            return RowScaled(*fp8_linear_triton.quantize_rows(x))
        warn_of_slowness("quantize_rows", fp8_linear_triton.TAKES, x.dtype,
                         f"columns side by side: {not x.stride(1) > 1}")
    largest = x.abs().amax(1, keepdim=True).float()
    scales = torch.where(largest == 0, 1.0, (largest / LARGEST).clamp_min(LEAST_SCALE))
    values = (x.float() / scales).clamp_(-LARGEST, LARGEST)
    return RowScaled(values.to(torch.float8_e4m3fn), scales)


@outside_autocast
def fp8_linear(x: Tensor, weight: RowScaled) -> Tensor:
    """x W^T of the rounded x and W; products are summed in float32.

    On a GPU by FP8 tensor cores; elsewhere the same values are multiplied in float32.

    Args:
        x: (..., inputs) bfloat16 or float32.
        weight: rows of (outputs, inputs).

    Returns:
        (..., outputs) in x's dtype.

    Raises:
        ArgumentError: shapes or devices disagree.
    """
    check_shapes("fp8_linear", x=(x, " ".join([*map(str, x.shape[:-1]), "inputs"])),
                 weight=(weight.values, "outputs inputs"), scales=(weight.scales, "outputs 1"))
    rows = quantize_rows(x.reshape(-1, x.shape[-1]))
    if x.is_cuda:
        y = torch._scaled_mm(rows.values, weight.values.t(), scale_a=rows.scales, scale_b=weight.scales.t(),
                             out_dtype=torch.bfloat16, use_fast_accum=True)
    else:
        y = F.linear(rows.values.float(), weight.values.float()).mul_(rows.scales).mul_(weight.scales.t())
    return y.to(x.dtype).view(*x.shape[:-1], -1)
