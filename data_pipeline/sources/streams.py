"""Bytes of files and web addresses: opened, resumed, decompressed, and cut at damage instead of given up.

What is packed is known by its first bytes, whatever its name: gzip, bzip2, xz, zstd, LZ4, one within another.

An address is read with retries: after a failed request or a broken connection the rest is asked for by an HTTP range,
after each of the `WAITS` in turn; any progress starts them anew. What fails for good is a DataError.
"""

from __future__ import annotations

import codecs
import http.client
import io
import lzma
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
from resiliparse.parse.encoding import detect_encoding

from data_pipeline.config import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 1 << 20
HEAD = 512
BEGIN = 64                              # bytes of a text without a control character, other data may follow
SLICE = 1 << 14                         # of a gzip stream: what stands before damage in the same slice is lost with it
PAGE = 1 << 11                          # of what Arrow unpacks, likewise
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)      # seconds between attempts
LONGEST_WAIT = 60.0                     # seconds a server may ask for
TIMEOUT = 60.0                          # seconds without an answer, or between two blocks of it
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
MOST_INVALID = 0.01                     # share of characters that may be unreadable in a text that is kept
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")      # hardly in text, in one of ten bytes of packed data
GZIP = b"\x1f\x8b\x08"
GZIP_MEMBER = re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL)
GZIP_HEADER_BYTES = 10
PACKED_NAMES = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4"}
MARKS = {                               # that a packed file begins with
    "gzip": re.compile(re.escape(GZIP)),
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
}
BYTE_ORDER_MARKS = {                    # the longer ones first, for they begin with shorter ones
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}
UNREADABLE = "half a surrogate pair"     # the error handler that puts one in place of what cannot be decoded
codecs.register_error(UNREADABLE, lambda error: ("\udc80", error.end))      # type: ignore[attr-defined]
URL_SIGNS = "!#$%&'()*+,/:;=?@[]~"      # that stand in an address as they are


class Gap(NamedTuple):
    """A place where bytes are missing: what comes next does not continue what came before."""

    reason: str


def is_url(location: str) -> bool:
    """Whether `location` is an address on the web, not a path."""
    return location.startswith(("http://", "https://"))


def changed_at(location: str) -> int:
    """When a file was changed, in nanoseconds of the epoch; 0 for an address or a file that is gone."""
    try:
        return 0 if is_url(location) else Path(location).stat().st_mtime_ns
    except OSError:
        return 0


def shown(location: str) -> str:
    """A name as valid Unicode: bytes that are not UTF-8 as `\\xe9`."""
    return os.fsencode(location).decode(errors="backslashreplace")


def chunks(location: str, start: int = 0) -> Iterator[bytes | Gap]:
    """The bytes of a file or an address, unpacked, from byte `start` of a plain file.

    Raises DataError for what cannot be opened or goes on failing.
    """
    with _open(location) as raw:
        if start:
            raw.seek(start)
            yield from _plain(raw)
        else:
            yield from unpacked(raw, location)


def look(file: str, size: int = HEAD) -> tuple[bytes, bool]:
    """The first `size` bytes of a file, up to SLICE, unpacked, and whether it is packed. Raises DataError."""
    with _open(file, SLICE) as raw:
        if _packing(raw, file) is None:
            return raw.peek(size)[:size], False
        return peeked(unpacked(raw, file), size)[0], True


def peeked(data: Iterator[bytes | Gap], size: int = HEAD) -> tuple[bytes, Iterator[bytes | Gap]]:
    """The first `size` bytes, as far as they are undamaged, and all of the data."""
    taken: list[bytes | Gap] = []
    head = b""
    for item in data:
        taken.append(item)
        if isinstance(item, Gap):
            break
        head += item
        if len(head) >= size:
            break
    return head[:size], chain(taken, data)


def unpacked(raw: io.BufferedReader, name: str) -> Iterator[bytes | Gap]:
    """What a stream holds, unpacked as often as it is packed."""
    packing = _packing(raw, name)
    if packing is None:
        yield from _plain(raw)
        return
    head, data = peeked(UNPACK[packing](raw, packing))
    if _mark(head) is None:
        yield from data
        return
    yield from unpacked_again(data, "")


def unpacked_again(data: Iterator[bytes | Gap], name: str) -> Iterator[bytes | Gap]:
    """Data that may be packed itself, up to its first damage: what comes after it cannot be unpacked."""
    stream = Joined(data)
    yield from unpacked(io.BufferedReader(stream), name)
    if stream.damage is not None:
        yield stream.damage


def _packing(raw: io.BufferedReader, name: str) -> str | None:
    """How a stream is packed: by its first bytes, or by its name where these are not text either."""
    head = raw.peek(HEAD)[:HEAD]
    by_name = PACKED_NAMES.get(PurePath(name.lower()).suffix)
    return _mark(head) or (by_name if CONTROL.search(head, 0, BEGIN) else None)


def _mark(head: bytes) -> str | None:
    return next((packing for packing, mark in MARKS.items() if mark.match(head)), None)


def _plain(raw: io.BufferedReader) -> Iterator[bytes]:
    while chunk := raw.read(CHUNK):
        yield chunk


class Joined(io.RawIOBase):
    """Data as a file to read, up to the first damage, which is kept."""

    def __init__(self, data: Iterator[bytes | Gap]) -> None:
        self._data = data
        self._rest = memoryview(b"")
        self.damage: Gap | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._rest and self.damage is None:
            item = next(self._data, None)
            if item is None:
                return 0
            if isinstance(item, Gap):
                self.damage = item
            else:
                self._rest = memoryview(item)
        view = memoryview(buffer).cast("B")
        size = min(len(view), len(self._rest))
        view[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _open(location: str, buffer: int = CHUNK) -> io.BufferedReader:
    if is_url(location):
        return io.BufferedReader(Download(location), buffer)
    try:
        return io.BufferedReader(io.FileIO(location), buffer)
    except OSError as error:
        raise DataError(
            f"annotate.sources: {shown(location)} cannot be read: {error.strerror}.\n"
            "Make it readable, or take it out of `paths`, in params.yaml."
        ) from error


def _gunzip(raw: io.BufferedReader, _: str) -> Iterator[bytes | Gap]:
    """Members one after another; after damage, from the next one on."""
    data, decoder, lost = b"", None, False
    while block := raw.read(SLICE):
        data += block
        while len(data) >= GZIP_HEADER_BYTES or (data and decoder):
            if decoder is None:
                data = data.lstrip(b"\0")       # some writers pad with zeros
                if data and not data.startswith(GZIP):
                    if not lost:
                        yield Gap("damaged gzip")
                        lost = True
                    member = GZIP_MEMBER.search(data)
                    data = data[member.start() :] if member else data[1 - GZIP_HEADER_BYTES :]
                    if member is None:
                        break
                decoder = zlib.decompressobj(wbits=31)
            try:
                out = decoder.decompress(data, CHUNK)
            except zlib.error:
                if not lost:
                    yield Gap("damaged gzip")
                data, decoder, lost = data[1:], None, True
                continue
            if out:
                yield out
                lost = False
            data, decoder = (decoder.unused_data, None) if decoder.eof else (decoder.unconsumed_tail, decoder)
    if decoder is not None:
        yield decoder.flush()
        if not decoder.eof:
            yield Gap("truncated gzip")
    elif data.strip(b"\0") and not lost:
        yield Gap("damaged gzip")


def _unxz(raw: io.BufferedReader, _: str) -> Iterator[bytes | Gap]:
    """Streams one after another; what follows damage is lost."""
    decoder = None
    while block := raw.read(SLICE):
        while block or (decoder and not decoder.needs_input):
            if decoder is None:
                block = block.lstrip(b"\0")         # streams may be padded
                if not block:
                    break
                decoder = lzma.LZMADecompressor()
            try:
                out = decoder.decompress(block, CHUNK)
            except lzma.LZMAError:
                yield Gap("damaged xz")
                return
            if out:
                yield out
            block, decoder = (decoder.unused_data, None) if decoder.eof else (b"", decoder)
    if decoder is not None:
        yield Gap("truncated xz")


def _unarrow(raw: io.BufferedReader, packing: str) -> Iterator[bytes | Gap]:
    """Frames or streams one after another, as Arrow unpacks them; what follows damage is lost, and up to a PAGE of what
    stands before it, for the read that meets it gives nothing."""
    stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), packing)
    pages: list[bytes] = []
    damage: Gap | None = None
    try:
        while page := stream.read(PAGE):
            pages.append(page)
            if len(pages) == SLICE // PAGE:
                yield b"".join(pages)
                pages.clear()
    except OSError as error:
        if "ictionary" in str(error):
            damage = Gap("zstd with a dictionary, which is not read")
        else:
            damage = Gap(f"{'truncated' if 'runcated' in str(error) else 'damaged'} {packing}")
    if pages:
        yield b"".join(pages)
    if damage:
        yield damage


UNPACK: dict[str, Callable[[io.BufferedReader, str], Iterator[bytes | Gap]]] = {
    "gzip": _gunzip, "xz": _unxz, "bz2": _unarrow, "zstd": _unarrow, "lz4": _unarrow,
}


class Download(io.RawIOBase):
    """The body of a GET request, taken up again where the connection broke. Raises DataError where that is another body
    by now, by its ETag or, without one, the date it was changed, or by its length."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._end: int | None = None
        self._version: str | None = None
        self._response: http.client.HTTPResponse | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        failures = 0
        while True:
            try:
                response = self._response or self._request()
                self._response = response
                size = response.readinto(buffer)
                if size == 0 and self._end is not None and self._position < self._end:
                    raise ConnectionError(f"the connection closed after {self._position} of {self._end} bytes")
                self._position += size
                return size
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if isinstance(error, urllib.error.HTTPError) and error.code not in TRY_AGAIN:
                    raise self._refused(error) from error
                failures += 1
                if failures > len(WAITS):
                    raise DataError(
                        f"annotate.sources: {self._url} failed {failures} times, the last time with: {error}.\n"
                        "Look after the network and run again: what has been read so far is kept."
                    ) from error
                if failures > 1:                # in a row: all of them may take seven minutes
                    print(f"Waiting for {self._url}: {error}; asked again.", flush=True)
                time.sleep(wait(error, WAITS[failures - 1]))

    def _request(self) -> http.client.HTTPResponse:
        """The response, at the position reached so far."""
        headers = {"User-Agent": "nemotron-h-reproduction", "Accept-Encoding": "identity"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        request = urllib.request.Request(urllib.parse.quote(self._url, URL_SIGNS), headers=headers)
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
        is_rest = response.status == 206
        missing = 0 if is_rest else self._position          # a server without ranges starts anew
        end = None if response.length is None else response.length + (self._position if is_rest else 0)
        version = response.headers["ETag"] or response.headers["Last-Modified"]
        if self._position and (version != self._version or (None not in (end, self._end) and end != self._end)):
            response.close()
            raise DataError(f"annotate.sources: {self._url} was changed on its server while it was read.\n"
                            "Run again: it is read from its beginning.")
        self._version, self._end = version, self._end if end is None else end
        while missing:
            skipped = response.read(min(missing, CHUNK))
            if not skipped:
                response.close()
                raise ConnectionError("the connection closed before the place reached earlier")
            missing -= len(skipped)
        return response

    def _refused(self, error: urllib.error.HTTPError) -> DataError:
        return DataError(
            f"annotate.sources: {self._url} answers {error.code} {error.reason}.\n"
            "Correct the address in `paths`, in params.yaml, or ask its owner for access."
        )

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        self._drop()
        super().close()


def wait(error: Exception, planned: float) -> float:
    """Seconds to the next attempt: the plan's, or what the server asks for, within reason."""
    asked = (getattr(getattr(error, "response", error), "headers", None) or {}).get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else planned


def decode(data: bytes) -> tuple[str, int] | None:
    """Text and the number of unreadable characters in it, which are U+FFFD; None for what is no text.

    As a byte-order mark says; else UTF-8; else, where hardly anything is UTF-8, as `encoding_of` finds it.
    """
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    unreadable = text.count("\ufffd")
    return (text, unreadable) if unreadable <= MOST_INVALID * len(text) else None


def encoding_of(data: bytes) -> str:
    """The encoding of a text, for Python; `utf-8-sig` where nothing speaks for another.

    One without a mark of its own is guessed where no more than a few characters are UTF-8 and it fits all bytes.
    """
    if encoding := wide_encoding(data):
        return encoding
    try:
        data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        unreadable = text.count("\ufffd")
        valid = len(text) - unreadable - sum(map(str.isascii, text))
        if unreadable > max(1, valid) and not CONTROL.search(data):
            try:
                guess = codecs.lookup(detect_encoding(data, max_len=len(data)) or "utf-8").name
                data.decode(guess)
                return guess
            except (LookupError, UnicodeDecodeError):
                pass
    return "utf-8-sig"


def has_mark(head: bytes) -> str | None:
    """UTF-16 or UTF-32, where a byte-order mark says so."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)


def wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32 by a byte-order mark; UTF-16 too where every other byte is zero, as in what is mostly ASCII."""
    if marked := has_mark(data):
        return marked
    half = len(data) // 2
    if half and not len(data) % 2:
        for encoding, zeros, others in (("utf-16-le", data[1::2], data[::2]), ("utf-16-be", data[::2], data[1::2])):
            if zeros.count(0) > 0.7 * half and b"\0" not in others:
                return encoding
    return None


def in_utf8(data: Iterator[bytes | Gap]) -> Iterator[bytes | Gap]:
    """Data as it is, or written anew in UTF-8 where a byte-order mark says that it is UTF-16 or UTF-32.

    What cannot be decoded becomes bytes that are not UTF-8 either, so that it is seen where it stands.
    """
    head, data = peeked(data)
    encoding = has_mark(head)
    if encoding is None:
        yield from data
        return
    decoder = codecs.getincrementaldecoder(encoding)(UNREADABLE)
    for item in data:
        yield item if isinstance(item, Gap) else decoder.decode(item).encode(errors="surrogatepass")
    yield decoder.decode(b"", final=True).encode(errors="surrogatepass")
