"""Reading the sources: workers turn pieces into Parquet, this process decides what of it counts and forms shards.

Text does not travel through this process. What counts where a source has a cap is decided in the order of the pieces,
whoever read them first, so that the corpus depends neither on workers nor on where pieces and shards are cut.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_pipeline.annotate.step import SCHEMA
from data_pipeline.config import AnnotateConfig, DataError, InstalledSource, Source, domains_of
from data_pipeline.sources import Document, PassedOver, Piece, Refusal
from data_pipeline.sources.streams import shown
from data_pipeline.storage import write_json, write_table
from data_pipeline.workers.executor import Workers, refuse

LARGEST_DOCUMENT = 0.1      # of a domain's cap: a sample of one file is none
FULL = 0.99                 # of its cap: a domain this full is read no further
PIECES_PER_SHARD = 4        # so that reading stops near the cap, and workers end together
EXAMPLES = 6                # of what was refused, for a reason and domain
READ_SCHEMA = pa.schema([SCHEMA.field(name) for name in Document._fields])
TOO_LARGE = "too large for the sample"

Report = Callable[[float, int], None]                   # the share read, documents more
Refusals = dict[str, dict[str, dict[str, Any]]]         # domain -> reason -> {"documents": n, "where": [...]}
Passed = dict[str, dict[str, dict[str, Any]]]           # unit -> what -> {"count": n, "where": [...]}


class ReadRows(NamedTuple):
    """Rows of a file of documents as read; all of them where `rows` is None."""

    file: str
    rows: list[int] | None
    bytes: int


class Read(NamedTuple):
    """What reading came to: the parts of each shard, in order, what was refused and what was passed over."""

    shards: list[list[ReadRows]]
    refusals: Refusals
    passed_over: Passed


class Quota:
    """How much of each domain is taken of one source, a document at a time. No limits: everything."""

    def __init__(self, limits: dict[str, float] | None):
        self.limits = limits
        self.size: Counter[str] = Counter()

    def wants(self, domain: str) -> bool:
        """Whether documents of `domain` are still taken."""
        if self.limits is None:
            return True
        return domain in self.limits and self.size[domain] < FULL * self.limits[domain]

    def wants_more(self) -> bool:
        """Whether documents of any domain are still taken."""
        return self.limits is None or any(self.wants(domain) for domain in self.limits)

    def take(self, domain: str, size: int) -> str | None:
        """Count a document of a domain that is wanted, or say why it is passed over."""
        if self.limits and size > min(LARGEST_DOCUMENT * self.limits[domain], self.limits[domain] - self.size[domain]):
            return TOO_LARGE
        self.size[domain] += size
        return None

    @property
    def share(self) -> float:
        """How full the emptiest domain is."""
        return min((self.size[domain] / limit for domain, limit in (self.limits or {}).items()), default=0.0)


def limits_of(source: Source) -> dict[str, float] | None:
    """Bytes to take of each domain of `source`; None for all there are."""
    if isinstance(source, InstalledSource):
        return {domain: megabytes * 1e6 for domain, megabytes in source.megabytes.items()}
    return None if source.megabytes is None else {source.domain: source.megabytes * 1e6}


def name_of(source: Source) -> str:
    """What messages call `source`."""
    match source.kind:
        case "installed":
            return "the installed packages"
        case "hub":
            return source.dataset
        case _:
            return ", ".join(map(shown, source.paths))


@dataclass(frozen=True)
class Reading:
    """One piece for a worker."""

    piece: Piece
    source: int             # number of its source
    number: int             # among the source's pieces
    target: Path            # TARGET.json says what was found, TARGET-000.parquet ... hold the documents
    file_bytes: int
    limits: dict[str, float] | None     # of the source
    full: frozenset[str]    # domains whose cap was reached: counted, not written

    @property
    def receipt(self) -> Path:
        """The file that says what was read; it is written last."""
        return self.target.with_suffix(".json")


def read(
    config: AnnotateConfig, cut: list[list[Piece]], directory: Path, workers: Workers, report: Report
) -> Read:
    """Read every source of `config`, cut into pieces, as far as its cap.

    Pieces that lie read in `directory` are not read again. Raises DataError for a source that cannot be read, or that
    holds no document of a domain it should.
    """
    shard_bytes = int(config.shard_megabytes * 1e6)
    refusals: Refusals = defaultdict(lambda: defaultdict(lambda: {"documents": 0, "where": []}))
    passed: Passed = defaultdict(lambda: defaultdict(lambda: {"count": 0, "where": []}))
    parts: list[ReadRows] = []
    failures: list[tuple[str, str]] = []
    for index, (source, found) in enumerate(zip(config.sources, cut, strict=True)):
        quota = Quota(limits_of(source))
        jobs = _jobs(found, index, source, quota, directory, shard_bytes)
        for done, outcome in enumerate(workers.map(read_one, jobs, _name(source)), start=1):
            if outcome.error is not None:
                if quota.wants_more():
                    failures.append((_name(source)(outcome.item), outcome.error))
                continue
            taken = list(_take(json.loads(outcome.item.receipt.read_text()), quota, refusals, passed, directory))
            parts += taken
            share = max(done / len(found), quota.share)
            report((index + share) / len(config.sources), outcome.result)
        if not failures:
            _refuse_empty(source, quota, _plain(refusals), _plain(passed))
    refuse(failures)
    return Read(list(_pack(parts, shard_bytes)), _plain(refusals), _plain(passed))


def _jobs(
    found: list[Piece], index: int, source: Source, quota: Quota, directory: Path, shard_bytes: int
) -> Iterator[Reading]:
    """A reading for each piece, as long as something is wanted."""
    limits = limits_of(source)
    for number, piece in enumerate(found):
        if not quota.wants_more():
            return
        full = frozenset(domain for domain in quota.limits or {} if not quota.wants(domain))
        target = directory / f"{index:03d}-{number:06d}"
        yield Reading(piece, index, number, target, shard_bytes, limits, full)


def _name(source: Source) -> Callable[[Reading], str]:
    return lambda reading: f"{name_of(source)}, piece {reading.number}"


def read_one(reading: Reading) -> int:
    """Write the documents of a piece and what was found in it; the number of documents. In a worker."""
    if reading.receipt.exists():
        kept = json.loads(reading.receipt.read_text())
        if all(reading.target.with_name(file).exists() for file in kept["files"]):
            return int(kept["documents"])
    files, sure = _Files(reading.target, reading.file_bytes), Counter[str]()
    # In order: [domain, bytes, file or -1], [domain, reason, where], or what was passed over: [None, unit, what, where]
    items: list[list[Any]] = []
    for found in reading.piece.read():
        if isinstance(found, PassedOver):
            items.append([None, *found])
            continue
        if isinstance(found, Refusal):
            items.append([found.domain, found.reason, found.where])
            continue
        size = len(found.text.encode())
        items.append([found.domain, size, files.add(found, size, written=found.domain not in reading.full)])
        if reading.limits is None:
            continue
        # A domain that is not full has room for so small a document, whatever of earlier pieces counts.
        if size <= (1 - FULL) * reading.limits[found.domain]:
            sure[found.domain] += size
        if all(domain in reading.full or sure[domain] >= FULL * limit for domain, limit in reading.limits.items()):
            break
    files.close()
    documents = sum(isinstance(item[1], int) for item in items)
    receipt = {"documents": documents, "files": [file.name for file in files.written], "items": items}
    write_json(receipt, reading.receipt)
    return documents


class _Files:
    """The Parquet files of a piece. Where they end depends on the documents alone, written or not."""

    def __init__(self, target: Path, limit: int):
        self.target, self.limit = target, limit
        self.written: list[Path] = []
        self.rows: list[Document] = []
        self.bytes = 0

    def add(self, document: Document, size: int, written: bool) -> int:
        """The number of the file that the document goes into, or -1."""
        if self.bytes and self.bytes + size > self.limit:
            self.close()
        self.bytes += size
        if not written:
            return -1
        self.rows.append(document)
        return len(self.written)

    def close(self) -> None:
        if self.bytes:
            file = self.target.with_name(f"{self.target.name}-{len(self.written):04d}.parquet")
            columns = {name: [getattr(row, name) for row in self.rows] for name in Document._fields}
            write_table(pa.table(columns, READ_SCHEMA), file)
            self.written.append(file)
        self.rows, self.bytes = [], 0


def _take(
    receipt: dict[str, Any], quota: Quota, refusals: Refusals, passed: Passed, directory: Path
) -> Iterator[ReadRows]:
    """The parts of a piece that count; what does not is counted in `refusals` and `passed`."""
    rows: Counter[int] = Counter()
    chosen: dict[int, list[int]] = defaultdict(list)
    sizes: Counter[int] = Counter()
    for domain, value, place, *where in receipt["items"]:
        if domain is None:
            if quota.wants_more():
                _count(passed[value][place], "count", *where)
            continue
        is_document = isinstance(value, int)
        row = rows[place] if is_document else 0
        if is_document:
            rows[place] += 1
        if not quota.wants(domain):
            continue
        reason = quota.take(domain, value) if is_document else value
        if reason is not None:
            _count(refusals[domain][reason], "documents", "" if is_document else place)
            continue
        chosen[place].append(row)
        sizes[place] += value
    for place in sorted(chosen):
        everything = len(chosen[place]) == rows[place]
        file = str(directory / receipt["files"][place])
        yield ReadRows(file, None if everything else chosen[place], sizes[place])


def _count(entry: dict[str, Any], key: str, where: str) -> None:
    entry[key] += 1
    if where:
        entry["where"] = sorted({*entry["where"], where}, key=lambda name: xxhash.xxh3_64_intdigest(name.encode()))
        del entry["where"][EXAMPLES:]


def _pack(parts: list[ReadRows], limit: int) -> Iterator[list[ReadRows]]:
    """Neighbouring parts, together no more than `limit` bytes where one alone is not."""
    shard: list[ReadRows] = []
    for part in parts:
        if shard and sum(other.bytes for other in shard) + part.bytes > limit:
            yield shard
            shard = []
        shard.append(part)
    if shard:
        yield shard


def load(parts: list[ReadRows]) -> pa.Table:
    """The documents of a shard as read: the other columns of SCHEMA are null."""
    tables = []
    for part in parts:
        table = pq.read_table(part.file, schema=READ_SCHEMA)
        tables.append(table if part.rows is None else table.take(pa.array(part.rows)))
    table = pa.concat_tables(tables).combine_chunks()
    columns = [
        table[field.name] if field.name in READ_SCHEMA.names else pa.nulls(len(table), field.type) for field in SCHEMA
    ]
    return pa.table(columns, SCHEMA)


def _refuse_empty(source: Source, quota: Quota, refusals: Refusals, passed: Passed) -> None:
    for domain in domains_of(source):
        if quota.size[domain]:
            continue
        where = f" in the closure of {', '.join(source.roots)}" if isinstance(source, InstalledSource) else ""
        reasons = refusals.get(domain, {})
        told = [f"{why} {entry['documents']:,} ({', '.join(entry['where'][:1])})" for why, entry in reasons.items()]
        told += [f"{unit} passed over: {counts(kinds)}" for unit, kinds in passed.items()]
        remedy = f"Name other text in annotate.sources, or raise megabytes where {domain} has a cap"
        if any(why.startswith("no column") for why in reasons):
            remedy = "Set `text_column` to the one that holds the text"
        raise DataError(
            f"Domain `{domain}`: no document was found{where or f' in {name_of(source)}'}"
            f"{': ' if told else ''}{'; '.join(told)}.\n{remedy}, in params.yaml."
        )


def counts(kinds: dict[str, dict[str, Any]], most: int = 8) -> str:
    """What was passed over, the most frequent first: `.png 12, .css 3, 4 of 2 other kinds`."""
    ordered = sorted(((-entry["count"], what) for what, entry in kinds.items()))
    said = [f"{what} {-number:,}" for number, what in ordered[:most]]
    if others := ordered[most:]:
        said.append(f"{-sum(number for number, _ in others):,} of {len(others):,} other kinds")
    return ", ".join(said)


def _plain(entries: Refusals | Passed) -> dict[str, dict[str, dict[str, Any]]]:
    return {outer: {what: dict(entry) for what, entry in sorted(inner.items())}
            for outer, inner in sorted(entries.items())}
