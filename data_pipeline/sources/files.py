"""Files of one's own: records in JSONL or Parquet, and plain texts, a document each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.config import DataError, FilesSource
from data_pipeline.sources.columns import as_bytes, missing_column, require_text
from data_pipeline.sources.locations import COMPRESSED, expand, suffix
from data_pipeline.sources.piece import Document, Piece, Refusal, batches, checked, seeded
from data_pipeline.sources.streams import Damage, changed_at, chunks, decode, is_url

RECORD_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst"})
LARGEST_RECORD = 256_000_000        # bytes: more in one line or text file is no document
ROWS = 64                           # of Parquet, held at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Part(NamedTuple):
    """A range of a file: bytes of records, row groups of Parquet. Without an end, all of it."""

    file: str
    kind: Literal["records", "parquet", "text"]
    size: int                       # bytes
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class FilesPiece(Piece):
    source: FilesSource
    parts: tuple[Part, ...]
    changed: int                    # nanoseconds of the epoch, of the file changed last

    def read(self) -> Iterator[Document | Refusal]:
        readers = {"records": _records, "parquet": _parquet, "text": _text}
        for part in self.parts:
            yield from readers[part.kind](part, self.source)


def file_pieces(source: FilesSource, seed: int, shard_bytes: int) -> list[Piece]:
    """Plain JSONL is cut into ranges of bytes, Parquet into row groups; small files go together.

    Raises DataError for a path that stands for nothing and for a Parquet file without the text column.
    """
    files = seeded(expand(source.paths, RECORD_SUFFIXES | TEXT_SUFFIXES | {".parquet"}), seed)
    parts = [part for file in files for part in _parts(file, source, shard_bytes)]
    groups = batches(((part, part.size) for part in parts), shard_bytes)
    return [FilesPiece(source, tuple(group), max(changed_at(part.file) for part in group)) for group in groups]


def _parts(file: str, source: FilesSource, shard_bytes: int) -> Iterator[Part]:
    ending, is_compressed = suffix(file), file.lower().endswith(COMPRESSED)
    if ending == ".parquet":
        if is_compressed or is_url(file):
            raise DataError(
                f"annotate.sources: {file} is Parquet that must be read from a plain file on disk.\n"
                "Fetch and unpack it first, or name the data set as a source of kind `hub`, in params.yaml."
            )
        yield from _row_groups(file, source, shard_bytes)
        return
    kind: Literal["records", "text"] = "records" if ending in RECORD_SUFFIXES else "text"
    size = shard_bytes if is_url(file) else Path(file).stat().st_size
    if kind == "text" or is_compressed or is_url(file):
        yield Part(file, kind, size)
        return
    for start in range(0, max(size, 1), shard_bytes):
        end = min(start + shard_bytes, size)
        yield Part(file, kind, end - start, start, end)


def _records(part: Part, source: FilesSource) -> Iterator[Document | Refusal]:
    """Documents of the lines that begin in the part. Raises DataError for what is not JSONL, and where no record at a
    file's beginning has the column: one may be of another kind, as a line of metadata."""
    first, column = part.start == 0, source.text_column
    lacking: dict[str, Any] | None = None if first else {}      # the first record, as long as none has the column
    for offset, line in _lines(part):
        where = f"{part.file}, byte {offset}"
        if isinstance(line, Damage):
            yield Refusal(source.domain, line.reason, where)
            continue
        line = line.removeprefix(BYTE_ORDER_MARK) if offset == 0 else line
        if not line.strip():
            continue
        if first and (line.lstrip().startswith(b"[") or line.strip() == b"{"):
            raise DataError(
                f"annotate.sources: {part.file} is one JSON value over several lines.\n"
                "Write one object a line: `jq -c '.[]'` does it for a list, `jq -c .` for an object."
            )
        record = _parse(line)
        if isinstance(record, str):
            yield Refusal(source.domain, record, where)
            continue
        lacking = {} if column in record else record if lacking is None else lacking
        first = False
        yield checked(record.get(column), part.file, f"byte {offset}", source.domain, source.license)
    if lacking:
        raise missing_column(part.file, column, lacking)


def _lines(part: Part) -> Iterator[tuple[int, bytes | Damage]]:
    """Offset and content of the lines that begin in the part.

    A part that begins within a file starts reading a byte early: the line that byte belongs to is the part's before.
    """
    for offset, line in split_lines(chunks(part.file, max(part.start - 1, 0)), max(part.start - 1, 0)):
        if part.end is not None and offset >= part.end:
            return
        if offset >= part.start:
            yield offset, line


def split_lines(data: Iterable[bytes | Damage], offset: int) -> Iterator[tuple[int, bytes | Damage]]:
    """Lines without their ends, each with the offset of its first byte; a line cut by damage is left out.

    One longer than LARGEST_RECORD is given as damage.
    """
    begun: list[bytes] = []
    size = 0
    for chunk in data:
        if isinstance(chunk, Damage):
            offset += size
            begun, size = [], 0
            yield offset, chunk
            continue
        *whole, rest = chunk.split(b"\n")
        for end in whole:
            size += len(end)
            yield offset, b"".join([*begun, end]) if size <= LARGEST_RECORD else Damage("too large")
            offset += size + 1
            begun, size = [], 0
        size += len(rest)
        if size <= LARGEST_RECORD:
            begun.append(rest)
        else:
            begun.clear()
    if size:
        yield offset, b"".join(begun) if size <= LARGEST_RECORD else Damage("too large")


def _parse(line: bytes) -> dict[str, Any] | str:
    """The object on a line of JSONL, or why there is none."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return "invalid UTF-8"
    except (ValueError, RecursionError):
        return "invalid JSON"
    return record if isinstance(record, dict) else "no JSON object"


def _text(part: Part, source: FilesSource) -> Iterator[Document | Refusal]:
    """A file as one document; what is unreadable in it is left out and counted."""
    data: list[bytes] = []
    size = 0
    for chunk in chunks(part.file):
        if isinstance(chunk, Damage):
            yield Refusal(source.domain, chunk.reason, part.file)
            continue
        data.append(chunk)
        size += len(chunk)
        if size > LARGEST_RECORD:
            yield Refusal(source.domain, "too large", part.file)
            return
    decoded = decode(b"".join(data))
    if decoded is None:
        yield Refusal(source.domain, "not text", part.file)
        return
    text, unreadable = decoded
    if unreadable:
        yield Refusal(source.domain, "invalid UTF-8", part.file)
    yield checked(text, part.file, "", source.domain, source.license)


def _row_groups(file: str, source: FilesSource, shard_bytes: int) -> Iterator[Part]:
    """Row groups in parts of about `shard_bytes` of text; a file without a readable footer stays whole."""
    try:
        parquet = pq.ParquetFile(file)
    except (OSError, pa.ArrowException):
        yield Part(file, "parquet", Path(file).stat().st_size)
        return
    with parquet:
        require_text(file, source.text_column, parquet.schema_arrow)
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        sizes = [_text_bytes(group, source.text_column) for group in groups]
    for batch in batches(enumerate(sizes), shard_bytes):
        start, end = batch[0], batch[-1] + 1
        yield Part(file, "parquet", sum(sizes[start:end]), start, end)


def _text_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    columns = [group.column(index) for index in range(group.num_columns)]
    return sum(entry.total_uncompressed_size for entry in columns if entry.path_in_schema == column)


def _parquet(part: Part, source: FilesSource) -> Iterator[Document | Refusal]:
    """Documents of the part's row groups, without those that are damaged."""
    try:
        parquet = pq.ParquetFile(part.file, buffer_size=1 << 20)
    except (OSError, pa.ArrowException):
        yield Refusal(source.domain, "damaged Parquet", part.file)
        return
    with parquet:
        end = parquet.num_row_groups if part.end is None else part.end
        rows = [parquet.metadata.row_group(index).num_rows for index in range(end)]
        for group in range(part.start, end):
            row = sum(rows[:group])
            try:
                for batch in parquet.iter_batches(ROWS, row_groups=[group], columns=[source.text_column]):
                    for value in as_bytes(batch.column(0)):
                        yield checked(value, part.file, f"row {row}", source.domain, source.license)
                        row += 1
            except (OSError, pa.ArrowException):
                yield Refusal(source.domain, "damaged Parquet", f"{part.file}, row {row}")
