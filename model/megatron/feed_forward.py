"""A feed-forward layer in FP8 as one operation: fc1, squared ReLU, fc2 and their backward.

The numbers are those of Transformer Engine's linear layers under `Float8CurrentScaling` with the activation in BF16
between them: the same values quantised to the same formats, the same products, with Transformer Engine's choice of
accumulation. What it saves is passes over memory: the activation and its gradient are quantised as they are computed
(`kernels.squared_relu_fp8`), and neither exists in BF16.

Kept for the backward, bytes a token: hidden + 3 ffn (in BF16: 2 hidden + 4 ffn).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from kernels.operation import once_differentiable
from kernels.squared_relu_fp8 import (
    Quantized,
    quantize_transpose,
    squared_relu_backward_quantize,
    squared_relu_quantize,
)
from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core.transformer.mlp import MLP


class FusedMLP(MLP):
    """Megatron's MLP on one tensor-parallel process, in FP8 where `quantized` is set.

    Attributes:
        quantized: whether this layer computes in FP8; else it is its parent.
        is_first_microbatch: Megatron sets it when weights have changed: they are quantised once a step.
        gradient_accumulation_fusion: whether weights' gradients go to DDP's buffers (`accumulate_in_products`).
    """

    quantized = gradient_accumulation_fusion = False

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.is_first_microbatch = True
        self._weights: tuple[Quantized, Quantized] | None = None

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """hidden_states (sequence, batch, hidden) -> the same shape, and no bias."""
        if not self.quantized:
            return cast(tuple[Tensor, Tensor | None], super().forward(hidden_states, *arguments, **options))
        up, down = self.linear_fc1.weight, self.linear_fc2.weight
        if self._weights is None or self.is_first_microbatch:
            self._weights = quantize_transpose(up.detach(), "e4m3"), quantize_transpose(down.detach(), "e4m3")
        self.is_first_microbatch = False
        return cast(Tensor, FP8FeedForward.apply(
            hidden_states, up, down, *self._weights, self.gradient_accumulation_fusion
        )), None


class FP8FeedForward(torch.autograd.Function):
    """relu(x up^T)^2 down^T; every factor of the six products in FP8, scaled by its own current maximum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, up8: Quantized, down8: Quantized,
                accumulate: bool = False) -> Tensor:
        """x (..., hidden), up (ffn, hidden), down (hidden, ffn), bfloat16; up8, down8; whether gradients of up and
        down are added to their `main_grad` -> (..., hidden)."""
        x8, x8_transposed, x_scale = quantize_transpose(x.flatten(0, -2), "e4m3")
        h = _product(x8, up8.values, x_scale, up8.inverse_scale, fast=True)
        a8, a8_transposed, a_scale = squared_relu_quantize(h)
        y = _product(a8, down8.values, a_scale, down8.inverse_scale, fast=True)
        ctx.weights = (up, down) if accumulate else (None, None)
        ctx.save_for_backward(h, x8_transposed, x_scale, a8_transposed, a_scale, *up8[1:], *down8[1:])
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy (..., hidden) -> gradients of x, up and down in bfloat16, the latter without values where they are added
        to `main_grad`."""
        up, down = ctx.weights
        h, x8, x_scale, a8, a_scale, up8, up_scale, down8, down_scale = ctx.saved_tensors        # FP8 ones transposed
        dy8, dy8_transposed, dy_scale = quantize_transpose(dy.flatten(0, -2), "e5m2")
        ddown = _weight_gradient(dy8_transposed, a8, dy_scale, a_scale, down)
        da = _product(dy8, down8, dy_scale, down_scale)
        dh8, dh8_transposed, dh_scale = squared_relu_backward_quantize(da, h)
        dup = _weight_gradient(dh8_transposed, x8, dh_scale, x_scale, up)
        dx = _product(dh8, up8, dh_scale, up_scale)
        return dx.unflatten(0, dy.shape[:-1]), dup, ddown, None, None, None


def _product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, fast: bool = False) -> Tensor:
    """a b^T times both inverse scales (), in bfloat16; a (m, k) and b (n, k) FP8, contiguous.

    `fast` leaves the whole sum to the tensor cores, which Transformer Engine does in the forward but not backward.
    """
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)


def _weight_gradient(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, weight: Tensor | None) -> Tensor:
    """The product of `_product`, or where `weight` is given no values in its place: it is added to its `main_grad`, by
    Transformer Engine, as PyTorch's FP8 product cannot add."""
    if weight is None:
        return _product(a, b, a_scale, b_scale)
    from transformer_engine.pytorch import Float8Tensor
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    sums: Tensor = weight.main_grad  # type: ignore[attr-defined]       # Megatron's DDP made it
    b8, a8 = (Float8Tensor(values.shape, torch.bfloat16, data=values.view(torch.uint8), fp8_scale_inv=scale.view(1),
                           fp8_dtype=TE_DType[values.dtype]) for values, scale in ((b, b_scale), (a, a_scale)))
    general_gemm(b8, a8, out_dtype=sums.dtype, out=sums, accumulate=True, use_split_accumulator=True)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]     # Megatron's hook then adds nothing
    return torch.empty_like(weight)
