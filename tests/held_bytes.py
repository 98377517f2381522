"""Bytes of tensors that are there at one time, on a CPU, where PyTorch's allocator does not say."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """A block in which storages that operations make are counted while they live.

    Attributes:
        most: bytes of them at most.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """`known`: tensors from before, such as weights, whose storages count as nothing."""
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.live:
                self.live[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key)
        return found

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key)
