"""What compression will take before it is started: time and memory of every step; a layout that cannot is refused.

Closed forms over `model.training.plan`: distillations are training runs with a teacher, scores and rankings are forward
passes of the parent. Which candidate wins is not known yet, so students are the largest of the grid that the closed
budgets allow; a budget on the decode step, which is measured, can only make them smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from model import costs
from model.compression.candidates import Cell, closed_budgets, keep_top_layers, maximal_cells
from model.compression.comparison import CHOICES, ITEM_TOKENS, ROWS
from model.compression.config import CompressConfig
from model.compression.distill import recipe_of
from model.config import ModelConfig, ModelError, PretrainConfig
from model.megatron.distributed import Parallelism
from model.training.plan import (
    BF16,
    FP32,
    GIB,
    Layout,
    Machine,
    Plan,
    alternatives,
    check_layout,
    forward_bytes,
    forward_seconds,
    head_seconds,
    held_parameters,
    machine_here,
    plan,
    stream_seconds,
)

# Bytes of a neuron's activation at a position while it is scored by `mean_then_l2`: the two float64 sums it has (kept),
# and what is read and written to add to them (`width_importance`: to float32, absolute, to float64, index_add_).
NEURON_KEPT, NEURON_MOVED = 16, 50
# Bytes read and written a logit of a ranked model (`comparison`, in float32): log-softmax, its maximum, the divergence;
# with all of the vocabulary, and where tensor ranks each have a part, whose log-softmax goes pass by pass.
RANKED_MOVED = 66, 86
# Bytes a weight of a resume state (BF16, and master weight and two moments in FP32: docs/results/two-gpus.md, 112 GB
# for 8.1 billion), of a checkpoint (BF16, also of a cut one).
STATE, CHECKPOINT = BF16 + 3 * FP32, BF16


class PlannedStep(NamedTuple):
    """A step's cost.

    Attributes:
        seconds: None where nothing says how long.
        gpus, cores: at work.
        memory: bytes of a GPU.
        disk: bytes written.
        host: bytes of a process's own memory, where that is known.
    """

    name: str
    seconds: float | None
    gpus: int = 0
    cores: int = 0
    memory: float = 0.0
    disk: float = 0.0
    host: float | None = None


class Grid(NamedTuple):
    """The candidates as far as they are known before anything is measured.

    Attributes:
        student: the one with the most parameters.
        candidates: how many, of those that the pipeline can split.
        kept: share of the parent's layers they have, mean. A ranking runs a candidate from its first changed layer on
            only (`layerwise`); which that is the weights say, so that the plan has the most it can take.
    """

    student: ModelConfig
    candidates: int
    kept: float

    @classmethod
    def of(cls, parent: ModelConfig, config: CompressConfig, pipeline: int = 1) -> Grid:
        """Raises ModelError where no candidate fits the budgets, or suits a pipeline of so many stages."""
        cells = maximal_cells(parent, config.ffn_widths, config.min_attention_layers, closed_budgets(parent, config))
        if not (split := [cell for cell in cells if sum(cell.counts.values()) % pipeline == 0]):
            raise ModelError(f"compress: none of {len(cells)} candidates has layers for {pipeline} pipeline stages.\n"
                             "Lower runtime.parallel.pipeline, or change the budgets.")
        largest = max(split, key=lambda cell: costs.parameters(cell.config(parent)))
        layers = sum(sum(cell.counts.values()) for cell in split)
        return cls(_spread(parent, largest), len(split), layers / len(split) / len(parent.pattern))


def _spread(parent: ModelConfig, cell: Cell) -> ModelConfig:
    """The cell's geometry with its layers in the parent's order, dropped evenly over the depth."""
    even = [0.0] * len(parent.pattern)
    for symbol in set(parent.pattern):
        places = [index for index, other in enumerate(parent.pattern) if other == symbol]
        for number in range(cell.counts[symbol]):
            even[places[number * len(places) // cell.counts[symbol]]] = 1.0
    kept = keep_top_layers(parent.pattern, even, cell.counts)
    return cell.config(parent).model_copy(update={"pattern": "".join(parent.pattern[index] for index in kept)})


def distillation(
    parent: ModelConfig, config: CompressConfig, pretrain: PretrainConfig, tokens: int, layout: Layout,
    machine: Machine, student: ModelConfig,
) -> Plan:
    """The plan of distilling `student` over `tokens`. Raises ModelError for a layout that cannot be."""
    recipe = recipe_of(config, pretrain, tokens, parent.sequence_length)
    return plan(student, recipe, config.precision == "fp8", layout, machine, parent)


def steps(
    parent: ModelConfig, config: CompressConfig, pretrain: PretrainConfig, layout: Layout, machine: Machine,
    grid: Grid,
) -> list[PlannedStep]:
    """Every step on GPUs under `layout`, whose micro-batch is compression's.

    Raises:
        ModelError: sizes that the layout cannot split.
    """
    check_layout(parent, layout, machine)
    tokens = layout.micro_batch_size * parent.sequence_length
    by_python = pretrain.model_copy(update={"cuda_graph": False})
    one = forward_seconds(parent, by_python, False, layout, machine)                    # of a micro-batch
    logits = tokens * parent.vocab_size / layout.tensor
    moved = RANKED_MOVED[layout.tensor > 1] * logits
    judged = (head_seconds(parent, layout, machine) + stream_seconds(moved, machine)) / layout.pipeline
    compared = one + judged

    def turns(samples: int) -> int:
        """Micro-batches a copy works on, of so many samples."""
        return math.ceil(math.ceil(samples / layout.data) / layout.micro_batch_size)

    layers = len(parent.pattern)
    by_position = config.ffn_score == "mean_then_l2"
    of_layer = by_position * parent.sequence_length * parent.ffn_hidden_size / layout.tensor
    neurons = of_layer * parent.pattern.count("-") / layout.pipeline
    added = stream_seconds(NEURON_MOVED * neurons * layout.micro_batch_size, machine)

    weights = max(held_parameters(parent, pretrain, False, layout, stage)[0] for stage in range(layout.pipeline))
    hidden = tokens * parent.hidden_size * BF16 / (layout.tensor if layout.sequence else 1)
    candidates = min(config.ranked_by_agreement, grid.candidates)
    held = BF16 * weights + (machine.reserved if layout.processes > 1 else machine.reserved / 2)
    scored = held + hidden * (layers / layout.pipeline + 2) + forward_bytes(parent, layout)
    # The last micro-batch's probabilities and logarithms stay while the next logarithms are made of the logits;
    # a model's logarithms, of the rows that are looked at, until the next model's. Layers run beside three of these.
    rows = min(1.0, ROWS["cuda"] / tokens)
    judging = max(FP32 * logits * (4 + rows), FP32 * logits * (2 + rows) + forward_bytes(parent, layout))
    ranked = held + hidden * (min(candidates, layers / layout.pipeline) + 2) + judging

    asked = config.task_items * CHOICES * ITEM_TOKENS / tokens / layout.data         # micro-batches
    finalists = min(config.finalists, candidates)
    # Parent and finalist; parent and two cuts, parent and student twice, parent and the controls' masks.
    models = 2 * finalists * config.ranking_samples + config.validation_samples * (3 + 4 + 2 + config.random_draws)

    short, final = (distillation(parent, config, pretrain, size, layout, machine, grid.student)
                    for size in (config.short_distillation_tokens, config.distillation_tokens))
    size = costs.parameters(grid.student)
    kept = size * 2 * CHECKPOINT
    state = size * STATE * (pretrain.checkpoints_kept + 1)          # the newest while it is written
    beside = max(held_parameters(grid.student, pretrain, False, layout, stage)[0]
                 for stage in range(layout.pipeline))

    def step(name: str, seconds: float, memory: float, disk: float = 0.0) -> PlannedStep:
        return PlannedStep(name, seconds, layout.processes, memory=memory, disk=disk)

    return [
        step("layer importance", turns(config.importance_samples) * importance_passes(
            layers, layout.pipeline) * one, scored),
        step("neuron importance", turns(config.ffn_importance_samples) * (one + added),
             scored + NEURON_KEPT * (neurons + of_layer * layout.micro_batch_size)),      # one layer's on their way
        step(f"ranking of {candidates}", turns(config.ranking_samples) * (
            compared + candidates * (grid.kept * one + judged)), ranked),
        step("task", asked * (1 + min(config.ranked_by_task, candidates)) * one, ranked),
        step(f"{finalists} short distillations", finalists * 86_400 * short.days, short.memory.total,
             finalists * kept + state),
        step("2 full distillations", 2 * 86_400 * final.days, final.memory.total, 2 * kept + state),
        step("measures, controls", turns(models) * compared, ranked + BF16 * beside),
    ]


def importance_passes(layers: int, pipeline: int) -> float:
    """Passes through all of its layers of the busiest pipeline stage, the last: one of the whole model, one for each
    that lacks a layer of an earlier stage, half a one on average for one that lacks a layer of its own."""
    return layers + (1 - layers / pipeline) / 2


def nearest(
    parent: ModelConfig, config: CompressConfig, pretrain: PretrainConfig, layout: Layout, machine: Machine, grid: Grid
) -> Layout | None:
    """Of the layouts of as many GPUs in which every step fits, one with the fewest settings changed; of those, the
    fastest."""
    def fitting() -> Iterator[tuple[int, float, Layout]]:
        for other in alternatives(layout, len(parent.pattern)):
            try:
                found = steps(parent, config, pretrain, other, machine, grid)
            except ModelError:
                continue
            if all(step.memory <= machine.memory for step in found):
                yield layout.changes(other), sum(step.seconds or 0.0 for step in found), other

    best = min(fitting(), key=lambda entry: entry[:2], default=None)
    return best[2] if best else None


def refusal(
    parent: ModelConfig, config: CompressConfig, pretrain: PretrainConfig, layout: Layout, machine: Machine, grid: Grid
) -> str | None:
    """None where every step fits a GPU; else which does not and the nearest layout in which all do, two lines."""
    found = steps(parent, config, pretrain, layout, machine, grid)
    worst = max(found, key=lambda step: step.memory)
    if worst.memory <= machine.memory:
        return None
    other = nearest(parent, config, pretrain, layout, machine, grid)
    cure = (f"Nearest that fits: {other} (runtime.parallel, compress.micro_batch_size and recompute, "
            "pretrain.distributed_optimizer)." if other else
            f"No layout of {layout.processes} GPUs fits: take more of them.")
    return (f"compress does not fit: {worst.name} take{'s' * (not worst.name.endswith('s'))} "
            f"{worst.memory / GIB:.1f} GiB, a {machine.name} has {machine.memory / GIB:.1f}.\n{cure}")


def check(
    parent: ModelConfig, config: CompressConfig, pretrain: PretrainConfig, parallelism: Parallelism, processes: int
) -> None:
    """Raise ModelError where a step does not fit the GPU of this process; without one nothing is known."""
    if not torch.cuda.is_available():
        return
    split = Layout(processes, parallelism.tensor, parallelism.sequence, parallelism.pipeline)
    wrong = refusal(parent, config, pretrain, layout_of(config, pretrain, split), machine_here(),
                    Grid.of(parent, config, parallelism.pipeline))
    if wrong:
        raise ModelError(wrong)


def layout_of(config: CompressConfig, pretrain: PretrainConfig, layout: Layout) -> Layout:
    """`layout` as compression uses it."""
    recompute = pretrain.recompute if config.recompute is None else config.recompute
    return layout._replace(micro_batch_size=config.micro_batch_size, recompute=recompute,
                           distributed_optimizer=pretrain.distributed_optimizer)
