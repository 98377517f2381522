"""Configuration of the compression stage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


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
    parent: str
    importance_samples: int = Field(ge=1)
    ffn_importance_samples: int = Field(ge=1)
    ffn_widths: list[int] = Field(min_length=1)
    min_attention_layers: int = Field(ge=0)
    memory: MemoryBudget
    ranked_by_agreement: int = Field(ge=1)
    finalists: int = Field(ge=1)
    short_distillation_tokens: int = Field(ge=1)
    distillation_tokens: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    micro_batch_size: int = Field(ge=1)
