"""Megatron's token files: `.bin` holds the ids of all documents end to end, `.idx` their lengths and places.

The bytes are those of megatron.core.datasets.indexed_dataset (megatron-core 0.16.1), one sequence a document, written
while the ids arrive and renamed when complete, with their digests beside them. Files written apart become one by
`merge`, which copies bytes and never holds the ids.
"""

from __future__ import annotations

import shutil
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from data_pipeline.config import DataError
from durable import replacing, seal

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
HEADER = struct.Struct("<9sQBQQ")       # magic, version, dtype code, sequences, documents + 1
DTYPE_CODES: dict[type[np.generic], int] = {np.int32: 4, np.uint16: 8}


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The narrowest type Megatron's format has for ids below `vocab_size`: uint16, else int32."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class IndexedDatasetWriter:
    """Writes `prefix`.bin and `prefix`.idx, a document at a time.

        with IndexedDatasetWriter(prefix, vocab_size) as writer:
            writer.add(ids)

    Leaving the block with an error leaves no file. Memory: four bytes a document.
    """

    def __init__(self, prefix: Path, vocab_size: int):
        self.prefix = prefix
        self.dtype = np.dtype(token_dtype(vocab_size))
        self.lengths = array("i")

    def __enter__(self) -> IndexedDatasetWriter:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._files = ExitStack()
        partial = self._files.enter_context(replacing(_path(self.prefix, "bin")))
        self._bin = self._files.enter_context(partial.open("wb"))
        return self

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document. Its ids include the end-of-document mark. Raises as `extend`."""
        self.extend(np.asarray(ids), np.array([len(ids)]))

    def extend(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that stand one after the other in `ids`, of these `lengths` in tokens. Raises OverflowError
        for an id that the file's type does not hold."""
        if len(ids) and not 0 <= ids.min() <= ids.max() <= np.iinfo(self.dtype).max:
            raise OverflowError(f"ids from {ids.min()} to {ids.max()} do not fit {self.dtype}")
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).data)
        self.lengths.frombytes(np.asarray(lengths, dtype=np.int32).tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.__exit__(kind, error, trace)
        if kind is None:
            lengths = np.asarray(self.lengths, dtype=np.int32)
            _write_index(self.prefix, self.dtype, lambda: iter([lengths]))


def merge(parts: Sequence[Path], prefix: Path) -> int:
    """Write the documents of the files `parts`, in this order, as `prefix`.bin and `prefix`.idx; returns their tokens.

    Memory: the lengths of one part at a time, four bytes a document. Raises DataError for a damaged part, and where
    the parts hold ids of different types.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    dtypes = {read_lengths(part)[0] for part in parts}
    if len(dtypes) != 1:
        raise DataError(f"{prefix}: parts with ids of {len(dtypes)} types.\nRun the `tokenize` stage again.")
    dtype = dtypes.pop()
    with replacing(_path(prefix, "bin")) as partial, partial.open("wb") as target:
        for part in parts:
            with _path(part, "bin").open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 24)
    return _write_index(prefix, dtype, lambda: (read_lengths(part)[1] for part in parts))


def _write_index(prefix: Path, dtype: np.dtype, parts: Callable[[], Iterator[np.ndarray]]) -> int:
    """Write `prefix`.idx, of documents whose lengths (int32) `parts` gives, some at a time, which completes the file.
    Returns the tokens."""
    with replacing(_path(prefix, "idx")) as partial, partial.open("wb") as index:
        tokens = _index(index, dtype, parts)
    for suffix in ("bin", "idx"):
        seal(_path(prefix, suffix))
    return tokens


def _index(index: BinaryIO, dtype: np.dtype, parts: Callable[[], Iterator[np.ndarray]]) -> int:
    index.write(bytes(HEADER.size))
    documents = 0
    for lengths in parts():
        documents += index.write(lengths.tobytes()) // lengths.itemsize
    tokens = 0
    for lengths in parts():
        ends = tokens + np.cumsum(lengths, dtype=np.int64)
        index.write(((ends - lengths) * dtype.itemsize).tobytes())
        tokens = int(ends[-1]) if len(ends) else tokens
    for first in range(0, documents + 1, 1 << 20):
        index.write(np.arange(first, min(first + (1 << 20), documents + 1), dtype=np.int64).tobytes())
    index.seek(0)
    index.write(HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype.type], documents, documents + 1))
    return tokens


def read_lengths(prefix: Path) -> tuple[np.dtype, np.ndarray]:
    """Type of the ids, and tokens of each document (int32).

    Raises DataError for a file that is missing, cut short, or no Megatron index.
    """
    index, ids = _path(prefix, "idx"), _path(prefix, "bin")
    for path in (index, ids):
        if not path.exists():
            raise DataError(f"{path}: not found.\nRun the `tokenize` stage, which writes it.")
    content = index.read_bytes()
    codes = {code: np.dtype(dtype) for dtype, code in DTYPE_CODES.items()}
    if len(content) >= HEADER.size:
        magic, version, code, sequences, entries = HEADER.unpack_from(content)
        expected = HEADER.size + 12 * sequences + 8 * entries
        if (magic, version) == (MAGIC, VERSION) and code in codes and len(content) == expected:
            lengths = np.frombuffer(content, np.int32, sequences, HEADER.size)
            if ids.stat().st_size == lengths.sum(dtype=np.int64) * codes[code].itemsize:
                return codes[code], lengths
            raise DataError(f"{ids}: its size is not what {index.name} says.\nRun the `tokenize` stage again.")
    raise DataError(f"{index}: not a Megatron index of uint16 or int32 ids.\nRun the `tokenize` stage again.")


def is_there(prefix: Path) -> bool:
    """Whether both files are."""
    return all(_path(prefix, suffix).exists() for suffix in ("bin", "idx"))


def _path(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")

