"""Configuration of the compression stage."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MemoryBudget(Section):
    """What a deployed model may take: bytes an element of each kind, at a context length and batch size."""

    context: int = Field(ge=1)
    batch: int = Field(ge=1)
    weight_bytes: float = Field(gt=0)
    kv_bytes: float = Field(gt=0)
    ssm_bytes: float = Field(gt=0)
    conv_bytes: float = Field(gt=0)
    budget_fraction: float = Field(gt=0, lt=1)      # of what the parent takes


class Workload(Section):
    """What is decoded when time is measured."""

    context: int = Field(ge=1)
    batch: int = Field(ge=1)
    decode_tokens: int = Field(ge=1)
    repeats: int = Field(ge=1)


class LatencyBudget(Workload):
    """A decode step measured on this machine, and what share of the parent's it may take; none: measured, not limited.
    """

    budget_fraction: float | None = Field(default=None, gt=0, lt=1)


class CompressConfig(Section):
    """MiniPuzzle (paper section 3): what to score, what to search, how long to distil. Samples are sequences.

    Attributes:
        layer_rule, layer_rounds: `model.compression.importance`; one round scores each layer alone.
        other_widths: further axes of the grid, by name of the geometry's field.
        parameters_fraction: of the parent's, a further limit.
        refit_samples: calibration sequences for the least-squares refit after cutting; 0 leaves it out.
        random_draws: cuts of the chosen shape at random that are compared without distillation.
    """

    parent: str                                     # name of a pretrained variant
    layer_rule: Literal["mse", "nmse", "kl", "influence"]
    layer_rounds: Literal["one", "iterative"]
    importance_samples: int = Field(ge=2)
    ffn_importance_samples: int = Field(ge=2)
    ffn_widths: list[int] = Field(min_length=1)
    other_widths: dict[str, list[int]]
    min_attention_layers: int = Field(ge=0)
    memory: MemoryBudget
    parameters_fraction: float | None = Field(gt=0, lt=1)
    latency: LatencyBudget | None
    refit_samples: int = Field(ge=0)
    validation_samples: int = Field(ge=1)
    ranking_samples: int = Field(ge=1)              # of the validation samples
    ranked_by_agreement: int = Field(ge=1)
    ranked_by_task: int = Field(ge=1)
    task_items: int = Field(ge=1)
    finalists: int = Field(ge=1)
    random_draws: int = Field(ge=1)
    teacher_precision: Literal["bf16", "fp8"]
    short_distillation_tokens: int = Field(ge=1)
    distillation_tokens: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(ge=0)
    warmup_fraction: float = Field(ge=0, lt=1)
    micro_batch_size: int = Field(ge=1)             # sequences a step
    checkpoint_every: int = Field(ge=1)             # steps

    @model_validator(mode="after")
    def rounds_narrow(self) -> CompressConfig:
        rounds = ("finalists", "ranked_by_task", "ranked_by_agreement")
        for fewer, more in pairwise(rounds):
            if getattr(self, fewer) > getattr(self, more):
                raise ValueError(
                    f"{fewer} ({getattr(self, fewer)}) must not exceed {more} ({getattr(self, more)})\n"
                    "Every round keeps some of the one before: lower the later one."
                )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) must not exceed learning_rate ({self.learning_rate})\n"
                "The rate falls from one to the other: lower the first."
            )
        if self.layer_rule == "influence" and self.layer_rounds == "iterative":
            raise ValueError("layer_rounds cannot be iterative with influence\nChoose mse, nmse or kl, or one round.")
        if self.refit_samples == 1:
            raise ValueError("refit_samples 1 is too few\nGive 0 for no refit, or at least 2.")
        return self
