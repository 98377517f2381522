"""Results of a long computation, cached on disk, so that a killed run goes on where it stopped."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from durable import read_checked, write_checked
from model.megatron.distributed import is_main_process

Value = TypeVar("Value")


class ResultCache:
    """Named values (tensors, numbers, text, containers of them) under `directory`, each as it was saved or not there.

    Of several processes the first reads and writes; all get the same. The file `resumed` appears when a value of an
    earlier run is taken up.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def once(
        self, name: str, compute: Callable[[], Value], alone: bool = False, holds: Callable[[], bool] = lambda: True
    ) -> Value:
        """`compute()`, or what an earlier run saved of it.

        Args:
            compute: called by all processes, whose results are equal.
            alone: whether the first computes by itself, for all.
            holds: whether what was saved still holds; asked of the first process.
        """
        value = from_main_process(lambda: self._load(name) if holds() else None)
        if value is None:
            value = from_main_process(compute) if alone else compute()
            if is_main_process():
                content = io.BytesIO()
                torch.save(value, content)
                write_checked(self.directory / f"{name}.pt", content.getvalue())
        return value

    def _load(self, name: str) -> Any | None:
        content = read_checked(self.directory / f"{name}.pt")
        if content is None:
            return None
        (self.directory / "resumed").touch()
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def from_main_process(compute: Callable[[], Value]) -> Value:
    """What `compute` gives on the first process, on all of them."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return compute()
    value: list[Any] = [compute() if is_main_process() else None]
    dist.broadcast_object_list(value)
    return value[0]
