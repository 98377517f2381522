"""Forward KL divergence between two rows of logits, the loss of distillation (paper section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.arguments import check_any, check_dtypes, check_shapes, warn_of_slowness
from kernels.operation import once_differentiable, outside_autocast

_ROWS = 64                  # of logits at a time on a CPU: their float32 copies stay in cache


@outside_autocast
def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)) in nats at temperature 1, the mean over rows; differentiable once.

    No gradient goes to the teacher. A token to which the teacher gives no chance (a logit of -inf) contributes nothing
    whatever the student's logit is. The sums run in float32 or better, a stretch of the vocabulary at a time on a GPU
    and some rows at a time on a CPU, so that neither distribution ever exists in float32 as a whole. Floor: two reads
    of both logits and one write of the gradient, which is made on the way.

    Args:
        student, teacher: (rows, vocab), contiguous, of one float type.

    Returns:
        () float32, float64 for float64 logits.

    Raises:
        ArgumentError: shapes, devices or dtypes disagree, or there is no row.
    """
    check_shapes("forward_kl", student=(student, "rows vocab"), teacher=(teacher, "rows vocab"))
    check_dtypes("forward_kl", student=student, teacher=teacher)
    check_any("forward_kl", student=student)
    return _ForwardKL.apply(student, teacher)


def row_sums(chance: Tensor, target: Tensor, logs: Tensor) -> Tensor:
    """Sums over the vocabulary of chance * (target - logs), the limit 0 where there is no chance.

    Args:
        chance, target, logs: (rows, vocab): the teacher's probabilities and their logarithms, the student's logarithms.

    Returns:
        (rows,), nats; of their dtype.
    """
    return torch.linalg.vecdot(chance, (target - logs).masked_fill_(chance == 0, 0))


class _ForwardKL(torch.autograd.Function):
    """The gradient is (softmax(student) - softmax(teacher)) / rows."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        gradient = torch.empty_like(student)
        if student.is_cuda:
            from kernels.forward_kl import triton as forward_kl_triton

            if forward_kl_triton.supports(student, teacher):
                ctx.save_for_backward(gradient)
                return forward_kl_triton.divergences(student, teacher, gradient).mean()
            warn_of_slowness("forward_kl", forward_kl_triton.TAKES, student.dtype,
                             f"contiguous: {student.is_contiguous()}, {teacher.is_contiguous()}")
        exact = torch.promote_types(student.dtype, torch.float32)
        total = student.new_zeros((), dtype=torch.float64)
        for part, expected, out in zip(
            student.split(_ROWS), teacher.split(_ROWS), gradient.split(_ROWS), strict=True
        ):
            logs, target = part.to(exact).log_softmax(dim=-1), expected.to(exact).log_softmax(dim=-1)
            chance = target.exp()
            total += row_sums(chance, target, logs).double().sum()
            out.copy_((logs.exp_() - chance) / len(student))
        ctx.save_for_backward(gradient)
        return (total / len(student)).to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream.to(gradient.dtype)), None          # a second backward is an error
