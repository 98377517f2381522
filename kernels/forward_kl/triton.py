"""`kernels.forward_kl` on CUDA: a program has one row of both logits and walks over the vocabulary twice.

The first walk finds both logarithms of the sums of exponentials, the second the divergence and the gradient; it goes
backwards, so that it finds in the second-level cache what the first read last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy.triton import _log_sum_exp, lanes
from kernels.launch import RowTiles

ROW = RowTiles(bytes=16384, warps=16)
TAKES = "at most 4 bytes an element and contiguous logits"


@triton.jit
def _kernel(student, teacher, divergences, gradient, vocab, scale, LANES: tl.constexpr, WIDTH: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    student, teacher, gradient = student + r * vocab, teacher + r * vocab, gradient + r * vocab
    of_student = _log_sum_exp(student, vocab, LANES, WIDTH)
    of_teacher = _log_sum_exp(teacher, vocab, LANES, WIDTH)
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((LANES,), tl.float32)
    tiles = tl.cdiv(vocab, LANES * WIDTH)
    for tile in range(tiles):
        at = (tiles - 1 - tile) * LANES * WIDTH + lane
        inside = at < vocab
        logs = tl.load(student + at, inside, 0.0).to(tl.float32) - of_student
        target = tl.load(teacher + at, inside, 0.0).to(tl.float32) - of_teacher
        chance = tl.exp(target)
        # Not `> 0`: a chance that is not a number is to be seen.
        total += tl.sum(tl.where(inside & (chance != 0), chance * (target - logs), 0.0), 1)
        tl.store(gradient + at, (scale * (tl.exp(logs) - chance)).to(gradient.dtype.element_ty), inside)
    tl.store(divergences + r, tl.sum(total, 0))


def supports(student: Tensor, teacher: Tensor) -> bool:
    """Whether the kernel takes these logits (rows, vocab): on a GPU, as `TAKES` says."""
    return all(logits.is_cuda and logits.itemsize <= 4 and logits.is_contiguous() for logits in (student, teacher))


@torch.library.custom_op("nemotron_h::forward_kl", mutates_args=("gradient",))
def divergences(student: Tensor, teacher: Tensor, gradient: Tensor) -> Tensor:
    """KL of each row (rows,) float32; (softmax(student) - softmax(teacher)) / rows is written to `gradient`."""
    rows, vocab = student.shape
    values = student.new_empty(rows, dtype=torch.float32)
    _kernel[(rows,)](student, teacher, values, gradient, vocab, 1 / rows, **lanes(student, ROW))
    return values


@divergences.register_fake
def _like(student: Tensor, teacher: Tensor, gradient: Tensor) -> Tensor:
    return student.new_empty(student.shape[0], dtype=torch.float32)
