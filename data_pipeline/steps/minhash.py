"""Near-duplicate removal by MinHash signatures, banding and connected components.

The public Nemotron-CC recipe: shingles of 24 characters, 20 bands of 13 rows (paper 2412.02595; NVIDIA-NeMo/Nemotron,
recipes/data/curation/nemotron-cc, step 2b). Two documents whose sets of shingles have Jaccard similarity J share a band
with probability 1 - (1 - J^rows)^bands: one half at J = 0.77. One document is kept of each connected component.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data_pipeline.config import MinHashConfig
from data_pipeline.steps.exact_dedup import split_by_shard
from data_pipeline.steps.step import GlobalStep, Outcome
from data_pipeline.steps.words import UInt64, mix, window_hashes

BATCH_SHINGLES = 1 << 18        # 1 MiB of 32-bit shingles: the arrays of one permutation stay in cache
SPACE = re.compile(r"\s+")


class Survey(NamedTuple):
    bands: UInt64               # (documents, bands)
    held_out: NDArray[np.bool_]
    ids: list[str]


class MinHash(GlobalStep):
    """Kept of a component: a held-out document if there is one, else the lowest id, so order does not matter."""

    name = "minhash"

    def __init__(self, config: MinHashConfig, seed: int):
        self.config, self.seed = config, seed

    def survey(self, table: pa.Table) -> Survey:
        signature = signatures(table["text"].to_pylist(), self.config, self.seed)
        return Survey(band_hashes(signature, self.config.bands), table["held_out"].to_numpy(), table["id"].to_pylist())

    def decide(self, surveys: list[Survey]) -> list[list[str | None]]:
        component = components(np.concatenate([survey.bands for survey in surveys]))
        held_out = np.concatenate([survey.held_out for survey in surveys])
        ids = np.array([text_id for survey in surveys for text_id in survey.ids])
        order = np.lexsort((ids, ~held_out, component))
        first = order[np.searchsorted(component[order], component)]     # the document kept of each one's component
        reasons = np.full(len(ids), None, dtype=object)
        removed = first != np.arange(len(ids))
        reasons[removed] = "near-duplicate"
        reasons[removed & held_out[first] & ~held_out] = "near-duplicate of a held-out document"
        return split_by_shard(reasons.tolist(), [len(survey.ids) for survey in surveys])

    def apply(self, table: pa.Table, decision: list[str | None]) -> Outcome:
        return Outcome(table, decision)


def shingles(text: str, characters: int) -> NDArray[np.uint32]:
    """32-bit hash of every run of `characters` characters, in lower case with white space as one blank.

    A text shorter than that is one shingle.
    """
    folded = SPACE.sub(" ", text.strip().lower())
    codes = np.frombuffer(folded.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    length = min(characters, len(codes))
    starts = np.arange(len(codes) - length + 1)
    return (window_hashes(mix(codes + np.uint64(1)), starts, starts + length) >> np.uint64(32)).astype(np.uint32)


def signatures(texts: list[str], config: MinHashConfig, seed: int) -> NDArray[np.uint32]:
    """MinHash signatures, shape (documents, bands * rows).

    Permutation i of the 32-bit shingles is x -> a_i x + b_i modulo 2^32 with a_i odd.
    """
    random = np.random.default_rng(seed)
    permutations = config.bands * config.rows
    a = random.integers(0, 2**32, permutations, dtype=np.uint32) | np.uint32(1)
    b = random.integers(0, 2**32, permutations, dtype=np.uint32)
    result = np.empty((len(texts), permutations), dtype=np.uint32)
    batch: list[NDArray[np.uint32]] = []
    size = 0
    for index, text in enumerate(texts):
        batch.append(shingles(text, config.shingle_characters))
        size += len(batch[-1])
        if size >= BATCH_SHINGLES or index == len(texts) - 1:
            values = np.concatenate(batch)
            starts = np.cumsum([0, *map(len, batch[:-1])])
            permuted = np.empty_like(values)
            for column in range(permutations):
                np.multiply(values, a[column], out=permuted)
                permuted += b[column]
                result[index + 1 - len(batch) : index + 1, column] = np.minimum.reduceat(permuted, starts)
            batch, size = [], 0
    return result


def band_hashes(signature: NDArray[np.uint32], bands: int) -> UInt64:
    """One 64-bit hash for each band of a signature: shape (documents, bands)."""
    documents, permutations = signature.shape
    rows = signature.astype(np.uint64).reshape(documents, bands, permutations // bands)
    result = np.zeros((documents, bands), dtype=np.uint64)
    for row in range(rows.shape[2]):
        result = mix(result ^ rows[:, :, row])
    return result


def components(bands: UInt64) -> NDArray[np.int32]:
    """Component number of each document, where documents that agree in a band are connected."""
    documents = len(bands)
    sources, targets = [], []
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        same = band[order[1:]] == band[order[:-1]]
        sources.append(order[:-1][same])
        targets.append(order[1:][same])
    edges = np.concatenate(sources), np.concatenate(targets)
    graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(documents, documents))
    return connected_components(graph, directed=False)[1]
