"""MiniPuzzle from the parent's checkpoint to the compressed one (paper section 3), and its controls.

importance -> every maximal candidate under the budgets -> the ones that keep most importance are compared with the
parent on held-out tokens -> the closest answer a task -> the best are distilled briefly -> the best of them in full.
The controls have the same shape: layers and units drawn at random, one draw with the same distillation, and the least
important kept instead of the most. What importance is worth, measured.

All of it runs on the pretraining engine, in whatever layout that has. Until a candidate is distilled it is a mask on
the parent; only then is it cut, to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from durable import sha256
from model import checkpoint, costs
from model.compression.candidates import (
    Budget,
    Candidate,
    closed_budgets,
    make_candidate,
    maximal_cells,
    random_selection,
    reverse_selection,
    share_budget,
)
from model.compression.comparison import Closeness, Name, compare, task_accuracy, task_items
from model.compression.config import CompressConfig
from model.compression.data import Data
from model.compression.distill import Distilled, School, recipe_of
from model.compression.importance import layer_importance, mean_ranks, split_half_correlation
from model.compression.latency import LatencyTable, measure_table, step_seconds
from model.compression.layerwise import Kept, Layerwise
from model.compression.plan import check
from model.compression.prune import Selection, cut_checkpoint
from model.compression.resume import ResultCache
from model.compression.schema import (
    DECODE_STEP,
    CandidateRecord,
    Controls,
    Costs,
    FfnImportance,
    Importance,
    LayerImportance,
)
from model.compression.width_importance import WidthImportance, kept_share, width_importance
from model.config import ModelConfig, ModelError, PretrainConfig
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder
from model.integrity import SUMS, is_whole
from model.megatron.distributed import ONE_COPY, Parallelism, device, is_main_process
from model.megatron.layerwise import MegatronLayerwise
from model.megatron.limits import check_model
from model.megatron.precision import Precision, PrecisionName
from model.megatron.spec import build_model
from model.processes import release_memory
from model.training.kernel_check import check_kernels
from model.training.token_data import end_of_document, text_digests
from model.training.trainer import FREE_WHEN_RESUMED, check_identity, recipe_identity

GIB = 2**30


@dataclass(frozen=True)
class Compression:
    """What comes out: the models, and the records of how they came about, one for each step (docs/compression.md)."""

    models: dict[str, Path]              # checkpoints of compressed and random
    layers: dict[str, list[int]]         # the parent's layers each of them keeps
    precision: str                       # of the distillation
    records: dict[str, Any]              # importance, candidates, ranking, task, short, final, controls, costs
    curve: list[tuple[str, int, int, float]]        # model, step, tokens, KL before the step
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
    parent: Path, tokens: Path, data: Data, config: CompressConfig, pretrain: PretrainConfig, seed: int, scratch: Path,
    progress: Callable[..., None], parallelism: Parallelism = ONE_COPY,
) -> Compression:
    """Compress the checkpoint `parent` under `config`'s budgets, within open process groups of `parallelism`.

    Resumes from what an earlier run kept in `scratch`, which also holds the models that come out.

    Args:
        tokens: the tokens directory `data` is from.
        pretrain: the recipe the parent was trained by.

    Raises:
        ModelError: weights are not those of the geometry, an activation is not finite, a width cannot be cut, no
            model of the grid fits the budgets, a candidate does not suit the layout, or `scratch` holds what another
            compression kept.
    """
    run = Funnel(parent, tokens, data, config, pretrain, seed, ResultCache(scratch), progress, parallelism)
    run.check_identity()
    if pretrain.check_kernels and device().type == "cuda":          # all candidates have its mixers and vocabulary
        check_kernels(run.config_of_parent, parallelism.tensor, device(), pretrain.reset_at_documents)
    candidates = run.candidates()
    rounds = run.rounds(candidates)
    winner = candidates[rounds.order[0]]
    drawn = random_selection(run.config_of_parent, winner.config, torch.Generator().manual_seed(seed))
    selections = {"compressed": winner.selection, "random": drawn}
    ends = {name: run.distil(kept, config.distillation_tokens, f"final-{name}") for name, kept in selections.items()}
    measured = run.measure(selections, {name: end.directory for name, end in ends.items()})
    controls = run.controls(winner)
    run.release()
    cost = run.cache.once("costs", lambda: run.costs(winner), alone=True)
    budgets = {budget.name: budget.limit for budget in run.budgets}
    parent_bytes = costs.memory(run.config_of_parent, config.memory).total
    metrics = {
        "parent_parameters": costs.parameters(run.config_of_parent),
        "compressed_parameters": winner.parameters,
        "parent_memory_gib": parent_bytes / GIB,
        "compressed_memory_gib": winner.memory.total / GIB,
        "budget_gib": config.memory.budget_fraction * parent_bytes / GIB,
        "candidates": len(candidates),
        "validation_samples": len(data.validation),
        "importance_split_half_correlation": split_half_correlation(run.layer_scores),
        **measured,
        "kl_parent_random_cut_mean": sum(controls["random"]) / len(controls["random"]),
        "kl_parent_reverse_cut": controls["reverse"],
        "distillation_tokens": ends["compressed"].curve[-1][1],
        **cost["metrics"],
    }
    if "neurons" in run.widths.reliability:         # a parent may have none, or dead ones alone
        metrics["neuron_split_half_correlation"] = run.widths.reliability["neurons"]
    records = {
        "importance": importance_record(run.config_of_parent, run.layer_scores, run.widths, config),
        "candidates": candidate_records(candidates, rounds, run.table),
        "ranking": ranking_record(rounds.zero_shot),
        "task": {str(index): value for index, value in rounds.task.items()},
        "short": ranking_record(rounds.short),
        "final": measured | {"layers": winner.layers},
        "controls": Controls(**controls, importance=measured["kl_parent_cut"]),
        "costs": Costs(**cost, budgets=budgets, latency=run.table.record() if run.table else None),
    }
    curve = [(name, *row) for name, end in ends.items() for row in end.curve]
    return Compression({name: end.directory for name, end in ends.items()},
                       {name: list(kept.layers) for name, kept in selections.items()}, run.precision, records, curve,
                       metrics)


class Funnel:
    """One compression: what its steps share. Scores are of BF16 models on a GPU, of float32 ones on a CPU, where BF16
    takes several times as long; so are distillations, but with `compress.precision` fp8.

    Attributes:
        config_of_parent: the parent's geometry.
    """

    def __init__(
        self, parent: Path, tokens: Path, data: Data, config: CompressConfig, pretrain: PretrainConfig, seed: int,
        cache: ResultCache, progress: Callable[..., None], parallelism: Parallelism = ONE_COPY,
    ):
        self.parent, self.data, self.config, self.seed = parent, data, config, seed
        self.cache, self.progress, self.parallelism = cache, progress, parallelism
        self.config_of_parent, _ = checkpoint.read_description(parent)
        check(self.config_of_parent, config, pretrain, parallelism, dist.get_world_size())
        self.scored_in: PrecisionName = "bf16" if device().type == "cuda" else "float32"
        self.precision: PrecisionName = "fp8" if config.precision == "fp8" else self.scored_in
        self.school = School(parent, data.training, tokens, config, pretrain, self.precision, seed, cache, parallelism,
                             progress)
        self.eod_id = end_of_document(tokens) if pretrain.reset_at_documents else None
        self._teacher: Layerwise | None = None

    def check_identity(self) -> None:
        """Raise ModelError where results are kept of another parent, text, seed or settings, or of a pipeline that
        leaves out other candidates."""
        recipe = recipe_of(self.config, self.school.pretrain, self.config.distillation_tokens,
                           self.config_of_parent.sequence_length)
        own = recipe_identity(recipe) | self.config.model_dump(mode="json", exclude=set(FREE_WHEN_RESUMED)) | {
            "seed": self.seed, "parent": sha256(self.parent / SUMS),
            "pipeline": self.parallelism.pipeline if self.parallelism.pipeline > 1 else None,
        } | text_digests(self.school.tokens)
        check_identity(self.cache.directory, self.cache.once("identity", lambda: own), own)

    @property
    def teacher(self) -> Layerwise:
        """The parent to be scored, there from the first use to `release`."""
        if self._teacher is None:
            self._teacher = self.load(self.parent)
        return self._teacher

    def release(self) -> None:
        """Give back the memory of the parent that was scored."""
        self._teacher = None
        release_memory()

    def load(self, directory: Path) -> Layerwise:
        """The model of a checkpoint, to be run layer by layer."""
        config, _ = checkpoint.read_description(directory)
        model = build_model(config, Precision(self.scored_in), self.parallelism, self.seed, start=directory)
        return MegatronLayerwise(model.to(device()).requires_grad_(False), config, self.eod_id)

    def _loaded(self, name: str, directory: Path) -> dict[str, Layerwise]:
        return {name: self.load(directory)}

    # --- Importance ---------------------------------------------------------------------------------------------------

    @cached_property
    def layer_scores(self) -> Tensor:
        """(layers, samples), `layer_importance`."""
        samples = self.data.calibration[: self.config.importance_samples]
        return self.cache.once("layers", lambda: layer_importance(
            self.teacher, samples, self.config.micro_batch_size, self.progress))

    @cached_property
    def layers(self) -> list[float]:
        """Importance of each layer."""
        return self.layer_scores.mean(dim=1).tolist()

    @cached_property
    def order(self) -> list[float]:
        """By which layers of a type stay."""
        return mean_ranks(self.layer_scores).tolist()

    @cached_property
    def widths(self) -> WidthImportance:
        """`width_importance`."""
        samples = self.data.calibration[: self.config.ffn_importance_samples]
        return WidthImportance(**self.cache.once("widths", lambda: vars(width_importance(
            self.teacher, samples, self.config.micro_batch_size, self.progress, self.config.ffn_score))))

    # --- Candidates ---------------------------------------------------------------------------------------------------

    @cached_property
    def table(self) -> LatencyTable | None:
        """Seconds of every layer the grid has; the overhead from the parent and four models without something of it."""
        workload, parent = self.config.latency, self.config_of_parent
        if workload is None:
            return None

        def measure() -> dict[str, Any]:
            geometries = [parent.model_copy(update={"ffn_hidden_size": width}) for width in self.config.ffn_widths]
            halves = [_without_half(parent, symbol) for symbol in dict.fromkeys(parent.pattern)]
            narrow = [parent.model_copy(update={"ffn_hidden_size": min(self.config.ffn_widths)})]
            quarter = _without_half(halves[0], parent.pattern[0])       # the fifth, of one type of layers and one width
            whole = [parent, *halves, *narrow, *geometries, quarter][: max(5, 2 + len(halves))]
            return vars(measure_table(parent, geometries, whole, workload, self.seed, self.progress))

        return LatencyTable(**self.cache.once("latency", measure, alone=True))

    @cached_property
    def budgets(self) -> list[Budget]:
        """What a candidate may take."""
        config, parent = self.config, self.config_of_parent
        budgets = closed_budgets(parent, config)
        if self.table and config.latency and config.latency.budget_fraction is not None:
            budgets.append(share_budget(DECODE_STEP, config.latency.budget_fraction, self.table.seconds,
                                        parent, "compress.latency.budget_fraction"))
        return budgets

    def candidates(self) -> list[Candidate]:
        """Every maximal candidate under the budgets that the layout can hold.

        Raises:
            ModelError: there is none, one has no layer left for FP8, or a width suits neither the layout nor FP8.
        """
        parent, config, layout = self.config_of_parent, self.config, self.parallelism
        for width in config.ffn_widths:
            check_model(parent.model_copy(update={"ffn_hidden_size": width}), self.school.number_format, layout)
        maximal = maximal_cells(parent, config.ffn_widths, config.min_attention_layers, self.budgets)
        cells = [cell for cell in maximal if sum(cell.counts.values()) % layout.pipeline == 0]
        if not cells:
            raise ModelError(f"compress: none of {len(maximal)} candidates has layers for {layout.pipeline} pipeline "
                             "stages.\nLower runtime.parallel.pipeline, or change the budgets.")
        least = min(cells, key=lambda cell: sum(cell.counts.values()))
        recipe, layers = self.school.pretrain, sum(least.counts.values())
        if self.precision == "fp8" and not recipe.fp8_layers(layers):
            raise ModelError(
                f"compress.precision fp8: a candidate of {least.mamba} Mamba-2, {least.attention} attention and "
                f"{least.ffn} FFN layers computes in BF16 alone: pretrain.bf16_layers_at_start "
                f"({recipe.bf16_layers_at_start}) and _at_end ({recipe.bf16_layers_at_end}) are all of them.\n"
                "Set compress.precision to bf16, or raise the budgets."
            )
        if len(cells) < len(maximal) and is_main_process():
            print(f"compress: {len(maximal) - len(cells)} of {len(maximal)} candidates are left out: {layout.pipeline} "
                  "pipeline stages (runtime.parallel) do not divide their layers.", flush=True)
        return [make_candidate(parent, cell, self.layers, self.widths, config.memory, self.order) for cell in cells]

    def mask(self, selection: Selection) -> Kept:
        """The parent with only what the selection keeps."""
        return Kept.of(self.config_of_parent, selection)

    def cut(self, selection: Selection, name: str) -> Path:
        """The checkpoint of the parent cut to the selection, made if it is not there."""
        directory = self.cache.directory / name / "start"
        if is_main_process() and not is_whole(directory):
            directory.mkdir(parents=True, exist_ok=True)
            cut_checkpoint(self.parent, directory, selection, {})
        dist.barrier()
        return directory

    # --- Rounds -------------------------------------------------------------------------------------------------------

    def rounds(self, candidates: Sequence[Candidate]) -> Rounds:
        """Narrow the candidates: kept importance; next token and agreement; a task; KL after a short distillation."""
        config, data = self.config, self.data
        held_out = evenly(data.validation, config.ranking_samples)
        order = sorted(range(len(candidates)), key=lambda index: -candidates[index].importance)

        def close(models: Mapping[int, Kept | Layerwise]) -> dict[int, Closeness]:
            return compare(self.teacher, models, held_out, config.micro_batch_size, self.progress)

        masks = {index: self.mask(candidate.selection) for index, candidate in enumerate(candidates)}
        compared = order[: config.ranked_by_agreement]
        zero_shot = self._closeness_once("agreement", lambda: close({index: masks[index] for index in compared}))
        ranks = [_ranks(zero_shot, lambda value: -value.agreement), _ranks(zero_shot, lambda value: -value.accuracy)]
        compared.sort(key=lambda index: (sum(rank[index] for rank in ranks), zero_shot[index].kl))

        asked = compared[: config.ranked_by_task]

        def answer() -> dict[int, float]:
            questions = task_items(data.validation, config.task_items, self.seed)
            together = max(1, config.micro_batch_size * held_out.shape[1] // questions[0].numel())
            models = {index: masks[index] for index in asked}
            return task_accuracy(self.teacher, models, questions, together, self.progress)

        task = self.cache.once("task", answer)
        ranks.append(_ranks(task, lambda value: -value))
        asked.sort(key=lambda index: (sum(rank[index] for rank in ranks), zero_shot[index].kl))

        finalists = asked[: config.finalists]

        def distilled() -> dict[int, Closeness]:
            ends = {index: self.distil(candidates[index].selection, config.short_distillation_tokens, f"short-{index}")
                    for index in finalists}
            return {index: close({index: self.load(end.directory)})[index] for index, end in ends.items()}

        short = self._closeness_once("finalists", distilled)
        finalists.sort(key=lambda index: short[index].kl)
        ranked = [*finalists, *asked[config.finalists :], *compared[config.ranked_by_task :]]
        return Rounds(zero_shot, task, short, [*ranked, *(index for index in order if index not in zero_shot)])

    def _closeness_once(self, name: str, compute: Callable[[], dict[Name, Closeness]]) -> dict[Name, Closeness]:
        plain = self.cache.once(name, lambda: {key: tuple(value) for key, value in compute().items()})
        return {key: Closeness(*value) for key, value in plain.items()}

    def distil(self, selection: Selection, tokens: int, name: str) -> Distilled:
        """The parent cut to the selection, after `tokens` tokens of distillation."""
        start = self.cut(selection, name)
        self.release()
        return self.school.distil(start, tokens, name)

    # --- What came of it ----------------------------------------------------------------------------------------------

    def measure(self, selections: Mapping[str, Selection], ends: Mapping[str, Path]) -> dict[str, float]:
        """Closeness to the parent of the cut and of the distilled models, and bits per byte, on all held-out tokens."""
        masks = {f"{name}_cut": self.mask(kept) for name, kept in selections.items()}
        close = self.closeness("measures", lambda: {"parent": self.teacher, **masks})
        for name, directory in ends.items():            # one at a time
            close |= self.closeness(f"measures-{name}", partial(self._loaded, name, directory))
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
        parent = self.config_of_parent
        selections = {"reverse": reverse_selection(parent, winner.config, self.order, self.widths)}
        for draw in range(self.config.random_draws):
            generator = torch.Generator().manual_seed(self.seed + draw)
            selections[f"random {draw}"] = random_selection(parent, winner.config, generator)
        close = self.closeness("controls", lambda: {name: self.mask(kept) for name, kept in selections.items()})
        return {
            "reverse": close["reverse"].kl,
            "random": [close[f"random {draw}"].kl for draw in range(self.config.random_draws)],
            "seeds": [self.seed + draw for draw in range(self.config.random_draws)],
        }

    def closeness(self, name: str, models: Callable[[], Mapping[str, Kept | Layerwise]]) -> dict[str, Closeness]:
        """How close `models()` come to the parent on all held-out tokens, kept under `name`."""
        return self._closeness_once(name, lambda: compare(
            self.teacher, models(), self.data.validation, self.config.micro_batch_size, self.progress))

    def costs(self, winner: Candidate) -> dict[str, Any]:
        """Parameters, bytes and decode step of parent and winner, predicted and measured, and the largest error."""
        runtime = costs.Deployment.of(self.config.memory.context, self.config.memory.batch)
        geometries = {"parent": self.config_of_parent, "compressed": winner.config}
        rows: dict[str, dict[str, float]] = {}
        for name, geometry in geometries.items():
            model = HybridLM.skeleton(geometry, torch.bfloat16)             # on no device: a 56B model too
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
            measured = step_seconds(geometries, self.config.latency, self.seed, self.progress)
            for name, geometry in geometries.items():
                rows[name] |= {"decode_seconds_predicted": self.table.seconds(geometry),
                               "decode_seconds": measured[name]}
        errors = {
            f"{quantity}_prediction_error": max(abs(row[f"{quantity}_predicted"] - row[quantity]) / (row[quantity] or 1)
                                                for row in rows.values())           # of layers of FFN alone no cache
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


# --- The records, as `model.compression.schema` has them (docs/compression.md) ---------------------------------------

def importance_record(
    parent: ModelConfig, scores: Tensor, widths: WidthImportance, config: CompressConfig
) -> Importance:
    """What the scores say of every layer and axis; `scores` (layers, samples) float64."""
    means = scores.mean(dim=1).tolist()
    return Importance(
        samples={"layers": config.importance_samples, "widths": config.ffn_importance_samples},
        layers=[
            LayerImportance(index=index, symbol=symbol, importance=means[index],
                            standard_error=float(scores[index].std() / scores.shape[1] ** 0.5))
            for index, symbol in enumerate(parent.pattern)
        ],
        ffn=[
            FfnImportance(index=index, kept_share_of_importance={
                width: kept_share(widths.neurons[index], width) for width in config.ffn_widths})
            for index in sorted(widths.neurons)
        ],
        mamba_heads={index: values.tolist() for index, values in widths.mamba_heads().items()},
        reliability=widths.reliability,
    )


def candidate_records(
    candidates: Sequence[Candidate], rounds: Rounds, table: LatencyTable | None
) -> list[CandidateRecord]:
    """One record a candidate, best first; null where a later round was not reached or nothing was timed."""
    records = []
    for rank, index in enumerate(rounds.order, start=1):
        candidate, close = candidates[index], rounds.zero_shot.get(index)
        records.append(CandidateRecord(
            index=index,
            pattern=candidate.config.pattern,
            ffn_hidden_size=candidate.config.ffn_hidden_size,
            parameters=candidate.parameters,
            memory_gib=candidate.memory.total / GIB,
            decode_milliseconds=1e3 * table.seconds(candidate.config) if table else None,
            importance=candidate.importance,
            agreement=close.agreement if close else None,
            accuracy=close.accuracy if close else None,
            kl_cut=close.kl if close else None,
            task_accuracy=rounds.task.get(index),
            kl_short=rounds.short[index].kl if index in rounds.short else None,
            rank=rank,
            chosen=rank == 1,
        ))
    return records


def ranking_record(found: Mapping[int, Closeness]) -> list[dict[str, Any]]:
    """Closeness by the candidate's index."""
    return [{"index": index, **value._asdict()} for index, value in found.items()]
