"""Importance of the widths in one forward pass: FFN neurons, and channels and heads of Mamba-2 layers.

Minitron's rule (arXiv 2407.14679), as its code has it: a channel's importance is the mean over the sequence of its
absolute activation, then the L2 norm over the batch of sequences; that of a head is the L2 norm over its channels. An
FFN neuron's is so with `l2_then_mean`. With `mean_then_l2` it is the mean over the batch at each position, then the L2
norm over positions, as MiniPuzzle's words are ordered (paper section 3.1: mean and L2, batch and sequence). The
activations are

    FFN neurons             squared_relu(x W1^T), input of down_proj (MiniPuzzle cuts by it)
    Mamba channels, heads   input of out_proj, after gate and norm; heads ranked within their SSM group
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.compression.importance import check_finite, check_samples, rank_correlation
from model.compression.layerwise import Layerwise, Progress
from model.compression.prune import Selection
from model.config import ModelConfig

CUT = ("ffn_hidden_size", "mamba_head_dim", "mamba_num_heads")      # what a layer can lose units of
HALVES = 2                      # even and odd sequences are kept apart
NeuronScore = Literal["mean_then_l2", "l2_then_mean"]   # over the batch, then over the sequence


@dataclass(frozen=True)
class WidthImportance:
    """Scores (units,) float64 of the axes by layer.

    Attributes:
        neurons: (ffn_hidden_size,) by FFN layer.
        mamba: (heads, head_dim) by Mamba-2 layer.
        reliability: by axis, Spearman's rank correlation between scores from even and odd sequences, mean over layers.
    """

    neurons: dict[int, Tensor]
    mamba: dict[int, Tensor]
    reliability: dict[str, float]

    def mamba_heads(self, channels: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
        """(heads,) by Mamba-2 layer, over the kept `channels` of a head, all by default."""
        return {index: (scores if channels is None else scores[:, channels[index]]).norm(dim=1)
                for index, scores in self.mamba.items()}

    def mamba_channels(self) -> dict[int, Tensor]:
        """(head_dim,) by Mamba-2 layer: over all heads, which lose the same channels."""
        return {index: scores.norm(dim=0) for index, scores in self.mamba.items()}


@torch.no_grad()
def width_importance(
    model: Layerwise, sequences: Tensor, batch_size: int, progress: Progress, ffn_score: NeuronScore = "mean_then_l2"
) -> WidthImportance:
    """Scores of all axes from one pass over `sequences` (samples, sequence) int64, which data-parallel copies share.

    `mean_then_l2` holds 16 bytes for every position of a sequence and neuron of this process's layers meanwhile.

    Raises:
        ModelError: fewer than two samples, or an activation that is not finite.
    """
    check_samples(sequences)
    config, count = model.config, len(sequences)

    def add(axis: str, index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = (inputs[0] if model.batch_first else inputs[0].transpose(0, 1)).float().abs()
        if by_position(axis):                                                   # (batch, sequence, channels)
            values = values.double()
        else:                                                                   # (batch, channels)
            values = values.mean(dim=1).double().square()
        sums[axis, index].index_add_(0, (samples_now % HALVES).to(values.device), values)

    def by_position(axis: str) -> bool:
        return axis == "neurons" and ffn_score == "mean_then_l2"

    def score(axis: str, total: Tensor, samples: int) -> Tensor:
        """(this process's channels,) of what was added up over `samples` sequences."""
        return (total / samples).norm(dim=0) if by_position(axis) else total.sqrt()

    sums: dict[tuple[str, int], Tensor] = {         # of the even and of the odd sequences; also where there are none
        (axis, index): torch.zeros(HALVES, *sequences.shape[1:] * by_position(axis), module.weight.shape[1],
                                   dtype=torch.float64, device=model.device)
        for axis, index, module in _scored(model)}
    with ExitStack() as hooks:
        for axis, index, module in _scored(model):
            hooks.enter_context(module.register_forward_pre_hook(partial(add, axis, index)))
        for samples_now in model.batches(sequences, batch_size):
            for _ in model.hidden(sequences[samples_now]):
                pass
            progress(int(samples_now[-1]) + 1, count)
    per_half = [(count + 1 - half) // HALVES for half in range(HALVES)]
    found = {}                                      # (even, odd, all; channels)
    for (axis, index), values in sums.items():
        values = model.over_replicas(values)
        scores = torch.stack([*map(score, [axis] * HALVES, values, per_half), score(axis, values.sum(0), count)])
        found[axis, index] = model.whole_units(scores).cpu()
    found = model.from_all_stages(found)
    for (axis, index), values in found.items():
        check_finite(f"{axis}, layer {index}", values)
    mamba = (config.mamba_num_heads, config.mamba_head_dim)
    return WidthImportance(
        neurons={index: values[-1] for (axis, index), values in found.items() if axis == "neurons"},
        mamba={index: values[-1].view(mamba) for (axis, index), values in found.items() if axis == "mamba"},
        reliability=_reliability(found, config),
    )


def _reliability(found: Mapping[tuple[str, int], Tensor], config: ModelConfig) -> dict[str, float]:
    """Axis -> mean over layers of the rank correlation between its units' scores from both halves. A layer whose units
    have one score, as dead ones do, has no ranks."""
    correlations: dict[str, list[float]] = {}
    for (axis, _), values in found.items():
        units = config.mamba_num_heads if axis == "mamba" else values.shape[1]
        halves = values[:HALVES].view(HALVES, units, -1).norm(dim=2)
        if all(len(half.unique()) > 1 for half in halves):
            correlations.setdefault(axis, []).append(rank_correlation(*halves))
    return {axis: sum(values) / len(values) for axis, values in correlations.items()}


def _scored(model: Layerwise) -> list[tuple[str, int, Any]]:
    """Axis, layer, and the module whose input is scored."""
    axes = {"M": "mamba", "-": "neurons"}
    return [(axes[symbol], index, module) for index, module in model.contractions.items()
            if (symbol := model.config.pattern[index]) in axes]


def kept_share(importance: Tensor, width: int) -> float:
    """Share of a layer's summed importance that its `width` most important units hold."""
    kept = importance[top(importance, width)].sum()
    return float(kept / importance.sum()) if kept else 0.0


def top(importance: Tensor, count: int) -> Tensor:
    """Indices of the `count` most important units, ascending; of equals the earlier one is kept."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def top_of_groups(importance: Tensor, count: int, groups: int) -> Tensor:
    """The same with `count` / `groups` units of each of the groups, which are equal consecutive stretches."""
    size = len(importance) // groups
    parts = [top(part, count // groups) + group * size for group, part in enumerate(importance.split(size))]
    return torch.cat(parts)


def select(parent: ModelConfig, smaller: ModelConfig, layers: list[int], importance: WidthImportance) -> Selection:
    """The most important units of each axis on which `smaller` is narrower than the parent, in the kept `layers`.

    Raises ValueError for a shape that no cut gives: another size of another axis, a wider one, uneven groups of heads.
    """
    for name in ModelConfig.model_fields:
        asked, whole = getattr(smaller, name), getattr(parent, name)
        if asked != whole and name not in ("pattern", "norm_epsilon") and not (name in CUT and asked < whole):
            raise ValueError(f"{name}: {asked} cannot be cut from the parent's {whole}")
    if smaller.mamba_num_heads % parent.mamba_num_groups:
        raise ValueError(f"mamba_num_heads: {smaller.mamba_num_heads} heads in {parent.mamba_num_groups} equal groups")
    ffn, mamba = ([index for index in layers if parent.pattern[index] == symbol] for symbol in "-M")
    neurons = channels = heads = {}
    if smaller.ffn_hidden_size < parent.ffn_hidden_size:
        neurons = {index: top(importance.neurons[index], smaller.ffn_hidden_size) for index in ffn}
    if smaller.mamba_head_dim < parent.mamba_head_dim:
        scores = importance.mamba_channels()
        channels = {index: top(scores[index], smaller.mamba_head_dim) for index in mamba}
    if smaller.mamba_num_heads < parent.mamba_num_heads:
        scores = importance.mamba_heads(channels or None)
        heads = {index: top_of_groups(scores[index], smaller.mamba_num_heads, parent.mamba_num_groups)
                 for index in mamba}
    return Selection(layers, neurons, heads, channels)
