"""Files of one's own, found and cut into pieces: records, texts, HTML pages, web archives, and archives of all these.

What a file is, its first bytes tell where they can, else its name (`sources.kinds`). A file that a user named and that
is not understood is a DataError; one found in a directory is refused or passed over, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.config import DataError, FilesSource, WebSource
from data_pipeline.sources.columns import require_text
from data_pipeline.sources.kinds import How, Kind, kind_of, not_read
from data_pipeline.sources.locations import locate, nothing, place
from data_pipeline.sources.piece import Item, PassedOver, PassedOverPiece, Piece, batches, seeded
from data_pipeline.sources.readers import Part, is_one_value, open_parquet, passed_over, read_part
from data_pipeline.sources.streams import SLICE, changed_at, has_mark, is_url, look

WEB_KINDS: frozenset[Kind] = frozenset({"warc", "tar", "zip"})


@dataclass(frozen=True)
class FilesPiece(Piece):
    """Parts of files that are read in one go."""

    source: FilesSource
    parts: tuple[Part, ...]
    changed: int                    # nanoseconds of the epoch, of the file changed last
    kinds: frozenset[Kind] | None

    def read(self) -> Iterator[Item]:
        for part in self.parts:
            yield from read_part(part, self.source, self.kinds)


def file_pieces(
    source: FilesSource, seed: int, shard_bytes: int, kinds: frozenset[Kind] | None = None
) -> list[Piece]:
    """Plain JSONL is cut into ranges of bytes, Parquet into row groups; small files go together.

    Args:
        kinds: of files to read; None stands for all.

    Raises DataError for a path that stands for nothing, for a file a user named that is not read, and for a Parquet
    file they named that lacks the text column.
    """
    found: dict[str, list[Part | PassedOver]] = {}
    first: dict[str, str] = {}
    over: set[PassedOver] = set()
    for path in source.paths:
        located, entries = locate(path)
        files = {first.setdefault(place(file), file): how for file, how in located.items()}     # each once
        for file, how in files.items():
            if how != "found" or file not in found:
                found[file] = list(_parts(file, how, source, shard_bytes, kinds))
        items = [item for file in files for item in found[file]]
        own = [*entries, *(item for item in items if isinstance(item, PassedOver))]
        if not any(isinstance(item, Part) for item in items):
            raise nothing(path, own, kinds)
        over.update(own)
    parts = [item for file in seeded(found, seed) for item in found[file] if isinstance(item, Part)]
    pieces: list[Piece] = [
        FilesPiece(source, tuple(group), max(changed_at(part.file) for part in group), kinds)
        for group in batches(((part, part.size) for part in parts), shard_bytes)
    ]
    return [PassedOverPiece(tuple(sorted(over))), *pieces] if over else pieces


def web_pieces(source: WebSource, seed: int, shard_bytes: int) -> list[Piece]:
    """Those of web archives alone. Raises DataError for a path that stands for none."""
    files = FilesSource(kind="files", **source.model_dump(exclude={"kind"}))
    return file_pieces(files, seed, shard_bytes, WEB_KINDS)


def _parts(
    file: str, how: How, source: FilesSource, shard_bytes: int, kinds: frozenset[Kind] | None
) -> Iterator[Part | PassedOver]:
    if is_url(file):
        yield Part(file, how, shard_bytes)
        return
    try:
        head, is_packed = look(file)
        size = Path(file).stat().st_size
    except (DataError, OSError):
        if how == "named":
            raise
        yield Part(file, how, 0)      # whose reader refuses it
        return
    kind = kind_of(file, head, how)
    if kind is None or (kinds and kind not in {*kinds, "pointer"}):
        yield passed_over(file, head, how, kinds)
    elif kind == "pointer" and how == "named":
        raise not_read(file, head, kinds)
    elif kind == "parquet" and head and not is_packed:
        yield from _row_groups(Part(file, how, size), source, shard_bytes)
    elif kind == "records" and size > shard_bytes and not (
        is_packed or has_mark(head) or is_one_value(look(file, SLICE)[0])
    ):
        for start in range(0, size, shard_bytes):
            end = min(start + shard_bytes, size)
            yield Part(file, how, end - start, "records", start, end)
    else:
        yield Part(file, how, size)


def _row_groups(whole: Part, source: FilesSource, shard_bytes: int) -> Iterator[Part]:
    """Row groups in parts of about `shard_bytes` of text; a file without a readable footer stays whole."""
    with open_parquet(whole.file) as parquet:
        if parquet is None or not parquet.num_row_groups:
            yield whole
            return
        if whole.how == "named":
            require_text(whole.file, source.text_column, parquet.schema_arrow)
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        sizes = [_text_bytes(group, source.text_column) for group in groups]
    for batch in batches(enumerate(sizes), shard_bytes):
        start, end = batch[0], batch[-1] + 1
        yield Part(whole.file, whole.how, sum(sizes[start:end]), "parquet", start, end)


def _text_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    columns = [group.column(index) for index in range(group.num_columns)]
    return sum(entry.total_uncompressed_size for entry in columns if entry.path_in_schema == column)
