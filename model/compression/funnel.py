"""MiniPuzzle from the parent's weights to the compressed model (paper section 3), and its random control.

importance -> every maximal candidate under the memory budget -> the ones that keep most importance are compared with
the parent on held-out tokens -> the closest are distilled briefly -> the best is distilled in full. The control has the
same shape, layers and neurons drawn at random, and the same distillation: what importance is worth, measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import costs
from model.compression.candidates import Candidate, maximal_cells, realise
from model.compression.comparison import Closeness, compare
from model.compression.config import CompressConfig
from model.compression.data import Data
from model.compression.distill import Distilled, distill
from model.compression.importance import (
    kept_share,
    layer_errors,
    neuron_importance,
    split_half_correlation,
    top_neurons,
)
from model.compression.prune import State, cut
from model.compression.resume import Pieces
from model.config import ModelConfig
from model.hybrid_lm import HybridLM

GIB = 2**30


class Weights(NamedTuple):
    config: ModelConfig
    state: State


@dataclass(frozen=True)
class Compression:
    """What comes out: the models and the records of how they came about (docs/architecture.md)."""

    models: dict[str, Weights]           # compressed and random
    layers: dict[str, list[int]]         # the parent's layers each of them keeps
    importance: dict[str, Any]
    candidates: list[dict[str, Any]]
    curve: list[tuple[str, int, int, float]]
    metrics: dict[str, float]


class _Candidates(NamedTuple):
    """All candidates and how far each came: by index, its closeness zero-shot and after the short distillation."""

    all: list[Candidate]
    zero_shot: dict[int, Closeness]
    short: dict[int, Closeness]
    order: list[int]                     # best first


def compress(
    parent: Weights, data: Data, config: CompressConfig, seed: int, scratch: Path, progress: Callable[..., None]
) -> Compression:
    """Compress `parent` under `config`'s memory budget. Resumes from the pieces in `scratch`.

    Raises:
        ModelError: no model of the grid fits the budget, or a width is wider than the parent's.
    """
    pieces = Pieces(scratch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = HybridLM.from_state(*parent).to(device)
    batch = config.micro_batch_size
    errors = pieces.once(
        "layers", lambda: layer_errors(teacher, data.calibration[: config.importance_samples], batch, progress)
    )
    neurons = pieces.once(
        "neurons",
        lambda: neuron_importance(teacher, data.calibration[: config.ffn_importance_samples], batch, progress),
    )
    layers = errors.mean(dim=1).tolist()
    parent_bytes = costs.memory(parent.config, config.memory).total
    budget = math.floor(parent_bytes * config.memory.budget_fraction)
    cells = maximal_cells(parent.config, config.ffn_widths, config.min_attention_layers, config.memory, budget)
    candidates = [realise(parent.config, cell, layers, neurons, config.memory) for cell in cells]
    found = _funnel(teacher, parent, candidates, neurons, data, config, pieces, progress)
    winner = candidates[found.order[0]]
    drawn, control = random_cut(parent, winner.config, torch.Generator().manual_seed(seed))
    starts = {"compressed": _cut(parent, winner, neurons), "random": control}
    final = distill(teacher, starts, data.training, config.distillation_tokens, config, pieces, "final", progress)
    ends = {name: Weights(starts[name].config, state) for name, state in final.states.items()}
    metrics = {
        "parent_parameters": costs.parameters(parent.config),
        "compressed_parameters": winner.parameters,
        "parent_memory_gib": parent_bytes / GIB,
        "compressed_memory_gib": winner.memory.total / GIB,
        "budget_gib": budget / GIB,
        "candidates": len(candidates),
        "importance_split_half_correlation": split_half_correlation(errors),
        **pieces.once("measures", lambda: _measure(teacher, starts, ends, data, batch, progress)),
        "distillation_tokens": final.curve[-1][2],
    }
    return Compression(
        models=ends,
        layers={"compressed": winner.layers, "random": drawn},
        importance=_importance_record(parent.config, layers, neurons, config),
        candidates=_candidate_records(found),
        curve=final.curve,
        metrics=metrics,
    )


def random_cut(parent: Weights, shape: ModelConfig, generator: torch.Generator) -> tuple[list[int], Weights]:
    """As many layers of each type and neurons as `shape` has, drawn at random: the layers, and what they make."""
    layers: list[int] = []
    for symbol in "M*-":
        choice = torch.tensor([i for i, other in enumerate(parent.config.pattern) if other == symbol])
        drawn = torch.randperm(len(choice), generator=generator)[: shape.pattern.count(symbol)]
        layers += choice[drawn].tolist()
    layers.sort()
    neurons = {
        index: torch.randperm(parent.config.ffn_hidden_size, generator=generator)[: shape.ffn_hidden_size].sort().values
        for index in layers
        if parent.config.pattern[index] == "-"
    }
    return layers, Weights(*cut(*parent, layers, neurons))


def _cut(parent: Weights, candidate: Candidate, neurons: dict[int, Tensor]) -> Weights:
    """The candidate with the parent's weights: its layers, and in each FFN the most important neurons."""
    width = candidate.config.ffn_hidden_size
    top = {index: top_neurons(neurons[index], width) for index in candidate.layers if index in neurons}
    return Weights(*cut(*parent, candidate.layers, top))


def _funnel(
    teacher: HybridLM,
    parent: Weights,
    candidates: list[Candidate],
    neurons: dict[int, Tensor],
    data: Data,
    config: CompressConfig,
    pieces: Pieces,
    progress: Callable[..., None],
) -> _Candidates:
    """Narrow the candidates: kept importance, then agreement with the parent, then KL after a short distillation."""
    device, batch = teacher.lm_head.weight.device, config.micro_batch_size
    held_out = evenly(data.validation, config.ranking_samples)
    order = sorted(range(len(candidates)), key=lambda index: -candidates[index].importance)

    def close(models: dict[int, Weights]) -> dict[int, Closeness]:
        loaded = {str(index): HybridLM.from_state(*weights).to(device) for index, weights in models.items()}
        compared = compare(teacher, loaded, held_out, batch, progress)
        return {int(index): value for index, value in compared.items()}

    def once(name: str, compute: Callable[[], dict[int, Closeness]]) -> dict[int, Closeness]:
        plain = pieces.once(name, lambda: {index: tuple(value) for index, value in compute().items()})
        return {index: Closeness(*value) for index, value in plain.items()}

    scored = order[: config.ranked_by_agreement]
    zero_shot = once("agreement", lambda: close({i: _cut(parent, candidates[i], neurons) for i in scored}))
    scored.sort(key=lambda index: (-zero_shot[index].agreement, zero_shot[index].kl))
    finalists = scored[: config.finalists]

    def distilled() -> dict[int, Closeness]:
        starts = {str(index): _cut(parent, candidates[index], neurons) for index in finalists}
        students: Distilled = distill(
            teacher, starts, data.training, config.short_distillation_tokens, config, pieces, "short", progress
        )
        return close({int(name): Weights(starts[name].config, state) for name, state in students.states.items()})

    short = once("finalists", distilled)
    finalists.sort(key=lambda index: short[index].kl)
    first = [*finalists, *scored[config.finalists :]]
    return _Candidates(candidates, zero_shot, short, [*first, *(index for index in order if index not in zero_shot)])


def evenly(sequences: Tensor, count: int) -> Tensor:
    """At most `count` of the sequences, spread evenly over them."""
    count = min(count, len(sequences))
    return sequences[torch.arange(count) * len(sequences) // count]


def _measure(
    teacher: HybridLM,
    starts: dict[str, Weights],
    ends: dict[str, Weights],
    data: Data,
    batch: int,
    progress: Callable[..., None],
) -> dict[str, float]:
    """Closeness to the parent of the cut and of the distilled models, and bits per byte, on all held-out tokens."""
    device = teacher.lm_head.weight.device
    models = {"parent": teacher}
    models |= {f"{name}_cut": HybridLM.from_state(*weights).to(device) for name, weights in starts.items()}
    models |= {name: HybridLM.from_state(*weights).to(device) for name, weights in ends.items()}
    close = compare(teacher, models, data.validation, batch, progress)
    bits_per_nat = data.validation[:, 1:].numel() / data.validation_bytes / math.log(2)
    return {
        "kl_parent_cut": close["compressed_cut"].kl,
        "kl_parent_compressed": close["compressed"].kl,
        "kl_parent_random_cut": close["random_cut"].kl,
        "kl_parent_random": close["random"].kl,
        "agreement_compressed": close["compressed"].agreement,
        "agreement_random": close["random"].agreement,
        **{
            f"validation_bits_per_byte_{name}": close[name].loss * bits_per_nat
            for name in ("parent", "compressed", "random")
        },
    }


def _importance_record(
    parent: ModelConfig, layers: list[float], neurons: dict[int, Tensor], config: CompressConfig
) -> dict[str, Any]:
    return {
        "layers": [
            {"index": index, "symbol": symbol, "importance": layers[index]}
            for index, symbol in enumerate(parent.pattern)
        ],
        "ffn": [
            {
                "index": index,
                "kept_share_of_importance": {str(w): kept_share(neurons[index], w) for w in config.ffn_widths},
            }
            for index in sorted(neurons)
        ],
    }


def _candidate_records(found: _Candidates) -> list[dict[str, Any]]:
    """One record a candidate, best first."""
    return [
        {
            "pattern": found.all[index].config.pattern,
            "ffn_hidden_size": found.all[index].config.ffn_hidden_size,
            "parameters": found.all[index].parameters,
            "memory_gib": found.all[index].memory.total / GIB,
            "importance": found.all[index].importance,
            "agreement": found.zero_shot[index].agreement if index in found.zero_shot else None,
            "kl_short": found.short[index].kl if index in found.short else None,
            "rank": rank,
            "chosen": rank == 1,
        }
        for rank, index in enumerate(found.order, start=1)
    ]
