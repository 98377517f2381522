"""Records of a compression, as the funnel writes them and as the report reads them back (docs/compression.md)."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from model.config import Record

DECODE_STEP = "decode step (seconds)"       # name of the budget that is measured


class LayerImportance(Record):
    """Importance of a layer: mean and standard error over samples (`model.compression.importance`)."""

    index: int
    symbol: str
    importance: float
    standard_error: float


class FfnImportance(Record):
    """Of one FFN layer: how much of its neurons' summed importance the most important ones hold."""

    index: int
    kept_share_of_importance: dict[int, float]          # by width


class Importance(Record):
    """importance.json. `mamba_heads` by layer; `reliability` by axis, a rank correlation."""

    samples: dict[str, int]
    layers: list[LayerImportance] = Field(min_length=1)
    ffn: list[FfnImportance]
    mamba_heads: dict[int, list[float]]
    reliability: dict[str, float]


class CandidateRecord(Record):
    """candidates.json, best first; None where a later round was not reached or nothing was timed."""

    index: int
    pattern: str
    ffn_hidden_size: int
    parameters: int
    memory_gib: float
    decode_milliseconds: float | None
    importance: float
    agreement: float | None
    accuracy: float | None
    kl_cut: float | None
    task_accuracy: float | None
    kl_short: float | None
    rank: int
    chosen: bool


class Controls(Record):
    """controls.json: KL to the parent of cuts to the chosen shape, before distillation."""

    importance: float
    random: list[float] = Field(min_length=1)           # by seed
    seeds: list[int]
    reverse: float


class Costs(Record):
    """costs.json: of parent and compressed, predicted and measured."""

    models: dict[str, Annotated[dict[str, float], Field(min_length=1)]] = Field(min_length=1)
    metrics: dict[str, float]
    budgets: dict[str, float]
    latency: dict[str, Any] | None
