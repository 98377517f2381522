"""Weights by name that are read or made when one asks for them: no model need ever be whole in memory.

A checkpoint and a Hub directory are opened as such (`checkpoint.open_weights`, `hub.open_weights`), and what is made of
one tensor by tensor is another: other names, a cut, another dtype. Nothing happens until a writer takes the tensors of
the last one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Recipe = Callable[[Callable[[str], Tensor]], Tensor]        # a tensor from others by name; on the meta device too


class LazyState(Mapping[str, Tensor]):
    """Tensors that are made when asked for, each time anew.

    Args:
        skeleton: them all on the meta device: names in order, shapes and dtypes.
        make: the tensor of a name.
    """

    def __init__(self, skeleton: State, make: Callable[[str], Tensor]):
        self.skeleton, self._make = skeleton, make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.skeleton:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.skeleton                        # Mapping's own would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.skeleton)

    def __len__(self) -> int:
        return len(self.skeleton)


def derive(source: Mapping[str, Tensor], recipes: Mapping[str, Recipe]) -> LazyState:
    """What `recipes` make of `source`. Its last tensor is kept, for several in a row may be parts of one.

    Raises:
        KeyError: a recipe asks for a tensor that `source` lacks.
    """
    shapes = skeleton(source)
    last = lru_cache(maxsize=1)(source.__getitem__)
    made = {name: recipe(shapes.__getitem__) for name, recipe in recipes.items()}
    return LazyState(made, lambda name: recipes[name](last))


def skeleton(state: Mapping[str, Tensor]) -> State:
    """`state` on the meta device, for which nothing is read."""
    if isinstance(state, LazyState):
        return state.skeleton
    return {name: tensor.detach().to("meta") for name, tensor in state.items()}


def compute_lazily(model: nn.Module, state: Mapping[str, Tensor], names: Callable[[str], str] = str) -> nn.Module:
    """Let `model`, on the meta device, compute with `state` in its dtype: every layer has weights while it runs.

    Args:
        model: whose layers stand in lists, called as modules. What is not in a list is called as well.
        names: from a name in `model` to that in `state`.
    """
    from accelerate import cpu_offload

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = {type(layer).__name__ for layers in lists for layer in layers}
    weights: Any = LazyState(model.state_dict(), lambda name: state[names(name)])
    return cpu_offload(model, torch.device("cpu"), state_dict=weights, preload_module_classes=[*layers])
