"""`kernels.cross_entropy` on CUDA: one pass over a row of logits gives its loss, a second writes its gradient in place.

A program has one row. The largest value and the sum of exponentials are kept for each of some lanes and scaled again
when a lane's maximum grows; the lanes meet once, at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import RowTiles
from kernels.operation import once_differentiable

LOWEST = tl.constexpr(-3.0e38)          # finite: the difference of two infinities is no number
IGNORED = tl.constexpr(-100)            # PyTorch's `ignore_index`
_VECTOR_BYTES = 16


@triton.jit
def _log_sum_exp(row, vocab, LANES: tl.constexpr, WIDTH: tl.constexpr):
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    largest = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab, LANES * WIDTH):
        values = tl.load(row + start + lane, start + lane < vocab, -float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(values, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(values - larger[:, None]), 1)
        largest = larger
    top = tl.max(largest, 0)
    return top + tl.log(tl.sum(total * tl.exp(largest - top), 0))


@triton.jit
def _logit_of(row, label, vocab):
    """The label's logit; NaN for a label out of range, rather than another row's."""
    return tl.load(row + label, (label >= 0) & (label < vocab), float("nan")).to(tl.float32)


@triton.jit
def _losses_kernel(logits, labels, losses, log_sum_exps, stride, vocab, LANES: tl.constexpr, WIDTH: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + r)
    of_label = _logit_of(logits + r * stride, label, vocab)
    log_sum_exp = _log_sum_exp(logits + r * stride, vocab, LANES, WIDTH)
    tl.store(losses + r, tl.where(label == IGNORED, 0.0, log_sum_exp - of_label))
    tl.store(log_sum_exps + r, log_sum_exp)


@triton.jit
def _gradient_kernel(
    logits, labels, log_sum_exps, weights, weights_stride, stride, vocab, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + r)
    weight = tl.where(label == IGNORED, 0.0, tl.load(weights + r * weights_stride))
    log_sum_exp = tl.load(log_sum_exps + r)
    row = logits + r * stride
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tiles = tl.cdiv(vocab, LANES * WIDTH)
    for tile in range(tiles):
        at = (tiles - 1 - tile) * LANES * WIDTH + lane
        values = tl.load(row + at, at < vocab, 0.0).to(tl.float32)
        gradient = tl.exp(values - log_sum_exp) - tl.where(at == label, 1.0, 0.0)
        tl.store(row + at, (weight * gradient).to(row.dtype.element_ty), at < vocab)


# Fastest on an H200 at a vocabulary of 131072.
LOSSES = RowTiles(bytes=8192, warps=8)
GRADIENT = RowTiles(bytes=32768, warps=32)


TAKES = "at most 4 bytes an element and contiguous logits"


def supports(logits: Tensor) -> bool:
    """Whether the kernels take logits (rows, vocab) like these: on a GPU, as `TAKES` says."""
    return logits.is_cuda and logits.itemsize <= 4 and logits.is_contiguous()


def lanes(logits: Tensor, tiles: RowTiles) -> dict[str, int]:
    """Launch parameters: lanes of a row, 16 bytes each, and warps."""
    width = _VECTOR_BYTES // logits.itemsize
    return {"LANES": tiles.bytes // _VECTOR_BYTES, "WIDTH": width, "num_warps": tiles.warps}


@torch.library.custom_op("nemotron_h::cross_entropy", mutates_args=())
def losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the logarithms of the sums of exponentials, both (rows,) float32."""
    rows, vocab = logits.shape
    values, log_sum_exps = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    _losses_kernel[(rows,)](
        logits, labels, values, log_sum_exps, logits.stride(0), vocab, **lanes(logits, LOSSES)
    )
    return values, log_sum_exps


@losses.register_fake
def _losses_like(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    rows = labels.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("nemotron_h::cross_entropy_backward", mutates_args=("logits",))
def backward(logits: Tensor, labels: Tensor, log_sum_exps: Tensor, dlosses: Tensor) -> None:
    """The logits become their gradient: dlosses * (softmax - one_hot)."""
    rows, vocab = logits.shape
    _gradient_kernel[(rows,)](
        logits, labels, log_sum_exps, dlosses, dlosses.stride(0), logits.stride(0), vocab, **lanes(logits, GRADIENT)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, dlosses: Tensor, _: Tensor) -> tuple[Tensor, None]:
    logits, labels, log_sum_exps = ctx.saved_tensors
    backward(logits, labels, log_sum_exps, dlosses)
    return logits.detach(), None


losses.register_autograd(once_differentiable(_differentiate), setup_context=_keep)
