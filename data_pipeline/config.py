"""Configuration of the data stages."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Label = Literal["high", "medium-high", "medium", "medium-low", "low"]


class DataError(ValueError):
    """Input the data stages cannot use. Its text is two lines: what is wrong (file, field), what to do."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MinHashConfig(Section):
    """Two documents with Jaccard similarity J of their shingles meet with probability 1 - (1 - J^rows)^bands."""

    shingle_characters: int = Field(ge=2)
    bands: int = Field(ge=1)
    rows: int = Field(ge=1)


class CurateConfig(Section):
    roots: list[str] = Field(min_length=1)
    domains: list[Literal["code", "docs", "reference"]] = Field(min_length=1)
    megabytes_per_domain: dict[str, float]
    held_out_fraction: float = Field(gt=0, lt=0.5)
    minhash: MinHashConfig
    decontamination_ngram: int = Field(ge=2)
    shards: int = Field(ge=1)

    @model_validator(mode="after")
    def every_domain_has_a_size(self) -> CurateConfig:
        if missing := [domain for domain in self.domains if domain not in self.megabytes_per_domain]:
            raise ValueError(f"megabytes_per_domain lacks {missing}")
        return self


class TokenizerConfig(Section):
    vocab_size: int = Field(ge=512, multiple_of=16)     # FP8 GEMMs and vLLM want multiples of 16
    training_megabytes: float = Field(gt=0)


class Phase(Section):
    """A stretch of training with its own blend (paper section 2.2.3)."""

    until: float = Field(gt=0, le=1)
    weights: dict[str, float]
    labels: list[Label] = Field(min_length=1)


class TokenizeConfig(Section):
    validation_kilobytes_per_domain: int = Field(ge=1)
    phases: list[Phase] = Field(min_length=1)

    @model_validator(mode="after")
    def phases_cover_training(self) -> TokenizeConfig:
        ends = [phase.until for phase in self.phases]
        if ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ValueError(f"phases must end at rising shares of training, the last at 1.0; got {ends}")
        return self
