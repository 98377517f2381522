"""Causal depthwise convolution along the sequence, then SiLU: Mamba-2's short filter over x, B and C."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y_t = SiLU(bias + sum_k weight_k x_{t - K + 1 + k}): the last tap meets the current token.

    Shifted multiply-adds with channels last: several times faster on a CPU than `F.conv1d`, which wants them first.
    Floor: one read of x and one write of y; 2 K operations an element.

    Args:
        x: (batch, sequence, channels), float32 or bfloat16.
        weight: (channels, K).
        bias: (channels,).
        initial_state: (batch, K - 1, channels), the inputs before the first token; zeros when None.

    Returns:
        y like x, and the last K - 1 inputs (batch, K - 1, channels): the initial state of what follows.
    """
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    return _CausalConv1d.apply(x, weight, bias, initial_state)


class _CausalConv1d(torch.autograd.Function):
    """Backward written out: autograd's own keeps and converts every partial sum, three times the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, channels = x.shape
        taps = weight.shape[1]
        precise = torch.promote_types(x.dtype, torch.float32)
        inputs = torch.empty(batch, taps - 1 + length, channels, dtype=precise, device=x.device)
        inputs[:, : taps - 1] = initial_state
        inputs[:, taps - 1 :] = x
        kernel = weight.to(precise).t().contiguous()
        z = torch.addcmul(bias.to(precise), inputs[:, :length], kernel[0])
        for tap in range(1, taps):
            z.addcmul_(inputs[:, tap : tap + length], kernel[tap])
        ctx.save_for_backward(inputs, kernel, z)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype, initial_state.dtype
        return F.silu(z).to(x.dtype), inputs[:, length:].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
        inputs, kernel, z = ctx.saved_tensors
        length, taps = z.shape[1], len(kernel)
        dz = torch.ops.aten.silu_backward(dy.to(z.dtype), z)
        dinputs = torch.zeros_like(inputs)
        dinputs[:, length:] = dlast
        dkernel, product = torch.empty_like(kernel), torch.empty_like(dz)
        for tap in range(taps):
            window = slice(tap, tap + length)
            dinputs[:, window].addcmul_(dz, kernel[tap])
            dkernel[tap] = torch.mul(dz, inputs[:, window], out=product).sum((0, 1))
        gradients = dinputs[:, taps - 1 :], dkernel.t(), dz.sum((0, 1)), dinputs[:, : taps - 1]
        return tuple(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
