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
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from data_pipeline.config import FilesSource
from data_pipeline.sources.licenses import UNKNOWN
from data_pipeline.sources.piece import Document, Item, PassedOver, Refusal, checked
from data_pipeline.sources.streams import SLICE, Gap, unpacked, wide_encoding
from data_pipeline.sources.web.main_text import EXTRACTORS

HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
LARGEST_PAGE = 10_000_000           # bytes of HTML: its tree takes many times that
LARGEST_RECORD = 64_000_000
LARGEST_HEADER = 1 << 16
DAMAGED, NO_TEXT, CUT = Gap("damaged record"), Gap("no main text"), Gap("page cut short by the crawler")
STATUS = re.compile(rb"HTTP/\d(?:\.\d)?[ \t]+(\d{3})\b")
CHARSET = re.compile(r"""charset\s*=\s*["']?([\w.:-]+)""", re.IGNORECASE)
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
MARK = b"WARC/"
NEXT = re.compile(rb"WARC/[01]\.\d{1,2}\r?\n")      # anywhere: what stands before may be cut off within a line
BLANK = re.compile(rb"\s+")
HEADER_END = re.compile(rb"\r?\n\r?\n")
TRUNCATED = re.compile(rb"^warc-truncated:", re.IGNORECASE | re.MULTILINE)
LENGTH = re.compile(rb"^content-length:[ \t]*(\d{1,18})[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
RECORD_END = re.compile(rb"\r?\n\r?\n|\s*(?:WARC/[01]\.|$)")
LOOK_AHEAD = 16                     # bytes after a record: line ends and the next one's mark


def archive(data: Iterable[bytes | Gap], name: str, source: FilesSource) -> Iterator[Item]:
    """The documents of a WARC or WET file; records of other types are passed over. A page of which the archive says
    that it is not whole is a document, and counted."""
    for number, record in enumerate(records(data)):
        where = f"{name}, record {number}"
        found = record if isinstance(record, Gap) else _document(record, where, source)
        if isinstance(found, Gap | Refusal):
            found = Refusal(source.domain, found.reason, where)
        yield found
        if isinstance(found, Document) and isinstance(record, bytes) and _is_truncated(record):
            yield Refusal(source.domain, CUT.reason, where)


def records(data: Iterable[bytes | Gap]) -> Iterator[bytes | Gap]:
    """Whole WARC records, and one damage for each place where there is none.

    Records are cut here and not by FastWARC, which gives up at the first damaged one and does not know all versions. A
    record counts as whole when its length leads to an empty line, the next one or the end.
    """
    buffer, lost = bytearray(), False
    for chunk in chain(data, [None]):
        gap = chunk if isinstance(chunk, Gap) else None
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
            if isinstance(size, Gap):
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


def _record_size(buffer: bytearray, ended: bool) -> int | Gap | None:
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
        return Gap("too large")
    if len(buffer) < size + LOOK_AHEAD and not ended:
        return None
    return size if len(buffer) >= size and RECORD_END.match(buffer, size) else DAMAGED


def _document(record: bytes, where: str, source: FilesSource) -> Document | Refusal | PassedOver | Gap:
    """The document of a record, or why there is none."""
    headers, body = _parsed(record)
    kind, content_type = headers.get("warc-type", "without a type").lower(), headers.get("content-type", "")
    if kind not in ("conversion", "response", "resource"):          # request, metadata, revisit, ...
        return PassedOver("WARC records", kind, where)
    address = headers.get("warc-target-uri", "").strip("<> ")
    try:
        target = urlsplit(address)
        host = target.hostname
    except ValueError:
        return DAMAGED
    is_http = content_type.lower().startswith("application/http") or body.startswith(b"HTTP/")
    if kind == "response" and not is_http:
        return PassedOver("WARC records", f"response of {target.scheme or 'no address'}", where)
    text: str | bytes | Gap = body
    if kind != "conversion":
        payload_type = headers.get("warc-identified-payload-type")
        text = _answer(body, payload_type, source) if is_http else _resource(body, payload_type or content_type, source)
    if isinstance(text, Gap):
        return text
    return checked(text, host or "unknown", address, source.domain, UNKNOWN) if text.strip() else NO_TEXT


def _is_truncated(record: bytes) -> bool:
    header = HEADER_END.search(record)
    return header is not None and TRUNCATED.search(record, 0, header.end()) is not None


def _parsed(data: bytes) -> tuple[dict[str, str], bytes]:
    """Headers by name in lower case, and what follows them. Lines may end in LF alone; a field may stand in several."""
    end = HEADER_END.search(data)
    headers: dict[str, str] = {}
    for line in (data[: end.start()] if end else data).splitlines()[1:]:
        name, _, value = line.decode(errors="replace").partition(":")
        name = name.strip().lower()
        headers[name] = f"{headers[name]}, {value.strip()}" if name in headers else value.strip()
    return headers, data[end.end() :] if end else b""


def _answer(data: bytes, payload_type: str | None, source: FilesSource) -> str | Gap:
    """Main text of an HTTP response."""
    status = STATUS.match(data)
    if status is None:
        return DAMAGED
    if status[1] != b"200":
        return Gap("not HTTP 200")
    headers, body = _parsed(data)
    codings = f"{headers.get('content-encoding', '')},{headers.get('transfer-encoding', '')}".lower().split(",")
    try:
        for coding in reversed(codings):
            body = _undone(coding.strip(), body)
    except ValueError:
        return DAMAGED
    return _resource(body, payload_type or "", source, headers.get("content-type", ""))


def _resource(body: bytes, content_type: str, source: FilesSource, header: str = "") -> str | Gap:
    """Main text of a page of this type, or of that of the HTTP header, which names the charset."""
    if (content_type or header).partition(";")[0].strip().lower() not in HTML_TYPES:
        return Gap("not HTML")
    charset = CHARSET.search(header or content_type)
    return page(body, charset[1] if charset else None, source.extractor)


def page(html: bytes, charset: str | None, extractor: str) -> str | Gap:
    """The main text of an HTML page; `charset` is what its server says of it."""
    if len(html) > LARGEST_PAGE:
        return Gap("too large")
    text = EXTRACTORS[extractor](_decoded(html, charset))
    return Gap("not HTML") if text is None else text


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
    if wide := wide_encoding(html):
        return html.decode(wide, "replace")
    try:
        return html.decode("utf-8-sig")
    except UnicodeDecodeError:
        encoding = charset or detect_encoding(html, from_html_meta=True)
    try:
        return bytes_to_str(html, encoding or "utf-8", errors="replace")
    except LookupError:
        return bytes_to_str(html, detect_encoding(html) or "utf-8", errors="replace")
