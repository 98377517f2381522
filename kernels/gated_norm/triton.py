"""The gated grouped RMSNorm on CUDA: `kernels.gated_norm` for bfloat16 and float16, forward and backward; and, where
the gate is None, the plain RMSNorm.

A program holds some rows of one group at a time; the backward recomputes the norm and adds up the weight's gradient
over the rows it walks. Bytes an element: forward 6 (x, gate, y), backward 10 (x, gate, dy, dx, dgate); without a gate
4 and 6.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, power_of_2
from kernels.operation import operation


class NormTiles(NamedTuple):
    """How a norm's kernel is launched."""

    elements: int           # at a time: as many whole rows of a group, or one that is longer
    warps: int              # for as many
    programs: int = 0       # of all groups; 0: one for every tile of rows


@triton.jit
def _forward_kernel(
    x, gate, weight, y, x_stride, gate_stride, rows, channels, epsilon,
    HAS_GATE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = tl.arange(0, BLOCK)
    c = tl.program_id(1) * SIZE + within
    inside = (row < rows)[:, None] & (within < SIZE)[None, :]
    gated = tl.load(x + row[:, None] * x_stride + c[None, :], inside, 0.0).to(tl.float32)
    if HAS_GATE:
        gates = tl.load(gate + row[:, None] * gate_stride + c[None, :], inside, 0.0).to(tl.float32)
        gated *= gates * tl.sigmoid(gates)
    inverse_rms = tl.rsqrt(tl.sum(gated * gated, 1) / SIZE + epsilon)
    scale = tl.load(weight + c, within < SIZE, 0.0).to(tl.float32)
    tl.store(y + row[:, None] * channels + c[None, :],
             (gated * inverse_rms[:, None] * scale[None, :]).to(y.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    x, gate, weight, dy, dx, dgate, partial, x_stride, gate_stride, dy_stride, dgate_stride, rows, channels, epsilon,
    HAS_GATE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):
    """`partial` (programs, channels): the weight's gradient over each program's rows."""
    within = tl.arange(0, BLOCK)
    c = tl.program_id(1) * SIZE + within
    there = within < SIZE
    scale = tl.load(weight + c, there, 0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    # The next rows are on their way while these are computed.
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & there[None, :]
        gated = tl.load(x + row[:, None] * x_stride + c[None, :], inside, 0.0).to(tl.float32)
        dys = tl.load(dy + row[:, None] * dy_stride + c[None, :], inside, 0.0).to(tl.float32)
        if HAS_GATE:
            xs = gated
            gates = tl.load(gate + row[:, None] * gate_stride + c[None, :], inside, 0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gates)
            silu = gates * sigmoid
            gated *= silu
        inverse_rms = tl.rsqrt(tl.sum(gated * gated, 1) / SIZE + epsilon)[:, None]
        normed = gated * inverse_rms
        dweight += tl.sum(dys * normed, 0)
        dnormed = dys * scale[None, :]
        along = tl.sum(dnormed * normed, 1)[:, None] / SIZE         # part of the gradient the norm cancels
        dxs = (dnormed - normed * along) * inverse_rms
        if HAS_GATE:
            dgates = dxs * xs * sigmoid * (1.0 + gates * (1.0 - sigmoid))
            tl.store(dgate + row[:, None] * dgate_stride + c[None, :], dgates.to(dgate.dtype.element_ty), inside)
            dxs *= silu
        tl.store(dx + row[:, None] * channels + c[None, :], dxs.to(dx.dtype.element_ty), inside)
    tl.store(partial + tl.program_id(0) * channels + c, dweight, there)


# Fastest on an H200, or nearly, for groups of 256 (with a gate) to rows of 4,096 (without).
FORWARD = NormTiles(elements=1024, warps=4)
BACKWARD = NormTiles(elements=512, warps=1, programs=1056)
WIDEST_AHEAD = 8192         # of which rows that are on their way fit in shared memory


TAKES = "bfloat16 or float16"


def supports(x: Tensor, gate: Tensor | None) -> bool:
    """Whether the kernels take (rows, channels) inputs like these: on a GPU, as `TAKES` says."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def prepared(x: Tensor, gate: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The tensors of `normalise`, copied where they do not lie as the kernels read them."""
    gate = gate if gate is None or gate.stride(1) == 1 else gate.contiguous()
    return x if x.stride(1) == 1 else x.contiguous(), gate, weight.contiguous()


def run_forward(
    x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, epsilon: float, y: Tensor
) -> None:
    """Write y (rows, channels), contiguous."""
    rows, channels = x.shape
    size = channels // groups
    block = power_of_2(size)
    at_once, warps = _fitted(FORWARD, block)
    _forward_kernel[(cdiv(rows, at_once), groups)](
        x, x if gate is None else gate, weight, y, x.stride(0), 0 if gate is None else gate.stride(0), rows, channels,
        epsilon, HAS_GATE=gate is not None, SIZE=size, BLOCK=block, ROWS=at_once, num_warps=warps,
    )


def _fitted(tiles: NormTiles, block: int) -> tuple[int, int]:
    """Rows of `block` elements at a time, and warps."""
    rows = max(1, tiles.elements // block)
    return rows, min(16, max(1, tiles.warps * rows * block // tiles.elements))


@operation("nemotron_h::gated_rms_norm")
def normalise(x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """y (rows, channels), contiguous."""
    y = x.new_empty(x.shape)
    run_forward(x, gate, weight, groups, epsilon, y)
    return y


@normalise.register_fake
def _like(x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


def run_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, epsilon: float, dx: Tensor,
    dgate: Tensor | None,
) -> Tensor:
    """Write dx, contiguous, and dgate, of any row stride. Returns the gradient of weight (float32)."""
    rows, channels = x.shape
    size = channels // groups
    block = power_of_2(size)
    at_once, warps = _fitted(BACKWARD, block)
    # With a gate and several warps half as many are faster: 178 us for 219 at 8B width (H200); without one slower.
    programs = BACKWARD.programs // (1 if gate is None else min(warps, 2))
    programs = min(max(1, programs // groups), cdiv(rows, at_once))
    partial = x.new_empty(programs, channels, dtype=torch.float32)
    strides = (0, dy.stride(0), 0) if gate is None or dgate is None else (gate.stride(0), dy.stride(0), dgate.stride(0))
    _backward_kernel[(programs, groups)](
        x, x if gate is None else gate, weight, dy, dx, dx if dgate is None else dgate, partial, x.stride(0), *strides,
        rows, channels, epsilon, HAS_GATE=gate is not None, SIZE=size, BLOCK=block, ROWS=at_once,
        STAGES=3 if block <= WIDEST_AHEAD else 1, num_warps=warps,
    )
    return partial.sum(0)


@operation("nemotron_h::gated_rms_norm_backward")
def normalise_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate (empty without one) and weight (float32)."""
    dx, dgate = x.new_empty(x.shape), x.new_empty(0 if gate is None else gate.shape)
    dweight = run_backward(dy, x, gate, weight, groups, epsilon, dx, None if gate is None else dgate)
    return dx, dgate, dweight


@normalise_backward.register_fake
def _gradients_like(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    dgate = x.new_empty(0 if gate is None else gate.shape)
    return x.new_empty(x.shape), dgate, x.new_empty(weight.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.groups, ctx.epsilon = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, weight = ctx.saved_tensors
    dx, dgate, dweight = normalise_backward(dy.contiguous(), x, gate, weight, ctx.groups, ctx.epsilon)
    return dx, None if gate is None else dgate, dweight.to(weight.dtype), None, None


normalise.register_autograd(_differentiate, setup_context=_keep)
