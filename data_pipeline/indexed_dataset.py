"""Megatron's token files: `.bin` holds the ids of all documents end to end, `.idx` their lengths and places.

The bytes are those of megatron.core.datasets.indexed_dataset (megatron-core 0.16.1), one sequence a document, written
while the ids arrive and renamed when complete, the index last: where an index is, the file is whole.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from data_pipeline.config import DataError

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
        self._bin = _partial(self.prefix, "bin").open("wb")
        return self

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document. Its ids include the end-of-document mark."""
        tokens = np.asarray(ids, dtype=self.dtype)
        self._bin.write(tokens.tobytes())
        self.lengths.append(len(tokens))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        if kind is not None:
            with suppress(FileNotFoundError):
                _partial(self.prefix, "bin").unlink()
            return
        _partial(self.prefix, "idx").write_bytes(self._index())
        for suffix in ("bin", "idx"):
            _partial(self.prefix, suffix).rename(_path(self.prefix, suffix))

    def _index(self) -> bytes:
        lengths = np.asarray(self.lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        header = HEADER.pack(MAGIC, VERSION, DTYPE_CODES[self.dtype.type], len(lengths), len(documents))
        return header + lengths.tobytes() + starts.tobytes() + documents.tobytes()


def read_documents(prefix: Path) -> Iterator[np.ndarray]:
    """The documents of `prefix`.bin in order: ids with their end-of-document mark, read-only views of the file.

    Raises DataError for a file that is missing, cut short, or no Megatron index.
    """
    dtype, lengths = read_lengths(prefix)
    if not lengths.sum():
        return iter(())
    tokens = np.memmap(_path(prefix, "bin"), dtype=dtype, mode="r")
    ends = np.cumsum(lengths, dtype=np.int64)
    return (tokens[end - length : end] for end, length in zip(ends, lengths, strict=True))


def read_lengths(prefix: Path) -> tuple[np.dtype, np.ndarray]:
    """Type of the ids, and tokens of each document (int32). Raises DataError as `read_documents` does."""
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


def _path(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")


def _partial(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f".{prefix.name}.{suffix}.partial")
