"""`paths` of the configuration as single files and addresses."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from fsspec.utils import glob_translate

from data_pipeline.config import DataError
from data_pipeline.sources.kinds import How, Kind, endings, suffix
from data_pipeline.sources.piece import PassedOver
from data_pipeline.sources.streams import Gap, chunks, is_url, shown

COMMON_CRAWL = "https://data.commoncrawl.org/"
CRAWLS = ("crawl-data/", "cc-index/", "contrib/")       # at the root of Common Crawl's address
LOCKED = "locked directory"
WILDCARD = re.compile(r"[*?[]")


class Located(NamedTuple):
    """What a path stands for."""

    files: dict[str, How]           # files and addresses, sorted
    passed_over: list[PassedOver]   # entries of directories that are neither files nor directories


def locate(path: str) -> Located:
    """Every file and address that `path` stands for.

    What exists under its name is that; else a wildcard stands for what it matches. A directory stands for the files
    below it, those behind links too, without hidden ones. A listing (`.paths`, or named so after its packing), as
    Common Crawl publishes them, stands for its lines. Raises DataError for a listing that leads nowhere.
    """
    found = list(_located(path))
    files = {item: how for item, how in found if isinstance(item, str)}
    return Located(dict(sorted(files.items())), sorted({item for item, _ in found if isinstance(item, PassedOver)}))


def _located(path: str) -> Iterator[tuple[str | PassedOver, How]]:
    if is_listing(path) and (is_url(path) or is_file(path)):
        yield from ((line, "found") for line in _listed(path))
    elif is_url(path) or is_file(path):
        yield path, "named"
    elif _is_directory(path):
        yield from ((found, "found") for found in walk(path))
    elif WILDCARD.search(path):
        for match in _matching(path):
            if isinstance(match, str) and _is_directory(match):
                yield from ((found, "found") for found in walk(match))
            elif isinstance(match, PassedOver) or is_file(match):
                yield match, "matched"
            else:
                yield _no_file(match), "matched"


def place(file: str) -> str:
    """Where a file or address lies, however its directory is spelt."""
    return file if is_url(file) else str(Path(file).parent.resolve() / Path(file).name)


def is_file(path: str) -> bool:
    """Whether `path` is a regular file."""
    return stat.S_ISREG(_mode(path))


def _is_directory(path: str) -> bool:
    return stat.S_ISDIR(_mode(path))


def _mode(path: str) -> int:
    """What `path` is, as in `stat`; 0 for what is not there or cannot be asked for."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):
        return 0


def _no_file(entry: str) -> PassedOver:
    return PassedOver("files", "special file" if _mode(entry) else "broken link", shown(entry))


def nothing(path: str, passed_over: list[PassedOver], kinds: frozenset[Kind] | None = None) -> DataError:
    """For a path that stands for nothing of these kinds; None stands for all."""
    if "://" in path:
        wrong, remedy = "no address of http or https", "Fetch it first, or give its https address"
    elif _mode(path) and not (is_file(path) or _is_directory(path)):
        wrong, remedy = "a pipe or a device", "Write what it gives to a file first"
    elif not _mode(path) and Path(path).is_symlink():
        wrong, remedy = f"a link to {shown(os.path.realpath(path))}, which is not there", "Mend the link"
    else:
        counts = Counter(item.what for item in passed_over).most_common(5)
        listed = ", ".join(f"{what} {count:,}" for what, count in counts)
        wrong = "where no file was found" + (f" that is read, but {listed}" if listed else "")
        remedy = ("Name files, wildcards such as 'texts/**/*.md', or directories with files in "
                  f"{' '.join(endings(kinds))} (also packed: .gz .bz2 .xz .zst .lz4)")
    return DataError(f"annotate.sources: `paths` names {shown(path)!r}, {wrong}.\n{remedy}, in params.yaml.")


def is_listing(path: str) -> bool:
    """Whether `path` lists others, as Common Crawl's *.paths files do, packed or not."""
    return suffix(f"x{Path(urlsplit(path).path if is_url(path) else path).name}") == ".paths"


def walk(directory: str, hidden: bool = False) -> Iterator[str | PassedOver]:
    """Files below a directory, and what there is besides files and directories.

    Links to directories are followed after everything else, and no directory is entered twice.
    """
    entered: set[tuple[int, int]] = set()
    waiting, links = deque([directory]), deque[str]()
    while waiting or links:
        current = (waiting or links).popleft()
        try:
            status = Path(current).stat()
            if (status.st_dev, status.st_ino) in entered:
                yield PassedOver("files", "link to a directory read already", shown(current))
                continue
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError:
            yield PassedOver("files", LOCKED, shown(current))
            continue
        for entry in entries:
            path = entry.path.removeprefix("./")
            if entry.name.startswith(".") and not hidden:
                yield PassedOver("files", "hidden", shown(path))
            elif _is_directory(path):
                (links if entry.is_symlink() else waiting).append(path)
            else:
                yield path if is_file(path) else _no_file(path)


def _matching(pattern: str) -> list[str | PassedOver]:
    """What a wildcard matches, sorted; `**` between slashes stands for any directories, those behind links too."""
    root, _, rest = pattern.partition("**/")
    if not rest:
        path = Path(pattern)
        anchor = Path(path.anchor)
        try:
            return sorted(str(file) for file in anchor.glob(str(path.relative_to(anchor))))
        except (ValueError, NotImplementedError, re.error):
            return []
    roots = _matching(root.rstrip("/")) if WILDCARD.search(root) else [root or "."]
    found = {item for start in roots if isinstance(start, str) and _is_directory(start)
             for item in walk(start, hidden=True)}
    return [*sorted(filter(matches(pattern), (item for item in found if isinstance(item, str)))),
            *sorted(item for item in found if isinstance(item, PassedOver) and item.what == LOCKED)]


def matches(pattern: str) -> Callable[[str], bool]:
    """Whether a wildcard matches a path, spelt as the wildcard is: from the root, or from here."""
    try:
        compiled = re.compile(glob_translate(pattern))
    except (ValueError, re.error):          # as of `a**`
        return lambda path: False
    return lambda path: compiled.match(path) is not None


def _listed(path: str) -> Iterator[str]:
    """The lines of a listing as files and addresses. Raises DataError for one that is damaged or leads nowhere."""
    parts = list(chunks(path))
    if damage := [part.reason for part in parts if isinstance(part, Gap)]:
        raise DataError(f"annotate.sources: {shown(path)}: {damage[0]}.\n"
                        "A list of files must be whole: fetch it again.")
    text = os.fsdecode(b"".join(part for part in parts if isinstance(part, bytes)).removeprefix(b"\xef\xbb\xbf"))
    lines = [line.strip("\r\t ") for line in text.split("\n")]
    places = {number: _place(path, line) for number, line in enumerate(lines, start=1) if line}
    if not places:
        raise DataError(f"annotate.sources: {shown(path)} lists no file.\nFetch it again, or take it out of `paths`, "
                        "in params.yaml.")
    if missing := [number for number, place in places.items() if place is None]:
        raise DataError(
            f"annotate.sources: {shown(path)}, line {missing[0]}: {shown(lines[missing[0] - 1])} is not there "
            f"({len(missing):,} of {len(places):,} lines lead nowhere).\n"
            "Put the files beside the listing, or give it whole paths or addresses."
        )
    yield from (place for place in places.values() if place is not None)


def _place(listing: str, line: str) -> str | None:
    """What a line stands for.

    A path is one from the listing's own directory or one above it; Common Crawl's are from the root of its address. On
    a server a path is one from where its first directory stands in the listing's address, or else from the root.
    """
    if is_url(line):
        return line
    if line.startswith("s3://commoncrawl/"):
        return COMMON_CRAWL + line.removeprefix("s3://commoncrawl/")
    if is_url(listing):
        first, slash, _ = line.partition("/")
        if not slash:
            return urljoin(listing, line)
        before, found, _ = urlsplit(listing).path.partition(f"/{first}/")
        return urljoin(listing, f"{before if found else ''}/{line.lstrip('/')}")
    parents = Path(listing).absolute().parents
    for place in (str(parent / line) for parent in parents):
        if is_file(place):
            return place
    return COMMON_CRAWL + line if line.startswith(CRAWLS) else None
