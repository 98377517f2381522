"""Cuts to compare with: the same shape drawn at random, and the least important kept instead of the most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    selection = Selection(
        layers,
        {index: _draw(parent.ffn_hidden_size, shape.ffn_hidden_size, generator) for index in of["-"]},
        {index: _draw_heads(parent, shape, generator) for index in of["*"]},
        {index: torch.cat([_draw(per_group, shape.mamba_num_heads // parent.mamba_num_groups, generator)
                           + group * per_group for group in range(parent.mamba_num_groups)]) for index in of["M"]},
        {index: _draw(parent.mamba_head_dim, shape.mamba_head_dim, generator) for index in of["M"]},
    )
    if shape.hidden_size < parent.hidden_size:
        selection = replace(selection, hidden=_draw(parent.hidden_size, shape.hidden_size, generator))
    return selection


def reverse_selection(
    parent: ModelConfig, shape: ModelConfig, layers: Sequence[float], widths: WidthImportance
) -> Selection:
    """The least important layers and units, as many as `shape` has."""
    counts = {symbol: shape.pattern.count(symbol) for symbol in "M*-"}
    kept = keep_top_layers(parent.pattern, [-value for value in layers], counts)
    return select(parent, shape, kept, WidthImportance(
        _reciprocals(widths.neurons), _reciprocals(widths.heads),
        {kind: _reciprocals(scores) for kind, scores in widths.mamba.items()}, _reciprocal(widths.hidden), {},
    ))


def _draw(whole: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(whole, generator=generator)[:count].sort().values


def _draw_heads(parent: ModelConfig, shape: ModelConfig, generator: torch.Generator) -> Tensor:
    size = parent.num_attention_heads // parent.num_query_groups
    per_group = shape.num_attention_heads // shape.num_query_groups
    groups = _draw(parent.num_query_groups, shape.num_query_groups, generator)
    return torch.cat([_draw(size, per_group, generator) + group * size for group in groups.tolist()])


def _reciprocals(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    return {index: _reciprocal(values) for index, values in scores.items()}


def _reciprocal(values: Tensor) -> Tensor:
    return 1 / (values + 1e-30)
