"""Files that are written whole or not at all, whatever ends the process or the machine, and whose damage is noticed.

A rename alone is not enough: after a power cut a file system may have the new name and not yet what it names. So
contents go to the disk first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path, writer: str = "") -> Iterator[Path]:
    """A path beside `target` for a file that takes its place when the block ends well, and is removed otherwise.

    Args:
        writer: tells apart those that may write the same file at once.
    """
    partial = target.with_name(f".{target.name}{writer}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that becomes `target`, in place of what is there, when the block ends well; never half-written."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for path in partial.rglob("*"):
        if path.is_file():
            sync(path)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write(target: Path, content: bytes | str) -> None:
    """Write a small file."""
    with replacing(target) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Wait until the contents of a file are on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sha256(path: Path) -> str:
    """The hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checked(path: Path, content: bytes) -> None:
    """Write `content` after its digest."""
    write(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_checked(path: Path) -> bytes | None:
    """What `write_checked` wrote; None where there is nothing, or where it is damaged, which is said and removed."""
    if not path.exists():
        return None
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        _drop(path)
        return None
    return content


def seal(piece: Path) -> None:
    """Keep the digest of a finished file beside it, for `drop_damaged`."""
    write(_digest_of(piece), sha256(piece))


def drop_damaged(directory: Path) -> None:
    """Remove the files below `directory` that are not as they were when they were sealed, which is said, or that a run
    cut short before they were."""
    for piece in sorted(path for path in directory.rglob("[!.]*") if path.is_file()):
        digest = _digest_of(piece)
        if not digest.exists():
            piece.unlink()
        elif digest.read_bytes() != sha256(piece).encode():
            _drop(piece)


def _digest_of(piece: Path) -> Path:
    return piece.with_name(f".{piece.name}.sha256")


def _drop(path: Path) -> None:
    print(f"{path}: damaged; made again.", flush=True)
    path.unlink()
