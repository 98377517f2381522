"""Damage is noticed before it is computed with: digests beside weights and states, and numbers that are finite.

`SHA256SUMS` in a directory, which `sha256sum -c` reads too, is written when all else there is, and checked on load.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from model.config import ModelError

SUMS = "SHA256SUMS"
WEIGHTS = (".distcp", ".safetensors")       # which must be listed


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file, which by then is on the disk and not in the system's memory alone."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(directory: Path, known: Mapping[str, str] | None = None, files: str = "*") -> None:
    """Write SHA256SUMS of the files below `directory`.

    Args:
        known: digests by name of those that need not be read again.
        files: a pattern of names. A Hub directory's weights alone are sealed: the rest people may well change.
    """
    paths = sorted(path for path in directory.rglob(files) if path.is_file() and path.name != SUMS)
    digests = {name: (known or {}).get(name) or sha256(path)
               for path in paths for name in [path.relative_to(directory).as_posix()]}
    (directory / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    sha256(directory / SUMS)


def check_sums(directory: Path, part: slice = slice(None)) -> None:
    """Compare the files below `directory` with its SHA256SUMS.

    Args:
        part: of the files; each of several processes may take its own.

    Raises:
        ModelError: there is no SHA256SUMS, or a file is not the one that was written, or is not listed.
    """
    try:
        lines = (directory / SUMS).read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ModelError(f"{directory / SUMS}: cannot be read ({error}).\n{_CURE}") from None
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    there = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.suffix in WEIGHTS)
    for name in [*digests, *(set(there) - set(digests))][part]:
        path = directory / name
        if not path.is_file():
            raise ModelError(f"{path}: not found, and {SUMS} beside it lists it.\n{_CURE}")
        if sha256(path) != digests.get(name):
            raise ModelError(f"{path}: damaged or replaced: it is not the file whose digest stands in {SUMS}.\n{_CURE}")


def is_whole(directory: Path) -> bool:
    """Whether the files below `directory` are those of its SHA256SUMS; where they are not, that is said."""
    try:
        check_sums(directory)
    except ModelError as error:
        if directory.exists():
            print(f"{str(error).partition(chr(10))[0]}\nIt is made again.", flush=True)
        return False
    return True


def check_finite(tensor: Tensor, name: str, where: Path) -> None:
    """Raise ModelError where a weight holds a NaN or an infinity."""
    parts = tensor.detach().flatten().split(2**24) if tensor.is_floating_point() else ()     # copied in float32
    if not all(bool(part.float().isfinite().all()) for part in parts):
        raise ModelError(f"{where}: {name} holds values that are not finite.\n{_CURE}")


def write_checked(path: Path, content: bytes) -> None:
    """Write `content` after its digest, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    partial.rename(path)


def read_checked(path: Path) -> bytes | None:
    """What `write_checked` wrote; None where there is nothing, or where it is damaged, which is said and removed."""
    if not path.exists():
        return None
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        print(f"{path}: damaged; made again.", flush=True)
        path.unlink()
        return None
    return content


_CURE = "Restore the file, or make the directory again: by the stage that writes it, or by a new download."
