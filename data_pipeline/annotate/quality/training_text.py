"""Words the offline scorers learn from: reference text, and a sample of the corpus to tell it from.

Reference text is the standard library, code and prose, which is edited and reviewed. It is taken from the corpus where
that holds any, else read from the running Python. Both parts are the documents with the lowest keys, up to a number of
words, so that they are the same however the documents lie in shards, and bounded whatever the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.annotate.passes import Arrays
from data_pipeline.annotate.quality.quality_labels import keys_of
from data_pipeline.annotate.step import text_id
from data_pipeline.sources import installed
from data_pipeline.text.words import Bool, Int8, Int64, UInt64, Words, words_of

REFERENCE_SOURCES = "python/"
TABLES = "python/encodings"     # not of them: character tables that a program wrote
WORDS = 1_500_000               # of each part, at most
LONGEST_DOCUMENT = 50_000       # words: no document is more than a thirtieth of its part
INSTALLED_BYTES = 6_000_000     # of the standard library, where the corpus has none of it

PROSE, CODE, HEADERS = range(3)     # kinds of text
KIND_OF_DOMAIN = {"code": CODE, "headers": HEADERS}     # by what a domain's name begins with; others are prose


class TrainingText(NamedTuple):
    """Documents in the order of `keys`; the words of document i are hashes[first[i]:first[i + 1]]."""

    keys: UInt64            # (documents,)
    kinds: Int8             # (documents,), PROSE, CODE or HEADERS
    first: Int64            # (documents + 1,)
    hashes: UInt64          # (words,)

    @property
    def words(self) -> Words:
        """The documents' words, without their places in the text."""
        nowhere = np.empty(0, np.int64)
        return Words(self.hashes, nowhere, nowhere, self.first, np.empty(0, np.uint8))


def kinds_of(table: pa.Table) -> Int8:
    """The kind of each document, by its domain: `code` and `code_...` are CODE."""
    domains = table["domain"].to_pylist()
    return np.array([KIND_OF_DOMAIN.get(domain.split("_")[0], PROSE) for domain in domains], dtype=np.int8)


def is_scored(table: pa.Table) -> Bool:
    """Which documents get scores: training documents that are no duplicates."""
    held_out = pc.fill_null(table["held_out"], False)
    return pc.and_(pc.invert(held_out), pc.is_null(table["duplicate"])).to_numpy()


def is_reference(table: pa.Table, words: Words) -> Bool:
    """Which documents may be reference text to learn from."""
    return _from_library(table) & pc.not_equal(table["source"], TABLES).to_numpy() & _is_usable(table, words)


def _from_library(table: pa.Table) -> Bool:
    return pc.starts_with(table["source"], REFERENCE_SOURCES).to_numpy()


def survey(table: pa.Table) -> Arrays:
    """What one shard may contribute to each part; to `long`, the beginnings of documents too long for the corpus."""
    words = words_of(table)
    keys, kinds = keys_of(table["id"].to_pylist()), kinds_of(table)
    reference = is_reference(table, words)
    long = is_scored(table) & (np.diff(words.first) > LONGEST_DOCUMENT) & ~_from_library(table)
    members = {"reference": reference, "corpus": _is_usable(table, words) & ~reference, "long": long}
    result: dict[str, np.ndarray] = {}
    for part, chosen in members.items():
        rows = np.flatnonzero(chosen)
        lengths = np.minimum(np.diff(words.first)[rows], LONGEST_DOCUMENT)
        order = _lowest(keys[rows], lengths)
        starts = words.first[rows[order]]
        pieces = [words.hashes[start : start + size] for start, size in zip(starts, lengths[order], strict=True)]
        text = _text(keys[rows[order]], kinds[rows[order]], pieces)
        result |= {f"{part}_{name}": array for name, array in text._asdict().items()}
    return result


def collect(surveys: Sequence[Arrays], part: Literal["reference", "corpus", "long"]) -> TrainingText:
    """The documents with the lowest keys of all shards, of one part."""
    keys = [np.asarray(shard[f"{part}_keys"]) for shard in surveys]
    kinds = np.concatenate([shard[f"{part}_kinds"] for shard in surveys])
    lengths = np.concatenate([np.diff(shard[f"{part}_first"]) for shard in surveys])
    order = _lowest(np.concatenate(keys), lengths)
    shard_of = np.repeat(np.arange(len(surveys)), [len(shard_keys) for shard_keys in keys])
    row_of = np.concatenate([np.arange(len(shard_keys)) for shard_keys in keys])
    pieces = [np.empty(0, np.uint64)] * len(order)
    for number, shard in enumerate(surveys):
        wanted = np.flatnonzero(shard_of[order] == number)
        if len(wanted):
            first, hashes = shard[f"{part}_first"], shard[f"{part}_hashes"]
            for rank in wanted:
                row = row_of[order[rank]]
                pieces[rank] = hashes[first[row] : first[row + 1]].copy()      # lets go of the shard's array
    return _text(np.concatenate(keys)[order], kinds[order], pieces)


def installed_reference(seed: int) -> TrainingText:
    """Reference text of the running Python's standard library."""
    documents, size = [], 0
    for file in installed.installed_files([], seed):
        found = installed.read_documents(file, frozenset({"code", "reference"}))
        if not isinstance(found, str):
            documents += found
            size += sum(len(document.text.encode()) for document in found)
        if size > INSTALLED_BYTES:
            break
    table = pa.table({
        "id": [text_id(document.text) for document in documents],
        "text": [document.text for document in documents],
        "source": [document.source for document in documents],
        "domain": [document.domain for document in documents],
        "held_out": [False] * len(documents),
        "duplicate": pa.nulls(len(documents), pa.string()),
    })
    return collect([survey(table)], "reference")


def _is_usable(table: pa.Table, words: Words) -> Bool:
    lengths = np.diff(words.first)
    return is_scored(table) & (lengths >= 2) & (lengths <= LONGEST_DOCUMENT)


def _lowest(keys: UInt64, lengths: Int64) -> Int64:
    """Indices of the documents with the lowest keys, in order, that have no more than WORDS words together."""
    order = np.argsort(keys, kind="stable")
    return order[np.cumsum(lengths[order]) <= WORDS]


def _text(keys: UInt64, kinds: Int8, pieces: Sequence[UInt64]) -> TrainingText:
    first = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=first[1:])
    return TrainingText(keys, kinds, first, np.concatenate([np.empty(0, np.uint64), *pieces]))
