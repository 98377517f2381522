"""What a file is: by its first bytes where these tell, else by its name."""

from __future__ import annotations

import json
import mimetypes
import re
from pathlib import PurePath
from typing import Literal
from urllib.parse import urlsplit

from data_pipeline.config import DataError
from data_pipeline.sources.streams import CONTROL, is_url, shown

Kind = Literal["records", "table", "text", "page", "warc", "parquet", "tar", "zip", "pointer"]

PACKED = frozenset({".gz", ".bz2", ".xz", ".zst", ".lz4"})
# How a file came to be read. A user who named it hears of it where it is not understood; one that a wildcard matched
# may be text under any name; one that was found in a directory, a listing or an archive is what it says it is.
How = Literal["named", "matched", "found"]

SHORT = {".tgz": ".tar", ".tbz2": ".tar", ".txz": ".tar", ".tzst": ".tar"}
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".jsonl", ".jsonlines", ".jl", ".ndjson", ".json"), "records"),
    **dict.fromkeys((".csv", ".tsv"), "table"),
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "page"),
    **dict.fromkeys((".warc", ".wet", ".wat"), "warc"),
    **dict.fromkeys((".zip", ".wacz"), "zip"),
    ".parquet": "parquet", ".tar": "tar",
}
WARC = re.compile(rb"\s*WARC/[01]\.\d")
PAGE = re.compile(rb"\s*(?:<!doctype html|<html)", re.IGNORECASE)
RECORD = re.compile(rb'\s*\{\s*"')
POINTER = b"version https://git-lfs.github.com/spec/"
TAR_MARK = slice(257, 262)


def suffix(location: str) -> str:
    """The suffix in lower case, before those of compression: `.jsonl` of `a.jsonl.gz`; empty for a number."""
    name = PurePath((urlsplit(location).path if is_url(location) else location).lower())
    while name.suffix in PACKED:
        name = name.with_suffix("")
    ending = SHORT.get(name.suffix, name.suffix)
    return "" if ending[1:].isdigit() else ending


def kind_of(location: str, head: bytes, how: How) -> Kind | None:
    """What a file of this name that begins so (unpacked) is read as; None for what is not read.

    A name that says nothing is enough for what its first bytes give away, and for text that a user chose.
    """
    ending = suffix(location)
    by_name = SUFFIXES.get(ending)
    if head.startswith(POINTER):
        return "pointer"
    if WARC.match(head):
        return "warc"
    if head.startswith(b"PAR1"):
        return "parquet"
    if by_name or not ending:           # a .docx is a ZIP file, and no archive of texts
        if head[TAR_MARK] == b"ustar":
            return "tar"
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return "zip"
    if by_name or (ending and how == "found"):
        return by_name
    if RECORD.match(head) and _begins_record(head):
        return "records"
    if PAGE.match(head):
        return "page"
    return "text" if how != "found" and not CONTROL.search(head) else None


def _begins_record(head: bytes) -> bool:
    """Whether the first line is a JSON object, as far as it can be seen."""
    line, end, _ = head.lstrip().partition(b"\n")
    try:
        return not end or isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def endings(kinds: frozenset[Kind] | None) -> list[str]:
    """Suffixes of files of these kinds; None stands for all."""
    return [ending for ending, kind in SUFFIXES.items() if kinds is None or kind in kinds]


def not_read(location: str, head: bytes, kinds: frozenset[Kind] | None) -> DataError:
    """For something a user named, where files of these kinds are read; None stands for all."""
    if head.startswith(POINTER):
        return DataError(f"annotate.sources: {shown(location)} is a Git LFS pointer, not the file it stands for.\n"
                         "Fetch the file with `git lfs pull`.")
    said = mimetypes.guess_type(location)[0] or suffix(location) or "packed or binary data"
    return DataError(
        f"annotate.sources: {shown(location)} is not read: it is {said}, or looks like it.\n"
        f"Give {', '.join(endings(kinds))}, packed or not{'' if kinds else ', or text under any name'}."
    )
