"""Bytes of files and web addresses: opened, resumed, decompressed, and cut at damage instead of given up.

An address is read with retries: after a failed request or a broken connection the rest is asked for by an HTTP range,
after each of the `WAITS` in turn; any progress starts them anew. What fails for good is a DataError.
"""

from __future__ import annotations

import http.client
import io
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from data_pipeline.config import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 1 << 20
HEAD = 512
SLICE = 1 << 14                         # of a gzip stream: what stands before damage in the same slice is lost with it
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)      # seconds between attempts
LONGEST_WAIT = 60.0                     # seconds a server may ask for
TIMEOUT = 60.0                          # seconds without an answer, or between two blocks of it
TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
MOST_INVALID = 0.01                     # share of characters that may be unreadable in a text that is kept
CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")      # hardly in text, in one of ten bytes of packed data
GZIP = b"\x1f\x8b\x08"
GZIP_MEMBER = re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL)
GZIP_HEADER_BYTES = 10
ZSTD_FRAME = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")


class Damage(NamedTuple):
    """A place where bytes are missing: what comes next does not continue what came before."""

    reason: str


def is_url(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def changed_at(location: str) -> int:
    """When a file was changed, in nanoseconds of the epoch; 0 for an address."""
    return 0 if is_url(location) else Path(location).stat().st_mtime_ns


def chunks(location: str, start: int = 0) -> Iterator[bytes | Damage]:
    """The bytes of a file or an address, decompressed where they are gzip or zstd, from byte `start` of a plain file.

    Raises DataError for what cannot be opened or goes on failing.
    """
    with _open(location) as raw:
        head = raw.peek(HEAD)[:HEAD]
        is_packed = CONTROL.search(head) is not None        # else a name ending in .gz or .zst is not meant
        if head.startswith(GZIP) or (is_packed and location.endswith(".gz")):
            yield from _gunzip(raw)
        elif ZSTD_FRAME.match(head) or (is_packed and location.endswith(".zst")):
            yield from _unzstd(raw)
        else:
            if start:
                raw.seek(start)
            while chunk := raw.read(CHUNK):
                yield chunk


def _open(location: str) -> io.BufferedReader:
    if is_url(location):
        return io.BufferedReader(Download(location), CHUNK)
    try:
        return io.BufferedReader(io.FileIO(location), CHUNK)
    except OSError as error:
        raise DataError(
            f"annotate.sources: {location} cannot be read: {error.strerror}.\n"
            "Make it readable, or take it out of `paths`, in params.yaml."
        ) from error


def _gunzip(raw: io.BufferedReader) -> Iterator[bytes | Damage]:
    """Members one after another; after damage, from the next one on."""
    data, decoder, lost = b"", None, False
    while block := raw.read(SLICE):
        data += block
        while len(data) >= GZIP_HEADER_BYTES or (data and decoder):
            if decoder is None:
                data = data.lstrip(b"\0")       # some writers pad with zeros
                if data and not data.startswith(GZIP):
                    if not lost:
                        yield Damage("damaged gzip")
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
                    yield Damage("damaged gzip")
                data, decoder, lost = data[1:], None, True
                continue
            if out:
                yield out
                lost = False
            data, decoder = (decoder.unused_data, None) if decoder.eof else (decoder.unconsumed_tail, decoder)
    if decoder is not None:
        yield decoder.flush()
        if not decoder.eof:
            yield Damage("truncated gzip")
    elif data.strip(b"\0") and not lost:
        yield Damage("damaged gzip")


def _unzstd(raw: io.BufferedReader) -> Iterator[bytes | Damage]:
    """Frames one after another; what follows damage is lost."""
    stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    try:
        while block := stream.read(1 << 16):
            yield block
    except OSError as error:
        yield Damage("truncated zstd" if "runcated" in str(error) else "damaged zstd")


class Download(io.RawIOBase):
    """The body of a GET request, taken up again where the connection broke."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._end: int | None = None
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
                time.sleep(_wait(error, WAITS[failures - 1]))

    def _request(self) -> http.client.HTTPResponse:
        """The response, at the position reached so far."""
        headers = {"User-Agent": "nemotron-h-reproduction", "Accept-Encoding": "identity"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
        response = urllib.request.urlopen(urllib.request.Request(self._url, headers=headers), timeout=TIMEOUT)
        missing = self._position if response.status != 206 else 0       # a server without ranges starts anew
        if response.length is not None:
            self._end = response.length + (0 if response.status != 206 else self._position)
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


def _wait(error: Exception, planned: float) -> float:
    """Seconds to the next attempt: the plan's, or what the server asks for, within reason."""
    asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else planned


def decode(data: bytes) -> tuple[str, int] | None:
    """Text and the number of unreadable characters in it, which are U+FFFD; None for what is no text.

    UTF-8, or UTF-16 where a byte-order mark says so.
    """
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in data:
        return None
    try:
        return data.decode(encoding), 0
    except UnicodeDecodeError:
        text = data.decode(encoding, "replace")
    unreadable = text.count("\ufffd")
    return (text, unreadable) if unreadable <= MOST_INVALID * len(text) else None
