"""Distillation of a cut model towards its parent: a training run of `model.training.trainer` with a teacher beside it
(paper section 3.2)."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor
from torch.utils.data import Subset

from model import checkpoint
from model.compression.config import CompressConfig
from model.compression.resume import ResultCache, from_main_process
from model.config import PretrainConfig, ScheduleConfig
from model.integrity import is_whole
from model.megatron.distributed import Parallelism, device, is_main_process
from model.megatron.precision import Precision, PrecisionName, choose_precision
from model.processes import release_memory
from model.training.distillation import Lesson
from model.training.trainer import Trainer

Objective = Literal["kl", "cross_entropy"]


class Distilled(NamedTuple):
    """A student after distillation: its checkpoint, and (step, tokens, loss before the step) of every step."""

    directory: Path
    curve: list[tuple[int, int, float]]


def recipe_of(config: CompressConfig, pretrain: PretrainConfig, tokens: int, sequence_length: int) -> PretrainConfig:
    """The recipe of a distillation over `tokens`, rounded up to whole batches: the parent's, with `config`'s batches,
    rates and cosine."""
    batch = config.global_batch_size * sequence_length
    return pretrain.model_copy(update={
        "tokens": math.ceil(tokens / batch) * batch, "decay_style": "cosine", "decay_fraction": None,
        "recompute": pretrain.recompute if config.recompute is None else config.recompute,
        "evaluations": 1, "cuda_graph": False, "fp8_statistics": False, "check_kernels": False,
        **config.model_dump(include=set(ScheduleConfig.model_fields)),
    })


@dataclass
class School:
    """What all distillations of one compression share."""

    parent: Path                        # its checkpoint
    samples: Sequence[Tensor] | Subset[Tensor]      # as of a Lesson, for the longest distillation
    tokens: Path                        # the tokens directory they come from
    config: CompressConfig              # sizes and rates
    pretrain: PretrainConfig            # the recipe the parent was trained by
    precision: PrecisionName            # of teacher and student
    seed: int                           # recorded with the students
    cache: ResultCache                  # of students that are done; their runs' states stand in directories beside it
    parallelism: Parallelism            # the layout of the open process groups
    progress: Callable[..., None]       # called as progress(step, steps, loss=..., ...)

    @property
    def number_format(self) -> Precision:
        """Of teacher and student, as this device computes it."""
        recipe = self.pretrain
        return choose_precision(self.precision, device(), recipe.bf16_layers_at_start, recipe.bf16_layers_at_end,
                                recipe.fp8_recipe, recipe.fp8_gradients)

    def distil(self, start: Path, tokens: int, name: str, objective: Objective = "kl") -> Distilled:
        """The student `start` after `tokens` tokens, under `name`. A killed run goes on from its last resume state."""
        config, _ = checkpoint.read_description(start)
        scratch = self.cache.directory / name
        out = scratch / "student"

        def run() -> list[list[float]]:
            trainer = Trainer(
                config, recipe_of(self.config, self.pretrain, tokens, config.sequence_length), self.precision,
                self.seed, self.tokens, scratch, self.parallelism,
                Lesson(start, self.samples, self.parent if objective == "kl" else None),
            )
            done = trainer.train("hybrid", out, self.progress)
            release_memory()
            return from_main_process(lambda: [[row["step"], row["tokens"], row["loss"]] for row in done.training])

        curve = self.cache.once(name, run, holds=lambda: is_whole(out))
        if is_main_process():
            shutil.rmtree(scratch / "resume", ignore_errors=True)
        return Distilled(out, [(int(step), int(seen), loss) for step, seen, loss in curve])
