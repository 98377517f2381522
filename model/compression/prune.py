"""Cutting layers and widths out of a model's weights.

MiniPuzzle cuts layers and FFN neurons (paper section 3), Minitron-SSM (arXiv 2504.11409) heads and channels of Mamba-2
layers too. These take channels from the gated RMSNorm, whose mean then runs over fewer: n of them become n'. Even when
those that went were always zero, the mean grows n / n' times, so slicing the norm's weight changes the model. Exact is

    weight *= sqrt(n / n'),     epsilon *= n / n'.

A model has one epsilon for these norms and for those of the residual stream. So the residual stream is scaled (at the
embedding and every projection that writes to it) by the factor at which its norms see the ratio that they saw before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import open_weights, save_weights
from model.config import ModelConfig
from model.lazy_state import LazyState, Recipe, derive

_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")
_WRITES_RESIDUAL = ("embeddings.weight", "out_proj.weight", "o_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Selection:
    """What is kept: ascending indices into the parent. What is not named stays whole.

    Attributes:
        layers: of the pattern.
        neurons: by FFN layer.
        mamba_heads: by Mamba-2 layer; as many of every group.
        mamba_channels: by Mamba-2 layer; channels of a head, the same ones in all heads of the layer.
    """

    layers: Sequence[int]
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    mamba_heads: Mapping[int, Tensor] = field(default_factory=dict)
    mamba_channels: Mapping[int, Tensor] = field(default_factory=dict)


def cut(config: ModelConfig, state: Mapping[str, Tensor], selection: Selection) -> tuple[ModelConfig, LazyState]:
    """The model of what is kept; `state` is left as it is, each tensor cut when asked for.

    Args:
        state: Hub names -> tensors.

    Raises:
        ValueError: indices not ascending, none or not of the model, or layers of one type with different widths.
    """
    smaller_config = _config(config, selection)
    position = {old: new for new, old in enumerate(selection.layers)}
    ratio = config.mamba_inner_size / smaller_config.mamba_inner_size if "M" in smaller_config.pattern else 1.0
    smaller_config = smaller_config.model_copy(update={"norm_epsilon": config.norm_epsilon * ratio})

    def cut_one(name: str, index: int, rest: str, get: Callable[[str], Tensor]) -> Tensor:
        tensor = get(name)
        for dimension, kept in _kept(config, selection, index, rest):
            if len(kept) < tensor.shape[dimension]:
                tensor = tensor.index_select(dimension, kept.to(tensor.device))
        if ratio != 1 and rest.endswith(("mixer.norm.weight", *_WRITES_RESIDUAL)):
            tensor = tensor * math.sqrt(ratio)
        return tensor

    recipes: dict[str, Recipe] = {}
    for name in state:
        match = _LAYER.fullmatch(name)
        index, rest = (int(match[1]), match[2]) if match else (-1, name)
        if not match or index in position:
            renamed = f"backbone.layers.{position[index]}.{rest}" if match else name
            recipes[renamed] = partial(cut_one, name, index, rest)
    return smaller_config, derive(state, recipes)


def cut_checkpoint(parent: Path, out: Path, selection: Selection, training: Mapping[str, Any]) -> ModelConfig:
    """Write what `selection` keeps of the checkpoint `parent` to the existing directory `out`, in its dtypes.

    Tensors are read, cut and written one by one: a few of the largest are in memory, whatever the model.

    Args:
        training: the new checkpoint's training record.

    Returns:
        The geometry of what was written.

    Raises:
        ModelError: `parent` is no whole checkpoint, or a tensor of it is not finite.
        ValueError: as `cut`.
    """
    config, state, _ = open_weights(parent)
    smaller_config, smaller = cut(config, state, selection)
    save_weights(out, smaller_config, smaller, training)
    return smaller_config


def _config(config: ModelConfig, selection: Selection) -> ModelConfig:
    """The geometry of what is kept, which every layer of a type must share."""
    symbols = dict(enumerate(config.pattern))
    if not selection.layers or list(selection.layers) != sorted(symbols.keys() & set(selection.layers)):
        raise ValueError(f"kept layers must be one or more of {len(symbols)}, ascending")
    pattern = "".join(config.pattern[index] for index in selection.layers)
    changes: dict[str, int | str] = {"pattern": pattern}
    axes = {"ffn_hidden_size": ("-", selection.neurons), "mamba_num_heads": ("M", selection.mamba_heads),
            "mamba_head_dim": ("M", selection.mamba_channels)}
    for width, (symbol, kept) in axes.items():
        if other := [index for index in kept if symbols.get(index) != symbol]:
            raise ValueError(f"{width}: layer {other[0]} has none")
        layers = [index for index in selection.layers if config.pattern[index] == symbol]
        changes[width] = _shared(width, getattr(config, width), [kept.get(index) for index in layers])
    for index, heads in selection.mamba_heads.items():
        groups, sizes = torch.unique(heads // (config.mamba_num_heads // config.mamba_num_groups), return_counts=True)
        if len(groups) < config.mamba_num_groups or (sizes != sizes[0]).any():
            raise ValueError(f"layer {index}: every group of Mamba heads must keep as many; got {sizes.tolist()}")
    return config.model_copy(update=changes)


def _shared(width: str, whole: int, kept: Sequence[Tensor | None]) -> int:
    """The number of indices that all of `kept` hold; `whole` where one is not given."""
    for indices in kept:
        given = [] if indices is None else indices.tolist()
        if indices is not None and (not given or given != sorted({*range(whole)} & {*given})):
            raise ValueError(f"{width}: kept indices must be one or more of {whole}, ascending")
    sizes = {whole if indices is None else len(indices) for indices in kept} or {whole}
    if len(sizes) > 1:
        raise ValueError(f"{width}: every layer must keep as many; got {sorted(sizes)}")
    return sizes.pop()


def _kept(config: ModelConfig, selection: Selection, index: int, name: str) -> list[tuple[int, Tensor]]:
    """For a tensor of layer `index` (-1: of none), dimensions and the indices to keep there."""
    if not name.startswith("mixer."):
        return []
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    if config.pattern[index] == "M":
        parts = _mamba(config, selection, index)
    elif index in selection.neurons:
        parts = {"up_proj.weight": [(0, selection.neurons[index])], "down_proj.weight": [(1, selection.neurons[index])]}
    return parts.get(name.removeprefix("mixer."), [])


def _mamba(config: ModelConfig, selection: Selection, index: int) -> dict[str, list[tuple[int, Tensor]]]:
    heads = selection.mamba_heads.get(index, torch.arange(config.mamba_num_heads))
    of_head = selection.mamba_channels.get(index, torch.arange(config.mamba_head_dim))
    inner, conv = config.mamba_inner_size, config.conv_channels
    channels = (heads[:, None] * config.mamba_head_dim + of_head).flatten()
    states = torch.arange(inner, conv)                              # B and C
    convolved = torch.cat([channels, states])
    rows = torch.cat([channels, inner + convolved, inner + conv + heads])     # z, x, B, C, dt
    return {"in_proj.weight": [(0, rows)], "conv1d.weight": [(0, convolved)], "conv1d.bias": [(0, convolved)],
            "A_log": [(0, heads)], "D": [(0, heads)], "dt_bias": [(0, heads)], "norm.weight": [(0, channels)],
            "out_proj.weight": [(1, channels)]}
