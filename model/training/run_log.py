"""What a run has recorded so far, on disk while it runs: CSV files to follow and TensorBoard events.

The CSV files are the record: a row is appended, whole, as soon as it is known, with every digit of its numbers. A
resume state holds copies of them, and a resumed run goes on with those.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

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

    def start(self, step: int, state: Path | None) -> None:
        """Go on after `step` with the files in the directory `state`; without either, anew. What there is goes."""
        for path in self.files():
            path.unlink()
        for path in sorted(state.glob("*.csv")) if state else ():
            shutil.copy(path, self.directory)
        curves = self.directory / "tensorboard"
        if not step:
            shutil.rmtree(curves, ignore_errors=True)
        self.events = SummaryWriter(str(curves), purge_step=step + 1)

    def append(self, name: str, row: Row) -> None:
        """Add `row` to NAME.csv; the first row makes the header."""
        path = self._path(name)
        is_new = not path.exists() or not path.stat().st_size
        header = ",".join(row) + "\n" if is_new else ""
        with path.open("a") as file:
            file.write(header + ",".join(map(str, row.values())) + "\n")

    def plot(self, step: int, figures: dict[str, float]) -> None:
        """Add points to TensorBoard's curves, named GROUP/NAME."""
        assert self.events is not None
        for name, value in figures.items():
            self.events.add_scalar(name, value, step)

    def rows(self, name: str) -> list[Row]:
        """All rows of NAME.csv, numbers as numbers."""
        path = self._path(name)
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]

    def files(self) -> list[Path]:
        """All there are."""
        return sorted(self.directory.glob("*.csv"))

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
