"""Configuration of the compression stage."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from model.config import ScheduleConfig, Section
from model.costs import Deployment


class MemoryBudget(Deployment):
    """What a model may take as it is deployed."""

    budget_fraction: float = Field(gt=0, lt=1)      # of what the parent takes


class LatencyBudget(Section):
    """A decode step measured on this machine, and what share of the parent's it may take; none: measured, not limited.
    """

    context: int = Field(ge=1)
    batch: int = Field(ge=1)
    decode_tokens: int = Field(ge=1)
    repeats: int = Field(ge=1)
    budget_fraction: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def tokens_end_at_the_context(self) -> LatencyBudget:
        """Raise ValueError where more tokens are decoded than the context has, which is where they end."""
        if self.decode_tokens > self.context:
            raise ValueError(f"decode_tokens ({self.decode_tokens}) must not exceed context ({self.context})\n"
                             "Steps are timed that end at the context: lower the first.")
        return self


class CompressConfig(ScheduleConfig):
    """MiniPuzzle (paper section 3): what to score, what to search, how long to distil. Samples are sequences.

    Attributes:
        ffn_score: of a neuron, over the batch, then over the sequence (`model.compression.width_importance`).
        parameters_fraction: of the parent's, a further limit.
        precision: of distillation, of teacher and student; on a CPU `bf16` means float32, which is faster there.
        recompute: in place of `pretrain.recompute`, for distillation, where a teacher takes memory too; null: the same.
        random_draws: cuts of the chosen shape at random that are compared without distillation.
    """

    parent: str                                     # name of a pretrained variant
    importance_samples: int = Field(ge=2)
    ffn_importance_samples: int = Field(ge=2)
    ffn_score: Literal["mean_then_l2", "l2_then_mean"]
    ffn_widths: list[int] = Field(min_length=1)
    min_attention_layers: int = Field(ge=0)
    memory: MemoryBudget
    parameters_fraction: float | None = Field(gt=0, lt=1)
    latency: LatencyBudget | None
    validation_samples: int = Field(ge=1)
    ranking_samples: int = Field(ge=1)              # of the validation samples
    ranked_by_agreement: int = Field(ge=1)
    ranked_by_task: int = Field(ge=1)
    task_items: int = Field(ge=1)
    finalists: int = Field(ge=1)
    random_draws: int = Field(ge=1)
    precision: Literal["bf16", "fp8"]
    short_distillation_tokens: int = Field(ge=1)
    distillation_tokens: int = Field(ge=1)
    recompute: str | None = Field(default=None, pattern=r"^[M*\-]*$")

    @model_validator(mode="after")
    def rounds_narrow(self) -> CompressConfig:
        """Raise ValueError unless every round keeps some of the one before, and ranks by some of the samples."""
        if self.ranking_samples > self.validation_samples:
            raise ValueError(
                f"ranking_samples ({self.ranking_samples}) must not exceed validation_samples "
                f"({self.validation_samples})\nCandidates are ranked on some of these: lower the first."
            )
        rounds = ("finalists", "ranked_by_task", "ranked_by_agreement")
        for fewer, more in pairwise(rounds):
            if getattr(self, fewer) > getattr(self, more):
                raise ValueError(
                    f"{fewer} ({getattr(self, fewer)}) must not exceed {more} ({getattr(self, more)})\n"
                    "Every round keeps some of the one before: lower the later one."
                )
        return self
