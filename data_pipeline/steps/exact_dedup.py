"""Documents with the same text, by xxh3-128, over all domains: one is kept."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from data_pipeline.steps.step import GlobalStep, Outcome

Survey = tuple[list[str], list[bool]]


class ExactDedup(GlobalStep):
    """A held-out copy is kept before a training copy, else the first in the order of the shards."""

    name = "exact_dedup"

    def survey(self, table: pa.Table) -> Survey:
        return table["id"].to_pylist(), table["held_out"].to_pylist()

    def decide(self, surveys: list[Survey]) -> list[list[str | None]]:
        ids = [text_id for shard, _ in surveys for text_id in shard]
        held_out = [flag for _, shard in surveys for flag in shard]
        kept: dict[str, int] = {}
        for index in sorted(range(len(ids)), key=lambda index: (not held_out[index], index)):
            kept.setdefault(ids[index], index)
        reasons = [
            None if (first := kept[text_id]) == index
            else "copy of a held-out document" if held_out[first] and not held_out[index] else "copy"
            for index, text_id in enumerate(ids)
        ]
        return split_by_shard(reasons, [len(shard) for shard, _ in surveys])

    def apply(self, table: pa.Table, decision: list[str | None]) -> Outcome:
        return Outcome(table, decision)


def split_by_shard(values: list[str | None], sizes: list[int]) -> list[list[str | None]]:
    ends = np.cumsum(sizes)
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]
