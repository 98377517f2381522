"""Squared ReLU, the activation of the feed-forward layers (paper Table 1), in its input's own number format.

`kernels.squared_relu_fp8` is the same fused with what FP8 products need.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import warn_of_slowness
from kernels.operation import once_differentiable


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, of any shape; differentiable once.

    On CUDA each pass goes over memory once. Floor: 4 bytes a bfloat16 element forward, 6 backward.
    """
    if x.is_cuda:
        from kernels.squared_relu import triton as squared_relu_triton

        if squared_relu_triton.supports(x):
            return cast(Tensor, squared_relu_triton.activate(x))
        warn_of_slowness("squared_relu", squared_relu_triton.TAKES, x.dtype, f"contiguous: {x.is_contiguous()}")
    return cast(Tensor, _SquaredReLU.apply(x))


class _SquaredReLU(torch.autograd.Function):
    """With its backward written out: autograd would keep and convert what lies between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (dy * positive).mul_(2)
