"""Distillation on the pretraining engine: a teacher runs beside the student, and the loss is their divergence.

The loss is the forward KL divergence KL(teacher || student) of the logits at temperature 1, and nothing else (paper
section 3.2): no cross-entropy, no hidden states. Student and teacher are spread over the processes alike. A pipeline
stage passes on both their hidden states, side by side in one tensor, so Megatron's schedule sees one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from kernels.forward_kl import forward_kl, row_sums
from kernels.operation import once_differentiable
from model.megatron.spec import HybridModel
from model.processes import TensorRanks

ROWS = 2048                 # of logits whose float32 copies exist at one time, where a process holds part of a row


@dataclass(frozen=True)
class Lesson:
    """What a student is taught from.

    Attributes:
        start: checkpoint of its first weights.
        samples: (sequence_length + 1,) int64 each, in order; at least as many as the run needs.
        teacher: checkpoint of its teacher; without one it learns the next token.
    """

    start: Path
    samples: Sequence[Tensor] | Subset[Tensor]
    teacher: Path | None


class Distiller(MegatronModule):
    """A student and its frozen teacher as one Megatron model.

    In training its output is the divergence; in evaluation the student's next-token losses.
    """

    def __init__(self, student: HybridModel, teacher: HybridModel):
        super().__init__(student.config)
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.pre_process, self.post_process = student.pre_process, student.post_process
        self.share_embeddings_and_output_weights = False
        self.model_type = student.model_type
        self._widths = [student.config.hidden_size, teacher.config.hidden_size]

    @property
    def decoder(self) -> nn.Module:
        """The student's stack of layers."""
        return self.student.decoder

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's hook: what the stage before sent, (sequence, batch, both hidden sizes), or the student's alone."""
        given = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if given is None or given.shape[-1] == self._widths[0]:
            self.student.set_input_tensor(given)
            return
        for model, part in zip((self.student, self.teacher), given.split(self._widths, -1), strict=True):
            model.set_input_tensor(part.contiguous())

    def shapes(self, *both: list[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], ...]:
        """Megatron's hook: shapes of what a stage receives and sends in training, from those of a student alone."""
        return tuple([(*shape[:-1], sum(self._widths)) for shape in shapes] for shapes in both)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None,
                labels: Tensor | None = None, packed_seq_params: Any = None) -> Tensor:
        """(batch, sequence) int64 -> in training (), in evaluation (batch, sequence), nats; before the last pipeline
        stage hidden states."""
        if not self.training:
            return self.student(input_ids, position_ids, attention_mask, labels=labels,
                                packed_seq_params=packed_seq_params)
        with torch.no_grad():
            expected = self.teacher(input_ids, position_ids, attention_mask, packed_seq_params=packed_seq_params)
        got = self.student(input_ids, position_ids, attention_mask, packed_seq_params=packed_seq_params)
        if not self.post_process:
            return torch.cat([got, expected], -1)
        return divergence(got.flatten(0, 1), expected.flatten(0, 1))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), nats, mean over rows; (rows, this process's part of the vocabulary)
    contiguous, of one dtype -> ()."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return forward_kl(student, teacher)
    return _VocabularyParallelKL.apply(student, teacher)


class _VocabularyParallelKL(torch.autograd.Function):
    """Where the vocabulary is split among the tensor-parallel processes only row sums travel, never logits. The
    gradient, (softmax(student) - softmax(teacher)) / rows, is each process's own."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        ranks = TensorRanks()
        ranks.split_over(parallel_state.get_tensor_model_parallel_group())
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        for logits, expected, out in zip(student.split(ROWS), teacher.split(ROWS), gradient.split(ROWS), strict=True):
            logs, target = ranks.normalised(torch.stack([logits, expected]))
            chance = target.exp()
            total += row_sums(chance, target, logs).double().sum()
            out.copy_((logs.exp() - chance) / len(student))
        ranks.over_tensor_ranks(total)
        ctx.save_for_backward(gradient)
        return (total / len(student)).to(torch.promote_types(student.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream.to(gradient.dtype)), None
