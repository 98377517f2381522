"""Cross-entropy over a large vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.arguments import ArgumentError, check_shapes, warn_of_slowness
from kernels.operation import once_differentiable

IGNORED = -100              # a label without a loss, PyTorch's `ignore_index`
_ROWS = 32                  # of logits at a time on a CPU: their float32 copies stay in cache


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses -log softmax(logits)[label], float32 inside; differentiable once.

    On a GPU the gradient takes the logits' place: the backward overwrites them, and autograd refuses any other use of
    them after it. Floor: the forward reads the logits once, the backward reads and writes them once.

    Args:
        logits: (..., vocab) float32 or bfloat16, contiguous.
        labels: (...) int64, from 0 to vocab - 1, or -100: no loss and no gradient.

    Returns:
        (...) float32. On a GPU, which nobody waits for here, the loss of a label out of range is NaN.

    Raises:
        ArgumentError: shapes or devices disagree; on a CPU, a label is out of range.
    """
    check_shapes("cross_entropy", logits=(logits, " ".join(map(str, logits.shape))),
                 labels=(labels, " ".join(map(str, logits.shape[:-1]))))
    rows, targets = logits.flatten(0, -2), labels.flatten().contiguous()
    if logits.is_cuda:
        from kernels.cross_entropy import triton as cross_entropy_triton

        if cross_entropy_triton.supports(rows):
            return cross_entropy_triton.losses(rows, targets)[0].view_as(labels)
        warn_of_slowness("cross_entropy", cross_entropy_triton.TAKES, rows.dtype, f"contiguous: {rows.is_contiguous()}")
    return _CrossEntropy.apply(rows, targets).view_as(labels)


class _CrossEntropy(torch.autograd.Function):
    """For a CPU, a few rows at a time; logits (rows, vocab), labels (rows,) -> losses (rows,) float32.

    The forward leaves softmax - one_hot in the logits' dtype, so that the backward is one product.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ignored = labels == IGNORED
        targets = labels.masked_fill(ignored, 0)
        if len(labels) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
            raise ArgumentError(f"cross_entropy: labels lie between {int(targets.min())} and {int(targets.max())}.\n"
                                f"They must lie between 0 and {logits.shape[1] - 1}, or be {IGNORED}.")
        gradient, losses = torch.empty_like(logits), torch.empty_like(labels, dtype=torch.float32)
        for start in range(0, len(labels), _ROWS):
            block = slice(start, start + _ROWS)
            values = logits[block].to(torch.float32, copy=True)
            target = targets[block, None]
            of_target = values.gather(1, target).squeeze(1)
            largest = values.amax(-1, keepdim=True)
            values.sub_(largest).exp_()
            total = values.sum(-1, keepdim=True)
            torch.sub(torch.log(total).add_(largest).squeeze(1), of_target, out=losses[block])
            values.div_(total).scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            gradient[block] = values.masked_fill_(ignored[block, None], 0)
        ctx.save_for_backward(gradient)
        return losses.masked_fill_(ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(dlosses.to(gradient.dtype).unsqueeze(-1)), None    # a second backward is an error
