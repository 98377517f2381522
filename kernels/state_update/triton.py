"""One token of a Mamba-2 mixer on CUDA: `kernels.state_update`, states in place.

A program of the scan's update holds some rows of one head's state: each element is read, advanced, used and written
once. Bytes: two of the state's elements, all else is 1% of them at a state dimension of 128. The convolution's update
is a program for some channels of one sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import RowTiles, cdiv, power_of_2
from kernels.ssd.triton import softplus


@triton.jit
def _scan_kernel(
    state, x, dt, A, B, C, D, dt_bias, y, x_batch, x_head, dt_batch, B_batch, B_group, C_batch, C_group, heads, ratio,
    P: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) // heads             # all in one axis: others end at 65,535
    h, part = tl.program_id(0) % heads, row % tl.cdiv(P, ROWS)
    b = (row // tl.cdiv(P, ROWS)).to(tl.int64)
    p = part * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, COLUMNS)
    inside = (p < P)[:, None] & (n < N)[None, :]
    tile = state + (b * heads + h) * (P * N) + p[:, None] * N + n[None, :]
    before = tl.load(tile, inside, 0.0, eviction_policy="evict_first").to(tl.float32)
    raw = tl.load(dt + b * dt_batch + h).to(tl.float32) + tl.load(dt_bias + h)
    step = softplus(raw)
    decay = tl.exp(step * tl.load(A + h))
    Bs = tl.load(B + b * B_batch + h // ratio * B_group + n, n < N, 0.0).to(tl.float32)
    Cs = tl.load(C + b * C_batch + h // ratio * C_group + n, n < N, 0.0).to(tl.float32)
    xs = tl.load(x + b * x_batch + h * x_head + p, p < P, 0.0).to(tl.float32)
    after = before * decay + (xs * step)[:, None] * Bs[None, :]
    tl.store(tile, after.to(state.dtype.element_ty), inside, eviction_policy="evict_first")
    ys = tl.sum(after * Cs[None, :], 1) + tl.load(D + h) * xs
    tl.store(y + (b * heads + h) * P + p, ys.to(y.dtype.element_ty), p < P)


@triton.jit
def _conv_kernel(
    state, x, weight, bias, y, state_batch, state_tap, x_batch, channels, K: tl.constexpr, BLOCK: tl.constexpr,
):
    across = tl.cdiv(channels, BLOCK)
    c = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(0) // across).to(tl.int64)
    inside = c < channels
    new = tl.load(x + b * x_batch + c, inside, 0.0)
    window = state + b * state_batch + c
    total = tl.load(bias + c, inside, 0.0).to(tl.float32)
    total += tl.load(weight + c * K + K - 1, inside, 0.0).to(tl.float32) * new.to(tl.float32)
    for k in tl.static_range(K - 1):
        value = tl.load(window + k * state_tap, inside, 0.0)
        total += tl.load(weight + c * K + k, inside, 0.0).to(tl.float32) * value.to(tl.float32)
        if k > 0:
            tl.store(window + (k - 1) * state_tap, value, inside)
    tl.store(window + (K - 2) * state_tap, new.to(state.dtype.element_ty), inside)
    tl.store(y + b * channels + c, (total * tl.sigmoid(total)).to(y.dtype.element_ty), inside)


# Fastest on an H200 at 8B width.
SCAN = RowTiles(bytes=4096, warps=2)              # of a head's state in a program, whole rows
CONV_CHANNELS = 128         # in a program of one warp


TAKES = "at most 4 bytes an element; the convolution's, two taps or more and a state whose channels lie side by side"


def supports_scan(state: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether the kernel takes these: on a GPU, as `TAKES` says."""
    return state.is_cuda and all(tensor.itemsize <= 4 for tensor in (state, x, dt, B, C))


def prepared_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> tuple[Tensor, ...]:
    """The arguments of `advance_scan` after the state, copied where they do not lie as the kernel reads them."""
    x, dt, B, C = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, dt, B, C))
    A, D, dt_bias = (tensor.float().contiguous() for tensor in (A, D, dt_bias))
    return x, dt, A, B, C, D, dt_bias


def supports_conv(state: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these: on a GPU, as `TAKES` says."""
    return x.is_cuda and state.itemsize <= 4 and x.itemsize <= 4 and state.stride(2) == 1 and weight.shape[1] > 1


@torch.library.custom_op("nemotron_h::ssd_state_update", mutates_args=("state",))
def advance_scan(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """y (batch, heads, head_dim), contiguous; shapes as in `kernels.state_update`."""
    batch, heads, head_dim, state_dim = state.shape
    y = x.new_empty(batch, heads, head_dim)
    columns = power_of_2(state_dim)
    rows = min(max(1, SCAN.bytes // (columns * state.itemsize)), power_of_2(head_dim))
    _scan_kernel[(heads * cdiv(head_dim, rows) * batch,)](
        state, x, dt, A, B, C, D, dt_bias, y, x.stride(0), x.stride(1), dt.stride(0), B.stride(0), B.stride(1),
        C.stride(0), C.stride(1), heads, heads // B.shape[1],
        P=head_dim, N=state_dim, ROWS=rows, COLUMNS=columns, num_warps=SCAN.warps,
    )
    return y


@advance_scan.register_fake
def _scan_like(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("nemotron_h::conv_state_update", mutates_args=("state",))
def advance_conv(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y (batch, channels), contiguous; shapes as in `kernels.state_update`."""
    batch, channels = x.shape
    y = x.new_empty(batch, channels)
    _conv_kernel[(cdiv(channels, CONV_CHANNELS) * batch,)](
        state, x, weight, bias, y, state.stride(0), state.stride(1), x.stride(0), channels,
        K=weight.shape[1], BLOCK=CONV_CHANNELS, num_warps=1,
    )
    return y


@advance_conv.register_fake
def _conv_like(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)
