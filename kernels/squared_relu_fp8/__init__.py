"""Squared ReLU, its gradient and plain tensors to FP8 and their transpose, with per-tensor current scaling.

Hopper's FP8 matrix products read both operands along the summed dimension, so the backward of a linear layer needs
the transpose of each; one read of a tile here writes both. Values and scales equal, to the bit, the activation in
bfloat16 followed by `kernels.fp8_quantize.quantize` (Transformer Engine's `Float8CurrentScaling`), up to the sign of
zeros. Nothing here is differentiable: an FP8 linear layer's backward calls it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.arguments import check_dtypes, check_shapes, warn_of_slowness
from kernels.fp8_quantize import Format, quantize

Operation = Literal["none", "squared_relu", "squared_relu_backward"]
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Quantized(NamedTuple):
    """A matrix in FP8 with one scale, as it is and transposed: FP8 products take both factors with the summed axis
    last."""

    values: Tensor              # (tokens, channels), FP8
    transposed: Tensor          # (channels, tokens), FP8, contiguous
    inverse_scale: Tensor       # (), float32: the tensor is about values * inverse_scale


def quantize_transpose(x: Tensor, format: Format) -> Quantized:
    """x (tokens, channels), bfloat16 or float32, rounded to "e4m3" or "e5m2".

    Floor: two reads of x (the largest absolute value comes first) and two writes of FP8: 6 bytes a bfloat16 element.
    """
    return _run("none", x, None, format)


def squared_relu_quantize(h: Tensor) -> Quantized:
    """relu(h)^2, rounded to h's dtype, then to E4M3; h (tokens, channels). Floor: 6 bytes a bfloat16 element."""
    return _run("squared_relu", h, None, "e4m3")


def squared_relu_backward_quantize(dy: Tensor, h: Tensor) -> Quantized:
    """2 relu(h) dy, the gradient of h, rounded to h's dtype, then to E5M2; both (tokens, channels).

    Floor: two reads of both and two writes of FP8: 10 bytes a bfloat16 element.
    """
    return _run("squared_relu_backward", h, dy, "e5m2")


def _run(operation: Operation, h: Tensor, dy: Tensor | None, format: Format) -> Quantized:
    check_shapes(operation, h=(h, "tokens channels"), dy=(dy, "tokens channels"))
    check_dtypes(operation, h=h, dy=dy)
    if h.is_cuda:
        from kernels.squared_relu_fp8 import triton as squared_relu_fp8_triton

        if squared_relu_fp8_triton.supports(h, dy):
            return Quantized(*squared_relu_fp8_triton.quantize_transpose(h, dy, operation, format))
        warn_of_slowness(f"quantize_transpose of {operation}", squared_relu_fp8_triton.TAKES, h.dtype,
                         f"{h.shape[1]} channels, side by side: {not h.stride(1) > 1}",
                         f"tokens a multiple of 16: {not h.shape[0] % 16}")
    values, inverse_scale = quantize(_apply(operation, h, dy), format)
    rounded = values.to(DTYPES[format])
    return Quantized(rounded, rounded.t().contiguous(), inverse_scale)


def _apply(operation: Operation, h: Tensor, dy: Tensor | None) -> Tensor:
    if operation == "none":
        return h
    positive = h.relu()
    return positive.square() if dy is None else (dy * positive).mul_(2)
