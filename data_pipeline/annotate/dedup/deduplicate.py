"""One document is kept of those with the same text, and one of those with nearly the same.

Copies are found by id (xxh3-128 of the text), near-duplicates among what is left as connected components of documents
that share a band of their MinHash signatures, over all domains and shards. Of copies a held-out one is kept, else the
first read; of a component the held-out document with the lowest id, else the document with the lowest id. So nothing
depends on the number of shards, and held-out text is never the reason to look at training text twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from data_pipeline.annotate.dedup.components import components, parted_edges, roots_of
from data_pipeline.annotate.dedup.minhash import band_hashes
from data_pipeline.annotate.passes import (
    Arrays,
    Groups,
    Made,
    OfShards,
    Passes,
    part_of,
    parted,
    taken,
    total,
)
from data_pipeline.annotate.step import Decision, GlobalStep, with_column
from data_pipeline.config import MinHashConfig
from data_pipeline.text.words import Bool, Int64, UInt8, UInt64, texts_of

PART_DOCUMENTS = 1 << 23        # of a part of the decision: what a worker holds is 150 bytes for each
BANDS_AT_ONCE = 5               # brought together at a time, as NeMo Curator: 80 bytes a document on disk
TRAINING = np.uint64(1 << 63)

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

    A document goes through the decision as 64 bits: whether it is training text, and the first 63 bits of its id. They
    are in order of merit, and two different ids have the same with probability 2^-63, as two different bands may. Who
    shares a band is found by the bands' hashes, what of it follows for a document by its id.
    """

    name = "deduplicate"

    def __init__(self, config: MinHashConfig, seed: int):
        self.config, self.seed = config, seed

    def survey(self, table: pa.Table) -> Arrays:
        bands = band_hashes(texts_of(table), self.config, self.seed)
        own = {"size": np.array([table.num_rows]), "ids": id_numbers(table),
               "held_out": np.array(table["held_out"].to_pylist(), dtype=bool)}
        return own | {f"band{number}": band for number, band in enumerate(bands)}

    def decide(self, surveys: Sequence[Arrays], passes: Passes) -> Decision:
        parts = passes.parts(total(surveys), PART_DOCUMENTS)
        groups = Groups(surveys, min(parts, len(surveys)))
        edges = []
        for first in range(0, self.config.bands, BANDS_AT_ONCE):
            bands = range(first, min(first + BANDS_AT_ONCE, self.config.bands))
            edges.append(passes.exchange(f"bands{first}", partial(bands_of, groups, bands, parts), groups.number,
                                         partial(edges_of, bands, parts), parts))
        found = components(edges, parts, PART_DOCUMENTS, passes)
        reasons = passes.exchange("reasons", partial(ids_of, groups, parts), groups.number,
                                  partial(reasons_of, found, groups.number), parts)
        made = passes.run("shards", partial(of_shards, groups, reasons), groups.number)
        return Decision({}, OfShards(made, ["reason"], groups))

    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        return with_column(table, "duplicate", REASONS.take(pa.array(own["reason"])))


def id_numbers(table: pa.Table) -> UInt64:
    """The column `id` as numbers that sort as it does, shape (documents, 2)."""
    digits = "".join(table["id"].to_pylist())
    return np.frombuffer(bytes.fromhex(digits), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def vertices(ids: UInt64, held_out: Bool) -> UInt64:
    """What stands for documents in the graph, in order of merit: held-out ones before the others, and each by id."""
    return (ids[:, 0] >> np.uint64(1)) | np.where(held_out, np.uint64(0), TRAINING)


def bands_of(groups: Groups, bands: Sequence[int], parts: int, group: int) -> Arrays:
    """Hash and vertex of the documents of a group of shards, by the prefix of the hash."""
    own = groups.own(group)
    vertex = np.concatenate([vertices(survey["ids"], survey["held_out"]) for survey in own])
    found: dict[str, np.ndarray] = {}
    for band in bands:
        hashes = np.concatenate([survey[f"band{band}"] for survey in own])
        found |= parted(part_of(hashes, parts), parts, {f"hash{band}": hashes, f"vertex{band}": vertex},
                        f"bounds{band}")
    return found


def edges_of(bands: Sequence[int], parts: int, given: Made, part: int) -> Arrays:
    """An edge from each vertex to the least with the same hash in a band."""
    upper, lower = [], []
    for band in bands:
        hashes, vertex = taken(given, part, [f"hash{band}", f"vertex{band}"], f"bounds{band}")
        order = np.argsort(hashes)
        hashes = hashes[order]
        same = np.zeros(len(hashes) + 1, dtype=bool)
        same[1:-1] = hashes[1:] == hashes[:-1]
        first = np.flatnonzero(same[1:] & ~same[:-1])
        vertex = vertex[order[same[1:] | same[:-1]]]        # of those that are not alone
        sizes = np.flatnonzero(same[:-1] & ~same[1:]) - first + 1
        starts = np.cumsum(sizes) - sizes
        least = np.repeat(np.minimum.reduceat(vertex, starts) if len(starts) else vertex, sizes)
        upper.append(vertex[vertex != least])
        lower.append(least[vertex != least])
    return parted_edges(np.concatenate(upper), np.concatenate(lower), parts)


def ids_of(groups: Groups, parts: int, group: int) -> Arrays:
    """What is to be known of the documents of a group of shards, by the prefix of the id."""
    ids, held_out = (np.concatenate([survey[name] for survey in groups.own(group)]) for name in ("ids", "held_out"))
    return parted(part_of(ids[:, 0], parts), parts, {
        "high": ids[:, 0], "low": ids[:, 1], "held_out": held_out, "group": np.full(len(ids), group, np.uint32),
        "row": np.arange(len(ids), dtype=np.uint32)})


def reasons_of(found: Sequence[Made], groups: int, given: Made, part: int) -> Arrays:
    """The documents of a part that are one too many, and why, by their group of shards."""
    high, low, held_out, group, row = taken(given, part, ["high", "low", "held_out", "group", "row"])
    reasons, distinct = copies(np.stack([high, low], axis=1), held_out)
    vertex = vertices(high[distinct, None], held_out[distinct])
    root = roots_of(vertex, found, part)
    near = np.where((root < TRAINING) & (vertex >= TRAINING), NEAR_HELD_OUT, NEAR)
    reasons[distinct] = np.where(root == vertex, 0, near)
    some = reasons > 0
    return parted(group[some], groups, {"row": row[some], "reason": reasons[some]})


def of_shards(groups: Groups, reasons: Made, group: int) -> Arrays:
    """The reason codes of a group of shards, one array a shard."""
    sizes = [int(survey["size"][0]) for survey in groups.own(group)]
    row, reason = taken(reasons, group, ["row", "reason"])
    found = np.zeros(sum(sizes), np.uint8)
    found[row] = reason
    by_shard = np.split(found, np.cumsum(sizes)[:-1])
    return {f"reason{shard}": own for shard, own in zip(groups.shards(group), by_shard, strict=True)}


def copies(ids: UInt64, held_out: Bool) -> tuple[UInt8, Int64]:
    """Reason code of each copy of an earlier document, else 0; and the documents that are none."""
    order = np.lexsort((~held_out, ids[:, 1], ids[:, 0]))
    same = np.zeros(len(ids), dtype=bool)
    same[1:] = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
    kept = order[np.flatnonzero(~same)[np.cumsum(~same) - 1]]
    reasons = np.zeros(len(ids), dtype=np.uint8)
    reasons[order[same]] = np.where(held_out[kept] > held_out[order], COPY_OF_HELD_OUT, COPY)[same]
    return reasons, order[~same]
