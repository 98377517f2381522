"""Outputs, and DVC's copies of them, against the hashes in dvc.lock.

DVC takes a file whose size and time are as it left them for unchanged, and a copy in its cache that is read-only for
whole: bits that rot pass for right, and a damaged copy is checked out again and again. Here both are hashed, before a
stage reads them and before the flow calls them cached or restored. Of two copies a good one mends the other; where none
is good, DVC is made to look again and runs the stage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from durable import replacing

LOCK = Path("dvc.lock")
SECONDS_TO_WRITE = 1.0      # dvc.lock, from its start: an output may not be in it yet
READ_ONLY = 0o444           # as DVC leaves what is in its cache


class Output(NamedTuple):
    """What a stage wrote: `md5` is that of the file, or, with `.dir` at its end, of the list of a directory's files."""

    stage: str
    path: Path
    md5: str
    size: int               # bytes, of all its files


class Damage(NamedTuple):
    """A file of an output that is not what dvc.lock says, that a directory lacks, or that it has besides."""

    output: Output
    path: Path              # of the output or a file in it

    def __str__(self) -> str:
        if not self.path.exists():
            return f"{self.path}: gone; stage {self.output.stage} wrote it."
        return f"{self.path}: not the file that stage {self.output.stage} wrote (its hash is not dvc.lock's)."


def recorded() -> list[Output]:
    """All outputs in dvc.lock; of one that DVC is just writing, those that are there."""
    import yaml

    with suppress(FileNotFoundError, ValueError, yaml.YAMLError, AttributeError, LookupError, TypeError):
        return [Output(name, Path(out["path"]), out["md5"], int(out["size"]))
                for name, stage in yaml.load(LOCK.read_text(), yaml.CSafeLoader)["stages"].items()
                for out in stage.get("outs", ()) if out.keys() >= {"path", "md5", "size"}]
    return []


def of_stage(stage: str) -> list[Output]:
    """Those of a stage that has ended; waits for a dvc.lock that DVC is just writing. None where it names none."""
    for _ in range(100):
        if found := [output for output in recorded() if output.stage == stage]:
            return found
        time.sleep(0.2)
    return []


def any_since(stage: str, time_ns: int) -> bool:
    """Whether a file of a stage that has ended was put in its place, or changed, at that time or later."""
    return any(path.lstat().st_ctime_ns >= time_ns for output in of_stage(stage)
               for path in (output.path, *output.path.rglob("*")))


def damaged(path: Path, largest: float) -> list[Damage]:
    """Of the outputs that are `path`, lie below it or hold it, the files that are not what dvc.lock says (`verify`).

    DVC rewrites dvc.lock in place: what does not fit is looked at again a moment later.
    """
    for _ in range(4):
        outputs = [out for out in recorded() if path.is_relative_to(out.path) or out.path.is_relative_to(path)]
        found = verify(outputs, largest)
        if not found and (outputs or not LOCK.exists() or time.time() - LOCK.stat().st_mtime > SECONDS_TO_WRITE):
            break
        time.sleep(0.5)
    return found


def verify(outputs: Iterable[Output], largest: float) -> list[Damage]:
    """Hash the files of `outputs` and DVC's copies of them. Where a file is good a bad copy is replaced, else removed.

    Args:
        largest: bytes of an output; larger ones are taken for right.

    Returns:
        Files that are there and are not as written, whose times change, so that DVC sees it; and those that a directory
        which is there lacks.
    """
    return [Damage(output, path) for output in outputs if output.size <= largest for path in _verify(output)]


def bytes_of_copies() -> int:
    """Of all that is in DVC's cache."""
    return sum(copy.stat().st_size for copy in (_cache() / "files" / "md5").glob("??/*"))


def drop_damaged_copies() -> None:
    """Hash all that is in DVC's cache, and remove what is not what its name says."""
    for copy in (_cache() / "files" / "md5").glob("??/*"):
        if _md5(copy) != f"{copy.parent.name}{copy.name}".removesuffix(".dir"):
            copy.unlink()


def drop_damaged_runs() -> None:
    """Remove entries of DVC's run cache that are not what their names, their digests, say, and directories of none:
    with half an entry, or an empty directory, a stage fails for ever; without them the stage runs.
    """
    import yaml
    from dvc.utils import dict_sha256
    from dvc.utils.serialize import load_yaml

    def is_whole(entry: Path, load: Callable[[Path], Any]) -> bool:
        try:
            return bool(dict_sha256(load(entry), exclude=["size", "nfiles"]) == entry.name)
        except Exception:                   # of any damage
            return False

    def fast(entry: Path) -> Any:           # reads most as DVC does, and not every number
        return yaml.load(entry.read_bytes(), yaml.CSafeLoader)

    for entry in (_cache() / "runs").glob("*/*/*"):
        if not (is_whole(entry, fast) or is_whole(entry, load_yaml)):
            entry.unlink()
    for directory in (_cache() / "runs").glob("*/*"):
        with suppress(OSError):         # not empty
            directory.rmdir()


def _verify(output: Output) -> Iterator[Path]:
    if not output.md5.endswith(".dir"):
        yield from _compare(output.path, output.md5)
        return
    listing = _copy(output.md5)
    content = listing.read_bytes() if listing.exists() else b""
    if f"{hashlib.md5(content).hexdigest()}.dir" != output.md5:
        files = sorted((path.relative_to(output.path).as_posix(), path)
                       for path in output.path.rglob("*") if path.is_file())
        content = json.dumps([{"md5": _md5(path), "relpath": name} for name, path in files], sort_keys=True).encode()
        if f"{hashlib.md5(content).hexdigest()}.dir" != output.md5:
            listing.unlink(missing_ok=True)
            for _, path in files:
                os.utime(path)
            if files:
                yield output.path
            return
        _replace(listing, content)
    listed = {output.path / file["relpath"]: file["md5"] for file in json.loads(content)}
    for path, md5 in listed.items():
        yield from _compare(path, md5)
    if output.path.is_dir():
        yield from sorted(listed.keys() ^ {path for path in output.path.rglob("*") if path.is_file()})


def _compare(path: Path, md5: str) -> Iterator[Path]:
    """`path`, where it is there and not the file of this hash."""
    copy = _copy(md5)
    good = _md5(path) == md5
    if _md5(copy) != md5:
        if good:
            _replace(copy, path)
        else:
            copy.unlink(missing_ok=True)
    if not good and path.exists():
        os.utime(path)
        yield path


def _md5(path: Path) -> str:
    """Hexadecimal; empty where there is no file."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _copy(md5: str) -> Path:
    """DVC's copy of what has this hash."""
    return _cache() / "files" / "md5" / md5[:2] / md5[2:]


@lru_cache
def _cache() -> Path:
    from dvc.config import Config

    return Path(Config(dvc_dir=".dvc")["cache"].get("dir", ".dvc/cache"))


def _replace(copy: Path, content: Path | bytes) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with replacing(copy, f".{os.getpid()}") as partial:
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            shutil.copyfile(content, partial)
        partial.chmod(READ_ONLY)
