"""`kernels.cached_attention.token_attention` on CUDA: flash decoding, the cache read once, in splits of its length.

A program holds all query heads of a group, so that keys and values come from memory once, and walks one split; a second
kernel weighs the splits' outputs by their sums. The number of splits is fixed by the batch, their length by the
sequence's position, read on the device: a captured graph fills the GPU at every length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = math.log2(math.e)
LEAST_ROWS = 16             # of a tensor core's product


class AttentionTiles(NamedTuple):
    """How the walk over cached tokens is launched."""

    tokens: int             # a step of the walk takes
    warps: int
    stages: int
    programs: int           # to share the work evenly among the multiprocessors
    splits: int             # at most


@triton.jit
def _split_kernel(
    q, keys, values, positions, outputs, log_sums, scale, max_length, groups,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):
    """One split of the tokens for the `HEADS` query heads of a sequence's group."""
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    length = (tl.load(positions + row // groups) + 1).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    start = split * share
    end = tl.minimum(start + share, length)
    head, d = tl.arange(0, ROWS), tl.arange(0, D)
    mine = head < HEADS
    qs = tl.load(q + (row * HEADS + head)[:, None] * D + d[None, :], mine[:, None], 0.0)
    cache = row * max_length * D
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, D), tl.float32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        at = cache + token[:, None] * D + d[None, :]
        inside = (token < end)[:, None]
        ks = tl.load(keys + at, inside, 0.0)
        vs = tl.load(values + at, inside, 0.0)
        scores = tl.where((token < end)[None, :], tl.dot(qs, tl.trans(ks)) * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(weights, 1)
        out = tl.dot(weights.to(vs.dtype), vs, out * kept[:, None])
        highest = higher
    at = (row * HEADS + head) * splits + split
    tl.store(outputs + at[:, None] * D + d[None, :], out / tl.maximum(total, 1e-30)[:, None], mine[:, None])
    tl.store(log_sums + at, highest + tl.log2(total), mine)


@triton.jit
def _merge_kernel(outputs, log_sums, y, splits, D: tl.constexpr, SPLITS: tl.constexpr):
    row, s, d = tl.program_id(0).to(tl.int64), tl.arange(0, SPLITS), tl.arange(0, D)
    sums = tl.load(log_sums + row * splits + s, s < splits, float("-inf"))
    weights = tl.exp2(sums - tl.max(sums, 0))
    outs = tl.load(outputs + (row * splits + s)[:, None] * D + d[None, :], (s < splits)[:, None], 0.0)
    merged = tl.sum(outs * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(y + row * D + d, merged.to(y.dtype.element_ty))


TILES = AttentionTiles(tokens=64, warps=4, stages=3, programs=1056, splits=64)


TAKES = "bfloat16 or float16, contiguous caches, a head_dim that is a power of two from 16 to 256"


def supports(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels take these: on a GPU, as `TAKES` says."""
    head_dim = q.shape[-1]
    return (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.dtype == keys.dtype == values.dtype
            and 16 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0
            and keys.is_contiguous() and values.is_contiguous())


@torch.library.custom_op("nemotron_h::token_attention", mutates_args=())
def attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """(batch, heads, head_dim), contiguous; shapes as in `kernels.cached_attention`."""
    batch, heads, head_dim = q.shape
    groups, max_length = keys.shape[1:3]
    rows = batch * groups
    splits = max(1, min(triton.cdiv(TILES.programs, rows), TILES.splits, triton.cdiv(max_length, TILES.tokens)))
    outputs = q.new_empty(batch * heads, splits, head_dim, dtype=torch.float32)
    log_sums = q.new_empty(batch * heads, splits, dtype=torch.float32)
    y = q.new_empty(batch, heads, head_dim)
    per_group = heads // groups
    _split_kernel[(rows, splits)](
        q.contiguous(), keys, values, positions.contiguous(), outputs, log_sums, LOG2_E / math.sqrt(head_dim),
        max_length, groups,
        HEADS=per_group, ROWS=max(LEAST_ROWS, triton.next_power_of_2(per_group)), D=head_dim, BLOCK=TILES.tokens,
        num_warps=TILES.warps, num_stages=TILES.stages,
    )
    _merge_kernel[(batch * heads,)](
        outputs, log_sums, y, splits, D=head_dim, SPLITS=triton.next_power_of_2(splits), num_warps=4
    )
    return y


@attend.register_fake
def _like(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return q.new_empty(q.shape)
