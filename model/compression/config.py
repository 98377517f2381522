"""Configuration of the compression stage."""

from __future__ import annotations

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


class CompressConfig(Section):
    """MiniPuzzle (paper section 3): what to score, what to search, how long to distil. Samples are sequences."""

    parent: str                                     # name of a pretrained variant
    importance_samples: int = Field(ge=2)
    ffn_importance_samples: int = Field(ge=1)
    ffn_widths: list[int] = Field(min_length=1)
    min_attention_layers: int = Field(ge=0)
    memory: MemoryBudget
    validation_samples: int = Field(ge=1)
    ranking_samples: int = Field(ge=1)              # of the validation samples
    ranked_by_agreement: int = Field(ge=1)
    finalists: int = Field(ge=1)
    short_distillation_tokens: int = Field(ge=1)
    distillation_tokens: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(ge=0)
    warmup_fraction: float = Field(ge=0, lt=1)
    micro_batch_size: int = Field(ge=1)             # sequences a step
    checkpoint_every: int = Field(ge=1)             # steps

    @model_validator(mode="after")
    def rounds_narrow(self) -> CompressConfig:
        if self.finalists > self.ranked_by_agreement:
            raise ValueError(
                f"finalists ({self.finalists}) must not exceed ranked_by_agreement ({self.ranked_by_agreement})"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) must not exceed learning_rate ({self.learning_rate})"
            )
        return self
