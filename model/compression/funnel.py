"""MiniPuzzle from the parent's weights to the compressed model (paper section 3), and its controls.

importance -> every maximal candidate under the budgets -> the ones that keep most importance are compared with the
parent on held-out tokens -> the closest answer a task -> the best are distilled briefly -> the best of them in full.
The controls have the same shape: layers and units drawn at random, one draw with the same distillation, and the least
important kept instead of the most. What importance is worth, measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model import costs
from model.compression import continuation
from model.compression.candidates import Budget, Candidate, make_candidate, maximal_cells, share_budget
from model.compression.comparison import Closeness, compare
from model.compression.config import CompressConfig
from model.compression.controls import random_selection, reverse_selection
from model.compression.data import Data
from model.compression.distill import Distilled, distill
from model.compression.fp8_teacher import fp8_teacher
from model.compression.importance import layer_importance, mean_ranks, split_half_correlation
from model.compression.latency import LatencyTable, measure_table, step_seconds
from model.compression.prune import Selection, State, cut
from model.compression.records import candidate_records, importance_record, ranking_record
from model.compression.resume import ResultCache
from model.compression.schema import Controls, Costs
from model.compression.width_importance import WidthImportance, width_importance
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder
from model.inference.random_weights import random_model

GIB = 2**30


class Weights(NamedTuple):
    """A model: its geometry, and tensors by Hub name."""

    config: ModelConfig
    state: State


@dataclass(frozen=True)
class Compression:
    """What comes out: the models, and the records of how they came about, one for each step (docs/compression.md)."""

    models: dict[str, Weights]           # compressed and random
    layers: dict[str, list[int]]         # the parent's layers each of them keeps
    records: dict[str, Any]              # importance, candidates, ranking, task, short, final, controls, costs
    curve: list[tuple[str, int, int, float]]
    metrics: dict[str, float]


class Rounds(NamedTuple):
    """How far each candidate came, by its index: what each round of the funnel found.

    Attributes:
        order: best first.
    """

    zero_shot: dict[int, Closeness]
    task: dict[int, float]
    short: dict[int, Closeness]
    order: list[int]


def compress(
    parent: Weights, data: Data, config: CompressConfig, seed: int, scratch: Path, progress: Callable[..., None]
) -> Compression:
    """Compress `parent` under `config`'s budgets. Resumes from what an earlier run kept in `scratch`.

    Raises:
        ModelError: weights are not those of the geometry, an activation is not finite, a width cannot be cut, or no
            model of the grid fits the budgets.
    """
    run = _Run(parent, data, config, seed, ResultCache(scratch), progress)
    candidates = run.candidates()
    rounds = run.rounds(candidates)
    winner = candidates[rounds.order[0]]
    drawn = random_selection(parent.config, winner.config, torch.Generator().manual_seed(seed))
    starts = {"compressed": run.cut(winner.selection), "random": run.cut(drawn)}
    final = run.distil(starts, config.distillation_tokens, "final")
    ends = {name: Weights(starts[name].config, state) for name, state in final.states.items()}
    measured = run.measure(starts, ends)
    controls = run.controls(winner)
    cost = run.cache.once("costs", lambda: run.costs(winner))
    budgets = {budget.name: budget.limit for budget in run.budgets}
    parent_bytes = costs.memory(parent.config, config.memory).total
    metrics = {
        "parent_parameters": costs.parameters(parent.config),
        "compressed_parameters": winner.parameters,
        "parent_memory_gib": parent_bytes / GIB,
        "compressed_memory_gib": winner.memory.total / GIB,
        "budget_gib": config.memory.budget_fraction * parent_bytes / GIB,
        "candidates": len(candidates),
        "importance_split_half_correlation": split_half_correlation(run.layer_scores),
        "neuron_split_half_correlation": run.widths.reliability.get("neurons", 1.0),
        **measured,
        "kl_parent_random_cut_mean": sum(controls["random"]) / len(controls["random"]),
        "kl_parent_reverse_cut": controls["reverse"],
        "distillation_tokens": final.curve[-1][2],
        **cost["metrics"],
    }
    records = {
        "importance": importance_record(parent.config, run.layer_scores, run.widths, config),
        "candidates": candidate_records(candidates, rounds, run.table),
        "ranking": ranking_record(rounds.zero_shot),
        "task": {str(index): value for index, value in rounds.task.items()},
        "short": ranking_record(rounds.short),
        "final": measured | {"layers": winner.layers},
        "controls": Controls(**controls, importance=measured["kl_parent_cut"]),
        "costs": Costs(**cost, budgets=budgets, latency=run.table.record() if run.table else None),
    }
    return Compression(ends, {"compressed": winner.layers, "random": list(drawn.layers)}, records, final.curve, metrics)


class _Run:
    """One compression: what its steps share. Everything runs in BF16 on a GPU, in float32 on a CPU."""

    def __init__(
        self, parent: Weights, data: Data, config: CompressConfig, seed: int, cache: ResultCache,
        progress: Callable[..., None],
    ):
        self.data, self.config, self.seed, self.cache, self.progress = data, config, seed, cache, progress
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.parent = Weights(parent.config, {name: tensor.to(self.device) for name, tensor in parent.state.items()})
        self.teacher = self.load(self.parent)
        self.layer_scores = cache.once("layers", self._layer_scores)               # (layers, samples)
        self.layers: list[float] = self.layer_scores.mean(dim=1).tolist()
        self.order: list[float] = mean_ranks(self.layer_scores).tolist()            # which stay, in a type
        self.widths = WidthImportance(**cache.once("widths", lambda: vars(self._widths())))
        self.table = self._latency_table()
        self.budgets = self._budgets()

    def load(self, weights: Weights) -> HybridLM:
        return HybridLM.from_state(*weights, self.dtype).to(self.device).requires_grad_(False)

    # --- Importance ---------------------------------------------------------------------------------------------------

    def _layer_scores(self) -> Tensor:
        samples = self.data.calibration[: self.config.importance_samples]
        return layer_importance(self.teacher, samples, self.config.micro_batch_size, self.progress)

    def _widths(self) -> WidthImportance:
        samples = self.data.calibration[: self.config.ffn_importance_samples]
        return width_importance(self.teacher, samples, self.config.micro_batch_size, self.progress,
                                self.config.ffn_score)

    # --- Candidates ---------------------------------------------------------------------------------------------------

    def _latency_table(self) -> LatencyTable | None:
        """Of every layer the grid has; the overhead from the parent and four models that lack something of it."""
        workload, parent = self.config.latency, self.parent.config
        if workload is None:
            return None

        def measure() -> dict[str, Any]:
            geometries = [parent.model_copy(update={"ffn_hidden_size": width}) for width in self.config.ffn_widths]
            halves = [_without_half(parent, symbol) for symbol in dict.fromkeys(parent.pattern)]
            narrow = [parent.model_copy(update={"ffn_hidden_size": min(self.config.ffn_widths)})]
            whole = [parent, *halves, *narrow, *geometries][: max(5, 2 + len(halves))]
            return vars(measure_table(parent, geometries, whole, workload, self.seed, self.progress))

        return LatencyTable(**self.cache.once("latency", measure))

    def _budgets(self) -> list[Budget]:
        config, parent = self.config, self.parent.config
        memory = config.memory
        budgets = [share_budget("memory (bytes)", memory.budget_fraction, lambda c: costs.memory(c, memory).total,
                                parent, "compress.memory.budget_fraction")]
        if config.parameters_fraction is not None:
            budgets.append(share_budget("parameters", config.parameters_fraction, costs.parameters, parent,
                                        "compress.parameters_fraction"))
        if self.table and config.latency and config.latency.budget_fraction is not None:
            budgets.append(share_budget("decode step (seconds)", config.latency.budget_fraction, self.table.seconds,
                                        parent, "compress.latency.budget_fraction"))
        return budgets

    def candidates(self) -> list[Candidate]:
        parent, config = self.parent.config, self.config
        cells = maximal_cells(parent, config.ffn_widths, config.min_attention_layers, self.budgets)
        return [make_candidate(parent, cell, self.layers, self.widths, config.memory, self.order) for cell in cells]

    def cut(self, selection: Selection) -> Weights:
        """The parent cut to the selection."""
        return Weights(*cut(*self.parent, selection))

    # --- Rounds -------------------------------------------------------------------------------------------------------

    def rounds(self, candidates: Sequence[Candidate]) -> Rounds:
        """Narrow the candidates: kept importance; next token and agreement; a task; KL after a short distillation."""
        config, data = self.config, self.data
        held_out = evenly(data.validation, config.ranking_samples)
        order = sorted(range(len(candidates)), key=lambda index: -candidates[index].importance)

        def load(indices: Sequence[int]) -> dict[str, HybridLM]:
            return {str(index): self.load(self.cut(candidates[index].selection)) for index in indices}

        def close(models: Mapping[str, HybridLM]) -> dict[int, Closeness]:
            found = compare(self.teacher, models, held_out, config.micro_batch_size, self.progress)
            return {int(name): value for name, value in found.items()}

        compared = order[: config.ranked_by_agreement]
        zero_shot = self._closeness_once("agreement", lambda: close(load(compared)))
        ranks = [_ranks(zero_shot, lambda value: -value.agreement), _ranks(zero_shot, lambda value: -value.accuracy)]
        compared.sort(key=lambda index: (sum(rank[index] for rank in ranks), zero_shot[index].kl))

        asked = compared[: config.ranked_by_task]

        def answer() -> dict[str, float]:
            questions = continuation.items(data.validation, config.task_items, self.seed)
            tokens = config.micro_batch_size * self.parent.config.sequence_length
            together = max(1, tokens // questions[0].numel())
            return continuation.accuracy(load(asked), questions, together, self.progress)

        task = {int(name): value for name, value in self.cache.once("task", answer).items()}
        ranks.append(_ranks(task, lambda value: -value))
        asked.sort(key=lambda index: (sum(rank[index] for rank in ranks), zero_shot[index].kl))

        finalists = asked[: config.finalists]

        def distilled() -> dict[int, Closeness]:
            starts = {str(index): self.cut(candidates[index].selection) for index in finalists}
            students = self.distil(starts, config.short_distillation_tokens, "short").states
            return close({name: self.load(Weights(starts[name].config, state)) for name, state in students.items()})

        short = self._closeness_once("finalists", distilled)
        finalists.sort(key=lambda index: short[index].kl)
        ranked = [*finalists, *asked[config.finalists :], *compared[config.ranked_by_task :]]
        return Rounds(zero_shot, task, short, [*ranked, *(index for index in order if index not in zero_shot)])

    def _closeness_once(self, name: str, compute: Callable[[], dict[int, Closeness]]) -> dict[int, Closeness]:
        plain = self.cache.once(name, lambda: {index: tuple(value) for index, value in compute().items()})
        return {index: Closeness(*value) for index, value in plain.items()}

    def distil(self, starts: Mapping[str, Weights], tokens: int, name: str) -> Distilled:
        teacher = fp8_teacher(self.teacher) if self.config.teacher_precision == "fp8" else self.teacher
        return distill(teacher, starts, self.data.training, tokens, self.config, self.cache, name, self.progress)

    # --- What came of it ----------------------------------------------------------------------------------------------

    def measure(self, starts: Mapping[str, Weights], ends: Mapping[str, Weights]) -> dict[str, float]:
        """Closeness to the parent of the cut and of the distilled models, and bits per byte, on all held-out tokens."""
        models = {"parent": self.teacher}
        models |= {f"{name}_cut": self.load(weights) for name, weights in starts.items()}
        models |= {name: self.load(weights) for name, weights in ends.items()}
        close = self._compared("measures", models)
        bits_per_nat = self.data.validation[:, 1:].numel() / self.data.validation_bytes / torch.log(torch.tensor(2.0))
        found = {
            "kl_parent_cut": close["compressed_cut"].kl,
            "kl_parent_compressed": close["compressed"].kl,
            "kl_parent_random_cut": close["random_cut"].kl,
            "kl_parent_random": close["random"].kl,
            "agreement_cut": close["compressed_cut"].agreement,
            "agreement_compressed": close["compressed"].agreement,
            "agreement_random": close["random"].agreement,
        }
        for name in ("parent", "compressed", "random", "compressed_cut", "random_cut"):
            found[f"validation_bits_per_byte_{name}"] = close[name].loss * bits_per_nat.item()
        return found

    def controls(self, winner: Candidate) -> dict[str, Any]:
        """KL to the parent, just cut, of `random_draws` draws and of the least important."""
        selections = {"reverse": reverse_selection(self.parent.config, winner.config, self.order, self.widths)}
        for draw in range(self.config.random_draws):
            generator = torch.Generator().manual_seed(self.seed + draw)
            selections[f"random {draw}"] = random_selection(self.parent.config, winner.config, generator)
        close = self._compared("controls", {name: self.load(self.cut(kept)) for name, kept in selections.items()})
        return {
            "reverse": close["reverse"].kl,
            "random": [close[f"random {draw}"].kl for draw in range(self.config.random_draws)],
            "seeds": [self.seed + draw for draw in range(self.config.random_draws)],
        }

    def _compared(self, name: str, models: Mapping[str, HybridLM]) -> dict[str, Closeness]:
        def compute() -> dict[str, tuple[float, ...]]:
            found = compare(self.teacher, models, self.data.validation, self.config.micro_batch_size, self.progress)
            return {key: tuple(value) for key, value in found.items()}

        return {key: Closeness(*value) for key, value in self.cache.once(name, compute).items()}

    def costs(self, winner: Candidate) -> dict[str, Any]:
        """Parameters, bytes and decode step of parent and winner, predicted and measured, and the largest error."""
        runtime = costs.Deployment.of(self.config.memory.context, self.config.memory.batch)
        rows: dict[str, dict[str, float]] = {}
        for name, geometry in {"parent": self.parent.config, "compressed": winner.config}.items():
            model = random_model(geometry, torch.bfloat16, self.device)
            decoder = Decoder(model, runtime.context, runtime.batch)
            predicted = costs.memory(geometry, runtime)
            rows[name] = {
                "parameters_predicted": costs.parameters(geometry),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "weight_bytes_predicted": predicted.weights,
                "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
                "cache_bytes_predicted": predicted.cache,
                "cache_bytes": decoder.cache_bytes,
            }
            del model, decoder
        if self.table and self.config.latency:
            measured = step_seconds({"parent": self.parent.config, "compressed": winner.config}, self.config.latency,
                                    self.seed, self.progress)
            for name, geometry in {"parent": self.parent.config, "compressed": winner.config}.items():
                rows[name] |= {"decode_seconds_predicted": self.table.seconds(geometry),
                               "decode_seconds": measured[name]}
        errors = {
            f"{quantity}_prediction_error": max(abs(row[f"{quantity}_predicted"] / row[quantity] - 1)
                                                for row in rows.values())
            for quantity in ("parameters", "weight_bytes", "cache_bytes", "decode_seconds")
            if quantity in rows["parent"]
        }
        if "decode_seconds" in rows["parent"]:
            errors["measured_speedup"] = rows["parent"]["decode_seconds"] / rows["compressed"]["decode_seconds"]
        return {"models": rows, "metrics": errors}


def _without_half(config: ModelConfig, symbol: str) -> ModelConfig:
    """Half the layers of one type, at least one."""
    counts = {other: config.pattern.count(other) for other in dict.fromkeys(config.pattern)}
    counts[symbol] = max(1, counts[symbol] // 2)
    return config.model_copy(update={"pattern": "".join(other * count for other, count in counts.items())})


def _ranks(values: Mapping[int, Any], key: Callable[[Any], float]) -> dict[int, float]:
    """Place of each, from 0; equals share the smallest."""
    ordered = sorted(key(value) for value in values.values())
    return {index: ordered.index(key(value)) for index, value in values.items()}


def evenly(sequences: Tensor, count: int) -> Tensor:
    """At most `count` of the sequences, spread evenly over them."""
    count = min(count, len(sequences))
    return sequences[torch.arange(count) * len(sequences) // count]


