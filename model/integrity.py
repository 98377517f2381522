"""Damage is noticed before it is computed with: digests beside weights and states, and numbers that are finite.

`SHA256SUMS` in a directory, which `sha256sum -c` reads too, is written when all else there is, and checked on load.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from durable import sha256, sync, write
from model.config import ModelError

SUMS = "SHA256SUMS"
WEIGHTS = (".distcp", ".safetensors")       # which must be listed


def write_sums(directory: Path, known: Mapping[str, str] | None = None, files: str = "*") -> None:
    """Write SHA256SUMS of the files below `directory`.

    Args:
        known: digests by name of those that need not be read again.
        files: a pattern of names. A Hub directory's weights alone are sealed: the rest people may well change.
    """
    paths = sorted(path for path in directory.rglob(files) if path.is_file() and path.name != SUMS)
    digests = {name: (known or {}).get(name) or sha256(path)
               for path in paths for name in [path.relative_to(directory).as_posix()]}
    for path in paths:
        sync(path)
    write(directory / SUMS, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))


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
    paths = {directory / name: digests.get(name) for name in [*digests, *(set(there) - set(digests))][part]}
    if missing := [path for path in paths if not path.is_file()]:
        raise ModelError(f"{missing[0]}: not found, and {SUMS} beside it lists it.\n{_CURE}")
    with ThreadPoolExecutor() as threads:                   # a core hashes slower than a disk reads
        for (path, expected), found in zip(paths.items(), threads.map(sha256, paths), strict=True):
            if found != expected:
                raise ModelError(
                    f"{path}: damaged or replaced: it is not the file whose digest stands in {SUMS}.\n{_CURE}")


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
    """Raise ModelError where a weight holds a NaN or an infinity, or is of a type that only scales give a meaning."""
    if not tensor.is_floating_point() or tensor.itemsize == 1:
        raise ModelError(f"{where}: {name} is {tensor.dtype}, a quantized weight, whose scales are not read here.\n"
                         "Take the model in BF16, FP16 or FP32.")
    parts = tensor.detach().flatten().split(2**24)          # copied in float32
    if not all(bool(part.float().isfinite().all()) for part in parts):
        raise ModelError(f"{where}: {name} holds values that are not finite.\n{_CURE}")


_CURE = "Restore the file, or make the directory again: by the stage that writes it, or by a new download."
