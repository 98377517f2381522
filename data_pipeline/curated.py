"""Reading what the `curate` stage wrote: its manifest, shards in order, their rows a batch at a time, samples of them.

Memory is bounded by a batch and by what is asked for, whatever the size of the corpus.
"""

from __future__ import annotations

import json
import sys
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data_pipeline.config import DataError

ROWS = 1024             # a batch
OVERSUPPLY = 4          # bytes kept to choose a sample from, for each byte of it


def manifest(curated: Path, *names: str) -> list[Any]:
    """What manifest.json says of each of `names`. Raises DataError."""
    path = curated / "manifest.json"
    try:
        content = json.loads(path.read_text())
        return [content[name] for name in names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no manifest of curated text ({error!r}).\nRun the `curate` stage again.") from None


def shards(curated: Path, split: str) -> list[Path]:
    """The Parquet files of `curated`/SPLIT (`train`, `heldout`) in order. Raises DataError."""
    files = sorted((curated / split).glob("part-*.parquet"))
    if not files:
        raise DataError(f"{curated / split}: no part-*.parquet files.\nRun the `curate` stage, which writes them.")
    return files


def batches(file: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The rows of a shard, in order. Raises DataError naming a file that is damaged or lacks a column or a value."""
    try:
        with pq.ParquetFile(file) as reader:
            if missing := [name for name in columns if name not in reader.schema_arrow.names]:
                raise DataError(f"{file}: columns {missing} are missing.\nRun the `curate` stage again.")
            for batch in reader.iter_batches(ROWS, columns=list(columns)):
                if empty := [name for name in columns if batch[name].null_count]:
                    raise DataError(f"{file}: columns {empty} have empty rows.\nRun the `curate` stage again.")
                yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read ({reason}).\nRun the `curate` stage again.") from None


class DomainSurvey:
    """What is known of a domain: its bytes of UTF-8 text, and documents to choose samples of up to `room` bytes from.

    Documents no larger than `room` stand in an order drawn by lot. Kept is the beginning of it, OVERSUPPLY x `room`
    bytes; up to twice that while documents come in, so that they are put in order now and then only.
    """

    def __init__(self, room: float):
        self.room = room
        self.bytes = 0
        self._smallest = (sys.maxsize, "")
        self._kept: list[tuple[int, int, str]] = []         # lot, bytes, id
        self._kept_bytes = 0
        self._last_lot = 2**64                              # of what can still be among the kept

    def add(self, lot: int, size: int, identity: str) -> None:
        """Count a document of `size` bytes; `lot` is its place in the order of drawing."""
        self.bytes += size
        self._smallest = min(self._smallest, (size, identity))
        if size <= self.room and lot <= self._last_lot:
            self._kept.append((lot, size, identity))
            self._kept_bytes += size
            if self._kept_bytes > 2 * OVERSUPPLY * self.room:
                self._put_in_order()

    def _put_in_order(self) -> None:
        self._kept.sort()
        ends = list(accumulate(size for _, size, _ in self._kept))
        if ends and ends[-1] > OVERSUPPLY * self.room:
            del self._kept[bisect_left(ends, OVERSUPPLY * self.room) + 1 :]
            self._kept_bytes, self._last_lot = ends[len(self._kept) - 1], self._kept[-1][0]

    def choose(self, limit: float) -> list[str]:
        """Ids of documents of `limit` (at most `room`) bytes together.

        A document that no longer fits is passed over, so that one large document does not end the choice; where all
        are too large, it is the smallest alone.
        """
        self._put_in_order()
        chosen, left = [], limit
        for _, size, identity in self._kept:
            if size <= left:
                chosen.append(identity)
                left -= size
        return chosen or [self._smallest[1]]


def survey(files: Sequence[Path], room: float, seed: int) -> dict[str, DomainSurvey]:
    """Each domain of `files`, smallest first. Does not depend on how the documents are divided among files."""
    found: dict[str, DomainSurvey] = {}
    for file in files:
        for batch in batches(file, ("id", "domain", "text")):
            sizes = pc.binary_length(batch["text"]).to_pylist()
            for domain, identity, size in zip(batch["domain"].to_pylist(), batch["id"].to_pylist(), sizes, strict=True):
                if domain not in found:
                    found[domain] = DomainSurvey(room)
                found[domain].add(xxhash.xxh3_64_intdigest(identity.encode(), seed=seed), size, identity)
    return dict(sorted(found.items(), key=lambda item: (item[1].bytes, item[0])))


def with_ids(files: Sequence[Path], identities: Sequence[str]) -> Iterator[pa.Table]:
    """The documents with these ids (columns id, text, domain), in the order of the files."""
    wanted = pa.array(identities, pa.string())
    for file in files:
        for batch in batches(file, ("id", "text", "domain")):
            yield batch.filter(pc.is_in(batch["id"].cast(pa.string()), value_set=wanted))


def sample(files: Sequence[Path], limit: float, seed: int) -> pa.Table:
    """Whole documents of each domain up to `limit` bytes, chosen by lots that `seed` draws (`Survey.choose`).

    Raises DataError where `files` hold none.
    """
    domains = survey(files, limit, seed)
    if not domains:
        raise DataError(
            f"{files[0].parent}: no documents.\nRaise annotate.held_out.fraction and run `annotate` and `curate` again."
        )
    chosen = [identity for domain in domains.values() for identity in domain.choose(limit)]
    return pa.concat_tables(with_ids(files, chosen))
