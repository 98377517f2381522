"""What a curation step is, and the table it works on.

A step reads a shard (`SCHEMA`) and gives it back, perhaps with other text or more columns filled, and for each row the
reason to remove it or None. It never removes rows itself: the pipeline cuts and counts in one place. Held-out rows go
through every step like the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import xxhash

SCHEMA = pa.schema([
    ("id", pa.string()),            # hex xxh3-128 of `text`
    ("text", pa.string()),
    ("source", pa.string()),
    ("path", pa.string()),
    ("domain", pa.string()),
    ("license", pa.string()),
    ("held_out", pa.bool_()),
    ("scores", pa.list_(pa.float64())),
    ("quality", pa.float64()),
    ("label", pa.string()),
])


class Outcome(NamedTuple):
    """A shard after a step, and one entry a row: the reason to remove it, or None to keep it."""

    table: pa.Table
    reasons: Sequence[str | None]


class Step(ABC):
    """A step that needs nothing but the shard. Instances are pickled to worker processes."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, table: pa.Table, decision: Any) -> Outcome:
        """The outcome for one shard, in a worker. `decision` is None unless the step is a GlobalStep."""


class GlobalStep(Step):
    """A step that looks at every shard before it decides on one."""

    @abstractmethod
    def survey(self, table: pa.Table) -> Any:
        """The little that must be known of one shard, in a worker."""

    @abstractmethod
    def decide(self, surveys: list[Any]) -> list[Any]:
        """From the surveys of all shards, in order, one decision for each."""


def text_id(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def with_column(table: pa.Table, name: str, values: Sequence[Any] | pa.Array) -> pa.Table:
    """`table` with one column of SCHEMA replaced."""
    array = values if isinstance(values, pa.Array) else pa.array(values, SCHEMA.field(name).type)
    return table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), array)


def with_text(table: pa.Table, texts: Sequence[str]) -> pa.Table:
    """`table` with other texts, and the ids that go with them."""
    return with_column(with_column(table, "text", texts), "id", [text_id(text) for text in texts])
