"""How a global step decides about more than one process can hold: passes of the workers over parts of the work.

A pass calls a function for each of its items, in workers, and keeps the arrays it gives back; the next pass reads of
each what it needs. Where items are to meet that lie in different shards, an exchange brings them together by a prefix
of their hash (MapReduce: Dean and Ghemawat 2004): each giver sorts its own by where they go (`parted`), each taker
reads its piece of what each giver left (`taken`). How many parts there are follows from the size of the work and the
number of workers, and changes no decision: one part is the whole work in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.storage import StoredArrays, Surveys, write_arrays
from data_pipeline.text.words import UInt64
from data_pipeline.workers.executor import Workers

Arrays = Mapping[str, np.ndarray]

SMALLEST = 8            # parts are made for workers down to an eighth of a full one


class Passes:
    """Makes passes: in the workers of `pool`, or in this process where a pass is one part. They are kept in
    `directory`: those made before an interruption are there.

    Attributes:
        workers: parts that are worked on at once.
    """

    def __init__(self, directory: Path, pool: Workers):
        self.workers, self.directory, self.pool = pool.backend.slots, directory, pool
        directory.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, function: Callable[[int], Arrays], count: int) -> Made:
        """function(item) for each item below `count`; `function` is pickled. What was made before is not made again."""
        made = Surveys(self.directory, name, count)
        missing = made.missing
        if missing and count == 1:              # not worth a worker, which on a cluster has to be waited for
            _make(function, made, 0)
            return made
        for _ in self.pool.all(partial(_make, function, made), missing,
                               lambda item: f"{self.directory.name}, {name}, part {item}"):
            pass
        return made

    def exchange(
        self, name: str, give: Callable[[int], Arrays], givers: int,
        take: Callable[[Made, int], Arrays], takers: int,
    ) -> Made:
        """take(given, part) for each part below `takers`, `given` being give(item) for each item below `givers`."""
        if givers == takers == 1:               # in this process, and there is nothing to bring together
            return self.run(name, lambda _: take([Held(give(0))], 0), 1)
        given: Made = []
        if Surveys(self.directory, name, takers).missing:
            given = self.run(f"{name}-given", give, givers)
        found = self.run(name, partial(take, given), takers)
        for file in self.directory.glob(f"{name}-given-*.npz"):
            file.unlink()
        return found

    def parts(self, size: float, largest: float) -> int:
        """How many parts of at most about `largest` to make of work of this size: one a worker, but no small ones."""
        wanted = min(self.workers, SMALLEST * size / largest)
        return max(1, int(np.ceil(size / largest)), int(wanted))


class Held(dict[str, np.ndarray]):
    """Arrays in memory, as `StoredArrays` are on disk."""

    def piece(self, part: int, names: Sequence[str], bounds: str) -> list[np.ndarray]:
        """Elements bounds[part] to bounds[part + 1] of one-dimensional arrays."""
        start, stop = self[bounds][part : part + 2]
        return [self[name][start:stop] for name in names]


Made = Sequence[StoredArrays] | Sequence[Held]


def _make(function: Callable[[int], Arrays], made: Surveys, item: int) -> None:
    write_arrays(function(item), made.file(item))


class Groups(NamedTuple):
    """Surveys in so many groups of neighbouring shards."""

    surveys: Sequence[Arrays]
    number: int

    def shards(self, group: int) -> range:
        """The shards of a group."""
        return range(len(self.surveys) * group // self.number, len(self.surveys) * (group + 1) // self.number)

    def group_of(self, shard: Any) -> Any:
        """The group of a shard, or of an array of shards."""
        return ((shard + 1) * self.number - 1) // len(self.surveys)

    def own(self, group: int) -> list[Arrays]:
        """The surveys of a group's shards."""
        return [self.surveys[shard] for shard in self.shards(group)]


def total(surveys: Sequence[Arrays]) -> int:
    """The sum of what surveys say they are about, in `size`."""
    return sum(int(survey["size"][0]) for survey in surveys)


def part_of(hashes: UInt64, parts: int) -> UInt64:
    """Which of so many parts, by the first 32 bits of a hash."""
    return ((hashes >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32)


def order_of(part: np.ndarray, parts: int) -> np.ndarray:
    """The stable order by part."""
    return np.argsort(part.astype(np.uint16) if parts < 1 << 16 else part, kind="stable")     # 16 bits by radix


def parted(part: np.ndarray, parts: int, arrays: Arrays, bounds: str = "bounds") -> dict[str, np.ndarray]:
    """`arrays` in the order of the parts their elements go to, and where in them each part begins, for `taken`."""
    ends = np.cumsum(np.bincount(part.astype(np.int64), minlength=parts))
    if parts > 1:
        order = order_of(part, parts)
        arrays = {name: values[order] for name, values in arrays.items()}
    return {**arrays, bounds: np.concatenate([[0], ends])}


def taken(given: Made, part: int, names: Sequence[str], bounds: str = "bounds") -> list[np.ndarray]:
    """What all givers left for `part` in the arrays of these names, one giver after the other."""
    pieces = [giver.piece(part, names, bounds) for giver in given]
    return [np.concatenate(arrays) for arrays in zip(*pieces, strict=True)]


class Places(Mapping[str, np.ndarray]):
    """Arrays by where they are, and what they are called there; each is read when asked for."""

    def __init__(self, places: Mapping[str, tuple[Arrays, str]]):
        self.places = places

    def __getitem__(self, name: str) -> np.ndarray:
        arrays, there = self.places[name]
        return arrays[there]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class OfShards(Sequence[Arrays]):
    """The arrays of each shard out of what was made of each group, where they are called NAMEshard."""

    def __init__(self, made: Made, names: Sequence[str], groups: Groups):
        self.made, self.names, self.groups = made, names, groups

    def __getitem__(self, shard: int) -> Arrays:            # type: ignore[override]
        shard = range(len(self))[shard]
        made = self.made[self.groups.group_of(shard)]
        return Places({name: (made, f"{name}{shard}") for name in self.names})

    def __len__(self) -> int:
        return len(self.groups.surveys)
