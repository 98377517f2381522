"""Web archives: pages of WARC files as their main text, records of WET files as they are."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

import brotli
from fastwarc.warc import WarcRecord
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from data_pipeline.config import FilesSource
from data_pipeline.sources.licenses import UNKNOWN
from data_pipeline.sources.main_text import EXTRACTORS
from data_pipeline.sources.piece import Document, Item, PassedOver, Refusal, checked
from data_pipeline.sources.streams import BYTE_ORDER_MARKS, SLICE, Damage, encoding_of, unpacked

HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
LARGEST_PAGE = 10_000_000           # bytes of HTML: its tree takes many times that
LARGEST_RECORD = 64_000_000
LARGEST_HEADER = 1 << 16
DAMAGED, NO_TEXT = Damage("damaged record"), Damage("no main text")
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
MARK = b"WARC/"
NEXT = re.compile(rb"WARC/[01]\.\d{1,2}\r?\n")      # anywhere: what stands before may be cut off within a line
BLANK = re.compile(rb"\s+")
HEADER_END = re.compile(rb"\r?\n\r?\n")
LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
RECORD_END = re.compile(rb"\r?\n\r?\n|\s*(?:WARC/[01]\.|$)")
LOOK_AHEAD = 16                     # bytes after a record: line ends and the next one's mark


def archive(data: Iterable[bytes | Damage], name: str, source: FilesSource) -> Iterator[Item]:
    """The documents of a WARC or WET file; records of other types are passed over."""
    for number, record in enumerate(records(data)):
        where = f"{name}, record {number}"
        found = record if isinstance(record, Damage) else _document(record, where, source)
        yield Refusal(source.domain, found.reason, where) if isinstance(found, Damage) else found


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


def _document(data: bytes, where: str, source: FilesSource) -> Document | Refusal | PassedOver | Damage:
    """The document of a record, or why there is none."""
    try:
        record = WarcRecord.from_reader(io.BytesIO(_normal(data)))
        kind = (record.headers.get("WARC-Type") or "without a type").strip().lower()
        if kind not in ("conversion", "response", "resource"):      # request, metadata, revisit, ...
            return PassedOver("WARC records", kind, where)
        address = (record.headers.get("WARC-Target-URI") or "").strip("<> ")
        host = urlsplit(address).hostname
        if kind == "response" and not record.is_http:
            return PassedOver("WARC records", f"response of {urlsplit(address).scheme or 'no address'}", where)
        text = record.reader.read() if kind == "conversion" else _page(record, source.extractor)
    except (OSError, ValueError):
        return DAMAGED
    if isinstance(text, Damage):
        return text
    return checked(text, host or "unknown", address, source.domain, UNKNOWN) if text.strip() else NO_TEXT


def _normal(data: bytes) -> bytes:
    """A record with the version and the line ends that FastWARC knows."""
    end = HEADER_END.search(data)
    assert end is not None          # it was cut there
    lines = data[: end.start()].replace(b"\r\n", b"\n").split(b"\n")
    return b"\r\n".join([b"WARC/1.0", *lines[1:]]) + b"\r\n\r\n" + data[end.end() :]


def _page(record: WarcRecord, extractor: str) -> str | Damage:
    """Main text of an HTTP response or a resource. Raises OSError or ValueError for one that cannot be parsed."""
    content_type, charset = record.headers.get("Content-Type") or "", None
    if record.is_http:
        record.parse_http(auto_decode="none")
        if record.http_headers.status_code != 200:
            return Damage("not HTTP 200")
        content_type, charset = record.http_content_type or "", record.http_charset
    content_type = record.headers.get("WARC-Identified-Payload-Type") or content_type
    if content_type.partition(";")[0].strip().lower() not in HTML_TYPES:
        return Damage("not HTML")
    body = record.reader.read()
    if record.is_http:
        codings = [coding.strip().lower() for field in ("Content-Encoding", "Transfer-Encoding")
                   for coding in (record.http_headers.get(field) or "").split(",")]
        for coding in reversed(codings):
            body = _undone(coding, body)
    return page(body, charset, extractor)


def page(html: bytes, charset: str | None, extractor: str) -> str | Damage:
    """The main text of an HTML page; `charset` is what its server says of it."""
    if len(html) > LARGEST_PAGE:
        return Damage("too large")
    text = EXTRACTORS[extractor](_decoded(html, charset))
    return Damage("not HTML") if text is None else text


def _undone(coding: str, body: bytes) -> bytes:
    """A body without a coding of HTTP: as far as it can be undone, and as it is where it turns out not to be coded.

    Archives keep what servers wrongly announced, and leave announcements standing for what they undid themselves.
    """
    match coding:
        case "chunked":
            return _dechunked(body)
        case "deflate":             # of zlib as the standard says, or without its frame as some servers do
            has_frame = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
            return _joined(_slices(zlib.decompressobj(15 if has_frame else -15).decompress, body)) or body
        case "br":
            return _joined(_slices(brotli.Decompressor().process, body)) or body
        case _:                     # gzip, x-gzip, zstd, ... show; identity, none, utf-8, ... are no codings
            blocks = unpacked(io.BufferedReader(io.BytesIO(body)), "")
            found = _joined(block for block in blocks if isinstance(block, bytes))
            if body and not found:
                raise ValueError(f"nothing of the body can be unpacked: {coding}")
            return found


def _slices(decode: Any, body: bytes) -> Iterator[bytes]:
    """What `decode` makes of the slices of a body, until it fails."""
    try:
        for start in range(0, len(body), SLICE):
            yield decode(body[start : start + SLICE])
    except (zlib.error, brotli.error):
        return


def _joined(blocks: Iterable[bytes]) -> bytes:
    """Blocks in one, up to a little more than the largest page: a small body may unpack to any size."""
    joined = bytearray()
    for block in blocks:
        joined += block
        if len(joined) > LARGEST_PAGE:
            break
    return bytes(joined)


def _dechunked(body: bytes) -> bytes:
    found, at = bytearray(), 0
    while size := CHUNK_SIZE.match(body, at):
        length = int(size[1], 16)
        if not length:
            return bytes(found)
        found += body[size.end() : size.end() + length]
        at = size.end() + length
        at += 2 if body[at : at + 2] == b"\r\n" else body[at : at + 1] == b"\n"
    return bytes(found) or body


def _decoded(html: bytes, charset: str | None) -> str:
    """UTF-8 where it is valid, for servers often name another; else the server's charset, the page's, a guess."""
    if html.startswith(tuple(BYTE_ORDER_MARKS)):
        return html.decode(encoding_of(html), "replace")
    try:
        return html.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = charset or detect_encoding(html, from_html_meta=True)
    try:
        return bytes_to_str(html, encoding or "utf-8", errors="replace")
    except LookupError:
        return bytes_to_str(html, detect_encoding(html) or "utf-8", errors="replace")
