"""One document is kept of those with the same text, and one of those with nearly the same.

Copies are found by id (xxh3-128 of the text), near-duplicates among what is left as connected components of documents
that share a band of their MinHash signatures, over all domains and shards. Of copies a held-out one is kept, else the
first read; of a component the held-out document with the lowest id, else the document with the lowest id. So nothing
depends on the number of shards, and held-out text is never the reason to look at training text twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from data_pipeline.annotate.dedup.minhash import band_hashes, join_equal, roots
from data_pipeline.annotate.step import Arrays, Decision, GlobalStep, with_column
from data_pipeline.config import MinHashConfig
from data_pipeline.text.words import Int64, UInt64, texts_of

COPY, COPY_OF_HELD_OUT, NEAR, NEAR_HELD_OUT = range(1, 5)
REASONS = pa.array([
    None,
    "copy",
    "copy of a held-out document",
    "near-duplicate",
    "near-duplicate of a held-out document",
])


class Deduplicate(GlobalStep):
    """Fills `duplicate`. A survey takes 17 bytes and 8 a band for each document; a decision one byte.

    `decide` reads one band of all shards at a time: its peak is about 70 bytes a document, whatever the bands.
    """

    name = "deduplicate"

    def __init__(self, config: MinHashConfig, seed: int):
        self.config, self.seed = config, seed

    def survey(self, table: pa.Table) -> Arrays:
        bands = band_hashes(texts_of(table), self.config, self.seed)
        own = {"ids": id_numbers(table), "held_out": np.array(table["held_out"].to_pylist(), dtype=bool)}
        return own | {f"band{number}": band for number, band in enumerate(bands)}

    def decide(self, surveys: Sequence[Arrays]) -> Decision:
        held_out = np.concatenate([survey["held_out"] for survey in surveys])
        reasons, ranked = copies(np.concatenate([survey["ids"] for survey in surveys]), held_out)
        parent = np.arange(len(ranked))
        for number in range(self.config.bands):
            band = np.concatenate([survey[f"band{number}"] for survey in surveys])[ranked]
            join_equal(parent, band, np.argsort(band))
        kept = ranked[roots(parent)]
        near = ranked != kept
        reasons[ranked[near]] = np.where(held_out[kept] > held_out[ranked], NEAR_HELD_OUT, NEAR)[near]
        ends = np.cumsum([len(survey["held_out"]) for survey in surveys])
        return Decision({}, [{"reason": part} for part in np.split(reasons, ends[:-1])])

    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        return with_column(table, "duplicate", REASONS.take(pa.array(own["reason"])))


def id_numbers(table: pa.Table) -> UInt64:
    """The column `id` as numbers that sort as it does, shape (documents, 2)."""
    digits = "".join(table["id"].to_pylist())
    return np.frombuffer(bytes.fromhex(digits), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def copies(ids: UInt64, held_out: np.ndarray) -> tuple[np.ndarray, Int64]:
    """Reason code of each copy of an earlier document, else 0; and the documents that are none, in order of merit.

    That is held-out documents before the others, and each by id.
    """
    order = np.lexsort((~held_out, ids[:, 1], ids[:, 0]))
    same = np.zeros(len(ids), dtype=bool)
    same[1:] = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
    kept = order[np.flatnonzero(~same)[np.cumsum(~same) - 1]]
    reasons = np.zeros(len(ids), dtype=np.uint8)
    reasons[order[same]] = np.where(held_out[kept] > held_out[order], COPY_OF_HELD_OUT, COPY)[same]
    distinct = order[~same]
    return reasons, np.concatenate([distinct[held_out[distinct]], distinct[~held_out[distinct]]])
