"""Cuts to compare with: the same shape drawn at random, and the least important kept instead of the most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.compression.candidates import keep_top_layers
from model.compression.prune import Selection
from model.compression.width_importance import WidthImportance, select
from model.config import ModelConfig


def random_selection(parent: ModelConfig, shape: ModelConfig, generator: torch.Generator) -> Selection:
    """As many layers of each type and units of each axis as `shape` has, drawn at random."""
    layers: list[int] = []
    for symbol in "M*-":
        choice = torch.tensor([i for i, other in enumerate(parent.pattern) if other == symbol])
        layers += choice[_draw(len(choice), shape.pattern.count(symbol), generator)].tolist()
    layers.sort()
    of = {symbol: [index for index in layers if parent.pattern[index] == symbol] for symbol in "M*-"}
    per_group = parent.mamba_num_heads // parent.mamba_num_groups
    return Selection(
        layers,
        {index: _draw(parent.ffn_hidden_size, shape.ffn_hidden_size, generator) for index in of["-"]},
        {index: torch.cat([_draw(per_group, shape.mamba_num_heads // parent.mamba_num_groups, generator)
                           + group * per_group for group in range(parent.mamba_num_groups)]) for index in of["M"]},
        {index: _draw(parent.mamba_head_dim, shape.mamba_head_dim, generator) for index in of["M"]},
    )


def reverse_selection(
    parent: ModelConfig, shape: ModelConfig, layers: Sequence[float], widths: WidthImportance
) -> Selection:
    """The least important layers and units, as many as `shape` has."""
    counts = {symbol: shape.pattern.count(symbol) for symbol in "M*-"}
    kept = keep_top_layers(parent.pattern, [-value for value in layers], counts)
    return select(parent, shape, kept, WidthImportance(_reciprocals(widths.neurons), _reciprocals(widths.mamba), {}))


def _draw(whole: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(whole, generator=generator)[:count].sort().values


def _reciprocals(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    return {index: 1 / (values + 1e-30) for index, values in scores.items()}
