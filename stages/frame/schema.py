"""Records that stages write whatever they compute, and the rows of their CSV files: written by these, read back by the
report. A field that is missing or unknown is an error: the record is of another version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from model.config import Record


class Code(Record):
    """Which code ran."""

    commit: str | None              # with "+changes" where the tree differed; None outside git
    digest: str                     # SHA-256 of the first-party code


class MachineRecord(Record):
    """Where it ran."""

    processor: str
    cores: int
    memory_gib: float
    accelerator: str | None = None  # only stages that load torch see one


class Provenance(Record):
    """provenance.json: where a result comes from. `started` is UTC, in ISO 8601; inputs by path, with SHA-256."""

    stage: str
    variant: str | None
    command: str
    started: str
    wall_seconds: float
    resumed: bool
    peak_memory_gib: float
    parameters: dict[str, Any]
    inputs: dict[str, str]
    code: Code
    versions: dict[str, str]
    machine: MachineRecord


class TrainingRow(Record):
    """pretrain/V/training.csv, a row a step."""

    step: int
    tokens: int
    loss: float                     # nats a token
    grad_norm: float
    learning_rate: float
    skipped: int
    spike: int


class ValidationRow(Record):
    """pretrain/V/validation.csv; domain `all` is the mean weighted by bytes."""

    step: int
    tokens: int
    domain: str
    loss: float
    bits_per_byte: float


class DistillationRow(Record):
    """compress/distillation.csv; `model` is compressed or random, `kl` to the parent in nats a token."""

    model: str
    step: int
    tokens: int
    kl: float


def csv_text(rows: Iterable[Record | Mapping[str, Any]], digits: int = 8) -> str:
    """Rows, at least one, under a header of their fields; None is empty, floats have `digits` digits."""
    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)

    plain = [dict(row) for row in rows]
    return "\n".join([",".join(plain[0]), *(",".join(map(cell, row.values())) for row in plain)]) + "\n"
