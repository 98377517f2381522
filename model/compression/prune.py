"""Cutting layers and widths out of a model's weights.

MiniPuzzle cuts layers and FFN neurons (paper section 3); Minitron and its hybrid form (arXiv 2407.14679, 2504.11409)
also cut attention heads, Mamba heads, channels of Mamba heads and channels of the residual stream. The last three take
channels from an RMSNorm, whose mean then runs over fewer: n of them become n'. Even when those that went were always
zero, the mean grows n / n' times, so slicing a norm's weight changes the model. Exact is

    weight *= sqrt(n / n'),     epsilon *= n / n'.

A model has one epsilon for the norms of the residual stream and for the gated norm of the Mamba-2 layers, which may
lose different shares. So the epsilon follows the gated norm, and the residual stream is scaled (at the embedding and
every projection that writes to it) by the factor at which its norms see the ratio that they saw before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from model.checkpoint import open_weights, save_weights
from model.config import ModelConfig
from model.lazy_state import Recipe, State, derive

_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")
_WRITES_RESIDUAL = ("embeddings.weight", "out_proj.weight", "o_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Selection:
    """What is kept: ascending indices into the parent. What is not named stays whole.

    Attributes:
        layers: of the pattern.
        neurons: by FFN layer.
        query_heads: by attention layer; as many of every query group that is kept at all, and a group without any goes.
        mamba_heads: by Mamba-2 layer; as many of every group.
        mamba_channels: by Mamba-2 layer; channels of a head, the same ones in all heads of the layer.
        hidden: channels of the residual stream.
    """

    layers: Sequence[int]
    neurons: Mapping[int, Tensor] = field(default_factory=dict)
    query_heads: Mapping[int, Tensor] = field(default_factory=dict)
    mamba_heads: Mapping[int, Tensor] = field(default_factory=dict)
    mamba_channels: Mapping[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None


@overload
def cut(config: ModelConfig, state: State, selection: Selection,
        correct_norms: bool = True) -> tuple[ModelConfig, State]: ...
@overload
def cut(config: ModelConfig, state: Mapping[str, Tensor], selection: Selection,
        correct_norms: bool = True) -> tuple[ModelConfig, Mapping[str, Tensor]]: ...
def cut(
    config: ModelConfig, state: Mapping[str, Tensor], selection: Selection, correct_norms: bool = True
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The model of what is kept; `state` is left as it is. Of a dict a dict, else each tensor is cut when asked for.

    Args:
        state: Hub names -> tensors.
        correct_norms: whether norms that lose channels are corrected; else their weights are only sliced.

    Raises:
        ValueError: indices not ascending, none or not of the model, or layers of one type with different widths.
    """
    smaller_config = _config(config, selection)
    position = {old: new for new, old in enumerate(selection.layers)}
    gated = _ratio(config, smaller_config, "mamba_inner_size") if "M" in smaller_config.pattern else 1.0
    hidden = _ratio(config, smaller_config, "hidden_size")
    if correct_norms:
        smaller_config = smaller_config.model_copy(update={"norm_epsilon": config.norm_epsilon * gated})

    def cut_one(name: str, index: int, rest: str, get: Callable[[str], Tensor]) -> Tensor:
        tensor = get(name)
        for dimension, kept in _kept(config, selection, index, rest):
            if len(kept) < tensor.shape[dimension]:
                tensor = tensor.index_select(dimension, kept.to(tensor.device))
        factor = 1.0
        if correct_norms:
            if rest.endswith(_WRITES_RESIDUAL):
                factor = residual_scale(config, smaller_config)
            elif rest == "mixer.norm.weight":
                factor = math.sqrt(gated)
            elif rest in ("norm.weight", "norm_f.weight"):
                factor = math.sqrt(hidden)
        return (tensor * factor if factor != 1 else tensor).contiguous()

    recipes: dict[str, Recipe] = {}
    for name in state:
        match = _LAYER.fullmatch(name)
        index, rest = (int(match[1]), match[2]) if match else (-1, name.removeprefix("backbone."))
        if not match or index in position:
            renamed = f"backbone.layers.{position[index]}.{rest}" if match else name
            recipes[renamed] = partial(cut_one, name, index, rest)
    smaller = derive(state, recipes)
    return smaller_config, dict(smaller) if isinstance(state, dict) else smaller


def cut_checkpoint(
    parent: Path, out: Path, selection: Selection, training: Mapping[str, Any], correct_norms: bool = True
) -> ModelConfig:
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
    smaller_config, smaller = cut(config, state, selection, correct_norms)
    save_weights(out, smaller_config, smaller, training)
    return smaller_config


def residual_scale(config: ModelConfig, smaller: ModelConfig) -> float:
    """What `cut` multiplies the residual stream by: sqrt(epsilon' n' / (epsilon n)), n its channels; 1 uncorrected."""
    if smaller.norm_epsilon == config.norm_epsilon and smaller.hidden_size == config.hidden_size:
        return 1.0
    return math.sqrt(smaller.norm_epsilon / config.norm_epsilon * smaller.hidden_size / config.hidden_size)


def _ratio(config: ModelConfig, smaller: ModelConfig, width: str) -> float:
    return getattr(config, width) / getattr(smaller, width)


def _config(config: ModelConfig, selection: Selection) -> ModelConfig:
    """The geometry of what is kept, which every layer of a type must share."""
    symbols = dict(enumerate(config.pattern))
    if not selection.layers or list(selection.layers) != sorted(symbols.keys() & set(selection.layers)):
        raise ValueError(f"kept layers must be one or more of {len(symbols)}, ascending")
    pattern = "".join(config.pattern[index] for index in selection.layers)
    changes: dict[str, int | str] = {"pattern": pattern}
    axes = {"ffn_hidden_size": ("-", selection.neurons), "num_attention_heads": ("*", selection.query_heads),
            "mamba_num_heads": ("M", selection.mamba_heads), "mamba_head_dim": ("M", selection.mamba_channels)}
    for width, (symbol, kept) in axes.items():
        if other := [index for index in kept if symbols.get(index) != symbol]:
            raise ValueError(f"{width}: layer {other[0]} has none")
        layers = [index for index in selection.layers if config.pattern[index] == symbol]
        changes[width] = _shared(width, getattr(config, width), [kept.get(index) for index in layers])
    groups = {index: _evenly_of(heads, config.num_attention_heads, config.num_query_groups)
              for index, heads in selection.query_heads.items() if index in selection.layers}
    changes["num_query_groups"] = _shared("num_query_groups", config.num_query_groups, list(groups.values()))
    for index, heads in selection.mamba_heads.items():
        if len(_evenly_of(heads, config.mamba_num_heads, config.mamba_num_groups)) < config.mamba_num_groups:
            raise ValueError(f"layer {index}: every group of Mamba heads must keep some")
    changes["hidden_size"] = _shared("hidden_size", config.hidden_size, [selection.hidden])
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


def _evenly_of(heads: Tensor, count: int, groups: int) -> Tensor:
    """Groups that keep heads, ascending. Raises ValueError unless all of them keep as many."""
    kept, sizes = torch.unique(heads // (count // groups), return_counts=True)
    if (sizes != sizes[0]).any():
        raise ValueError(f"every group must keep as many heads; got {sizes.tolist()}")
    return kept


def _kept(config: ModelConfig, selection: Selection, index: int, name: str) -> list[tuple[int, Tensor]]:
    """For a tensor of layer `index` (-1: of none), dimensions and the indices to keep there."""
    hidden = selection.hidden if selection.hidden is not None else torch.arange(config.hidden_size)
    everywhere = {"embeddings.weight": 1, "lm_head.weight": 1, "norm_f.weight": 0, "norm.weight": 0}
    if name in everywhere:
        return [(everywhere[name], hidden)]
    parts: Callable[[ModelConfig, Selection, int], dict[str, list[tuple[int, Tensor]]]]
    parts = {"M": _mamba, "*": _attention, "-": _ffn}[config.pattern[index]]
    written = {"out_proj.weight", "o_proj.weight", "down_proj.weight"}
    own = parts(config, selection, index)[name.removeprefix("mixer.")]
    reads_residual = name.endswith("_proj.weight") and name.removeprefix("mixer.") not in written
    if reads_residual:
        return [*own, (1, hidden)]
    return [*own, (0, hidden)] if name.removeprefix("mixer.") in written else own


def _ffn(config: ModelConfig, selection: Selection, index: int) -> dict[str, list[tuple[int, Tensor]]]:
    neurons = selection.neurons.get(index, torch.arange(config.ffn_hidden_size))
    return {"up_proj.weight": [(0, neurons)], "down_proj.weight": [(1, neurons)]}


def _attention(config: ModelConfig, selection: Selection, index: int) -> dict[str, list[tuple[int, Tensor]]]:
    heads = selection.query_heads.get(index, torch.arange(config.num_attention_heads))
    groups = _evenly_of(heads, config.num_attention_heads, config.num_query_groups)
    rows, kv_rows = (_channels(units, config.head_dim) for units in (heads, groups))
    return {"q_proj.weight": [(0, rows)], "k_proj.weight": [(0, kv_rows)], "v_proj.weight": [(0, kv_rows)],
            "o_proj.weight": [(1, rows)]}


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


def _channels(units: Tensor, size: int) -> Tensor:
    """Channels of heads (or groups) of `size` channels each."""
    return (units[:, None] * size + torch.arange(size)).flatten()
