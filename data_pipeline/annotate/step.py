"""What a curation step is, and the table it works on.

A step fills columns of a shard (`SCHEMA`) and gives back the same rows in the same order. It never removes one: it
writes down what is true of the document, and `data_pipeline.curate` cuts in one place, so that a threshold can change
without any step running again. Held-out documents go through every step like the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import xxhash

from data_pipeline.annotate.features.measures import FEATURES
from data_pipeline.annotate.passes import Arrays, Passes

SCHEMA = pa.schema([
    ("id", pa.string()),                    # hex xxh3-128 of `text`
    ("text", pa.string()),
    ("source", pa.string()),                # distribution, site, data set or file: the unit of holding out
    ("path", pa.string()),                  # within the source
    ("domain", pa.string()),
    ("license", pa.string()),
    ("masked", pa.int32()),                 # personal data replaced
    ("language", pa.string()),              # ISO 639-1, or "un" for unknown
    ("language_share", pa.float32()),       # of the text's bytes
    ("features", pa.struct([(name, pa.float32()) for name in FEATURES])),
    ("held_out", pa.bool_()),
    ("duplicate", pa.string()),             # why the document is one too many, else null
    ("repeats", pa.list_(pa.int32())),      # starts and ends, in bytes, of strings that stood before: s0, e0, s1 ...
    ("contamination", pa.int32()),          # n-grams of words shared with evaluation text
    ("contaminated_by", pa.string()),       # the set that shares most of them; null where none is shared
    ("scores", pa.list_(pa.float32())),     # one a quality scorer; null where held out or duplicate
    ("perplexity", pa.float32()),           # a word, under the fluency model; null as `scores`
])


class Step(ABC):
    """A step that needs nothing but the shard. Instances are pickled to worker processes."""

    name: ClassVar[str]

    @abstractmethod
    def apply(self, table: pa.Table) -> pa.Table:
        """The shard with the step's columns filled, in a worker."""


class Decision(NamedTuple):
    """What a global step found out: arrays for all shards, and arrays for each, perhaps read when asked for."""

    shared: Arrays
    shards: Sequence[Arrays]


class GlobalStep(ABC):
    """A step that looks at every shard before it fills one.

    Surveys and decisions are written to disk as .npz files, an array at a time is read back: memory stays bounded by
    the largest array, not by the corpus.
    """

    name: ClassVar[str]

    @abstractmethod
    def survey(self, table: pa.Table) -> Arrays:
        """The little that must be known of one shard, in a worker."""

    @abstractmethod
    def decide(self, surveys: Sequence[Arrays], passes: Passes) -> Decision:
        """From the surveys of all shards, in order. Reading `surveys[i][name]` loads that array from disk.

        What would not fit into one process, or keep one busy for long, is done in `passes`.
        """

    @abstractmethod
    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        """The shard with the step's columns filled, in a worker."""


def text_id(text: str) -> str:
    """Hex xxh3-128 of `text`: equal texts, equal ids."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def with_column(table: pa.Table, name: str, values: Sequence[Any] | pa.Array) -> pa.Table:
    """`table` with one column of SCHEMA replaced."""
    array = values if isinstance(values, pa.Array) else pa.array(values, SCHEMA.field(name).type)
    return table.set_column(table.schema.get_field_index(name), name, array)


def with_text(table: pa.Table, texts: Sequence[str]) -> pa.Table:
    """`table` with other texts, and the ids that go with them."""
    return with_column(with_column(table, "text", texts), "id", [text_id(text) for text in texts])
