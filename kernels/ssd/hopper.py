"""Parts of the scan on Hopper by warps with an occupation each (Triton's Gluon): one warp only loads, by TMA, and warp
groups compute, 64 rows of a product each. What is loaded and what is computed then wait for each other alone, and the
loader needs no registers. Other GPUs and sizes run the kernels of `kernels.ssd.triton`. What these give is the same to
within rounding: dx of a chunk's first half is rounded once here and twice there.

Loads and products meet at barriers in shared memory: a tile's `full` counts the bytes that have come, its `empty` the
warp groups that are done with it. Their phases alternate: what uses a tile for the n-th time waits for phase n % 2.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.launch import grid

CHUNK = 128                     # the only one they take: two halves of the 64 rows of a warp group's product
WIDTH = 64                      # of a tile of a head, at most and at least
LARGEST_STATE = 128             # state_dim whose tiles leave room for a pipeline
SHARED_BYTES = 225 * 1024       # for tiles, of 227 KiB
_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether these kernels run there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def takes(x: Tensor, B: Tensor) -> bool:
    """Whether these kernels are for what `kernels.ssd.triton.supports` says the kernels take."""
    return x.shape[3] <= WIDTH and B.shape[3] <= LARGEST_STATE and is_hopper(x.device)


def _tile_width(tensor: Tensor | TensorDescriptor) -> int:
    return max(WIDTH, tensor.shape[3])


def _tokens(tensor: Tensor, rows: int) -> TensorDescriptor:
    """For tiles (rows, elements) of a head or group of (b, t, heads, elements), zeros beyond its sizes."""
    return _tiled(tensor, (1, rows, 1, _tile_width(tensor)))


def _states(states: Tensor, rows: int) -> TensorDescriptor:
    """For tiles (rows, p) of (b, chunks, heads, n, p)."""
    return _tiled(states.flatten(0, 2), (1, rows, WIDTH))


def _rows(tensor: Tensor) -> TensorDescriptor:
    """For a chunk of (b, heads, tokens) float32."""
    return _tiled(tensor.flatten(0, 1), (1, CHUNK))


def _tiled(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(tensor, tensor.shape, tensor.stride(), list(block), _layout(block, tensor.dtype))


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Kept, for making one takes Python as long as launching a kernel."""
    if dtype == torch.float32:
        return gl.NVMMASharedLayout(0, 32, len(block))
    return gl.NVMMASharedLayout.get_default_for(list(block), _ELEMENTS[dtype])


def _sizes(n: int, once: int, repeated: int) -> dict[str, int]:
    """Tiles' sizes, and stages: as many times `repeated` elements of 2 bytes, a row of steps and one of decays as fit
    into shared memory beside `once` elements."""
    stages = min(4, (SHARED_BYTES - 2 * once) // (2 * repeated + 8 * CHUNK))
    return {"Q": CHUNK, "N": n, "P": WIDTH, "STAGES": stages, "num_warps": 4}


def write_outputs(
    x: Tensor, B: Tensor, C: Tensor, D: Tensor, step: Tensor, decay: Tensor, documents: Tensor | None,
    initial: Tensor | None, states: Tensor, final: Tensor, y: Tensor,
) -> None:
    """`kernels.ssd.triton._write_outputs`."""
    b, t, h, _ = x.shape
    groups, chunks, n = B.shape[2], states.shape[1], _tile_width(B)
    xs, Bs, before, rows = _tokens(x, CHUNK), _tokens(B, CHUNK), _states(states, n), (_rows(step), _rows(decay))
    _walk(xs, Bs, rows, documents, before, initial, states, final, step, backwards=False)
    programs, is_reversed = grid(b, groups, chunks)
    outputs_kernel[programs](
        xs, Bs, _tokens(C, CHUNK), D, *rows, documents, before, _tokens(y, CHUNK // 2), t, h, chunks,
        HAS_DOCUMENTS=documents is not None, REVERSED=is_reversed, R=h // groups,
        **_sizes(n, CHUNK * (2 * n + WIDTH), WIDTH * (CHUNK + n)),
    )


def walk_gradients(
    dy: Tensor, dfinal: Tensor | None, C: Tensor, step: Tensor, decay: Tensor, states: Tensor,
    documents: Tensor | None, dstates: Tensor, dinitial: Tensor, through: Tensor,
) -> None:
    """`kernels.ssd.triton._walk_gradients`."""
    before, rows = _states(states, _tile_width(C)), (_rows(step), _rows(decay))
    _walk(_tokens(dy, CHUNK), _tokens(C, CHUNK), rows, documents, before, dfinal, dstates, dinitial, through,
          backwards=True)


def write_input_gradients(
    dy: Tensor, x: Tensor, B: Tensor, C: Tensor, D: Tensor, step: Tensor, decay: Tensor, documents: Tensor | None,
    dstates: Tensor, sums: Tensor, own_scores: Tensor, dscores: Tensor, dx: Tensor,
) -> None:
    """`kernels.ssd.triton._write_input_gradients`."""
    b, t, h, _ = x.shape
    (chunks, groups), n, half = dscores.shape[1:3], _tile_width(B), CHUNK // 2
    programs, is_reversed = grid(b, groups, chunks)
    input_gradients_kernel[programs](
        _tokens(x, CHUNK), _tokens(dy, CHUNK), _tokens(B, CHUNK), _tokens(C, half), D, _rows(step), _rows(decay),
        documents, _states(dstates, n), dscores, _tokens(dx, half), sums, own_scores, t, h, groups, chunks,
        step.shape[2], step.numel(), HAS_DOCUMENTS=documents is not None, REVERSED=is_reversed, R=h // groups,
        **_sizes(n, 2 * CHUNK * max(n, 2 * WIDTH), WIDTH * (2 * CHUNK + n)),
    )


def write_shared_gradients(
    dy: Tensor, x: Tensor, B: Tensor, C: Tensor, step: Tensor, decay: Tensor, states: Tensor,
    documents: Tensor | None, dstates: Tensor, dscores: Tensor, from_start: Tensor, dB: Tensor, dC: Tensor,
) -> None:
    """`kernels.ssd.triton._write_shared_gradients`."""
    b, t, h, _ = x.shape
    (chunks, groups), n = dscores.shape[1:3], _tile_width(B)
    C_halves, rows, pairs = _tokens(C, CHUNK // 2), (_rows(step), _rows(decay)), dscores.flatten(0, 2)
    programs, is_reversed = grid(b, groups, chunks)
    sizes, all_pairs = _sizes(n, CHUNK * (2 * n + CHUNK), WIDTH * (CHUNK + n)), _tiled(pairs, (1, CHUNK, CHUNK))
    for values, others, given, gradient in ((x, C, dstates, dB), (dy, B, states, dC)):
        shared_gradients_kernel[programs](
            _tokens(values, CHUNK), C_halves, _tokens(others, CHUNK), _states(given, n), *rows, documents, all_pairs,
            _tokens(gradient, CHUNK // 2), from_start, t, h, groups, chunks, step.shape[2], OF_C=gradient is dC,
            HAS_DOCUMENTS=documents is not None, REVERSED=is_reversed, R=h // groups, **sizes,
        )


def _walk(
    values: TensorDescriptor, shared: TensorDescriptor, rows: tuple[TensorDescriptor, TensorDescriptor],
    documents: Tensor | None, given: TensorDescriptor, first: Tensor | None, written: Tensor, last: Tensor,
    through: Tensor, *, backwards: bool,
) -> None:
    (b, t, h, _), n = values.shape, _tile_width(shared)
    walk_kernel[b, h](
        values, shared, *rows, documents, given, first, _states(written, WIDTH), last, through, t, h,
        h // shared.shape[2], written.shape[1], *written.shape[3:], BACKWARDS=backwards, HAS_FIRST=first is not None,
        HAS_DOCUMENTS=documents is not None, **_sizes(n, n * WIDTH, CHUNK * (n + WIDTH) + n * WIDTH * backwards),
    )


@gluon.jit
def _program(REVERSED: gl.constexpr):
    """`kernels.launch.program`."""
    if REVERSED:
        b, at = gl.program_id(2), gl.program_id(0)
    else:
        b, at = gl.program_id(0), gl.program_id(2)
    return b, gl.program_id(1), at


@gluon.jit
def _document(documents, b, t, length):
    """`kernels.ssd.triton._document`."""
    return gl.load(documents + b.to(gl.int64) * length + gl.minimum(gl.maximum(t, 0), length - 1))


@gluon.jit
def _row(tile, COLUMNS: gl.constexpr):
    return tile._reinterpret(tile.dtype, [COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _barriers(STAGES: gl.constexpr, ONCE: gl.constexpr = 2, USERS: gl.constexpr = 2):
    """`ONCE` of one arrival each, for what is loaded once or follows a load; two for each of the stages, which `USERS`
    warp groups read."""
    ready = gl.allocate_shared_memory(gl.int64, [ONCE, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for once in gl.static_range(ONCE):
        mbarrier.init(ready.index(once), 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(empty.index(stage), USERS)
    fence_async_shared()
    return ready, full, empty


@gluon.jit
def _give_back(empty):
    """Without the fence a read may be under way still when TMA, which waits for arrivals, fills the tile again: one was
    overtaken, and gradients were wrong now and then (docs/results/kernels-h200.md)."""
    fence_async_shared()
    mbarrier.arrive(empty)


@gluon.jit
def _tiles(descriptor, COUNT: gl.constexpr):
    return gl.allocate_shared_memory(descriptor.dtype, [COUNT] + descriptor.block_shape, descriptor.layout)


@gluon.jit
def _load_for_walk(
    values, shared, step, decay, given, tiles, barriers, b, h, heads, ratio, chunks,
    BACKWARDS: gl.constexpr, Q: gl.constexpr, STAGES: gl.constexpr,
):
    value_tiles, shared_tiles, step_tiles, decay_tiles, given_tiles = tiles
    full, _, empty = barriers
    for k in range(chunks):
        c, stage = chunks - 1 - k if BACKWARDS else k, k % STAGES
        mbarrier.wait(empty.index(stage), (k // STAGES + 1) % 2)
        is_full = full.index(stage)
        if BACKWARDS:
            mbarrier.expect(
                is_full, values.block_type.nbytes + shared.block_type.nbytes + given.block_type.nbytes + 8 * Q
            )
        else:
            mbarrier.expect(is_full, values.block_type.nbytes + shared.block_type.nbytes + 8 * Q)
        tma.async_copy_global_to_shared(decay, [b * heads + h, c * Q], is_full, decay_tiles.index(stage))
        tma.async_copy_global_to_shared(step, [b * heads + h, c * Q], is_full, step_tiles.index(stage))
        tma.async_copy_global_to_shared(values, [b, c * Q, h, 0], is_full, value_tiles.index(stage))
        tma.async_copy_global_to_shared(shared, [b, c * Q, h // ratio, 0], is_full, shared_tiles.index(stage))
        if BACKWARDS:
            tma.async_copy_global_to_shared(
                given, [(b * chunks + c) * heads + h, 0, 0], is_full, given_tiles.index(stage)
            )


@gluon.jit
def _weigh_for_walk(
    tiles, barriers, documents, b, length, chunks,
    BACKWARDS: gl.constexpr, HAS_DOCUMENTS: gl.constexpr, Q: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """Inputs by what of them is left at a chunk's end; gradients of outputs by what its start's state is in them."""
    value_tiles, _, step_tiles, decay_tiles, _ = tiles
    full, weighed, _ = barriers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // P, P // 8], [4, 1], [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    q = gl.arange(0, Q, of_row)
    for k in range(chunks):
        c, stage = chunks - 1 - k if BACKWARDS else k, k % STAGES
        passes = q >= 0
        if HAS_DOCUMENTS:
            state_at = c * Q - 1 if BACKWARDS else c * Q + Q - 1
            passes = _document(documents, b, c * Q + q, length) == _document(documents, b, state_at, length)
        mbarrier.wait(full.index(stage), k // STAGES % 2)
        decay = _row(decay_tiles.index(stage), Q)
        if BACKWARDS:
            weight = gl.exp2(decay.load(of_row))
        else:
            weight = gl.exp2(decay.slice(Q - 1, 1).load(of_row) - decay.load(of_row))
            weight *= _row(step_tiles.index(stage), Q).load(of_row)
        values = value_tiles.index(stage).reshape([Q, P])
        values.store((values.load(layout) * gl.where(passes, weight, 0.0)[:, None]).to(values.dtype))
        fence_async_shared()
        mbarrier.arrive(weighed.index(stage))


@gluon.jit
def _compute_walk(
    PART: gl.constexpr, tiles, written_tiles, barriers, tensors, sizes, b, h,
    BACKWARDS: gl.constexpr, HAS_FIRST: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """64 rows of a state."""
    value_tiles, shared_tiles, _, decay_tiles, given_tiles = tiles
    full, weighed, empty = barriers
    documents, first, written, last, through = tensors
    length, heads, chunks, rows, columns = sizes
    ROWS: gl.constexpr = 64
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    n, p = PART * ROWS + gl.arange(0, ROWS, of_row), gl.arange(0, P, gl.SliceLayout(0, layout))
    at = (b * heads + h).to(gl.int64) * (rows * columns) + (n[:, None] * columns + p[None, :])
    there = (n < rows)[:, None] & (p < columns)[None, :]
    written_tile = written_tiles.index(PART)
    state = gl.zeros([ROWS, P], gl.float32, layout)
    if HAS_FIRST:
        state = gl.load(first + at, there, 0.0)
    for k in range(chunks):
        c, stage = chunks - 1 - k if BACKWARDS else k, k % STAGES
        goes_on = True
        if HAS_DOCUMENTS:
            goes_on = _document(documents, b, c * Q - 1, length) == _document(documents, b, c * Q + Q - 1, length)
        number = (b * chunks + c) * heads + h
        tma.store_wait(0)
        written_tile.reshape([ROWS, P]).store(state.to(written.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(written, [number, PART * ROWS, 0], written_tile)
        mbarrier.wait(full.index(stage), k // STAGES % 2)
        kept = gl.exp2(_row(decay_tiles.index(stage), Q).slice(Q - 1, 1).load(of_row))
        if HAS_DOCUMENTS:
            kept = gl.where(goes_on, kept, 0.0)
        state *= kept[:, None]
        if BACKWARDS:
            given = given_tiles.index(stage).reshape([N, P]).slice(PART * ROWS, ROWS).load(layout)
            gl.store(through + number.to(gl.int64) * rows + n, gl.sum(state * given.to(gl.float32), 1), n < rows)
        mbarrier.wait(weighed.index(stage), k // STAGES % 2)
        shared = shared_tiles.index(stage).reshape([Q, N]).permute([1, 0]).slice(PART * ROWS, ROWS)
        state = warpgroup_mma(shared, value_tiles.index(stage).reshape([Q, P]), state)
        _give_back(empty.index(stage))
    gl.store(last + at, state, there)
    tma.store_wait(0)


@gluon.jit
def walk_kernel(
    values, shared, step, decay, documents, given, first, written, last, through, length, heads, ratio, chunks, rows,
    columns, BACKWARDS: gl.constexpr, HAS_FIRST: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """A head's states before its chunks, from x and B; or backwards the gradients of those after them, from dy and C,
    and with the states given `through`; and the last one. Between the warp that loads and the groups that multiply
    another one weighs the tokens, ahead of the products."""
    b, h = gl.program_id(0), gl.program_id(1)
    value_tiles, written_tiles = _tiles(values, STAGES), _tiles(written, N // 64)
    given_tiles = value_tiles
    if BACKWARDS:
        given_tiles = _tiles(given, STAGES)
    tiles = (value_tiles, _tiles(shared, STAGES), _tiles(step, STAGES), _tiles(decay, STAGES), given_tiles)
    weighed, full, empty = _barriers(STAGES, STAGES, N // 64)
    barriers, sizes = (full, weighed, empty), (length, heads, chunks, rows, columns)
    tensors = (documents, first, written, last, through)
    if N == 64:
        gl.warp_specialize(
            [
                (_compute_walk, (gl.constexpr(0), tiles, written_tiles, barriers, tensors, sizes, b, h, BACKWARDS,
                                 HAS_FIRST, HAS_DOCUMENTS, Q, N, P, STAGES)),
                (_weigh_for_walk, (tiles, barriers, documents, b, length, chunks, BACKWARDS, HAS_DOCUMENTS, Q, P,
                                   STAGES)),
                (_load_for_walk, (values, shared, step, decay, given, tiles, barriers, b, h, heads, ratio, chunks,
                                  BACKWARDS, Q, STAGES)),
            ],
            [4, 1], [96, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute_walk, (gl.constexpr(0), tiles, written_tiles, barriers, tensors, sizes, b, h, BACKWARDS,
                                 HAS_FIRST, HAS_DOCUMENTS, Q, N, P, STAGES)),
                (_compute_walk, (gl.constexpr(1), tiles, written_tiles, barriers, tensors, sizes, b, h, BACKWARDS,
                                 HAS_FIRST, HAS_DOCUMENTS, Q, N, P, STAGES)),
                (_weigh_for_walk, (tiles, barriers, documents, b, length, chunks, BACKWARDS, HAS_DOCUMENTS, Q, P,
                                   STAGES)),
                (_load_for_walk, (values, shared, step, decay, given, tiles, barriers, b, h, heads, ratio, chunks,
                                  BACKWARDS, Q, STAGES)),
            ],
            [4, 4, 1], [160, 96, 24],
        )


@gluon.jit
def _load_heads(
    values, states, step, decay, tiles, full, empty, b, g, c, heads, chunks,
    R: gl.constexpr, Q: gl.constexpr, STAGES: gl.constexpr, more=None, more_tiles=None,
):
    """A chunk of each head of a group in turn; `more` are other values."""
    value_tiles, state_tiles, step_tiles, decay_tiles = tiles
    for r in range(R):
        h, stage = g * R + r, r % STAGES
        mbarrier.wait(empty.index(stage), (r // STAGES + 1) % 2)
        is_full = full.index(stage)
        VALUES: gl.constexpr = 1 if more is None else 2
        mbarrier.expect(is_full, VALUES * values.block_type.nbytes + states.block_type.nbytes + 8 * Q)
        tma.async_copy_global_to_shared(decay, [b * heads + h, c * Q], is_full, decay_tiles.index(stage))
        tma.async_copy_global_to_shared(step, [b * heads + h, c * Q], is_full, step_tiles.index(stage))
        state = [(b * chunks + c) * heads + h, 0, 0]
        tma.async_copy_global_to_shared(states, state, is_full, state_tiles.index(stage))
        tma.async_copy_global_to_shared(values, [b, c * Q, h, 0], is_full, value_tiles.index(stage))
        if more is not None:
            tma.async_copy_global_to_shared(more, [b, c * Q, h, 0], is_full, more_tiles.index(stage))


@gluon.jit
def _load_for_outputs(
    x, states, step, decay, B, C, tiles, B_tile, C_tile, barriers, b, g, c, heads, chunks,
    R: gl.constexpr, Q: gl.constexpr, STAGES: gl.constexpr,
):
    ready, full, empty = barriers
    mbarrier.expect(ready.index(0), B.block_type.nbytes + C.block_type.nbytes)
    tma.async_copy_global_to_shared(C, [b, c * Q, g, 0], ready.index(0), C_tile)
    tma.async_copy_global_to_shared(B, [b, c * Q, g, 0], ready.index(0), B_tile)
    _load_heads(x, states, step, decay, tiles, full, empty, b, g, c, heads, chunks, R, Q, STAGES)


@gluon.jit
def _compute_outputs(
    HALF: gl.constexpr, tiles, B_tile, C_tile, y_tile, barriers, y, D, documents, b, g, c, length,
    HAS_DOCUMENTS: gl.constexpr,
    R: gl.constexpr, Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """The first or the second half of a chunk, of which the first one sees itself alone."""
    x_tiles, state_tiles, step_tiles, decay_tiles = tiles
    ready, full, empty = barriers
    ROWS: gl.constexpr = Q // 2
    SEEN: gl.constexpr = ROWS * (HALF + 1)
    pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SEEN, 16])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    of_i: gl.constexpr = gl.SliceLayout(1, pairs)
    of_j: gl.constexpr = gl.SliceLayout(0, pairs)
    i, j = c * Q + HALF * ROWS + gl.arange(0, ROWS, of_i), c * Q + gl.arange(0, SEEN, of_j)
    seen = i[:, None] >= j[None, :]
    goes_on = i >= 0
    if HAS_DOCUMENTS:
        own = _document(documents, b, i, length)
        seen = seen & (own[:, None] == _document(documents, b, j, length)[None, :])
        goes_on = own == _document(documents, b, c * Q - 1, length)
    Cs, Bs = C_tile.reshape([Q, N]).slice(HALF * ROWS, ROWS), B_tile.reshape([Q, N]).slice(0, SEEN)
    mbarrier.wait(ready.index(0), 0)
    scores = warpgroup_mma(Cs, Bs.permute([1, 0]), gl.zeros([ROWS, SEEN], gl.float32, pairs), use_acc=False)
    scores = gl.where(seen, scores, 0.0)
    for r in range(R):
        h, stage = g * R + r, r % STAGES
        skip = gl.load(D + h)
        mbarrier.wait(full.index(stage), r // STAGES % 2)
        xs, before = x_tiles.index(stage).reshape([Q, P]), state_tiles.index(stage).reshape([N, P])
        ys = warpgroup_mma(Cs, before, gl.zeros([ROWS, P], gl.float32, outputs), use_acc=False, is_async=True)
        decays, steps = _row(decay_tiles.index(stage), Q), _row(step_tiles.index(stage), Q).slice(0, SEEN).load(of_j)
        i_decays, j_decays = decays.slice(HALF * ROWS, ROWS).load(of_i), decays.slice(0, SEEN).load(of_j)
        mask = scores * gl.exp2(gl.minimum(i_decays[:, None] - j_decays[None, :], 0.0)) * steps[None, :]
        mask = gl.convert_layout(mask.to(y.dtype), gl.DotOperandLayout(0, outputs, 2))
        from_start = gl.where(goes_on, gl.exp2(i_decays), 0.0)
        own_xs = xs.slice(HALF * ROWS, ROWS).load(outputs)
        ys = warpgroup_mma_wait(0, [ys]) * gl.convert_layout(from_start, gl.SliceLayout(1, outputs))[:, None]
        ys = warpgroup_mma(mask, xs.slice(0, SEEN), ys) + skip * own_xs
        _give_back(empty.index(stage))
        tma.store_wait(0)
        y_tile.reshape([ROWS, P]).store(ys.to(y.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [b, c * Q + HALF * ROWS, h, 0], y_tile)
    tma.store_wait(0)


@gluon.jit
def outputs_kernel(
    x, B, C, D, step, decay, documents, states, y, length, heads, chunks,
    HAS_DOCUMENTS: gl.constexpr, REVERSED: gl.constexpr,
    R: gl.constexpr, Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """y = (C B^T * decay) (step x) + decay from the start * C state + D x, a chunk and a group."""
    b, g, c = _program(REVERSED)
    tiles = (_tiles(x, STAGES), _tiles(states, STAGES), _tiles(step, STAGES), _tiles(decay, STAGES))
    B_tile, C_tile, y_tiles = _tiles(B, 1).index(0), _tiles(C, 1).index(0), _tiles(y, 2)
    barriers = _barriers(STAGES)
    gl.warp_specialize(
        [
            (_compute_outputs, (gl.constexpr(0), tiles, B_tile, C_tile, y_tiles.index(0), barriers, y, D, documents,
                                b, g, c, length, HAS_DOCUMENTS, R, Q, N, P, STAGES)),
            (_compute_outputs, (gl.constexpr(1), tiles, B_tile, C_tile, y_tiles.index(1), barriers, y, D, documents,
                                b, g, c, length, HAS_DOCUMENTS, R, Q, N, P, STAGES)),
            (_load_for_outputs, (x, states, step, decay, B, C, tiles, B_tile, C_tile, barriers, b, g, c, heads, chunks,
                                 R, Q, STAGES)),
        ],
        [4, 1], [240, 24],
    )


@gluon.jit
def _load_for_inputs(
    x, dy, states, step, decay, B, C, tiles, dy_tiles, B_tile, C_tiles, barriers, b, g, c, heads, chunks,
    R: gl.constexpr, Q: gl.constexpr, STAGES: gl.constexpr,
):
    ready, full, empty, _ = barriers
    mbarrier.expect(ready.index(0), B.block_type.nbytes + 2 * C.block_type.nbytes)
    tma.async_copy_global_to_shared(B, [b, c * Q, g, 0], ready.index(0), B_tile)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(C, [b, c * Q + half * (Q // 2), g, 0], ready.index(0), C_tiles.index(half))
    _load_heads(x, states, step, decay, tiles, full, empty, b, g, c, heads, chunks, R, Q, STAGES, dy, dy_tiles)


@gluon.jit
def _compute_inputs(
    BLOCK: gl.constexpr, tiles, barriers, tensors, sizes, b, g, c, HAS_DOCUMENTS: gl.constexpr,
    R: gl.constexpr, Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """A block of pairs (inputs j, outputs i): the first half of a chunk with itself (0), the first and the second (1),
    the second with itself (2). Block 1 hands its part of dx, with that of the state at the end, to block 0."""
    per_head, dy_tiles, B_tile, C_tiles, handed_tiles = tiles
    x_tiles, state_tiles, step_tiles, decay_tiles = per_head
    ready, full, empty, handed = barriers
    D, documents, dscores, dx, sums, own_scores = tensors
    length, heads, groups, chunks, padded, plane = sizes
    ROWS: gl.constexpr = Q // 2
    INPUTS: gl.constexpr = BLOCK // 2
    OUTPUTS: gl.constexpr = (BLOCK + 1) // 2
    pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    inputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    of_j: gl.constexpr = gl.SliceLayout(1, pairs)
    of_i: gl.constexpr = gl.SliceLayout(0, pairs)
    of_row: gl.constexpr = gl.SliceLayout(1, inputs)
    j, i, k = gl.arange(0, ROWS, of_j), gl.arange(0, ROWS, of_i), gl.arange(0, ROWS, of_row)
    first_j, first_i = c * Q + INPUTS * ROWS, c * Q + OUTPUTS * ROWS
    seen = j[:, None] <= i[None, :] + (OUTPUTS - INPUTS) * ROWS
    in_last = k >= 0
    if HAS_DOCUMENTS:
        own = _document(documents, b, first_j + j, length)
        seen = seen & (own[:, None] == _document(documents, b, first_i + i, length)[None, :])
        in_last = _document(documents, b, first_j + k, length) == _document(documents, b, c * Q + Q - 1, length)
    Bs = B_tile.reshape([Q, N]).slice(INPUTS * ROWS, ROWS)
    mbarrier.wait(ready.index(0), 0)
    scores = warpgroup_mma(Bs, C_tiles.index(OUTPUTS).reshape([ROWS, N]).permute([1, 0]),
                           gl.zeros([ROWS, ROWS], gl.float32, pairs), use_acc=False)
    # From here on C's tiles, if large enough, hold what block 1 hands over, and dx.
    mbarrier.arrive(handed.index(0))
    mbarrier.wait(handed.index(0), 0)
    part = handed_tiles.index(0)._reinterpret(gl.float32, [ROWS, P], gl.NVMMASharedLayout(128, 32, 2))
    dx_tile = handed_tiles._reinterpret(dx.dtype, [4, 1, ROWS, 1, P], dx.layout).index(2 + INPUTS)
    own_score = gl.zeros([ROWS], gl.float32, of_j)
    if BLOCK != 1:
        own_score = gl.sum(gl.where(j[:, None] == i[None, :], scores, 0.0), 1)
        gl.store(own_scores + (b * groups + g).to(gl.int64) * padded + first_j + j, own_score)
        scores = gl.where(seen & (j[:, None] < i[None, :]), scores, 0.0)
    elif HAS_DOCUMENTS:
        scores = gl.where(seen, scores, 0.0)
    own_score = gl.convert_layout(own_score, of_row)
    dscores_sum = gl.zeros([ROWS, ROWS], gl.float32, pairs)
    plane = gl.cast(plane, gl.int64)
    inputs_plane, outputs_plane = (4 * plane, 4 * plane) if BLOCK == 1 else (0 * plane, 3 * plane)
    for r in range(R):
        h, stage = g * R + r, r % STAGES
        skip = gl.load(D + h)
        row = (b * heads + h).to(gl.int64) * padded
        mbarrier.wait(full.index(stage), r // STAGES % 2)
        xs = x_tiles.index(stage).reshape([Q, P]).slice(INPUTS * ROWS, ROWS)
        dys = dy_tiles.index(stage).reshape([Q, P]).slice(OUTPUTS * ROWS, ROWS)
        dmask = warpgroup_mma(xs, dys.permute([1, 0]), gl.zeros([ROWS, ROWS], gl.float32, pairs), use_acc=False,
                              is_async=True)
        decay, step = _row(decay_tiles.index(stage), Q), _row(step_tiles.index(stage), Q).slice(INPUTS * ROWS, ROWS)
        j_decays, i_decays = decay.slice(INPUTS * ROWS, ROWS).load(of_j), decay.slice(OUTPUTS * ROWS, ROWS).load(of_i)
        factor = i_decays[None, :] - j_decays[:, None]
        if BLOCK != 1:
            factor = gl.minimum(factor, 0.0)        # where an output is before an input, and its score zero
        factor = gl.exp2(factor) * step.load(of_j)[:, None]
        mask = gl.convert_layout((scores * factor).to(dx.dtype), gl.DotOperandLayout(0, inputs, 2))
        dmask = warpgroup_mma_wait(0, [dmask]) * factor
        dscores_sum += dmask
        G = dmask * scores
        gl.store(sums + inputs_plane + row + first_j + j, gl.sum(G, 1))
        gl.store(sums + outputs_plane + row + first_i + i, gl.sum(G, 0))
        dxs = gl.zeros([ROWS, P], gl.float32, inputs)
        if BLOCK != 0:
            weight = gl.exp2(decay.slice(Q - 1, 1).load(of_row) - decay.slice(INPUTS * ROWS, ROWS).load(of_row))
            weight = gl.where(in_last, weight * step.load(of_row), 0.0)
            dxs = warpgroup_mma(Bs, state_tiles.index(stage).reshape([N, P]), dxs, use_acc=False) * weight[:, None]
            gl.store(sums + plane + row + first_j + k, gl.sum(dxs * xs.load(inputs), 1))
        dxs = warpgroup_mma(mask, dys, dxs)
        if BLOCK == 1:
            _give_back(empty.index(stage))
            mbarrier.wait(handed.index(2), (r + 1) % 2)
            part.store(dxs)
            mbarrier.arrive(handed.index(1))
        else:
            own_dys = dys.load(inputs).to(gl.float32)
            gl.store(sums + 2 * plane + row + first_j + k, gl.sum(xs.load(inputs).to(gl.float32) * own_dys, 1))
            dxs += (skip + own_score * step.load(of_row))[:, None] * own_dys
            _give_back(empty.index(stage))
            if BLOCK == 0:
                mbarrier.wait(handed.index(1), r % 2)
                dxs += part.load(inputs)
                mbarrier.arrive(handed.index(2))
            tma.store_wait(0)
            dx_tile.reshape([ROWS, P]).store(dxs.to(dx.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(dx, [b, first_j, h, 0], dx_tile)
    dscores_sum = gl.where(seen, dscores_sum, 0.0)
    at = ((b * chunks + c) * groups + g).to(gl.int64) * (Q * Q) + INPUTS * (ROWS * Q) + OUTPUTS * ROWS
    gl.store(dscores + at + (j[:, None] * Q + i[None, :]), dscores_sum.to(dx.dtype))
    tma.store_wait(0)


@gluon.jit
def input_gradients_kernel(
    x, dy, B, C, D, step, decay, documents, dstates, dscores, dx, sums, own_scores, length, heads, groups, chunks,
    padded, plane, HAS_DOCUMENTS: gl.constexpr, REVERSED: gl.constexpr,
    R: gl.constexpr, Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """dx, the gradient of C B^T summed over a group's heads (transposed), and the sums a token of
    `kernels.ssd.triton._input_gradients_kernel`: a chunk and a group."""
    b, g, c = _program(REVERSED)
    per_head = (_tiles(x, STAGES), _tiles(dstates, STAGES), _tiles(step, STAGES), _tiles(decay, STAGES))
    dy_tiles, B_tile, C_tiles = _tiles(dy, STAGES), _tiles(B, 1).index(0), _tiles(C, 2)
    handed_tiles = C_tiles
    if N < 2 * P:
        handed_tiles = gl.allocate_shared_memory(C.dtype, [2, 1, Q // 2, 1, 2 * P], C.layout)
    ready, full, empty = _barriers(STAGES, 1, 3)
    handed = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    mbarrier.init(handed.index(0), 3)
    mbarrier.init(handed.index(1), 1)
    mbarrier.init(handed.index(2), 1)
    fence_async_shared()
    tiles, barriers = (per_head, dy_tiles, B_tile, C_tiles, handed_tiles), (ready, full, empty, handed)
    tensors, sizes = (D, documents, dscores, dx, sums, own_scores), (length, heads, groups, chunks, padded, plane)
    gl.warp_specialize(
        [
            (_compute_inputs, (gl.constexpr(2), tiles, barriers, tensors, sizes, b, g, c, HAS_DOCUMENTS,
                               R, Q, N, P, STAGES)),
            (_compute_inputs, (gl.constexpr(1), tiles, barriers, tensors, sizes, b, g, c, HAS_DOCUMENTS,
                               R, Q, N, P, STAGES)),
            (_compute_inputs, (gl.constexpr(0), tiles, barriers, tensors, sizes, b, g, c, HAS_DOCUMENTS,
                               R, Q, N, P, STAGES)),
            (_load_for_inputs, (x, dy, dstates, step, decay, B, C, per_head, dy_tiles, B_tile, C_tiles, barriers, b, g,
                                c, heads, chunks, R, Q, STAGES)),
        ],
        [4, 4, 1], [160, 160, 24],
    )


@gluon.jit
def _load_for_shared(
    values, states, step, decay, own, others, dscores, tiles, own_tiles, others_tile, pairs_tile, barriers,
    b, g, c, heads, groups, chunks,
    OF_C: gl.constexpr, R: gl.constexpr, Q: gl.constexpr, STAGES: gl.constexpr,
):
    ready, full, empty = barriers
    if OF_C:
        mbarrier.expect(ready.index(0), 2 * own.block_type.nbytes)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                own, [b, c * Q + half * (Q // 2), g, 0], ready.index(0), own_tiles.index(half)
            )
    _load_heads(values, states, step, decay, tiles, full, empty, b, g, c, heads, chunks, R, Q, STAGES)
    mbarrier.expect(ready.index(1), others.block_type.nbytes + dscores.block_type.nbytes)
    tma.async_copy_global_to_shared(others, [b, c * Q, g, 0], ready.index(1), others_tile)
    tma.async_copy_global_to_shared(dscores, [(b * chunks + c) * groups + g, 0, 0], ready.index(1), pairs_tile)


@gluon.jit
def _compute_shared(
    HALF: gl.constexpr, tiles, own_tile, others_tile, pairs_tile, barriers, gradient, from_start, documents,
    b, g, c, length, heads, padded, OF_C: gl.constexpr, HAS_DOCUMENTS: gl.constexpr,
    R: gl.constexpr, Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """The first or the second half of a chunk."""
    value_tiles, state_tiles, step_tiles, decay_tiles = tiles
    ready, full, empty = barriers
    ROWS: gl.constexpr = Q // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    factors: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    t = c * Q + HALF * ROWS + gl.arange(0, ROWS, of_row)
    passes = t >= 0
    if HAS_DOCUMENTS:
        state_at = c * Q - 1 if OF_C else c * Q + Q - 1
        passes = _document(documents, b, t, length) == _document(documents, b, state_at, length)
    sums = gl.zeros([ROWS, N], gl.float32, layout)
    if OF_C:
        mbarrier.wait(ready.index(0), 0)
    for r in range(R):
        h, stage = g * R + r, r % STAGES
        mbarrier.wait(full.index(stage), r // STAGES % 2)
        rows = value_tiles.index(stage).reshape([Q, P]).slice(HALF * ROWS, ROWS)
        state = state_tiles.index(stage).reshape([N, P]).permute([1, 0])
        decay, step = _row(decay_tiles.index(stage), Q), _row(step_tiles.index(stage), Q)
        decays = decay.slice(HALF * ROWS, ROWS).load(of_row)
        if OF_C:
            dstart = warpgroup_mma(rows, state, gl.zeros([ROWS, N], gl.float32, layout), use_acc=False)
            _give_back(empty.index(stage))
            dstart *= gl.where(passes, gl.exp2(decays), 0.0)[:, None]
            row = (b * heads + h).to(gl.int64) * padded
            gl.store(from_start + row + t, gl.sum(dstart * own_tile.reshape([ROWS, N]).load(layout), 1))
            sums += dstart
        else:
            weight = gl.exp2(decay.slice(Q - 1, 1).load(of_row) - decays) * step.slice(HALF * ROWS, ROWS).load(of_row)
            weight = gl.convert_layout(gl.where(passes, weight, 0.0), gl.SliceLayout(1, factors))
            sums = warpgroup_mma((rows.load(factors) * weight[:, None]).to(rows.dtype), state, sums)
            _give_back(empty.index(stage))
    mbarrier.wait(ready.index(1), 0)
    # Pairs are there where an output, their column, is not before an input, their row: half 1 of dC and half 0 of dB
    # have pairs with both halves.
    FIRST: gl.constexpr = 0 if OF_C else HALF * ROWS
    COUNT: gl.constexpr = ROWS * (HALF + 1) if OF_C else Q - HALF * ROWS
    pairs = pairs_tile.reshape([Q, Q])
    if OF_C:
        pairs = pairs.permute([1, 0])
    pairs = pairs.slice(HALF * ROWS, ROWS).slice(FIRST, COUNT, 1)
    sums = warpgroup_mma(pairs, others_tile.reshape([Q, N]).slice(FIRST, COUNT), sums)
    own_tile.reshape([ROWS, N]).store(sums.to(gradient.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(gradient, [b, c * Q + HALF * ROWS, g, 0], own_tile)
    tma.store_wait(0)


@gluon.jit
def shared_gradients_kernel(
    values, own, others, states, step, decay, documents, dscores, gradient, from_start, length, heads, groups, chunks,
    padded, OF_C: gl.constexpr, HAS_DOCUMENTS: gl.constexpr, REVERSED: gl.constexpr,
    R: gl.constexpr, Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr,
):
    """dB from x, C and the gradients of the states after chunks, or dC and `from_start` from dy, B and the states
    before: a chunk and a group."""
    b, g, c = _program(REVERSED)
    tiles = (_tiles(values, STAGES), _tiles(states, STAGES), _tiles(step, STAGES), _tiles(decay, STAGES))
    own_tiles, others_tile, pairs_tile = _tiles(gradient, 2), _tiles(others, 1).index(0), _tiles(dscores, 1).index(0)
    barriers = _barriers(STAGES)
    gl.warp_specialize(
        [
            (_compute_shared, (gl.constexpr(0), tiles, own_tiles.index(0), others_tile, pairs_tile, barriers, gradient,
                               from_start, documents, b, g, c, length, heads, padded, OF_C, HAS_DOCUMENTS,
                               R, Q, N, P, STAGES)),
            (_compute_shared, (gl.constexpr(1), tiles, own_tiles.index(1), others_tile, pairs_tile, barriers, gradient,
                               from_start, documents, b, g, c, length, heads, padded, OF_C, HAS_DOCUMENTS,
                               R, Q, N, P, STAGES)),
            (_load_for_shared, (values, states, step, decay, own, others, dscores, tiles, own_tiles, others_tile,
                                pairs_tile, barriers, b, g, c, heads, groups, chunks, OF_C, R, Q, STAGES)),
        ],
        [4, 1], [240, 24],
    )
