"""Results of a long computation, cached on disk, so that a killed run goes on where it stopped."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from durable import read_checked, write_checked

Value = TypeVar("Value")


class ResultCache:
    """Named values (tensors, numbers, text, containers of them) under `directory`, each as it was saved or not there.

    The file `resumed` appears when a value of an earlier run is taken up.
    """

    def __init__(self, directory: Path):
        self.directory = directory

    def load(self, name: str) -> Any | None:
        """The value saved under `name`, tensors on the CPU, or None."""
        content = read_checked(self.directory / f"{name}.pt")
        if content is None:
            return None
        (self.directory / "resumed").touch()
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def save(self, name: str, value: Any) -> None:
        """Keep `value` under `name`, whole or not at all, in place of an earlier one."""
        content = io.BytesIO()
        torch.save(value, content)
        write_checked(self.directory / f"{name}.pt", content.getvalue())

    def once(self, name: str, compute: Callable[[], Value]) -> Value:
        """`compute()`, or what an earlier run saved of it."""
        value = self.load(name)
        if value is None:
            value = compute()
            self.save(name, value)
        return value
