"""What a run has recorded so far, on disk while it runs: CSV files to follow and TensorBoard events.

The CSV files are the record: a row is appended, whole, as soon as it is known, with every digit of its numbers. A
resume state holds copies of them, and a resumed run goes on with those.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from model.config import ModelError

Row = dict[str, Any]


class RunLog:
    """The records of one run, written by its first process.

    Args:
        directory: where the files go: NAME.csv and tensorboard/.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.events: SummaryWriter | None = None
        self.sums: dict[Path, Any] = {}         # of what was written, hashlib's running SHA-256

    def start(self, step: int, state: Path | None) -> None:
        """Go on after `step` with the files in the directory `state`; without either, anew. What there is goes."""
        for path in self.directory.glob("*.csv"):
            path.unlink()
        for path in sorted(state.glob("*.csv")) if state else ():
            copy = Path(shutil.copy(path, self.directory))
            self.sums[copy] = hashlib.sha256(copy.read_bytes())
        curves = self.directory / "tensorboard"
        if not step:
            shutil.rmtree(curves, ignore_errors=True)
        self.events = SummaryWriter(str(curves), purge_step=step + 1)

    def append(self, name: str, row: Row) -> None:
        """Add `row` to NAME.csv; the first row makes the header."""
        path = self._path(name)
        text = ("" if path.exists() else ",".join(row) + "\n") + ",".join(map(str, row.values())) + "\n"
        self.sums.setdefault(path, hashlib.sha256()).update(text.encode())
        with path.open("a") as file:
            file.write(text)

    def plot(self, step: int, figures: dict[str, float]) -> None:
        """Add points to TensorBoard's curves, named GROUP/NAME."""
        assert self.events is not None
        for name, value in figures.items():
            self.events.add_scalar(name, value, step)

    def rows(self, name: str) -> list[Row]:
        """All rows of NAME.csv, numbers as numbers. Raises ModelError where they are not those that were written."""
        path = self._path(name)
        if not path.exists():
            return []
        self._check(path)
        with path.open(newline="") as file:
            return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]

    def files(self) -> list[Path]:
        """All there are. Raises ModelError where one is not as it was written."""
        found = sorted(self.directory.glob("*.csv"))
        for path in found:
            self._check(path)
        return found

    def _check(self, path: Path) -> None:
        if path not in self.sums or hashlib.sha256(path.read_bytes()).digest() != self.sums[path].digest():
            raise ModelError(f"{path}: changed by something else while the run wrote to it.\n"
                             "Run the same command again: it goes on from the last resume state, with that one's copy.")

    def close(self) -> None:
        """Close TensorBoard's file."""
        assert self.events is not None
        self.events.close()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.csv"


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
