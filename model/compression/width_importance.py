"""Importance of every width axis in one forward pass: neurons, heads, groups, channels.

Minitron's rule (arXiv 2407.14679), as its code has it: a channel's importance is the mean over the sequence of its
absolute activation, then the L2 norm over the batch of sequences; that of a head or a group is the L2 norm over its
channels. An FFN neuron's is so with `l2_then_mean`. With `mean_then_l2` it is the mean over the batch at each position,
then the L2 norm over positions, as MiniPuzzle's words are ordered (paper section 3.1: mean and L2, batch and sequence).
The activations are

    FFN neurons             squared_relu(x W1^T), input of down_proj (MiniPuzzle cuts by it)
    attention heads         input of o_proj; ranked within their query group
    query groups            the same, over the heads of the group
    Mamba channels, heads   `input`: the x part of in_proj's output (Minitron-SSM, arXiv 2504.11409);
                            `output`: the input of out_proj, after gate and norm; ranked within their SSM group
    hidden channels         output of every layer's norm and of the last one, norms summed over layers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.compression.importance import check_samples, rank_correlation
from model.compression.layerwise import Layerwise, Progress
from model.compression.prune import Selection
from model.config import ModelConfig, ModelError

HALVES = 2                      # even and odd sequences are kept apart
MAMBA_SCORES = ("input", "output")
NeuronScore = Literal["mean_then_l2", "l2_then_mean"]   # over the batch, then over the sequence


@dataclass(frozen=True)
class WidthImportance:
    """Scores (units,) float64 of the axes by layer, and of the residual stream.

    Attributes:
        neurons: (ffn_hidden_size,) by FFN layer.
        heads: (num_attention_heads,) by attention layer.
        mamba: by kind of score, then by Mamba-2 layer, (heads, head_dim).
        hidden: (hidden_size,).
        reliability: by axis, Spearman's rank correlation between scores from even and odd sequences, mean over layers.
    """

    neurons: dict[int, Tensor]
    heads: dict[int, Tensor]
    mamba: dict[str, dict[int, Tensor]]
    hidden: Tensor
    reliability: dict[str, float]

    def groups(self, config: ModelConfig) -> dict[int, Tensor]:
        """(num_query_groups,) by attention layer."""
        return {index: scores.view(config.num_query_groups, -1).norm(dim=1) for index, scores in self.heads.items()}

    def mamba_heads(self, kind: str, channels: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
        """(heads,) by Mamba-2 layer, over the kept `channels` of a head, all by default."""
        return {index: (scores if channels is None else scores[:, channels[index]]).norm(dim=1)
                for index, scores in self.mamba[kind].items()}

    def mamba_channels(self, kind: str) -> dict[int, Tensor]:
        """(head_dim,) by Mamba-2 layer: over all heads, which lose the same channels."""
        return {index: scores.norm(dim=0) for index, scores in self.mamba[kind].items()}


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
    sums: dict[tuple[str, int], Tensor] = {}        # of the even and of the odd sequences
    samples = model.share(sequences)

    def add(axis: str, index: int, activation: Tensor) -> None:
        values = (activation if model.batch_first else activation.transpose(0, 1)).float().abs()
        if by_position(axis):                                                   # (batch, sequence, channels)
            values = values.double()
        else:                                                                   # (batch, channels)
            mean = values.mean(dim=1)
            values = (model.mean_over_sequence(mean) if axis == "hidden" else mean).double().square()
        key = axis, index
        if key not in sums:
            sums[key] = values.new_zeros(HALVES, *values.shape[1:])
        sums[key].index_add_(0, (samples_now % HALVES).to(values.device), values)

    def by_position(axis: str) -> bool:
        return axis == "neurons" and ffn_score == "mean_then_l2"

    def score(axis: str, total: Tensor, samples: int) -> Tensor:
        """(this process's channels,) of what was added up over `samples` sequences."""
        return (total / samples).norm(dim=0) if by_position(axis) else total.sqrt()

    with _hooks(model, add):
        for samples_now in samples.split(batch_size):
            for _ in model.hidden(sequences[samples_now]):
                pass
            progress(int(samples_now[-1]) + 1, count)
    per_half = [(count + 1 - half) // HALVES for half in range(HALVES)]
    found = {}                                      # (even, odd, all; channels)
    for (axis, index), values in sums.items():
        values = model.over_replicas(values)
        scores = torch.stack([*map(score, [axis] * HALVES, values, per_half), score(axis, values.sum(0), count)])
        found[axis, index] = (scores if axis == "hidden" else model.whole_units(scores)).cpu()
    found = model.from_all_stages(found)
    for (axis, index), values in found.items():
        if not values.isfinite().all():
            raise ModelError(
                f"importance of {axis}, layer {index}: an activation is not finite.\n"
                "Check the weights, and that the calibration tokens are of the model's own tokenizer."
            )
    halves = {key: values[:HALVES] for key, values in found.items()}

    def both(axis: str) -> dict[int, Tensor]:
        return {index: values[-1] for (other, index), values in found.items() if other == axis}

    heads = (config.num_attention_heads, config.head_dim)
    mamba = (config.mamba_num_heads, config.mamba_head_dim)
    hidden = torch.stack(list(both("hidden").values())).sum(0)
    return WidthImportance(
        neurons=both("neurons"),
        heads={index: scores.view(heads).norm(dim=1) for index, scores in both("heads").items()},
        mamba={kind: {index: scores.view(mamba) for index, scores in both(f"mamba {kind}").items()}
               for kind in MAMBA_SCORES},
        hidden=hidden,
        reliability=_reliability(halves, config),
    )


def _reliability(halves: Mapping[tuple[str, int], Tensor], config: ModelConfig) -> dict[str, float]:
    """Axis -> mean over layers of the rank correlation between its units' scores from both halves."""
    sizes = {"heads": config.num_attention_heads, "mamba input": config.mamba_num_heads,
             "mamba output": config.mamba_num_heads}
    hidden = [values for (axis, _), values in halves.items() if axis == "hidden"]
    pairs = [key_values for key_values in halves.items() if key_values[0][0] != "hidden"]
    found: dict[str, list[float]] = {}
    for (axis, _), values in [*pairs, (("hidden", 0), torch.stack(hidden).sum(0))]:
        units = values.view(HALVES, sizes.get(axis, values.shape[1]), -1).norm(dim=2)
        if units.shape[1] > 1:
            found.setdefault(axis, []).append(rank_correlation(units[0], units[1]))
    return {axis: sum(values) / len(values) for axis, values in found.items()}


@contextmanager
def _hooks(model: Layerwise, add: Callable[[str, int, Tensor], None]) -> Iterator[None]:
    """Every activation that is scored goes to `add(axis, layer, activation)` while the block runs."""
    inner = model.config.mamba_inner_size // model.tensor_ranks

    def read_input(axis: str, index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        add(axis, index, inputs[0])

    def read_output(axis: str, index: int, part: slice, module: nn.Module, inputs: object, output: Any) -> None:
        add(axis, index, (output[0] if isinstance(output, tuple) else output)[..., part])

    everything, x = slice(None), slice(inner, 2 * inner)
    handles = []
    for index, site in model.sites.items():
        handles.append(site.norm.register_forward_hook(partial(read_output, "hidden", index, everything)))
        if site.expansion is not None:
            handles.append(site.expansion.register_forward_hook(partial(read_output, "mamba input", index, x)))
        axis = {"M": "mamba output", "*": "heads", "-": "neurons"}[site.symbol]
        handles.append(site.contraction.register_forward_pre_hook(partial(read_input, axis, index)))
    if model.has_head:
        last = len(model.config.pattern)
        handles.append(model.final_norm().register_forward_hook(partial(read_output, "hidden", last, everything)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def select(
    parent: ModelConfig, smaller: ModelConfig, layers: list[int], importance: WidthImportance,
    mamba_score: str = "output",
) -> Selection:
    """The most important units of each axis on which `smaller` is narrower than the parent, in the kept `layers`.

    Query groups go whole, the least important first; heads go within the groups that stay.
    """
    of = {symbol: [index for index in layers if parent.pattern[index] == symbol] for symbol in "M*-"}
    neurons = query_heads = channels = mamba_heads = {}
    hidden = None
    if smaller.ffn_hidden_size < parent.ffn_hidden_size:
        neurons = {index: top(importance.neurons[index], smaller.ffn_hidden_size) for index in of["-"]}
    if smaller.num_attention_heads < parent.num_attention_heads:
        groups = importance.groups(parent)
        query_heads = {index: _query_heads(importance.heads[index], groups[index], smaller) for index in of["*"]}
    if smaller.mamba_head_dim < parent.mamba_head_dim:
        scores = importance.mamba_channels(mamba_score)
        channels = {index: top(scores[index], smaller.mamba_head_dim) for index in of["M"]}
    if smaller.mamba_num_heads < parent.mamba_num_heads:
        scores = importance.mamba_heads(mamba_score, channels or None)
        mamba_heads = {index: top_of_groups(scores[index], smaller.mamba_num_heads, parent.mamba_num_groups)
                       for index in of["M"]}
    if smaller.hidden_size < parent.hidden_size:
        hidden = top(importance.hidden, smaller.hidden_size)
    return Selection(layers, neurons, query_heads, mamba_heads, channels, hidden)


def _query_heads(heads: Tensor, groups: Tensor, smaller: ModelConfig) -> Tensor:
    """`smaller`'s heads in as many groups as it has, of all `heads` (heads,) in all `groups` (groups,)."""
    size = len(heads) // len(groups)
    per_group = smaller.num_attention_heads // smaller.num_query_groups
    return torch.cat([top(heads[group * size : (group + 1) * size], per_group) + group * size
                      for group in top(groups, smaller.num_query_groups).tolist()])
