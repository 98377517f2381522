"""The SSD chunk scan on CUDA: `kernels.ssd.chunk_scan` for bfloat16 and float16 inputs, forward and backward.

Only what is sequential is done in sequence. A first kernel a head walks the chunks and hands the state on, one product
a chunk; it writes the state before each chunk in the inputs' type. A second one takes a chunk and a group, with C B^T
formed once for all heads of the group, and needs no order. The backward is the same, mirrored: a walk from the end for
the gradient of the states, then everything else a chunk and a group at a time, so that the gradients of B and C are
summed over the group's heads in registers and no atomics are needed. What needs no order reads its tiles by TMA: no
registers hold them or their addresses on the way, which saves 4 to 13 % of the time. The walks are slower by it. On
Hopper all but what a token's step and decay need is `kernels.ssd.hopper`'s, for sizes it takes.

A gradient of a decay sums what the decay lets pass. Its largest part, a whole chunk's, is taken in the walk from the
end, where the states' gradient is still float32: rounding both factors would lose what mamba_ssm keeps.

Documents: with their numbers a token sees only its own. A state, and what becomes of it, is zero across a boundary.

Bytes a token, h heads of p, g groups of n, chunks of q (elements of 2 bytes): forward 3 h p + 2 h p n / q + 2 g n,
backward 8 h p + 5 h p n / q + 6 g n. Products of an accumulator's transpose, which Triton 3.6 miscompiles on Hopper
(flash-linear-attention issue 640), do not occur: transposed factors are computed as such or read back transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import cdiv, grid, program
from kernels.operation import operation
from kernels.ssd import KERNEL_SIZES, LARGEST_STATE, hopper

LOG2_E = tl.constexpr(1.4426950408889634)


class ScanTiles(NamedTuple):
    """Launch parameters of one kernel."""

    warps: int
    stages: int
    size: int = 0           # elements of a state a program of a walk holds; heads or rows of a chunk one of the others


@triton.jit
def _document(documents, b, t, length):
    """Document of token t; of the first and the last one before and after the sequence."""
    return tl.load(documents + b.to(tl.int64) * length + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit
def _rows(tensor, b, c, Q: tl.constexpr, batch_stride, time_stride):
    """Where chunk c of sequence b begins: in 64 bits, so that offsets within a chunk may have 32. Those come in
    brackets: added one by one each would be held in 64."""
    return tensor + b.to(tl.int64) * batch_stride + c.to(tl.int64) * Q * time_stride


@triton.jit
def _columns(inside, column, SIZE: tl.constexpr, TILE: tl.constexpr):
    """`inside` (rows, 1), and where a tile is wider than the tensor, its columns too."""
    if TILE > SIZE:
        inside = inside & (column < SIZE)[None, :]
    return inside


@triton.jit
def _load_state(state, n, p, N: tl.constexpr, N_TILE: tl.constexpr, P: tl.constexpr, P_TILE: tl.constexpr):
    """A tile (n, p) of a state, zeros beyond its sizes."""
    at = state + (n[:, None] * P + p[None, :])
    if (N_TILE > N) or (P_TILE > P):
        values = tl.load(at, (n < N)[:, None] & (p < P)[None, :], 0.0)
    else:
        values = tl.load(at)
    return values


@triton.jit
def _store_state(state, values, n, p, N: tl.constexpr, N_TILE: tl.constexpr, P: tl.constexpr, P_TILE: tl.constexpr):
    at = state + (n[:, None] * P + p[None, :])
    if (N_TILE > N) or (P_TILE > P):
        tl.store(at, values.to(state.dtype.element_ty), (n < N)[:, None] & (p < P)[None, :])
    else:
        tl.store(at, values.to(state.dtype.element_ty))


@triton.jit
def softplus(raw):
    """log(1 + exp(raw)), to float32's precision for very negative ones too."""
    small = tl.exp(-tl.abs(raw))
    series = small * (1.0 - small * (1.0 / 2 - small * (1.0 / 3 - small * (1.0 / 4))))
    return tl.maximum(raw, 0.0) + tl.where(small < 0.03, series, tl.log(1.0 + small))


@triton.jit
def _decays_kernel(
    dt, dt_bias, A, step, decay, batch_stride, time_stride, length, heads, chunks, padded,
    REVERSED: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr,
):
    """step = softplus(dt + dt_bias) and the running sum of step A log2(e) in each chunk: (batch, heads, padded)."""
    b, h_block, c = program(REVERSED)
    q = tl.arange(0, Q)
    t = c * Q + q
    h = h_block * BLOCK + tl.arange(0, BLOCK)
    inside = (t < length)[:, None] & (h < heads)[None, :]
    dt = _rows(dt, b, c, Q, batch_stride, time_stride)
    raw = tl.load(dt + q[:, None] * time_stride + h[None, :], inside, 0.0).to(tl.float32)
    raw += tl.load(dt_bias + h, h < heads, 0.0)[None, :]
    steps = tl.where(inside, softplus(raw), 0.0)
    rate = tl.load(A + h, h < heads, 0.0) * LOG2_E
    out = (b * heads + h[None, :]).to(tl.int64) * padded + t[:, None]
    tl.store(step + out, steps, (h < heads)[None, :])
    tl.store(decay + out, tl.cumsum(steps * rate[None, :], 0), (h < heads)[None, :])


@triton.jit
def _state_walk_kernel(
    x, B, step, decay, initial, documents, states, final, x_batch, x_time, B_batch, B_time,
    length, heads, ratio, chunks, padded, HAS_INITIAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, N_TILE: tl.constexpr, P: tl.constexpr, P_TILE: tl.constexpr, ROWS: tl.constexpr,
):
    """States (batch, chunks, heads, n, p) before each chunk, in x's type, and the last one in float32."""
    b, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, p, q = part * ROWS + tl.arange(0, ROWS), tl.arange(0, P_TILE), tl.arange(0, Q)
    if HAS_INITIAL:
        state = _load_state(initial + (b * heads + h).to(tl.int64) * (N * P), n, p, N, N_TILE, P, P_TILE)
    else:
        state = tl.zeros((ROWS, P_TILE), tl.float32)
    B += b.to(tl.int64) * B_batch + (h // ratio) * N
    x += b.to(tl.int64) * x_batch + h * P
    row = (b * heads + h).to(tl.int64) * padded
    out = states + (b * chunks * heads + h).to(tl.int64) * (N * P)
    for c in range(chunks):
        t = c * Q + q
        inside = (t < length)[:, None]
        _store_state(out, state, n, p, N, N_TILE, P, P_TILE)
        out += heads * (N * P)
        end = tl.load(decay + row + c * Q + Q - 1)
        weight = tl.exp2(end - tl.load(decay + row + t)) * tl.load(step + row + t)
        kept = tl.exp2(end)
        if HAS_DOCUMENTS:
            last = _document(documents, b, c * Q + Q - 1, length)
            weight = tl.where(_document(documents, b, t, length) == last, weight, 0.0)
            kept = tl.where(_document(documents, b, c * Q - 1, length) == last, kept, 0.0)
        start = tl.cast(c, tl.int64) * Q
        xs = tl.load(x + start * x_time + (q[:, None] * x_time + p[None, :]), _columns(inside, p, P, P_TILE), 0.0)
        Bs = tl.load(B + start * B_time + (q[:, None] * B_time + n[None, :]), _columns(inside, n, N, N_TILE), 0.0)
        state = tl.dot(tl.trans(Bs), (xs * weight[:, None]).to(Bs.dtype), state * kept)
    _store_state(final + (b * heads + h).to(tl.int64) * (N * P), state, n, p, N, N_TILE, P, P_TILE)


@triton.jit
def _outputs_kernel(
    x, B, C, D, step, decay, documents, states, y, length, heads, groups, chunks, padded,
    HAS_DOCUMENTS: tl.constexpr, REVERSED: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, N_TILE: tl.constexpr, P_TILE: tl.constexpr,
):
    """y = (C B^T * decay) (step x) + decay from the start * C state + D x, a chunk and a group."""
    b, g, c = program(REVERSED)
    first, q = c * Q, tl.arange(0, Q)
    t = first + q
    Bs, Cs = B.load([b, first, g, 0]).reshape(Q, N_TILE), C.load([b, first, g, 0]).reshape(Q, N_TILE)
    seen = q[:, None] >= q[None, :]
    if HAS_DOCUMENTS:
        own = _document(documents, b, t, length)
        seen = seen & (own[:, None] == own[None, :])
        goes_on = own == _document(documents, b, first - 1, length)
    scores = tl.where(seen, tl.dot(Cs, tl.trans(Bs)), 0.0)
    for r in range(R):
        h = g * R + r
        row = (b * heads + h).to(tl.int64) * padded
        decays, steps = tl.load(decay + row + t), tl.load(step + row + t)
        from_start = tl.exp2(decays)
        if HAS_DOCUMENTS:
            from_start = tl.where(goes_on, from_start, 0.0)
        xs = x.load([b, first, h, 0]).reshape(Q, P_TILE)
        before = states.load([(b * chunks + c) * heads + h, 0, 0]).reshape(N_TILE, P_TILE)
        mask = scores * tl.exp2(tl.minimum(decays[:, None] - decays[None, :], 0.0)) * steps[None, :]
        ys = tl.dot(Cs, before) * from_start[:, None]
        ys = tl.dot(mask.to(xs.dtype), xs, ys) + tl.load(D + h) * xs
        y.store([b, first, h, 0], ys.to(y.dtype).reshape(1, Q, 1, P_TILE))


@triton.jit
def _gradient_walk_kernel(
    dy, C, decay, documents, states, dfinal, dstates, dinitial, through, dy_batch, dy_time, C_batch, C_time,
    length, heads, ratio, chunks, padded, HAS_FINAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, N_TILE: tl.constexpr, P: tl.constexpr, P_TILE: tl.constexpr, ROWS: tl.constexpr,
):
    """Gradients (batch, chunks, heads, n, p) of the state after each chunk, and that of the initial state. `through`
    (batch, chunks, heads, n), to be summed: the start's state in the end's times its gradient."""
    b, h, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, p, q = part * ROWS + tl.arange(0, ROWS), tl.arange(0, P_TILE), tl.arange(0, Q)
    if HAS_FINAL:
        gradient = _load_state(dfinal + (b * heads + h).to(tl.int64) * (N * P), n, p, N, N_TILE, P, P_TILE)
    else:
        gradient = tl.zeros((ROWS, P_TILE), tl.float32)
    C += b.to(tl.int64) * C_batch + (h // ratio) * N
    dy += b.to(tl.int64) * dy_batch + h * P
    row = (b * heads + h).to(tl.int64) * padded
    at = (((b + 1) * chunks - 1) * heads + h).to(tl.int64) * (N * P)
    sums = through + (((b + 1) * chunks - 1) * heads + h).to(tl.int64) * N + n
    for backwards in range(chunks):
        c = chunks - 1 - backwards
        t = c * Q + q
        inside = (t < length)[:, None]
        _store_state(dstates + at, gradient, n, p, N, N_TILE, P, P_TILE)
        kept = tl.exp2(tl.load(decay + row + c * Q + Q - 1))
        from_start = tl.exp2(tl.load(decay + row + t))
        if HAS_DOCUMENTS:
            first = _document(documents, b, c * Q - 1, length)
            from_start = tl.where(_document(documents, b, t, length) == first, from_start, 0.0)
            kept = tl.where(_document(documents, b, c * Q + Q - 1, length) == first, kept, 0.0)
        gradient *= kept
        passed = tl.sum(gradient * _load_state(states + at, n, p, N, N_TILE, P, P_TILE).to(tl.float32), 1)
        if N_TILE > N:
            tl.store(sums, passed, n < N)
        else:
            tl.store(sums, passed)
        at -= heads * (N * P)
        sums -= heads * N
        start = tl.cast(c, tl.int64) * Q
        dys = tl.load(dy + start * dy_time + (q[:, None] * dy_time + p[None, :]), _columns(inside, p, P, P_TILE), 0.0)
        Cs = tl.load(C + start * C_time + (q[:, None] * C_time + n[None, :]), _columns(inside, n, N, N_TILE), 0.0)
        gradient = tl.dot(tl.trans(Cs), (dys * from_start[:, None]).to(Cs.dtype), gradient)
    _store_state(dinitial + (b * heads + h).to(tl.int64) * (N * P), gradient, n, p, N, N_TILE, P, P_TILE)


@triton.jit
def _pair_gradients(xs, dys, scores, seen, j_decays, i_decays, steps, dxs):
    """One block of inputs (rows j) and one of outputs (columns i) of a head: the gradient of scores, dx with its part
    added, and the sums of G = dM * M over either axis."""
    factor = tl.where(seen, tl.exp2(tl.minimum(i_decays[None, :] - j_decays[:, None], 0.0)), 0.0) * steps[:, None]
    dscores = tl.dot(xs, tl.trans(dys)) * factor
    dxs = tl.dot((scores * factor).to(dys.dtype), dys, dxs)
    G = dscores * scores
    return dscores, dxs, tl.sum(G, 1), tl.sum(G, 0)


@triton.jit
def _input_gradients_kernel(
    x, dy, B, C, D, step, decay, documents, dstates, dscores, dx, sums, own_scores, length, heads, groups, chunks,
    padded, plane, HAS_DOCUMENTS: tl.constexpr, REVERSED: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, N_TILE: tl.constexpr, P_TILE: tl.constexpr,
):
    """dx from the same half of a chunk and from the state at its end, the gradient of C B^T summed over the group's
    heads (transposed), and sums a token.

    `sums` are planes (batch, heads, padded): with G = dM * M of a token's input and a later token's output, G summed
    over i; what the input adds to the end's state times its gradient; x dy; and G summed over j. A fifth is
    `_across_gradients_kernel`'s: pairs from half to half, apart, for else their squares would be in registers too.
    Pairs of a token with itself stay out: they pass no decay, and where decays are strong they would drown all that
    does. `own_scores` (batch, groups, padded), C B of a token, gives their part of dx here and of ddt later.
    """
    HALF: tl.constexpr = Q // 2
    b, g, stretch = program(REVERSED)
    c, first = stretch // 2, stretch * HALF
    j = tl.arange(0, HALF)
    t = first + j
    Bs, Cs = B.load([b, first, g, 0]).reshape(HALF, N_TILE), C.load([b, first, g, 0]).reshape(HALF, N_TILE)
    seen = j[:, None] <= j[None, :]
    if HAS_DOCUMENTS:
        own = _document(documents, b, t, length)
        seen = seen & (own[:, None] == own[None, :])
        in_last = own == _document(documents, b, c * Q + Q - 1, length)
    scores = tl.dot(Bs, tl.trans(Cs))
    own_score = tl.sum(tl.where(j[:, None] == j[None, :], scores, 0.0), 1)
    scores = tl.where(seen & (j[:, None] < j[None, :]), scores, 0.0)
    tl.store(own_scores + (b * groups + g).to(tl.int64) * padded + t, own_score)
    dscores_sum = tl.zeros((HALF, HALF), tl.float32)
    plane = tl.cast(plane, tl.int64)
    for r in range(R):
        h = g * R + r
        row = (b * heads + h).to(tl.int64) * padded
        decays, steps = tl.load(decay + row + t), tl.load(step + row + t)
        xs = x.load([b, first, h, 0]).reshape(HALF, P_TILE)
        dys = dy.load([b, first, h, 0]).reshape(HALF, P_TILE)
        dafter = dstates.load([(b * chunks + c) * heads + h, 0, 0]).reshape(N_TILE, P_TILE)
        weight = tl.exp2(tl.load(decay + row + c * Q + Q - 1) - decays) * steps
        if HAS_DOCUMENTS:
            weight = tl.where(in_last, weight, 0.0)
        dxs = tl.dot(Bs, dafter) * weight[:, None]
        tl.store(sums + plane + row + t, tl.sum(dxs * xs, 1))
        tl.store(sums + 2 * plane + row + t, tl.sum(xs.to(tl.float32) * dys.to(tl.float32), 1))
        dmask, dxs, over_i, over_j = _pair_gradients(xs, dys, scores, seen, decays, decays, steps, dxs)
        tl.store(sums + row + t, over_i)
        tl.store(sums + 3 * plane + row + t, over_j)
        dscores_sum += dmask
        # Read again: kept until here, it would be spilled.
        dys = dy.load([b, first, h, 0]).reshape(HALF, P_TILE)
        dxs += (tl.load(D + h) + own_score * steps)[:, None] * dys
        dx.store([b, first, h, 0], dxs.to(dx.dtype).reshape(1, HALF, 1, P_TILE))
    dscores += ((b * chunks + c) * groups + g).to(tl.int64) * (Q * Q) + stretch % 2 * (HALF * Q + HALF)
    tl.store(dscores + (j[:, None] * Q + j[None, :]), dscores_sum.to(dscores.dtype.element_ty))


@triton.jit
def _across_gradients_kernel(
    x, dy, B, C, step, decay, documents, dscores, dx, dx_rows, sums, dx_batch, dx_time, length, heads, groups, chunks,
    padded, plane, HAS_DOCUMENTS: tl.constexpr, REVERSED: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, N_TILE: tl.constexpr, P: tl.constexpr, P_TILE: tl.constexpr,
):
    """Pairs of a chunk's first half and its second: added to dx, the gradient of C B^T summed over the group's heads
    (transposed), and the fifth of `sums`: G summed over i for inputs of the first half, over j for outputs of the
    second. `dx_rows` is dx, whose tile no product waits for."""
    HALF: tl.constexpr = Q // 2
    b, g, c = program(REVERSED)
    j, p = tl.arange(0, HALF), tl.arange(0, P_TILE)
    t, later = c * Q + j, c * Q + HALF + j
    Bs = B.load([b, c * Q, g, 0]).reshape(HALF, N_TILE)
    Cs = C.load([b, c * Q + HALF, g, 0]).reshape(HALF, N_TILE)
    seen = j[:, None] >= 0
    if HAS_DOCUMENTS:
        seen = _document(documents, b, t, length)[:, None] == _document(documents, b, later, length)[None, :]
    scores = tl.where(seen, tl.dot(Bs, tl.trans(Cs)), 0.0)
    dscores_sum = tl.zeros((HALF, HALF), tl.float32)
    sums += 4 * tl.cast(plane, tl.int64)
    dx_rows, inside = _rows(dx_rows, b, c, Q, dx_batch, dx_time), _columns((t < length)[:, None], p, P, P_TILE)
    for r in range(R):
        h = g * R + r
        dxs = tl.load(dx_rows + (j[:, None] * dx_time + h * P + p[None, :]), inside, 0.0)
        row = (b * heads + h).to(tl.int64) * padded
        decays, steps = tl.load(decay + row + t), tl.load(step + row + t)
        xs = x.load([b, c * Q, h, 0]).reshape(HALF, P_TILE)
        dys = dy.load([b, c * Q + HALF, h, 0]).reshape(HALF, P_TILE)
        dmask, dxs, over_i, over_j = _pair_gradients(
            xs, dys, scores, seen, decays, tl.load(decay + row + later), steps, dxs.to(tl.float32)
        )
        tl.store(sums + row + t, over_i)
        tl.store(sums + row + later, over_j)
        dscores_sum += dmask
        dx.store([b, c * Q, h, 0], dxs.to(dx.dtype).reshape(1, HALF, 1, P_TILE))
    dscores += ((b * chunks + c) * groups + g).to(tl.int64) * (Q * Q) + (j[:, None] * Q + HALF + j[None, :])
    tl.store(dscores, dscores_sum.to(dscores.dtype.element_ty))


@triton.jit
def _shared_gradients_kernel(
    values, own, others, states, step, decay, documents, dscores, gradient, from_start, length, heads, groups, chunks,
    padded, OF_C: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, REVERSED: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, N_TILE: tl.constexpr, P_TILE: tl.constexpr,
):
    """dB from x, C and the gradients of the states after chunks, or dC from dy, B and the states before: some rows of a
    chunk and a group. With dC, `from_start` (batch, heads, padded): what the start's state gives each output times its
    gradient. Apart, for then the registers are enough for two programs beside each other. `own` is C."""
    b, g, stretch = program(REVERSED)
    c, first = stretch // (Q // ROWS), stretch * ROWS
    q, k = stretch % (Q // ROWS) * ROWS + tl.arange(0, ROWS), tl.arange(0, Q)
    t = c * Q + q
    if HAS_DOCUMENTS:
        state_at = c * Q - 1 if OF_C else c * Q + Q - 1
        passes = _document(documents, b, t, length) == _document(documents, b, state_at, length)
    if OF_C:
        Cs = own.load([b, first, g, 0]).reshape(ROWS, N_TILE)
    sums = tl.zeros((ROWS, N_TILE), tl.float32)
    for r in range(R):
        h = g * R + r
        row = (b * heads + h).to(tl.int64) * padded
        decays = tl.load(decay + row + t)
        if OF_C:
            weight = tl.exp2(decays)
        else:
            weight = tl.exp2(tl.load(decay + row + c * Q + Q - 1) - decays) * tl.load(step + row + t)
        if HAS_DOCUMENTS:
            weight = tl.where(passes, weight, 0.0)
        rows = values.load([b, first, h, 0]).reshape(ROWS, P_TILE)
        state = states.load([(b * chunks + c) * heads + h, 0, 0]).reshape(N_TILE, P_TILE)
        if OF_C:
            dstart = tl.dot(rows, tl.trans(state)) * weight[:, None]
            tl.store(from_start + row + t, tl.sum(dstart * Cs, 1))
            sums += dstart
        else:
            sums = tl.dot((rows * weight[:, None]).to(rows.dtype), tl.trans(state), sums)
    # Last, so that these tiles need not lie in shared memory beside the loop's.
    dscores += ((b * chunks + c) * groups + g).to(tl.int64) * (Q * Q)
    if OF_C:
        pairs = tl.load(dscores + k[None, :] * Q + q[:, None], k[None, :] <= q[:, None], 0.0)
    else:
        pairs = tl.load(dscores + q[:, None] * Q + k[None, :], q[:, None] <= k[None, :], 0.0)
    sums = tl.dot(pairs, others.load([b, c * Q, g, 0]).reshape(Q, N_TILE), sums)
    gradient.store([b, first, g, 0], sums.to(gradient.dtype).reshape(1, ROWS, 1, N_TILE))


@triton.jit
def _step_gradients_kernel(
    sums, own_scores, from_start, through, step, A, ddt, partial, ddt_batch, ddt_time, length, heads, ratio, chunks,
    padded, plane, REVERSED: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, THROUGH: tl.constexpr,
):
    """ddt, and a chunk's part of dA, dD and the gradient of dt_bias: partial (batch, chunks, 3, heads) float32.

    The gradient of the log decay at token t of a chunk sums what passes over t: G_ij for j < t <= i, the start's state
    into outputs i >= t, inputs j < t into the end's state, and the start's state into the end's.
    """
    b, h_block, c = program(REVERSED)
    q = tl.arange(0, Q)
    t = c * Q + q
    h = h_block * BLOCK + tl.arange(0, BLOCK)
    there = (h < heads)[:, None]
    plane = tl.cast(plane, tl.int64)
    at = (b * heads + h[:, None]).to(tl.int64) * padded + t[None, :]
    inputs, into_end = tl.load(sums + at, there, 0.0), tl.load(sums + plane + at, there, 0.0)
    diagonal, outputs = tl.load(sums + 2 * plane + at, there, 0.0), tl.load(from_start + at, there, 0.0)
    outputs += tl.load(sums + 3 * plane + at, there, 0.0)
    across, is_later = tl.load(sums + 4 * plane + at, there, 0.0), (q >= Q // 2)[None, :]
    inputs, outputs = inputs + tl.where(is_later, 0.0, across), outputs + tl.where(is_later, across, 0.0)
    steps = tl.load(step + at, there, 0.0)
    groups = (b * (heads // ratio) + h // ratio).to(tl.int64)
    scores = tl.load(own_scores + groups[:, None] * padded + t[None, :], there, 0.0)
    parts = (((b * chunks + c) * heads + h).to(tl.int64) * THROUGH)[:, None] + tl.arange(0, THROUGH)[None, :]
    ddecay = tl.cumsum(outputs - inputs, 1, reverse=True) + tl.cumsum(into_end, 1) - into_end
    ddecay += tl.sum(tl.load(through + parts, there, 0.0), 1)[:, None]
    direct = (inputs + into_end) / tl.where(steps > 0.0, steps, 1.0) + diagonal * scores
    dstep = direct + ddecay * tl.load(A + h, h < heads, 0.0)[:, None]
    # softplus' = 1 - exp(-softplus), by its series where that would cancel
    series = steps * (1.0 - steps * (1.0 / 2 - steps * (1.0 / 6 - steps * (1.0 / 24))))
    draw = dstep * tl.where(steps < 0.06, series, 1.0 - tl.exp(-steps))
    draw = tl.where((t < length)[None, :], draw, 0.0)
    out = _rows(ddt, b, c, Q, ddt_batch, ddt_time) + q[None, :] * ddt_time + h[:, None]
    tl.store(out, draw.to(ddt.dtype.element_ty), (t < length)[None, :] & there)
    partial += (b * chunks + c) * 3 * heads + h
    tl.store(partial, tl.sum(ddecay * steps, 1), h < heads)
    tl.store(partial + heads, tl.sum(diagonal, 1), h < heads)
    tl.store(partial + 2 * heads, tl.sum(draw, 1), h < heads)


# Fastest on an H200 at 8B shapes; more registers than these spill.
CHUNK = 128
DECAYS = ScanTiles(warps=4, stages=1, size=16)
STATE_WALK = ScanTiles(warps=4, stages=4, size=128 * 64)
OUTPUTS = ScanTiles(warps=8, stages=4)
GRADIENT_WALK = ScanTiles(warps=4, stages=3, size=64 * 64)
ACROSS_GRADIENTS = ScanTiles(warps=4, stages=3)
INPUT_GRADIENTS = ScanTiles(warps=4, stages=3)
SHARED_GRADIENTS = ScanTiles(warps=4, stages=3, size=64)
STEP_GRADIENTS = ScanTiles(warps=4, stages=1, size=4)
# Elements a matrix product's tiles have along their rows, at least: 128 bytes. For narrower ones ptxas 12.8, which
# Triton 3.6 brings, adds offsets to a uniform register that nothing wrote, and products read whatever lies there.
LEAST_WIDTH = 64
TUNED_STATE = 128 * 64          # elements of the largest state for which the pipelines above fit into shared memory


TAKES = (f"bfloat16 or float16, head_dim and state_dim of {', '.join(map(str, KERNEL_SIZES))}, their product at most "
         f"{LARGEST_STATE}")


def supports(x: Tensor, B: Tensor) -> bool:
    """Whether the kernels take these inputs: on a GPU, as `TAKES` says."""
    head_dim, state_dim = x.shape[-1], B.shape[-1]
    return (
        x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and head_dim in KERNEL_SIZES
        and state_dim in KERNEL_SIZES and head_dim * state_dim <= LARGEST_STATE
    )


def prepared(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial: Tensor | None,
    documents: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of `scan` from those of `chunk_scan`, copied where they do not lie as the kernels read them."""
    x, B, C = map(_laid_out, (x, B, C))
    dt = dt if dt.stride(2) == 1 and _is_near(dt) else dt.contiguous()
    A, D, dt_bias = (tensor.float().contiguous() for tensor in (A, D, dt_bias))
    initial = None if initial is None else initial.float().transpose(2, 3).contiguous()
    return x, dt, A, B, C, D, dt_bias, initial, None if documents is None else documents.to(torch.int32).contiguous()


def _laid_out(tensor: Tensor) -> Tensor:
    """(b, t, heads, elements) with heads side by side and, as TMA wants it, all else in steps of 16 bytes: itself or a
    copy."""
    *steps, head, element = tensor.stride()
    in_16_bytes = all(step and step % 8 == 0 for step in steps) and tensor.storage_offset() % 8 == 0
    if (head, element) == (tensor.shape[3], 1) and in_16_bytes and _is_near(tensor):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _is_near(tensor: Tensor) -> bool:
    """Whether offsets within a chunk have 31 bits."""
    return tensor.stride(1) * CHUNK + tensor.shape[2:].numel() < 2**31


def _tile(size: int) -> int:
    return max(size, LEAST_WIDTH)


def _tiles(n: int, p: int) -> dict[str, int]:
    return {"N_TILE": _tile(n), "P_TILE": _tile(p)}


def _tokens(tensor: Tensor, rows: int) -> TensorDescriptor:
    """For tiles (rows, elements) of a head or group of (b, t, heads, elements), zeros beyond its sizes."""
    return TensorDescriptor.from_tensor(tensor, [1, rows, 1, _tile(tensor.shape[3])])


def _states(states: Tensor) -> TensorDescriptor:
    """For tiles (n, p) of (b, chunks, heads, n, p)."""
    return TensorDescriptor.from_tensor(states.flatten(0, 2), [1, *map(_tile, states.shape[3:])])


def _walked_rows(tiles: ScanTiles, n: int, p: int) -> int:
    """Rows of a state that one program of a walk holds."""
    return min(_tile(n), _tile(tiles.size // _tile(p)))


def _launched(tiles: ScanTiles, n: int, p: int) -> dict[str, int]:
    """Warps and stages: a larger state leaves no shared memory for a pipeline, and fills a warp group's registers."""
    if _tile(n) * _tile(p) <= TUNED_STATE:
        return {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return {"num_warps": 8, "num_stages": 1}


def _is_specialised(x: Tensor, B: Tensor) -> bool:
    """Whether the kernels of `kernels.ssd.hopper` take these inputs."""
    return CHUNK == hopper.CHUNK and hopper.takes(x, B)


def run_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial: Tensor | None,
    documents: Tensor | None, y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write y, of any strides whose heads lie side by side. Returns the other outputs of `scan`."""
    b, t, h, _ = x.shape
    final, step, decay, states = kept_like(x, B.shape[3])
    chunks = states.shape[1]
    programs, is_reversed = grid(b, cdiv(h, DECAYS.size), chunks)
    _decays_kernel[programs](
        dt, dt_bias, A, step, decay, *_strides(dt), t, h, chunks, chunks * CHUNK,
        REVERSED=is_reversed, Q=CHUNK, BLOCK=DECAYS.size, num_warps=DECAYS.warps, num_stages=DECAYS.stages,
    )
    write = hopper.write_outputs if _is_specialised(x, B) else _write_outputs
    write(x, B, C, D, step, decay, documents, initial, states, final, y)
    return final, step, decay, states


def _write_outputs(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor, step: Tensor, decay: Tensor, documents: Tensor | None,
    initial: Tensor | None, states: Tensor, final: Tensor, y: Tensor,
) -> None:
    """Write the states before chunks, the final one and y."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunks, rows, has_documents = states.shape[1], _walked_rows(STATE_WALK, n, p), documents is not None
    _state_walk_kernel[(b, h, _tile(n) // rows)](
        x, B, step, decay, initial, documents, states, final, *_strides(x, B), t, h, h // g, chunks, chunks * CHUNK,
        HAS_INITIAL=initial is not None, HAS_DOCUMENTS=has_documents, Q=CHUNK, N=n, P=p, **_tiles(n, p), ROWS=rows,
        **_launched(STATE_WALK, rows, p),
    )
    programs, is_reversed = grid(b, g, chunks)
    _outputs_kernel[programs](
        _tokens(x, CHUNK), _tokens(B, CHUNK), _tokens(C, CHUNK), D, step, decay, documents, _states(states),
        _tokens(y, CHUNK), t, h, g, chunks, chunks * CHUNK, HAS_DOCUMENTS=has_documents, REVERSED=is_reversed,
        R=h // g, Q=CHUNK, **_tiles(n, p), **_launched(OUTPUTS, n, p),
    )


def run_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, step: Tensor,
    decay: Tensor, states: Tensor, documents: Tensor | None, dx: Tensor, ddt: Tensor, dB: Tensor, dC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write dx, ddt, dB and dC, of any strides whose last axes lie side by side. Returns the gradients of A, D, dt_bias
    (float32) and the initial state; without `dfinal` that of the final state is zero."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunks, padded = states.shape[1], step.shape[2]
    dstates, dinitial = torch.empty_like(states), x.new_empty(b, h, n, p, dtype=torch.float32)
    through = x.new_empty(b, chunks, h, n, dtype=torch.float32)
    sums, from_start = x.new_empty(5, b, h, padded, dtype=torch.float32), torch.empty_like(step)
    own_scores = x.new_empty(b, g, padded, dtype=torch.float32)
    dscores = x.new_empty(b, chunks, g, CHUNK, CHUNK)
    specialised = _is_specialised(x, B)
    walk = hopper.walk_gradients if specialised else _walk_gradients
    walk(dy, dfinal, C, step, decay, states, documents, dstates, dinitial, through)
    write_inputs = hopper.write_input_gradients if specialised else _write_input_gradients
    write_inputs(dy, x, B, C, D, step, decay, documents, dstates, sums, own_scores, dscores, dx)
    write_shared = hopper.write_shared_gradients if specialised else _write_shared_gradients
    write_shared(dy, x, B, C, step, decay, states, documents, dstates, dscores, from_start, dB, dC)
    partial = x.new_empty(b * chunks, 3, h, dtype=torch.float32)
    programs, is_reversed = grid(b, cdiv(h, STEP_GRADIENTS.size), chunks)
    _step_gradients_kernel[programs](
        sums, own_scores, from_start, through, step, A, ddt, partial, *_strides(ddt), t, h, h // g, chunks, padded,
        step.numel(), REVERSED=is_reversed, Q=CHUNK, BLOCK=STEP_GRADIENTS.size, THROUGH=n,
        num_warps=STEP_GRADIENTS.warps, num_stages=STEP_GRADIENTS.stages,
    )
    dA, dD, ddt_bias = partial.sum(0)
    return dA, dD, ddt_bias, dinitial


def _walk_gradients(
    dy: Tensor, dfinal: Tensor | None, C: Tensor, step: Tensor, decay: Tensor, states: Tensor,
    documents: Tensor | None, dstates: Tensor, dinitial: Tensor, through: Tensor,
) -> None:
    """Write the gradients of the states after chunks and of the initial one, and `through`."""
    (b, t, h, p), (g, n) = dy.shape, C.shape[2:]
    chunks, rows = states.shape[1], _walked_rows(GRADIENT_WALK, n, p)
    _gradient_walk_kernel[(b, h, _tile(n) // rows)](
        dy, C, decay, documents, states, dfinal, dstates, dinitial, through, *_strides(dy, C), t, h, h // g, chunks,
        step.shape[2], HAS_FINAL=dfinal is not None, HAS_DOCUMENTS=documents is not None, Q=CHUNK, N=n, P=p,
        **_tiles(n, p), ROWS=rows, **_launched(GRADIENT_WALK, rows, p),
    )


def _write_input_gradients(
    dy: Tensor, x: Tensor, B: Tensor, C: Tensor, D: Tensor, step: Tensor, decay: Tensor, documents: Tensor | None,
    dstates: Tensor, sums: Tensor, own_scores: Tensor, dscores: Tensor, dx: Tensor,
) -> None:
    """Write dx, the gradient of C B^T, and the sums a token."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    chunks, padded = dstates.shape[1], step.shape[2]
    rest = {"HAS_DOCUMENTS": documents is not None, "R": h // g, "Q": CHUNK, **_tiles(n, p)}
    *halves, dx_half = (_tokens(tensor, CHUNK // 2) for tensor in (x, dy, B, C, dx))
    programs, is_reversed = grid(b, g, 2 * chunks)
    _input_gradients_kernel[programs](
        *halves, D, step, decay, documents, _states(dstates), dscores, dx_half, sums, own_scores, t, h, g, chunks,
        padded, step.numel(), REVERSED=is_reversed, **rest, **_launched(INPUT_GRADIENTS, n, p),
    )
    programs, is_reversed = grid(b, g, chunks)
    _across_gradients_kernel[programs](
        *halves, step, decay, documents, dscores, dx_half, dx, sums, *_strides(dx), t, h, g, chunks, padded,
        step.numel(), REVERSED=is_reversed, P=p, **rest, **_launched(ACROSS_GRADIENTS, n, p),
    )


def _write_shared_gradients(
    dy: Tensor, x: Tensor, B: Tensor, C: Tensor, step: Tensor, decay: Tensor, states: Tensor,
    documents: Tensor | None, dstates: Tensor, dscores: Tensor, from_start: Tensor, dB: Tensor, dC: Tensor,
) -> None:
    """Write dB, dC, and what the start's state gives to the outputs."""
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    chunks, some = states.shape[1], SHARED_GRADIENTS.size
    programs, is_reversed = grid(b, g, chunks * (CHUNK // some))
    for values, others, given, gradient in ((x, C, dstates, dB), (dy, B, states, dC)):
        _shared_gradients_kernel[programs](
            _tokens(values, some), _tokens(C, some), _tokens(others, CHUNK), _states(given), step, decay, documents,
            dscores, _tokens(gradient, some), from_start, t, h, g, chunks, step.shape[2], OF_C=gradient is dC,
            HAS_DOCUMENTS=documents is not None, REVERSED=is_reversed, R=h // g, Q=CHUNK, ROWS=some, **_tiles(n, p),
            **_launched(SHARED_GRADIENTS, n, p),
        )


@operation("nemotron_h::chunk_scan")
def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (b, t, h, p), the final state (b, h, n, p) float32, and for the backward the step and decay (b, h, padded)
    float32 and the states (b, chunks, h, n, p). Arguments as `chunk_scan`, but initial is (b, h, n, p)."""
    y = x.new_empty(x.shape)
    return y, *run_forward(x, dt, A, B, C, D, dt_bias, initial, documents, y)


@scan.register_fake
def _outputs_like(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *kept_like(x, B.shape[-1])


def kept_like(x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The final state, step, decay and states."""
    b, t, h, p = x.shape
    chunks = (t + CHUNK - 1) // CHUNK
    step = x.new_empty(b, h, chunks * CHUNK, dtype=torch.float32)
    return (x.new_empty(b, h, n, p, dtype=torch.float32), step, torch.empty_like(step),
            x.new_empty(b, chunks, h, n, p))


@operation("nemotron_h::chunk_scan_backward")
def scan_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, step: Tensor,
    decay: Tensor, states: Tensor, documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state (b, h, n, p)."""
    dx, ddt, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (x, dt, B, C))
    dA, dD, ddt_bias, dinitial = run_backward(
        dy, dfinal, x, A, B, C, D, step, decay, states, documents, dx, ddt, dB, dC
    )
    return dx, ddt, dA, dB, dC, dD.clone(), ddt_bias.clone(), dinitial


@scan_backward.register_fake
def _gradients_like(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    *_: Tensor | None
) -> tuple[Tensor, ...]:
    dinitial = x.new_empty(x.shape[0], x.shape[2], B.shape[3], x.shape[3], dtype=torch.float32)
    return *(tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C, D, D)), dinitial


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, dt, A, B, C, D, _, initial, documents = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, *output[2:], documents)
    ctx.has_initial = initial is not None
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, step, decay, states, documents = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else _laid_out(dy)
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    *gradients, dinitial = scan_backward(dy, dfinal, x, dt, A, B, C, D, step, decay, states, documents)
    return *gradients, dinitial if ctx.has_initial else None, None


scan.register_autograd(_differentiate, setup_context=_keep)


def _strides(*tensors: Tensor) -> list[int]:
    """Elements from one sequence and from one token to the next; heads and their elements lie side by side."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]
