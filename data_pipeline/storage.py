"""Tables and arrays on disk between two passes over the shards, each written whole, with its digest beside it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from durable import replacing, seal, write

KEPT_BYTES = 2 << 30            # of a decision that all shards share


def write_table(table: pa.Table, target: Path) -> None:
    """Write `table` to the Parquet file `target`."""
    with replacing(target) as partial:
        pq.write_table(table.replace_schema_metadata(), partial, compression="zstd")
    seal(target)


def write_json(value: Any, target: Path) -> None:
    """Write plain values to `target`."""
    write(target, json.dumps(value))
    seal(target)


def write_arrays(arrays: Mapping[str, np.ndarray], target: Path) -> None:
    """Write `arrays` to the .npz file `target`, one at a time: those made when asked for are not held together."""
    with replacing(target) as partial, zipfile.ZipFile(partial, "w") as stored:
        for name, values in arrays.items():
            with stored.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asanyarray(values), allow_pickle=False)
    seal(target)


def place(file: Path, target: Path) -> None:
    """Let `target` be `file`, which stays until a run has ended well."""
    try:
        target.hardlink_to(file)
    except OSError:                             # another file system
        shutil.copyfile(file, target)


class StoredArrays(Mapping[str, np.ndarray]):
    """The arrays of an .npz file, each read when it is asked for and then forgotten."""

    def __init__(self, file: Path):
        self.file = file

    def __getitem__(self, name: str) -> np.ndarray:
        with np.load(self.file, allow_pickle=False) as stored:
            return stored[name]

    def __iter__(self) -> Iterator[str]:
        with np.load(self.file, allow_pickle=False) as stored:
            yield from list(stored.files)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def piece(self, part: int, names: Sequence[str], bounds: str) -> list[np.ndarray]:
        """Elements bounds[part] to bounds[part + 1] of one-dimensional arrays; nothing else is read."""
        with zipfile.ZipFile(self.file) as stored, self.file.open("rb") as stream:
            def read(name: str, start: int, stop: int) -> np.ndarray:
                stream.seek(stored.getinfo(f"{name}.npy").header_offset + 26)   # an entry's sizes, in the ZIP format
                stream.seek(sum(struct.unpack("<HH", stream.read(4))), os.SEEK_CUR)
                assert np.lib.format.read_magic(stream) == (1, 0)
                _, _, dtype = np.lib.format.read_array_header_1_0(stream)
                stream.seek(start * dtype.itemsize, os.SEEK_CUR)
                return np.fromfile(stream, dtype, stop - start)

            start, stop = read(bounds, part, part + 2)
            return [read(name, start, stop) for name in names]


class Surveys(Sequence[StoredArrays]):
    """The arrays in DIRECTORY/NAME-00000.npz, DIRECTORY/NAME-00001.npz and so on: what was noted of each shard."""

    def __init__(self, directory: Path, name: str, count: int):
        self.directory, self.name, self.size = directory, name, count

    def __getitem__(self, index: int) -> StoredArrays:      # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(index)
        return StoredArrays(self.file(index))

    def __len__(self) -> int:
        return self.size

    def file(self, index: int) -> Path:
        """Where the arrays of one item are."""
        return self.directory / f"{self.name}-{index:05d}.npz"

    @property
    def missing(self) -> list[int]:
        """The items whose arrays are not there."""
        return [index for index in range(self.size) if not self.file(index).exists()]


def shared_arrays(file: Path) -> Mapping[str, np.ndarray]:
    """All arrays of a decision, kept, as a worker applies it to one shard after the other; read each time where they
    are more than a worker should hold."""
    return _kept(file) if file.stat().st_size <= KEPT_BYTES else StoredArrays(file)


@lru_cache(maxsize=4)
def _kept(file: Path) -> Mapping[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
