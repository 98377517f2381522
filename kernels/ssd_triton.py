"""The SSD chunk scan on CUDA: `kernels.ssd.chunk_scan` for bfloat16 and float16 inputs, forward and backward.

Only what is sequential is done in sequence. A first kernel a head walks the chunks and hands the state on, one product
a chunk; it writes the state before each chunk in the inputs' type. A second one takes a chunk and a group, with C B^T
formed once for all heads of the group, and needs no order. The backward is the same, mirrored: a walk from the end for
the gradient of the states, then everything else a chunk and a group at a time, so that the gradients of B and C are
summed over the group's heads in registers and no atomics are needed.

A gradient of a decay sums what the decay lets pass. Its largest part, a whole chunk's, is taken in the walk from the
end, where the states' gradient is still float32: rounding both factors would lose what mamba_ssm keeps.

Documents: with their numbers a token sees only its own. A state, and what becomes of it, is zero across a boundary.

Bytes a token, h heads of p, g groups of n, chunks of q (elements of 2 bytes): forward 3 h p + 2 h p n / q + 2 g n,
backward 6 h p + 5 h p n / q + 6 g n. Products of an accumulator's transpose, which Triton 3.6 miscompiles on Hopper
(flash-linear-attention issue 640), do not occur: transposed factors are computed as such or read back transposed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Tiles(NamedTuple):
    """Launch parameters of one kernel."""

    warps: int
    stages: int
    size: int = 0           # columns of head_dim a program of a walk holds; rows of a chunk one of the others holds


@triton.jit
def _document(documents, b, t, length):
    """Document of token t; of the first and the last one before and after the sequence."""
    return tl.load(documents + b * length + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit
def _decays_kernel(
    dt, dt_bias, A, step, decay, batch_stride, time_stride, length, heads, chunks, padded,
    Q: tl.constexpr, BLOCK: tl.constexpr,
):
    """step = softplus(dt + dt_bias) and the running sum of step A log2(e) in each chunk: (batch, heads, padded)."""
    c, h_block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t = c * Q + tl.arange(0, Q)
    h = h_block * BLOCK + tl.arange(0, BLOCK)
    inside = (t < length)[:, None] & (h < heads)[None, :]
    raw = tl.load(dt + b * batch_stride + t[:, None] * time_stride + h[None, :], inside, 0.0).to(tl.float32)
    raw += tl.load(dt_bias + h, h < heads, 0.0)[None, :]
    softplus = tl.maximum(raw, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(raw)))
    steps = tl.where(inside, softplus, 0.0)
    rate = tl.load(A + h, h < heads, 0.0) * LOG2_E
    out = (b * heads + h[None, :]) * padded + t[:, None]
    tl.store(step + out, steps, (h < heads)[None, :])
    tl.store(decay + out, tl.cumsum(steps * rate[None, :], 0), (h < heads)[None, :])


@triton.jit
def _state_walk_kernel(
    x, B, step, decay, initial, documents, states, final, x_batch, x_time, B_batch, B_time,
    length, heads, ratio, chunks, padded, HAS_INITIAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
):
    """States (batch, chunks, heads, n, p) before each chunk, in x's type, and the last one in float32."""
    h, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, p, q = tl.arange(0, N), part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, Q)
    as_state = n[:, None] * P + p[None, :]
    if HAS_INITIAL:
        state = tl.load(initial + (b * heads + h).to(tl.int64) * (N * P) + as_state)
    else:
        state = tl.zeros((N, COLUMNS), tl.float32)
    B += b * B_batch + (h // ratio) * N
    x += b * x_batch + h * P
    row = (b * heads + h).to(tl.int64) * padded
    out = states + (b * chunks * heads + h).to(tl.int64) * (N * P) + as_state
    for c in range(chunks):
        t = c * Q + q
        inside = (t < length)[:, None]
        tl.store(out, state.to(states.dtype.element_ty))
        out += heads.to(tl.int64) * (N * P)
        end = tl.load(decay + row + c * Q + Q - 1)
        weight = tl.exp2(end - tl.load(decay + row + t)) * tl.load(step + row + t)
        kept = tl.exp2(end)
        if HAS_DOCUMENTS:
            last = _document(documents, b, c * Q + Q - 1, length)
            weight = tl.where(_document(documents, b, t, length) == last, weight, 0.0)
            kept = tl.where(_document(documents, b, c * Q - 1, length) == last, kept, 0.0)
        xs = tl.load(x + t[:, None] * x_time + p[None, :], inside, 0.0)
        Bs = tl.load(B + t[:, None] * B_time + n[None, :], inside, 0.0)
        state = tl.dot(tl.trans(Bs), (xs * weight[:, None]).to(Bs.dtype), state * kept)
    tl.store(final + (b * heads + h).to(tl.int64) * (N * P) + as_state, state)


@triton.jit
def _outputs_kernel(
    x, B, C, D, step, decay, documents, states, y, x_batch, x_time, B_batch, B_time, C_batch, C_time, y_batch, y_time,
    length, heads, groups, chunks, padded, HAS_DOCUMENTS: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):
    """y = (C B^T * decay) (step x) + decay from the start * C state + D x, some rows of a chunk and a group."""
    g, b = tl.program_id(0), tl.program_id(2)
    c, part = tl.program_id(1) // (Q // ROWS), tl.program_id(1) % (Q // ROWS)
    n, p, j, i = tl.arange(0, N), tl.arange(0, P), tl.arange(0, Q), part * ROWS + tl.arange(0, ROWS)
    tj, ti = c * Q + j, c * Q + i
    inside_j, inside_i = (tj < length)[:, None], (ti < length)[:, None]
    Bs = tl.load(B + b * B_batch + g * N + tj[:, None] * B_time + n[None, :], inside_j, 0.0)
    Cs = tl.load(C + b * C_batch + g * N + ti[:, None] * C_time + n[None, :], inside_i, 0.0)
    seen = i[:, None] >= j[None, :]
    if HAS_DOCUMENTS:
        own = _document(documents, b, ti, length)
        seen = seen & (own[:, None] == _document(documents, b, tj, length)[None, :])
        goes_on = own == _document(documents, b, c * Q - 1, length)
    scores = tl.where(seen, tl.dot(Cs, tl.trans(Bs)), 0.0)
    for r in range(R):
        h = g * R + r
        row = (b * heads + h).to(tl.int64) * padded
        decays = tl.load(decay + row + ti)
        from_start = tl.exp2(decays)
        if HAS_DOCUMENTS:
            from_start = tl.where(goes_on, from_start, 0.0)
        xs = tl.load(x + b * x_batch + h * P + tj[:, None] * x_time + p[None, :], inside_j, 0.0)
        x_rows = tl.load(x + b * x_batch + h * P + ti[:, None] * x_time + p[None, :], inside_i, 0.0)
        before = tl.load(states + ((b * chunks + c) * heads + h).to(tl.int64) * (N * P) + n[:, None] * P + p[None, :])
        fading = tl.exp2(tl.minimum(decays[:, None] - tl.load(decay + row + tj)[None, :], 0.0))
        mask = scores * fading * tl.load(step + row + tj)[None, :]
        ys = tl.dot(Cs, before) * from_start[:, None]
        ys = tl.dot(mask.to(xs.dtype), xs, ys)
        ys += tl.load(D + h) * x_rows
        out = y + b * y_batch + h * P + ti[:, None] * y_time + p[None, :]
        tl.store(out, ys.to(y.dtype.element_ty), inside_i)


@triton.jit
def _gradient_walk_kernel(
    dy, C, decay, documents, states, dfinal, dstates, dinitial, through, dy_batch, dy_time, C_batch, C_time,
    length, heads, ratio, chunks, padded, HAS_FINAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Gradients (batch, chunks, heads, n, p) of the state after each chunk, and that of the initial state. `through`
    (batch, chunks, heads, parts, n), to be summed: the start's state in the end's times its gradient."""
    h, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, p, q = tl.arange(0, N), part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, Q)
    as_state = (b * heads + h).to(tl.int64) * (N * P) + n[:, None] * P + p[None, :]
    if HAS_FINAL:
        gradient = tl.load(dfinal + as_state)
    else:
        gradient = tl.zeros((N, COLUMNS), tl.float32)
    C += b * C_batch + (h // ratio) * N
    dy += b * dy_batch + h * P
    row = (b * heads + h).to(tl.int64) * padded
    at = (((b + 1) * chunks - 1) * heads + h).to(tl.int64) * (N * P) + n[:, None] * P + p[None, :]
    sums = through + ((((b + 1) * chunks - 1) * heads + h) * (P // COLUMNS) + part) * N + n
    for backwards in range(chunks):
        c = chunks - 1 - backwards
        t = c * Q + q
        inside = (t < length)[:, None]
        tl.store(dstates + at, gradient.to(dstates.dtype.element_ty))
        kept = tl.exp2(tl.load(decay + row + c * Q + Q - 1))
        from_start = tl.exp2(tl.load(decay + row + t))
        if HAS_DOCUMENTS:
            first = _document(documents, b, c * Q - 1, length)
            from_start = tl.where(_document(documents, b, t, length) == first, from_start, 0.0)
            kept = tl.where(_document(documents, b, c * Q + Q - 1, length) == first, kept, 0.0)
        gradient *= kept
        tl.store(sums, tl.sum(gradient * tl.load(states + at).to(tl.float32), 1))
        at -= heads.to(tl.int64) * (N * P)
        sums -= heads * N * (P // COLUMNS)
        dys = tl.load(dy + t[:, None] * dy_time + p[None, :], inside, 0.0)
        Cs = tl.load(C + t[:, None] * C_time + n[None, :], inside, 0.0)
        gradient = tl.dot(tl.trans(Cs), (dys * from_start[:, None]).to(Cs.dtype), gradient)
    tl.store(dinitial + as_state, gradient)


@triton.jit
def _pair_gradients(xs, dys, scores, seen, j_decays, i_decays, steps, dinput):
    """One block of inputs (rows j) and one of outputs (columns i) of a head: the gradient of scores, dinput with the
    block's part added, and the sums of G = dM * M over either axis."""
    fading = tl.where(seen, tl.exp2(tl.minimum(i_decays[None, :] - j_decays[:, None], 0.0)), 0.0)
    dscores = tl.dot(xs, tl.trans(dys)) * (fading * steps[:, None])
    dinput = tl.dot((scores * fading).to(dys.dtype), dys, dinput)
    G = dscores * scores
    return dscores, dinput, tl.sum(G, 1), tl.sum(G, 0)


@triton.jit
def _input_gradients_kernel(
    x, dy, B, C, D, step, decay, documents, dstates, dscores, dx, sums, x_batch, x_time, dy_batch, dy_time, B_batch,
    B_time, C_batch, C_time, dx_batch, dx_time, length, heads, groups, chunks, padded, plane,
    HAS_DOCUMENTS: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):
    """dx, the gradient of C B^T summed over the group's heads (transposed), and sums a token; inputs of half a chunk.

    Inputs of the first half also reach the outputs of the second. `sums` are planes (batch, heads, padded): with
    G = dM * M, G summed over i; what the input adds to the end's state times its gradient; x dy; G summed over j of the
    own half; and, for the second half's tokens, over j of the first.
    """
    HALF: tl.constexpr = Q // 2
    g, b = tl.program_id(0), tl.program_id(2)
    c, part = tl.program_id(1) // 2, tl.program_id(1) % 2
    n, p, j = tl.arange(0, N), tl.arange(0, P), tl.arange(0, HALF)
    t = c * Q + part * HALF + j
    later = c * Q + HALF + j
    inside, inside_later = (t < length)[:, None], (later < length)[:, None]
    B += b * B_batch + g * N
    C += b * C_batch + g * N
    Bs = tl.load(B + t[:, None] * B_time + n[None, :], inside, 0.0)
    Cs = tl.load(C + t[:, None] * C_time + n[None, :], inside, 0.0)
    Cs_later = tl.load(C + later[:, None] * C_time + n[None, :], inside_later, 0.0)
    seen, seen_later = j[:, None] <= j[None, :], j[:, None] >= 0
    if HAS_DOCUMENTS:
        own = _document(documents, b, t, length)
        seen = seen & (own[:, None] == own[None, :])
        seen_later = own[:, None] == _document(documents, b, later, length)[None, :]
        in_last = own == _document(documents, b, c * Q + Q - 1, length)
    scores = tl.where(seen, tl.dot(Bs, tl.trans(Cs)), 0.0)
    scores_later = tl.where(seen_later, tl.dot(Bs, tl.trans(Cs_later)), 0.0)
    sum_own, sum_later = tl.zeros((HALF, HALF), tl.float32), tl.zeros((HALF, HALF), tl.float32)
    for r in range(R):
        h = g * R + r
        row = (b * heads + h).to(tl.int64) * padded
        decays, steps = tl.load(decay + row + t), tl.load(step + row + t)
        xs = tl.load(x + b * x_batch + h * P + t[:, None] * x_time + p[None, :], inside, 0.0)
        dys = tl.load(dy + b * dy_batch + h * P + t[:, None] * dy_time + p[None, :], inside, 0.0)
        dafter = tl.load(dstates + ((b * chunks + c) * heads + h).to(tl.int64) * (N * P) + n[:, None] * P + p[None, :])
        into_end = tl.exp2(tl.load(decay + row + c * Q + Q - 1) - decays)
        if HAS_DOCUMENTS:
            into_end = tl.where(in_last, into_end, 0.0)
        dinput = tl.dot(Bs, dafter) * into_end[:, None]
        tl.store(sums + plane + row + t, tl.sum(dinput * xs, 1) * steps)
        tl.store(sums + 2 * plane + row + t, tl.sum(xs.to(tl.float32) * dys.to(tl.float32), 1))
        dmask, dinput, over_i, over_j = _pair_gradients(xs, dys, scores, seen, decays, decays, steps, dinput)
        tl.store(sums + 3 * plane + row + t, over_j)
        sum_own += dmask
        skip = tl.load(D + h) * dys
        if part == 0:
            dys = tl.load(dy + b * dy_batch + h * P + later[:, None] * dy_time + p[None, :], inside_later, 0.0)
            dmask, dinput, more_over_i, over_j = _pair_gradients(
                xs, dys, scores_later, seen_later, decays, tl.load(decay + row + later), steps, dinput
            )
            tl.store(sums + 4 * plane + row + later, over_j)
            sum_later += dmask
            over_i += more_over_i
        tl.store(sums + row + t, over_i)
        out = dx + b * dx_batch + h * P + t[:, None] * dx_time + p[None, :]
        tl.store(out, (dinput * steps[:, None] + skip).to(dx.dtype.element_ty), inside)
    dscores += ((b * chunks + c) * groups + g).to(tl.int64) * (Q * Q) + j[:, None] * Q + j[None, :]
    tl.store(dscores + part * (HALF * Q + HALF), sum_own.to(dscores.dtype.element_ty))
    if part == 0:
        tl.store(dscores + HALF, sum_later.to(dscores.dtype.element_ty))


@triton.jit
def _shared_gradients_kernel(
    x, dy, B, C, step, decay, documents, states, dstates, dscores, dB, dC, from_start, x_batch, x_time, dy_batch,
    dy_time, B_batch, B_time, C_batch, C_time, dB_batch, dB_time, dC_batch, dC_time, length, heads, groups, chunks,
    padded, HAS_DOCUMENTS: tl.constexpr,
    R: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
):
    """dB and dC, some rows of a chunk and a group; `from_start` (batch, heads, padded), what the start's state gives
    each output times its gradient."""
    g, b = tl.program_id(0), tl.program_id(2)
    c, part = tl.program_id(1) // (Q // ROWS), tl.program_id(1) % (Q // ROWS)
    n, p, k, q = tl.arange(0, N), tl.arange(0, P), tl.arange(0, Q), part * ROWS + tl.arange(0, ROWS)
    tk, t = c * Q + k, c * Q + q
    inside_k, inside = (tk < length)[:, None], (t < length)[:, None]
    C_rows = tl.load(C + b * C_batch + g * N + t[:, None] * C_time + n[None, :], inside, 0.0)
    if HAS_DOCUMENTS:
        own = _document(documents, b, t, length)
        in_last = own == _document(documents, b, c * Q + Q - 1, length)
        goes_on = own == _document(documents, b, c * Q - 1, length)
    sum_dB, sum_dC = tl.zeros((ROWS, N), tl.float32), tl.zeros((ROWS, N), tl.float32)
    for r in range(R):
        h = g * R + r
        row = (b * heads + h).to(tl.int64) * padded
        decays = tl.load(decay + row + t)
        weight = tl.exp2(tl.load(decay + row + c * Q + Q - 1) - decays) * tl.load(step + row + t)
        fading = tl.exp2(decays)
        if HAS_DOCUMENTS:
            weight, fading = tl.where(in_last, weight, 0.0), tl.where(goes_on, fading, 0.0)
        xs = tl.load(x + b * x_batch + h * P + t[:, None] * x_time + p[None, :], inside, 0.0)
        dys = tl.load(dy + b * dy_batch + h * P + t[:, None] * dy_time + p[None, :], inside, 0.0)
        at = ((b * chunks + c) * heads + h).to(tl.int64) * (N * P) + n[:, None] * P + p[None, :]
        sum_dB = tl.dot((xs * weight[:, None]).to(xs.dtype), tl.trans(tl.load(dstates + at)), sum_dB)
        dstart = tl.dot(dys, tl.trans(tl.load(states + at))) * fading[:, None]
        sum_dC += dstart
        tl.store(from_start + row + t, tl.sum(dstart * C_rows, 1))
    # Last, so that these tiles need not lie in shared memory beside the loop's.
    dscores += ((b * chunks + c) * groups + g).to(tl.int64) * (Q * Q)
    Cs = tl.load(C + b * C_batch + g * N + tk[:, None] * C_time + n[None, :], inside_k, 0.0)
    sum_dB = tl.dot(tl.load(dscores + q[:, None] * Q + k[None, :], q[:, None] <= k[None, :], 0.0), Cs, sum_dB)
    Bs = tl.load(B + b * B_batch + g * N + tk[:, None] * B_time + n[None, :], inside_k, 0.0)
    sum_dC = tl.dot(tl.load(dscores + k[None, :] * Q + q[:, None], k[None, :] <= q[:, None], 0.0), Bs, sum_dC)
    tl.store(dB + b * dB_batch + g * N + t[:, None] * dB_time + n[None, :], sum_dB.to(dB.dtype.element_ty), inside)
    tl.store(dC + b * dC_batch + g * N + t[:, None] * dC_time + n[None, :], sum_dC.to(dC.dtype.element_ty), inside)


@triton.jit
def _step_gradients_kernel(
    sums, from_start, through, step, A, ddt, partial, ddt_batch, ddt_time, length, heads, chunks, padded, plane,
    Q: tl.constexpr, BLOCK: tl.constexpr, THROUGH: tl.constexpr,
):
    """ddt, and a chunk's part of dA, dD and the gradient of dt_bias: partial (batch, chunks, 3, heads) float32.

    The gradient of the log decay at token t of a chunk sums what passes over t: G_ij for j < t <= i, the start's state
    into outputs i >= t, inputs j < t into the end's state, and the start's state into the end's.
    """
    c, h_block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q = tl.arange(0, Q)
    t = c * Q + q
    h = h_block * BLOCK + tl.arange(0, BLOCK)
    there = (h < heads)[:, None]
    at = (b * heads + h[:, None]).to(tl.int64) * padded + t[None, :]
    inputs, into_end = tl.load(sums + at, there, 0.0), tl.load(sums + plane + at, there, 0.0)
    diagonal, outputs = tl.load(sums + 2 * plane + at, there, 0.0), tl.load(from_start + at, there, 0.0)
    outputs += tl.load(sums + 3 * plane + at, there, 0.0)
    outputs += tl.load(sums + 4 * plane + at, there & (q >= Q // 2)[None, :], 0.0)
    steps = tl.load(step + at, there, 0.0)
    parts = (((b * chunks + c) * heads + h) * THROUGH)[:, None] + tl.arange(0, THROUGH)[None, :]
    passing = outputs - inputs
    ddecay = tl.sum(passing, 1)[:, None] - tl.cumsum(passing - into_end, 1) + passing - into_end
    ddecay += tl.sum(tl.load(through + parts, there, 0.0), 1)[:, None]
    direct = (inputs + into_end) / tl.where(steps > 0.0, steps, 1.0)
    dstep = direct + ddecay * tl.load(A + h, h < heads, 0.0)[:, None]
    draw = dstep * (1.0 - tl.exp(-steps))                                   # softplus' = 1 - exp(-softplus)
    draw = tl.where((t < length)[None, :], draw, 0.0)
    out = ddt + b * ddt_batch + t[None, :] * ddt_time + h[:, None]
    tl.store(out, draw.to(ddt.dtype.element_ty), (t < length)[None, :] & there)
    partial += (b * chunks + c) * 3 * heads + h
    tl.store(partial, tl.sum(ddecay * steps, 1), h < heads)
    tl.store(partial + heads, tl.sum(diagonal, 1), h < heads)
    tl.store(partial + 2 * heads, tl.sum(draw, 1), h < heads)


# Fastest on an H200 at 8B shapes; more registers than these spill.
CHUNK = 128
DECAYS = Tiles(warps=4, stages=1, size=16)
STATE_WALK = Tiles(warps=4, stages=4, size=64)
OUTPUTS = Tiles(warps=8, stages=3, size=128)
GRADIENT_WALK = Tiles(warps=8, stages=3, size=64)
INPUT_GRADIENTS = Tiles(warps=4, stages=1)
SHARED_GRADIENTS = Tiles(warps=8, stages=3, size=64)
STEP_GRADIENTS = Tiles(warps=4, stages=1, size=4)


def supports(x: Tensor, B: Tensor) -> bool:
    """Whether the kernels take these inputs: on a GPU, 2 bytes an element, powers of two that fill a tensor core."""
    sizes = (x.shape[-1], B.shape[-1])
    return (
        x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        and all(16 <= size <= 256 and size & (size - 1) == 0 for size in sizes)
        and x.stride()[2:] == (sizes[0], 1) and B.stride()[2:] == (sizes[1], 1)
    )


def run_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, initial: Tensor | None,
    documents: Tensor | None, y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write y, of any strides whose heads lie side by side. Returns the other outputs of `scan`."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunks = triton.cdiv(t, CHUNK)
    final, step, decay, states = kept_like(x, n)
    _decays_kernel[(chunks, triton.cdiv(h, DECAYS.size), b)](
        dt, dt_bias, A, step, decay, *_strides(dt), t, h, chunks, chunks * CHUNK,
        Q=CHUNK, BLOCK=DECAYS.size, num_warps=DECAYS.warps, num_stages=DECAYS.stages,
    )
    columns, has_documents = min(p, STATE_WALK.size), documents is not None
    documents = step if documents is None else documents
    _state_walk_kernel[(h, p // columns, b)](
        x, B, step, decay, final if initial is None else initial, documents, states, final, *_strides(x, B), t, h,
        h // g, chunks, chunks * CHUNK, HAS_INITIAL=initial is not None, HAS_DOCUMENTS=has_documents, Q=CHUNK, N=n, P=p,
        COLUMNS=columns, num_warps=STATE_WALK.warps, num_stages=_stages(STATE_WALK, n),
    )
    _outputs_kernel[(g, chunks * (CHUNK // OUTPUTS.size), b)](
        x, B, C, D, step, decay, documents, states, y, *_strides(x, B, C, y), t, h, g, chunks, chunks * CHUNK,
        HAS_DOCUMENTS=has_documents, R=h // g, Q=CHUNK, ROWS=OUTPUTS.size, N=n, P=p, num_warps=OUTPUTS.warps,
        num_stages=OUTPUTS.stages,
    )
    return final, step, decay, states


def run_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, step: Tensor,
    decay: Tensor, states: Tensor, documents: Tensor | None, dx: Tensor, ddt: Tensor, dB: Tensor, dC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write dx, ddt, dB and dC, of any strides whose last axes lie side by side. Returns the gradients of A, D, dt_bias
    (float32) and the initial state; without `dfinal` that of the final state is zero."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    chunks, padded = states.shape[1], step.shape[2]
    columns, has_documents = min(p, GRADIENT_WALK.size), documents is not None
    documents = step if documents is None else documents
    dstates, dinitial = torch.empty_like(states), x.new_empty(b, h, n, p, dtype=torch.float32)
    through = x.new_empty(b, chunks, h, p // columns * n, dtype=torch.float32)
    _gradient_walk_kernel[(h, p // columns, b)](
        dy, C, decay, documents, states, dinitial if dfinal is None else dfinal, dstates, dinitial, through,
        *_strides(dy, C), t, h, h // g, chunks, padded, HAS_FINAL=dfinal is not None, HAS_DOCUMENTS=has_documents,
        Q=CHUNK, N=n, P=p, COLUMNS=columns, num_warps=GRADIENT_WALK.warps, num_stages=GRADIENT_WALK.stages,
    )
    sums, from_start = x.new_empty(5, b, h, padded, dtype=torch.float32), torch.empty_like(step)
    dscores = x.new_empty(b, chunks, g, CHUNK, CHUNK)
    _input_gradients_kernel[(g, chunks * 2, b)](
        x, dy, B, C, D, step, decay, documents, dstates, dscores, dx, sums, *_strides(x, dy, B, C, dx), t, h, g, chunks,
        padded, step.numel(), HAS_DOCUMENTS=has_documents, R=h // g, Q=CHUNK, N=n, P=p,
        num_warps=INPUT_GRADIENTS.warps, num_stages=INPUT_GRADIENTS.stages,
    )
    _shared_gradients_kernel[(g, chunks * (CHUNK // SHARED_GRADIENTS.size), b)](
        x, dy, B, C, step, decay, documents, states, dstates, dscores, dB, dC, from_start,
        *_strides(x, dy, B, C, dB, dC), t, h, g, chunks, padded, HAS_DOCUMENTS=has_documents, R=h // g, Q=CHUNK,
        ROWS=SHARED_GRADIENTS.size, N=n, P=p, num_warps=SHARED_GRADIENTS.warps, num_stages=SHARED_GRADIENTS.stages,
    )
    partial = x.new_empty(b * chunks, 3, h, dtype=torch.float32)
    _step_gradients_kernel[(chunks, triton.cdiv(h, STEP_GRADIENTS.size), b)](
        sums, from_start, through, step, A, ddt, partial, *_strides(ddt), t, h, chunks, padded, step.numel(),
        Q=CHUNK, BLOCK=STEP_GRADIENTS.size, THROUGH=through.shape[3], num_warps=STEP_GRADIENTS.warps,
        num_stages=STEP_GRADIENTS.stages,
    )
    dA, dD, ddt_bias = partial.sum(0)
    return dA, dD, ddt_bias, dinitial


@torch.library.custom_op("nemotron_h::chunk_scan", mutates_args=())
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


@torch.library.custom_op("nemotron_h::chunk_scan_backward", mutates_args=())
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
    if dy is None:
        dy = torch.zeros_like(x)
    elif dy.stride()[2:] != (x.shape[3], 1):
        dy = dy.contiguous()
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    *gradients, dinitial = scan_backward(dy, dfinal, x, dt, A, B, C, D, step, decay, states, documents)
    return *gradients, dinitial if ctx.has_initial else None, None


scan.register_autograd(_differentiate, setup_context=_keep)


def _stages(tiles: Tiles, n: int) -> int:
    """Stages of a walk: a larger state, as the 56B model's 256, leaves shared memory for fewer."""
    return tiles.stages if n <= 128 else tiles.stages // 2


def _strides(*tensors: Tensor) -> list[int]:
    """Elements from one sequence and from one token to the next; heads and their elements lie side by side."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]
