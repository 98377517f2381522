"""Tables and arrays on disk between two passes over the shards, each written whole, with its digest beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from durable import replacing, seal, write


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
    """Write `arrays` to the .npz file `target`."""
    with replacing(target) as partial, partial.open("wb") as stream:    # given a name, NumPy would add its own suffix
        np.savez(stream, allow_pickle=False, **arrays)
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


class Surveys(Sequence[Mapping[str, np.ndarray]]):
    """What a step noted of each shard, on disk."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __getitem__(self, index: int) -> StoredArrays:      # type: ignore[override]
        return StoredArrays(self.files[index])

    def __len__(self) -> int:
        return len(self.files)


@lru_cache(maxsize=4)
def shared_arrays(file: Path) -> Mapping[str, np.ndarray]:
    """All arrays of a decision, kept: a worker applies it to one shard after the other."""
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
