"""Web archives: pages of WARC files as their main text, records of WET files as they are."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from urllib.parse import urlsplit

from fastwarc.warc import WarcRecord, WarcRecordType
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from data_pipeline.config import WebSource
from data_pipeline.sources.licenses import UNKNOWN
from data_pipeline.sources.locations import expand
from data_pipeline.sources.main_text import EXTRACTORS
from data_pipeline.sources.piece import Document, Piece, Refusal, checked, seeded
from data_pipeline.sources.streams import Damage, changed_at, chunks

SUFFIXES = frozenset({".warc", ".wet"})
HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
LARGEST_PAGE = 10_000_000           # bytes of HTML: its tree takes many times that
LARGEST_RECORD = 64_000_000
LARGEST_HEADER = 1 << 16
DAMAGED = Damage("damaged record")
MARK = b"WARC/1."
NEXT = re.compile(rb"WARC/1\.\d\r?\n")      # anywhere: what stands before may be cut off within a line
BLANK = re.compile(rb"\s+")
HEADER_END = re.compile(rb"\r?\n\r?\n")
LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
RECORD_END = re.compile(rb"\r?\n\r?\n|\s*(?:WARC/1\.|$)")
LOOK_AHEAD = 16                     # bytes after a record: line ends and the next one's mark


@dataclass(frozen=True)
class WebPiece(Piece):
    source: WebSource
    location: str
    changed: int                    # nanoseconds of the epoch; 0 for an address

    def read(self) -> Iterator[Document | Refusal]:
        for number, record in enumerate(records(chunks(self.location))):
            where = f"{self.location}, record {number}"
            found = record if isinstance(record, Damage) else _document(record, self.source)
            if isinstance(found, Damage):
                found = Refusal(self.source.domain, found.reason, where)
            if found is not None:
                yield found


def web_pieces(source: WebSource, seed: int) -> list[Piece]:
    """A piece a file. Raises DataError for a path that stands for nothing."""
    locations = seeded(expand(source.paths, SUFFIXES), seed)
    return [WebPiece(source, location, changed_at(location)) for location in locations]


def records(data: Iterable[bytes | Damage]) -> Iterator[bytes | Damage]:
    """Whole WARC records, and one damage for each place where there is none.

    Records are cut here and not by FastWARC, which gives up at the first damaged one. A record counts as whole when its
    length leads to an empty line, the next one or the end.
    """
    buffer, lost = bytearray(), False
    for chunk in chain(data, [None]):
        gap = chunk if isinstance(chunk, Damage) else None
        if isinstance(chunk, bytes):
            buffer += chunk
        while buffer:
            if lost and not _find_next(buffer):
                break
            lost = False
            if blank := BLANK.match(buffer):
                del buffer[: blank.end()]
                continue
            size = _record_size(buffer, ended=not isinstance(chunk, bytes))
            if size is None:
                break
            if isinstance(size, Damage):
                if gap is None:         # which stands for what it cut off
                    yield size
                del buffer[: len(MARK)]
                lost = True
                continue
            yield bytes(buffer[:size])
            del buffer[:size]
        if gap is not None:
            yield gap
            buffer.clear()
            lost = True


def _find_next(buffer: bytearray) -> bool:
    """Cut what stands before the next record, if one begins in the buffer."""
    found = NEXT.search(buffer)
    del buffer[: found.start() if found else max(0, len(buffer) - LOOK_AHEAD)]
    return found is not None


def _record_size(buffer: bytearray, ended: bool) -> int | Damage | None:
    """Bytes of the record that begins the buffer; None where more are needed to know."""
    if not buffer.startswith(MARK):
        return DAMAGED if ended or len(buffer) >= LOOK_AHEAD else None
    header = HEADER_END.search(buffer, 0, LARGEST_HEADER)
    if header is None:
        return DAMAGED if ended or len(buffer) >= LARGEST_HEADER else None
    length = LENGTH.search(buffer, 0, header.end())
    if length is None or NEXT.search(buffer, len(MARK), header.end()):      # a header that runs into the next one
        return DAMAGED
    size = header.end() + int(length[1])
    if size > LARGEST_RECORD:
        return Damage("too large")
    if len(buffer) < size + LOOK_AHEAD and not ended:
        return None
    return size if len(buffer) >= size and RECORD_END.match(buffer, size) else DAMAGED


def _document(data: bytes, source: WebSource) -> Document | Refusal | Damage | None:
    """The document of a record; None for a kind of record that holds none: requests, metadata, revisits."""
    try:
        record = WarcRecord.from_reader(io.BytesIO(data))
        address = (record.headers.get("WARC-Target-URI") or "").strip("<>")
        host = urlsplit(address).hostname
        if record.record_type == WarcRecordType.conversion:
            text: str | bytes | Damage = record.reader.read()
        elif record.record_type == WarcRecordType.response and record.is_http:
            text = _page(record, source.extractor)
        else:
            return None
    except (OSError, ValueError):
        return DAMAGED
    if isinstance(text, Damage):
        return text
    return checked(text, host or "unknown", address, source.domain, UNKNOWN) if text.strip() else Damage("no main text")


def _page(record: WarcRecord, extractor: str) -> str | Damage:
    """Main text of an HTTP response. Raises OSError for a body that cannot be decoded."""
    record.parse_http(auto_decode="all")
    if record.http_headers.status_code != 200:
        return Damage("not HTTP 200")
    content_type = record.headers.get("WARC-Identified-Payload-Type") or record.http_content_type or ""
    if content_type.lower() not in HTML_TYPES:
        return Damage("not HTML")
    html = record.reader.read()
    if len(html) > LARGEST_PAGE:
        return Damage("too large")
    text = EXTRACTORS[extractor](_decoded(html, record.http_charset))
    return Damage("not HTML") if text is None else text


def _decoded(html: bytes, charset: str | None) -> str:
    """UTF-8 where it is valid, for servers often name another; else the server's charset, the page's, a guess."""
    try:
        return html.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = charset or detect_encoding(html, from_html_meta=True)
    try:
        return bytes_to_str(html, encoding or "utf-8", errors="replace")
    except LookupError:
        return bytes_to_str(html, detect_encoding(html) or "utf-8", errors="replace")
