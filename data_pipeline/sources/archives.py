"""Files within tar and ZIP archives, one after another."""

from __future__ import annotations

import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from typing import IO, NamedTuple, Self

from data_pipeline.sources.streams import CHUNK, Gap, Joined

TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, struct.error)
ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, zlib.error, LZMAError, OSError, EOFError, ValueError,
              OverflowError, struct.error)


class Member(NamedTuple):
    """An entry of an archive."""

    name: str
    data: Iterator[bytes | Gap] | None       # None for what is no file: a link, a device


def tar_members(data: Iterator[bytes | Gap]) -> Iterator[Member | Gap]:
    """The members of a tar stream, each to be read before the next; after a damaged header from the next whole one."""
    stream, state = Joined(data), {"damaged": False, "ended": False}

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            try:
                header = super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                state["ended"] |= isinstance(error, tarfile.EOFHeaderError)             # type: ignore[attr-defined]
                state["damaged"] |= isinstance(error, tarfile.InvalidHeaderError)       # type: ignore[attr-defined]
                raise
            state["ended"] = False
            return header

    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=Header, ignore_zeros=True) as archive:
            while info := archive.next():
                if state["damaged"]:
                    yield Gap("damaged tar")
                state["damaged"] = False
                archive.members.clear()         # type: ignore[attr-defined]  # which it keeps, of all there are
                if not info.isdir():
                    file = archive.extractfile(info) if info.isreg() else None
                    yield Member(info.name.removeprefix("./"), file and _blocks(file, "tar", TAR_ERRORS))
    except TAR_ERRORS:
        state["ended"] = False
    if stream.damage is not None:
        yield stream.damage
    elif state["damaged"] or not state["ended"]:
        yield Gap("damaged tar" if state["damaged"] else "truncated tar")


def zip_members(file: IO[bytes]) -> Iterator[Member | Gap]:
    """The members of a ZIP file, as its directory lists them."""
    try:
        archive = zipfile.ZipFile(file)
    except ZIP_ERRORS:
        yield Gap("damaged zip")
        return
    if not archive.infolist() and archive.start_dir:        # nothing listed, and bytes before the list
        yield Gap("damaged zip")
    for info in archive.infolist():
        if not info.filename.endswith("/"):             # as info.is_dir() asks, which a damaged, empty name breaks
            is_link = stat.S_ISLNK(info.external_attr >> 16)        # whose bytes are the name of a file
            yield Member(info.filename, None if is_link else _zip_blocks(archive, info))


def _zip_blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes | Gap]:
    if info.flag_bits & 1:
        yield Gap("encrypted zip")
        return
    try:
        with archive.open(info) as file:
            yield from _blocks(file, "zip", ZIP_ERRORS)
    except NotImplementedError:
        yield Gap("packing that is not read")
    except ZIP_ERRORS:
        yield Gap("damaged zip")


def _blocks(file: IO[bytes], kind: str, errors: tuple[type[Exception], ...]) -> Iterator[bytes | Gap]:
    try:
        while block := file.read(CHUNK):
            yield block
    except errors:
        yield Gap(f"damaged {kind}")
