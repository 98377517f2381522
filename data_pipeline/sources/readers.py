"""Documents of files, addresses and members of archives, whatever they are."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.config import DataError, FilesSource
from data_pipeline.evaluation_sets import leaves
from data_pipeline.sources.archives import Member, tar_members, zip_members
from data_pipeline.sources.columns import as_bytes, missing_column, require_text
from data_pipeline.sources.kinds import How, Kind, kind_of, not_read, suffix
from data_pipeline.sources.piece import Item, PassedOver, Refusal, checked
from data_pipeline.sources.streams import (
    CHUNK,
    SLICE,
    Gap,
    Joined,
    chunks,
    decode,
    encoding_of,
    has_mark,
    in_utf8,
    is_url,
    peeked,
    shown,
    unpacked_again,
)
from data_pipeline.sources.web import NO_TEXT, archive, page

LARGEST_RECORD = 256_000_000        # bytes: more in one line or text file is no document
ROWS = 64                           # of Parquet, held at a time
DEEPEST = 4                         # archives within each other
IN_MEMORY = 64_000_000              # bytes of what must be read as a whole and is no plain file; more goes to disk
PARQUET_ERRORS = (OSError, ValueError, pa.ArrowException)       # Arrow's own, and names that are not UTF-8
MARKS = ",;\t|"                      # between the columns of a table, the commonest first
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = re.compile(r"\s*")
BETWEEN = re.compile(r"[\s,\[\]]*")              # the values of an array
OBJECT_LINE = re.compile(r"\n\s*(?=\{)")
LONGEST_TOKEN = 16                              # characters, of what is cut short and no string
TOO_DEEP, NO_OBJECT = "nested too deeply", "no JSON object"
UNREADABLE = {True: re.compile("[\ud800-\udfff]"), False: re.compile("\ufffd")}     # by whether the file is UTF-8
csv.field_size_limit(LARGEST_RECORD)


class Repeating(dict[str, Any]):
    """An object with names that stand in it more than once: `twice`. It has the last value of each, as in JSON's
    readers everywhere."""

    twice: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating, counts = Repeating(found), Counter(name for name, _ in pairs)
    repeating.twice = frozenset(name for name, count in counts.items() if count > 1)
    return repeating


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=float)      # which takes any number of digits
# Of an object its values, those of a name that stands in it twice as well.
VALUES = json.JSONDecoder(object_pairs_hook=lambda pairs: [value for _, value in pairs], parse_int=float)
Entry = tuple[str, dict[str, Any]]      # the place of a record, and the record


class Part(NamedTuple):
    """A range of a file: bytes of records, row groups of Parquet. Without an end, all of it."""

    file: str
    how: How
    size: int                       # bytes
    kind: Literal["records", "parquet"] | None = None       # None: what its first bytes say
    start: int = 0
    end: int | None = None


class Stream(NamedTuple):
    """Bytes to read documents from."""

    name: str                           # as shown; a member's after its archive's and a slash
    data: Iterator[bytes | Gap]      # unpacked
    source: FilesSource
    kinds: frozenset[Kind] | None       # that are read; None stands for all
    part: Part | None                   # None for a member of an archive
    depth: int = 0                      # archives that it lies in

    @property
    def how(self) -> How:
        """How its file was come by; a member of an archive is found."""
        return self.part.how if self.part else "found"

    @property
    def named(self) -> bool:
        """Whether the user named the file."""
        return self.how == "named"

    def refused(self, reason: str, place: str = "") -> Refusal:
        """A refusal of what stands at `place`, or of all of it."""
        where = f"{self.name}, {place}" if place else self.name
        return Refusal(self.source.domain, reason, where.encode(errors="backslashreplace").decode())

    def checked(self, text: object, place: str) -> Item:
        """The document of the text at `place`, or why there is none."""
        return checked(text, self.name, place, self.source.domain, self.source.license)


def read_part(part: Part, source: FilesSource, kinds: frozenset[Kind] | None) -> Iterator[Item]:
    """Raises DataError for a file a user named that cannot be opened, is not read or lacks the text column."""
    stream = Stream(shown(part.file), iter(()), source, kinds, part)
    if part.kind == "parquet":
        yield from _told(_row_groups(part.file, stream), stream)
        return
    try:
        head, data = peeked(chunks(part.file, max(part.start - 1, 0)))      # the part before has that byte's line
    except DataError:
        if stream.named or is_url(part.file):
            raise
        yield stream.refused("cannot be read")
        return
    stream = stream._replace(data=data)
    yield from _records(stream) if part.kind == "records" else _stream(part.file, head, stream)


def _told(items: Iterator[Item], stream: Stream) -> Iterator[Item]:
    """`items`; a refusal where there are none, unless it is a later part of a file."""
    first = next(items, None)
    if first is not None:
        yield first
        yield from items
    elif not (stream.part and stream.part.start):
        yield stream.refused("empty")


def _stream(name: str, head: bytes, stream: Stream) -> Iterator[Item]:
    """Documents of a stream that is what its name and first bytes say."""
    kind = kind_of(name, head, stream.how)
    if kind and not head:
        first = next(stream.data, None)
        if first is None:
            yield stream.refused("empty")
            return
        stream = stream._replace(data=chain([first], stream.data))
    if kind is None or (stream.kinds and kind not in {*stream.kinds, "pointer"}):
        yield passed_over(name, head, stream.how, stream.kinds)._replace(where=stream.name)
    elif kind == "pointer":
        if stream.named:
            raise not_read(name, head, stream.kinds)
        yield stream.refused("Git LFS pointer")
    else:
        yield from _told(READERS[kind](stream), stream)


def passed_over(name: str, head: bytes, how: How, kinds: frozenset[Kind] | None) -> PassedOver:
    """A file of a kind that is not read. Raises DataError where a user named it."""
    if how == "named":
        raise not_read(name, head, kinds)
    return PassedOver("files", suffix(name) or "no suffix", shown(name))


def _members(members: Iterator[Member | Gap], stream: Stream) -> Iterator[Item]:
    """Documents of the files in an archive. As in a directory, hidden ones are passed over."""
    if stream.depth == DEEPEST:
        yield stream.refused(f"more than {DEEPEST} archives within each other")
        return
    first = next(members, None)
    if first is None:
        yield stream.refused("empty")
        return
    for member in chain([first], members):
        if isinstance(member, Gap):
            yield stream.refused(member.reason)
            continue
        name = f"{stream.name}/{shown(member.name)}"
        if member.data is None:
            yield PassedOver("files", "link or device in an archive", name)
        elif any(part.startswith(".") for part in member.name.split("/")):
            yield PassedOver("files", "hidden", name)
        else:
            head, data = peeked(unpacked_again(member.data, member.name))
            inner = stream._replace(name=name, data=data, part=None, depth=stream.depth + 1)
            yield from _stream(member.name, head, inner)


def _of_whole(stream: Stream, read: Callable[[IO[bytes]], Iterator[Item]]) -> Iterator[Item]:
    """What `read` finds in a stream as a file that can be read at any place; a refusal where it is damaged."""
    with tempfile.SpooledTemporaryFile(IN_MEMORY) as file:
        for item in stream.data:
            if isinstance(item, Gap):
                yield stream.refused(item.reason)
                return
            file.write(item)
        file.seek(0)
        yield from read(file)


def is_one_value(begin: bytes) -> bool:
    """Whether JSON that begins so is an array, or its first value goes on after its first line."""
    text = begin.decode("utf-8-sig", "replace").lstrip()
    end = text.find("\n")
    if text.startswith("[") or end < 0:
        return text.startswith("[")
    following = BETWEEN.match(text, end).end()      # type: ignore[union-attr]   # it matches nothing too
    try:
        return JSON.raw_decode(text)[1] > end
    except RecursionError:
        return False
    except json.JSONDecodeError as error:           # in a line cut short nothing of the next one is understood
        return error.pos > following


def _no_column(stream: Stream, columns: Iterable[str], place: str = "") -> Refusal:
    column, names = stream.source.text_column, sorted(columns)
    if (count := names.count(column)) > 1:
        return stream.refused(f"{count} columns {column!r}", place)
    return stream.refused(f"no column {column!r}", f"{place}{', ' if place else ''}but {', '.join(names):.200}")


def _records(stream: Stream) -> Iterator[Item]:
    """Documents of the lines of JSONL that begin in the part, or of JSON whose values go over several lines.

    Raises DataError where none of the records of a file that a user named has the text column.
    """
    column, is_first = stream.source.text_column, not (stream.part and stream.part.start)
    for entry in _entries(stream):
        if isinstance(entry, Refusal):
            yield entry
            continue
        place, record = entry
        if isinstance(record, Repeating) and column in record.twice:
            yield stream.refused(f"several {column!r}", place)
        elif column in record:
            yield stream.checked(record[column], place)
        elif is_first and stream.named and stream.part and not _has_column(stream, stream.part.file):
            raise missing_column(stream.name, column, record)
        else:
            yield _no_column(stream, record, place)
        is_first = False


def _has_column(stream: Stream, file: str) -> bool:
    """Whether any record of a file has the column."""
    entries = _entries(stream._replace(data=chunks(file), part=None))
    return any(stream.source.text_column in entry[1] for entry in entries if not isinstance(entry, Refusal))


def _entries(stream: Stream) -> Iterator[Entry | Refusal]:
    part = stream.part or Part(stream.name, "found", 0)
    begin, data = max(part.start - 1, 0), in_utf8(stream.data)
    if part.start == 0:
        head, data = peeked(data, SLICE)
        if is_one_value(head):
            yield from _values(stream._replace(data=data))
            return
    for offset, line in split_lines(data, begin):
        if part.end is not None and offset >= part.end:
            return
        if offset < part.start:
            continue
        line = line.removeprefix(BYTE_ORDER_MARK) if offset == 0 and isinstance(line, bytes) else line
        if isinstance(line, bytes) and not line.strip():
            continue
        record = line.reason if isinstance(line, Gap) else _parse(line)
        place = f"byte {offset}"
        yield stream.refused(record, place) if isinstance(record, str) else (place, record)


def _values(stream: Stream) -> Iterator[Entry | Refusal]:
    """Objects one after another, or in an array; after damage, from the next one that begins a line.

    No more is held than a value, or a chunk. Values in a row that are no objects are one refusal.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    held, size, wanted = [""], 0, 0             # characters; a value that goes on is tried again at twice the size
    number, depth, is_object, is_lost = 0, 0, True, False
    for item in chain(stream.data, [None]):
        if isinstance(item, Gap):
            yield stream.refused(item.reason)
            continue
        held.append(decoder.decode(item or b"", final=item is None))
        size += len(held[-1])
        if size > LARGEST_RECORD:
            yield stream.refused("too large", f"record {number}")
            return
        if item is not None and size < wanted:
            continue
        text, start = "".join(held), 0
        while True:
            if is_lost:
                following = OBJECT_LINE.search(text, start)
                if following is None:
                    start = text.rfind("\n", start)         # -1 keeps a character, which does no harm
                    break
                start, is_lost = following.end(), False
            before, start = start, BETWEEN.match(text, start).end()     # type: ignore[union-attr]
            depth += text.count("[", before, start) - text.count("]", before, start)
            found = _value(text, start, is_last=item is None)
            if found is None:
                break
            place = f"record {number}"
            number += 1
            if isinstance(found, str):
                yield stream.refused(found, place)
                is_lost = True
                continue
            (value, end), was_object = found, is_object
            is_object = isinstance(value, dict)
            if UNREADABLE[True].search(text, start, end):
                yield stream.refused("invalid UTF-8", place)
            elif is_object:
                yield place, value
            elif was_object:
                yield stream.refused(NO_OBJECT, place)
            start = end
        held, size = [text[start:]], len(text[start:])
        wanted = 2 * size
    if depth > 0:
        yield stream.refused("truncated JSON")


def _value(text: str, start: int, is_last: bool) -> tuple[Any, int] | str | None:
    """The value at `start` and where it ends, or why there is none; None where that shows in what follows `text`."""
    if start == len(text):
        return None
    try:
        value, end = JSON.raw_decode(text, start)
    except RecursionError:
        return TOO_DEEP
    except json.JSONDecodeError as error:
        goes_on = error.msg.startswith("Unterminated string") or error.pos > len(text) - LONGEST_TOKEN
        return None if goes_on and not is_last else "invalid JSON"
    return (value, end) if is_last or end < len(text) else None


def split_lines(data: Iterable[bytes | Gap], offset: int) -> Iterator[tuple[int, bytes | Gap]]:
    """Lines without their ends, each with the offset of its first byte; a line cut by damage is left out.

    One longer than LARGEST_RECORD is given as damage.
    """
    begun: list[bytes] = []
    size = 0
    for chunk in data:
        if isinstance(chunk, Gap):
            offset += size
            begun, size = [], 0
            yield offset, chunk
            continue
        *whole, rest = chunk.split(b"\n")
        for end in whole:
            size += len(end)
            yield offset, b"".join([*begun, end]) if size <= LARGEST_RECORD else Gap("too large")
            offset += size + 1
            begun, size = [], 0
        size += len(rest)
        if size <= LARGEST_RECORD:
            begun.append(rest)
        else:
            begun.clear()
    if size:
        yield offset, b"".join(begun) if size <= LARGEST_RECORD else Gap("too large")


def _parse(line: bytes) -> dict[str, Any] | str:
    """The object on a line of JSONL, or why there is none."""
    try:
        record = JSON.decode(line.decode())
    except UnicodeDecodeError:
        return "invalid UTF-8"
    except RecursionError:
        return TOO_DEEP
    except ValueError:
        return "invalid JSON"
    return record if isinstance(record, dict) else NO_OBJECT


def _table(stream: Stream) -> Iterator[Item]:
    """Documents of the rows of a CSV or TSV file, whose first row names the columns.

    The mark between columns is the one that makes the text column one of them. A row cut by damage is left out. Raises
    DataError where a file that a user named lacks the column.
    """
    column = stream.source.text_column
    head, data = peeked(stream.data, CHUNK)
    joined, encoding = Joined(in_utf8(data)), "utf-8-sig" if has_mark(head) else encoding_of(head)
    is_utf8 = encoding == "utf-8-sig"
    text = io.TextIOWrapper(
        io.BufferedReader(joined), encoding, errors="surrogateescape" if is_utf8 else "replace", newline=""
    )
    first = text.readline()
    mark = next((mark for mark in MARKS if column in _header(first, mark)), ",")
    rows = _rows(chain([first], text), mark)
    _, names = next(rows, (1, None)) if first else (1, [])
    if names is None:
        yield stream.refused("damaged CSV")
        return
    if names and names.count(column) != 1:
        if stream.named:
            raise missing_column(stream.name, column, names)
        yield _no_column(stream, names)
        return
    pairs: Iterator[Any] = pairwise(chain(rows, [None]))
    for (line, row), following in pairs:
        if following is None and joined.damage is not None:
            break
        if row is None or len(row) != len(names):
            yield stream.refused("damaged CSV", f"line {line}")
        elif UNREADABLE[is_utf8].search(row[names.index(column)]):
            yield stream.refused("invalid UTF-8" if is_utf8 else f"invalid {encoding}", f"line {line}")
        else:
            yield stream.checked(row[names.index(column)], f"line {line}")
    if joined.damage is not None:
        yield stream.refused(joined.damage.reason)


def _header(line: str, mark: str) -> list[str]:
    return next(csv.reader([line], delimiter=mark), [])


def _rows(text: Iterator[str], mark: str) -> Iterator[tuple[int, list[str] | None]]:
    """Rows with the number of their first line; None for a line that begins none, after which the next is tried."""
    taken: list[str] = []                   # lines of the row that is being read
    again: deque[str] = deque()

    def lines() -> Iterator[str]:
        while line := again.popleft() if again else next(text, ""):
            taken.append(line)
            yield line

    number = 1
    while True:
        try:
            for row in csv.reader(lines(), delimiter=mark, strict=True):
                if row:
                    yield number, row
                number += len(taken)
                taken.clear()
            return
        except csv.Error:
            yield number, None
            again.extendleft(reversed(taken[1:]))
            number += 1
            taken.clear()


def _bytes(stream: Stream) -> Generator[Refusal, None, bytes | None]:
    """All bytes of a stream, without what is damaged, which is counted; None for too many."""
    data: list[bytes] = []
    size = 0
    for chunk in stream.data:
        if isinstance(chunk, Gap):
            yield stream.refused(chunk.reason)
            continue
        data.append(chunk)
        size += len(chunk)
        if size > LARGEST_RECORD:
            yield stream.refused("too large")
            return None
    return b"".join(data)


def _text(stream: Stream) -> Iterator[Item]:
    """A file as one document; what is unreadable in it is left out and counted."""
    data = yield from _bytes(stream)
    if data is None:
        return
    decoded = decode(data)
    if decoded is None:
        yield stream.refused("not text")
        return
    text, unreadable = decoded
    if unreadable:
        yield stream.refused("invalid UTF-8")
    yield stream.checked(text, "")


def _page(stream: Stream) -> Iterator[Item]:
    """The main text of an HTML file."""
    data = yield from _bytes(stream)
    if data is None:
        return
    text = page(data, None, stream.source.extractor) if data.strip() else Gap("empty")
    if isinstance(text, str) and not text.strip():
        text = NO_TEXT
    yield stream.refused(text.reason) if isinstance(text, Gap) else stream.checked(text, "")


def _row_groups(file: str | IO[bytes], stream: Stream) -> Iterator[Item]:
    """Documents of the part's row groups, without those that are damaged."""
    part, column = stream.part or Part("", "found", 0), stream.source.text_column
    with open_parquet(file) as parquet:
        if parquet is None:
            yield stream.refused("damaged Parquet")
            return
        try:
            require_text(stream.name, column, schema := parquet.schema_arrow)
        except DataError:
            if stream.named:
                raise
            yield stream.refused(f"no column {column!r} of text", str(schema.field(column).type)) \
                if schema.names.count(column) == 1 else _no_column(stream, schema.names)
            return
        end = parquet.num_row_groups if part.end is None else part.end
        rows = [parquet.metadata.row_group(index).num_rows for index in range(end)]
        for group in range(part.start, end):
            row = sum(rows[:group])
            try:
                for batch in parquet.iter_batches(ROWS, row_groups=[group], columns=[column]):
                    for value in as_bytes(batch.column(0)):
                        yield stream.checked(value, f"row {row}")
                        row += 1
            except PARQUET_ERRORS:
                yield stream.refused("damaged Parquet", f"row {row}")


def strings(file: str) -> Iterator[str]:
    """Every string in a file of records, a table or a text, whole, at any depth. Raises ValueError and DataError."""
    head, data = peeked(in_utf8(chunks(file)))
    whole = b"".join(_undamaged(item) for item in data)
    kind = kind_of(file, head, "named")
    if kind == "records":
        yield from leaves(list(_all_values(whole.decode("utf-8-sig"))))
    elif kind == "parquet":
        with open_parquet(io.BytesIO(whole)) as parquet:
            if parquet is None:
                raise ValueError("damaged Parquet")
            for batch in parquet.iter_batches():
                yield from leaves(batch.to_pylist())
    elif kind == "table":
        text = io.StringIO(whole.decode(encoding_of(whole)), "")
        first = text.readline()
        mark = max(MARKS, key=lambda mark: len(_header(first, mark)))
        yield from leaves(list(csv.reader(chain([first], text), delimiter=mark)))
    elif kind == "text":
        yield whole.decode(encoding_of(whole))
    else:
        raise ValueError("of a kind that is no evaluation set: give JSON, CSV, Parquet or text, packed or not")


def _all_values(text: str) -> Iterator[Any]:
    """JSON one after another, on a line each or on several. Raises ValueError."""
    end = 0
    while (start := BLANK.match(text, end).end()) < len(text):          # type: ignore[union-attr]
        value, end = VALUES.raw_decode(text, start)
        yield value


def _undamaged(item: bytes | Gap) -> bytes:
    if isinstance(item, Gap):
        raise ValueError(item.reason)
    return item


@contextmanager
def open_parquet(file: str | IO[bytes]) -> Iterator[pq.ParquetFile | None]:
    """None where its footer cannot be read. Arrow opens no files itself: it takes some names for addresses."""
    with Path(file).open("rb") if isinstance(file, str) else nullcontext(file) as stream:
        try:
            parquet = pq.ParquetFile(stream, buffer_size=1 << 20, page_checksum_verification=True)
            assert parquet.schema_arrow is not None         # which is read here
        except PARQUET_ERRORS:
            parquet = None
        yield parquet


READERS: dict[Kind, Callable[[Stream], Iterator[Item]]] = {
    "records": _records, "table": _table, "text": _text, "page": _page,
    "warc": lambda stream: archive(stream.data, stream.name, stream.source),
    "tar": lambda stream: _members(tar_members(stream.data), stream),
    "zip": lambda stream: _of_whole(stream, lambda file: _members(zip_members(file), stream)),
    "parquet": lambda stream: _of_whole(stream, lambda file: _row_groups(file, stream)),
}
