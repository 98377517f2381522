"""`kernels.squared_relu` on CUDA: one pass forward, one backward; arithmetic in float32, rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv
from kernels.operation import operation

BLOCK, WARPS = 4096, 8


@triton.jit
def _forward_kernel(x, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, at < size).to(tl.float32)
    positive = tl.where(values < 0.0, 0.0, values)                     # keeps NaN
    tl.store(y + at, (positive * positive).to(y.dtype.element_ty), at < size)


@triton.jit
def _backward_kernel(x, dy, dx, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, at < size).to(tl.float32)
    positive = tl.where(values < 0.0, 0.0, values)
    gradient = tl.load(dy + at, at < size).to(tl.float32) * positive * 2.0
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), at < size)


TAKES = "floating-point numbers of at most 4 bytes, contiguous"


def supports(x: Tensor) -> bool:
    """Whether the kernels take x: on a GPU, as `TAKES` says."""
    return x.is_cuda and x.is_floating_point() and x.itemsize <= 4 and x.is_contiguous()


@operation("nemotron_h::squared_relu")
def activate(x: Tensor) -> Tensor:
    """relu(x)^2; x contiguous, any shape -> the same shape and dtype."""
    y = torch.empty_like(x)
    _forward_kernel[(cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return y


@activate.register_fake
def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@operation("nemotron_h::squared_relu_backward")
def activate_backward(dy: Tensor, x: Tensor) -> Tensor:
    """2 relu(x) dy; dy and x contiguous, of one shape and dtype, as the result."""
    dx = torch.empty_like(x)
    _backward_kernel[(cdiv(x.numel(), BLOCK),)](x, dy, dx, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return dx


@activate_backward.register_fake
def _gradient_like(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    return activate_backward(dy.contiguous(), *ctx.saved_tensors)


activate.register_autograd(_differentiate, setup_context=_keep)
