"""Documents as a step gets them, and a global step in this process, its passes kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.annotate.passes import Arrays, Held, Made, Passes
from data_pipeline.annotate.step import SCHEMA, GlobalStep, text_id


class Here(Passes):
    """Nothing is on disk; as many parts as so many workers would be given."""

    directory = Path("nowhere")

    def __init__(self, workers: int = 1):
        self.workers = workers

    def run(self, name: str, function: Callable[[int], Arrays], count: int) -> Made:
        return [Held(function(item)) for item in range(count)]


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Documents of which the rows say what matters, `text` at least."""
    base = {"source": "s", "path": "p", "domain": "docs", "license": "MIT", "held_out": False}
    return pa.Table.from_pylist([{**base, "id": text_id(row["text"]), **row} for row in rows], SCHEMA)


def marked(pairs: Sequence[tuple[str, bool]]) -> pa.Table:
    """The same of (text, whether it is held out)."""
    return table([{"text": text, "held_out": held_out} for text, held_out in pairs])


def cut(rows: Sequence[Any], shards: int) -> list[Any]:
    """The rows in so many parts, in order."""
    return [rows[len(rows) * i // shards : len(rows) * (i + 1) // shards] for i in range(shards)]


def run(step: GlobalStep, shards: Sequence[pa.Table], shares: bool = True) -> list[pa.Table]:
    """The shards after the step, which may decide something that all of them need."""
    decision = step.decide([step.survey(shard) for shard in shards], Here())
    assert shares or decision.shared == {}
    return [step.apply(shard, decision.shared, own) for shard, own in zip(shards, decision.shards, strict=True)]


def column(name: str, shards: Sequence[pa.Table]) -> list[Any]:
    """A column of all the shards."""
    return [value for shard in shards for value in shard[name].to_pylist()]
