"""Cross-entropy over a large vocabulary: of given logits, and fused with the linear layer that makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.arguments import ArgumentError, check_dtypes, check_shapes, warn_of_slowness
from kernels.operation import once_differentiable, outside_autocast

IGNORED = -100              # a label without a loss, PyTorch's `ignore_index`
_ROWS = 32                  # of logits at a time on a CPU: their float32 copies stay in cache
_BLOCK_BYTES = 2**30        # of logits at a time in linear_cross_entropy


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
    return CrossEntropy.apply(rows, targets).view_as(labels)


@outside_autocast
def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses of logits = hidden weight^T, whose logits never exist all at once.

    Rows go in blocks of 1 GiB of logits. The forward computes each block's logits, losses and gradient, and from it
    the block's part of both gradients, so that no logits are kept and none is computed twice: three matrix products in
    all. That is why the rows' weights (a loss mask over the number of tokens, say) are arguments: the sum's gradient
    is one number, which the backward multiplies in. The weight's gradient is added up in the weight's dtype, rounded
    once a block. Differentiable once, in hidden and weight. Without gradients only the losses are computed.

    Floor: 6 rows hidden vocab operations forward and backward. Beyond inputs, gradients and 1 GiB of logits, memory
    is a few bytes a row.

    Args:
        hidden: (..., hidden) float32 or bfloat16.
        weight: (vocab, hidden), hidden's dtype.
        labels: (...) int64, from 0 to vocab - 1, or -100: no loss and no gradient.
        row_weights: (...) float32.

    Returns:
        sum(row_weights * losses) (), and the losses (...), float32; the losses carry no gradient. As `cross_entropy`
        for labels out of range.

    Raises:
        ArgumentError: shapes, devices or the dtypes of hidden and weight disagree; on a CPU, a label is out of range.
    """
    rows = " ".join(map(str, hidden.shape[:-1]))
    check_shapes("linear_cross_entropy", hidden=(hidden, f"{rows} hidden"), weight=(weight, "vocab hidden"),
                 labels=(labels, rows), row_weights=(row_weights, rows))
    check_dtypes("linear_cross_entropy", hidden=hidden, weight=weight)
    flat = (hidden.flatten(0, -2), weight, labels.flatten().contiguous(), row_weights.flatten().float().contiguous())
    total, losses = _LinearCrossEntropy.apply(*flat, torch.is_grad_enabled())
    return total, losses.view_as(labels)


class CrossEntropy(torch.autograd.Function):
    """For a CPU, a few rows at a time; logits (..., vocab), labels (...) -> losses (...) float32.

    The forward leaves softmax - one_hot in the logits' dtype, so that the backward is one product.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (..., vocabulary), labels (...) int64 -> losses (...); the gradient is made with them."""
        gradient = torch.empty_like(logits)
        losses = _losses_and_gradient(logits.flatten(0, -2), labels.flatten(), None, gradient.flatten(0, -2))
        ctx.save_for_backward(gradient)
        return losses.view_as(labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None]:
        """dlosses (...) -> the gradient of the logits, in place."""
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(dlosses.to(gradient.dtype).unsqueeze(-1)), None    # a second backward is an error


class _LinearCrossEntropy(torch.autograd.Function):
    """On (rows, hidden); a block's logits turn into their gradient where they lie."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, row_weights: Tensor, differentiate: bool
    ) -> tuple[Tensor, Tensor]:
        dhidden = torch.empty_like(hidden) if differentiate and ctx.needs_input_grad[0] else None
        dweight = torch.empty_like(weight) if differentiate and ctx.needs_input_grad[1] else None
        losses = torch.empty_like(row_weights)
        size = max(1, _BLOCK_BYTES // (weight.shape[0] * hidden.element_size()))
        for start in range(0, max(1, len(labels)), size):        # no rows: one empty block, which zeroes the gradient
            block = slice(start, start + size)
            logits = hidden[block] @ weight.t()
            if dhidden is None and dweight is None:
                losses[block] = cross_entropy(logits, labels[block])
            else:
                losses[block] = _replace_by_gradient(logits, labels[block], row_weights[block])
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[block])
            if dweight is not None:
                dweight.addmm_(logits.t(), hidden[block], beta=min(start, 1))
            del logits                                           # before the next block's are made
        ctx.save_for_backward(dhidden, dweight)
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, row_weights), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = (None if gradient is None else gradient.mul_(dtotal) for gradient in ctx.saved_tensors)
        return dhidden, dweight, None, None, None                                # a second backward is an error


def _replace_by_gradient(logits: Tensor, labels: Tensor, row_weights: Tensor) -> Tensor:
    """Losses (rows,) of logits (rows, vocab), which become row_weights * (softmax - one_hot)."""
    if logits.is_cuda:
        from kernels.cross_entropy import triton as cross_entropy_triton

        if cross_entropy_triton.supports(logits):
            return cross_entropy_triton.replace_by_gradient(logits, labels, row_weights)
    return _losses_and_gradient(logits, labels, row_weights, logits)


def _losses_and_gradient(logits: Tensor, labels: Tensor, row_weights: Tensor | None, gradient: Tensor) -> Tensor:
    """Losses (rows,) of logits (rows, vocab), and into `gradient` softmax - one_hot times the weights."""
    ignored = labels == IGNORED
    targets = labels.masked_fill(ignored, 0)
    if len(labels) and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ArgumentError(f"cross_entropy: labels lie between {int(targets.min())} and {int(targets.max())}.\n"
                            f"They must lie between 0 and {logits.shape[1] - 1}, or be {IGNORED}.")
    losses = torch.empty_like(labels, dtype=torch.float32)
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
        values.masked_fill_(ignored[block, None], 0)
        gradient[block] = values if row_weights is None else values.mul_(row_weights[block, None])
    return losses.masked_fill_(ignored, 0)
