"""RMSNorm before every layer, and of a gated input by groups between Mamba-2's scan and its output projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import check_any, check_dtypes, check_multiple, check_shapes, warn_of_slowness
from kernels.operation import once_differentiable

_BLOCK = 65_536                  # elements; the float32 temporaries of one block stay in the second-level cache


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """RMSNorm(x * SiLU(gate)) over each of `groups` equal parts of the channels, then times weight; float32 inside.

    The gate comes first and the mean square is taken by group, as in Mamba-2's `norm_before_gate=False` (mamba_ssm,
    Megatron-LM, vLLM). Differentiable once. Floor: two reads and one write an element.

    Args:
        x, gate: (..., channels) float64, float32 or bfloat16.
        weight: (channels,).

    Returns:
        (..., channels) in x's dtype.

    Raises:
        ArgumentError: shapes, devices or the dtypes of x and gate disagree, or channels are no multiple of groups.
    """
    channels = x.shape[-1]
    axes = " ".join(map(str, x.shape))
    check_shapes("gated_rms_norm", x=(x, axes), gate=(gate, axes), weight=(weight, str(channels)))
    check_dtypes("gated_rms_norm", x=x, gate=gate)
    check_any("gated_rms_norm", x=x)
    check_multiple("gated_rms_norm", "channels", channels, "groups", groups)
    rows = x.reshape(-1, channels), gate.reshape(-1, channels)
    if x.is_cuda:
        from kernels.gated_norm import triton as gated_norm_triton

        if gated_norm_triton.supports(*rows):
            return gated_norm_triton.normalise(
                *gated_norm_triton.prepared(*rows, weight), groups, epsilon
            ).view(x.shape)
        warn_of_slowness("gated_rms_norm", gated_norm_triton.TAKES, x.dtype)
    y = _GatedNorm.apply(*rows, weight, groups, epsilon)
    return y.view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last axis, the norm before every layer; float32 inside. Differentiable once.

    Floor: 4 bytes a bfloat16 element forward, 6 backward.

    Args:
        x: (..., channels) float64, float32 or bfloat16.
        weight: (channels,).

    Raises:
        ArgumentError: shapes or devices disagree.
    """
    check_shapes("rms_norm", x=(x, " ".join(map(str, x.shape))), weight=(weight, str(x.shape[-1])))
    check_any("rms_norm", x=x)
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        from kernels.gated_norm import triton as gated_norm_triton

        if gated_norm_triton.supports(rows, None):
            return gated_norm_triton.normalise(
                *gated_norm_triton.prepared(rows, None, weight), 1, epsilon
            ).view(x.shape)
    if x.device.type == "cpu" and x.dtype is torch.bfloat16:
        y: Tensor = _Norm.apply(rows, weight, epsilon)
        return y.view(x.shape)
    return F.rms_norm(x, weight.shape, weight, epsilon)         # one kernel too: nothing to warn of


class _Norm(torch.autograd.Function):
    """On (rows, channels). On a CPU PyTorch composes the norm of elementwise operations, whose bfloat16 intermediates
    autograd keeps and converts one by one; this and `kernels.squared_relu` save a tenth of a training step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        normed = x.to(torch.float32, copy=True)
        size = normed.shape[-1]
        scale = torch.linalg.vector_norm(normed, dim=-1, keepdim=True).square_().div_(size).add_(epsilon).rsqrt_()
        normed.mul_(scale)
        ctx.save_for_backward(normed, scale, weight)
        return (normed * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        gradient = dy.to(torch.float32, copy=True)
        dweight = (gradient * normed).sum(0)
        gradient.mul_(weight)
        along = torch.linalg.vecdot(gradient, normed).div_(normed.shape[-1]).unsqueeze(-1)
        dx = gradient.addcmul_(normed, along, value=-1).mul_(scale)
        return dx.to(dy.dtype), dweight.to(weight.dtype), None


class _GatedNorm(torch.autograd.Function):
    """On (rows, channels), by blocks of rows; the backward computes the gated input again rather than keep it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        scale = weight.to(precise)
        y = torch.empty_like(x)
        inverse_rms = x.new_empty(x.shape[0], groups, 1, dtype=precise)
        for rows in _row_blocks(x):
            gated = F.silu(gate[rows].to(precise)).mul_(x[rows].to(precise)).unflatten(-1, (groups, -1))
            torch.rsqrt(gated.square().mean(-1, keepdim=True).add_(epsilon), out=inverse_rms[rows])
            y[rows] = gated.mul_(inverse_rms[rows]).flatten(-2).mul_(scale)
        ctx.save_for_backward(x, gate, weight, inverse_rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, inverse_rms = ctx.saved_tensors
        groups, precise = inverse_rms.shape[1], inverse_rms.dtype
        scale, dweight = weight.to(precise), weight.new_zeros(weight.shape, dtype=precise)
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        for rows in _row_blocks(x):
            xs, gates = x[rows].to(precise), gate[rows].to(precise)
            silu = F.silu(gates)
            normed = (xs * silu).unflatten(-1, (groups, -1)).mul_(inverse_rms[rows])
            dnormed = dy[rows].to(precise)
            dweight += (dnormed * normed.flatten(-2)).sum(0)
            dnormed = (dnormed * scale).view_as(normed)
            along = (dnormed * normed).mean(-1, keepdim=True)            # part of the gradient the norm cancels
            dgated = dnormed.addcmul_(normed, along, value=-1).mul_(inverse_rms[rows]).flatten(-2)
            dx[rows] = silu.mul_(dgated)
            dgate[rows] = torch.ops.aten.silu_backward(dgated.mul_(xs), gates)
        return dx, dgate, dweight.to(weight.dtype), None, None


def _row_blocks(x: Tensor) -> list[slice]:
    rows = max(1, _BLOCK // x.shape[1])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]
