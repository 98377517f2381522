"""Say what every stage of a profile will take: time, GPU-hours, memory of a GPU, disk; of pretraining by part.

    python -m flows.plan nemotron-h-56b                         each variant of the profile
    python -m flows.plan nemotron-h-8b --machine h200 --set runtime.parallel.tensor=4
    python -m flows.plan nemotron-h-56b --nvidia                pretraining, beside NVIDIA's recipe for speed

The layout is `runtime.launcher` and `runtime.parallel`; without a profile, params.yaml is read. Exits 1 where a stage
does not fit into a GPU's memory, and names the nearest layout that does.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from data_pipeline.tokenize.indexed_dataset import token_dtype
from flows import profile
from flows.console import table
from model import costs
from model.compression import plan as compression
from model.compression.plan import CHECKPOINT, STATE, PlannedStep
from model.config import ModelConfig, ModelError
from model.evaluation import paper_size
from model.training.plan import (
    BF16,
    FP32,
    GIB,
    MACHINES,
    Layout,
    Machine,
    Plan,
    inference_seconds,
    nearest_that_fits,
    nvidia_setup,
    plan,
    writing_seconds,
)
from stages.frame.params import Params, ParamsError, load_params

MEMORY_ROWS = {
    "weights": "weights, BF16", "fp8_copies": "weights, FP8 copies", "gradients": "gradients",
    "optimizer": "master weights and Adam's moments", "activations": "activations", "logits": "logits",
    "workspace": "workspace of the backward", "reserved": "CUDA and NCCL",
}
TIME_ROWS = {
    "layers": "layers", "head": "logits and loss", "update": "gradients and AdamW",
    "tensor_parallel": "between tensor ranks", "pipeline": "between pipeline stages, and waiting",
    "data_parallel": "between replicas",
}


def layout_of(params: Params) -> Layout:
    """The layout that runtime and pretrain sections describe."""
    runtime, recipe = params.runtime, params.pretrain
    return Layout(
        runtime.launcher.processes, runtime.parallel.tensor, runtime.parallel.sequence, runtime.parallel.pipeline,
        recipe.distributed_optimizer, recipe.micro_batch_size, recipe.recompute,
    )


def plans(params: Params, machine: Machine, nvidia: bool = False) -> dict[str, Plan]:
    """The first seed of each architecture and precision; with `nvidia`, each also as NVIDIA's recipe runs it.

    Raises:
        ModelError: a layout that cannot be.
    """
    found: dict[str, Plan] = {}
    for name, *_ in _kinds(params):
        config, recipe, layout = params.model_of(name), params.recipe_of(name), layout_of(params)
        fp8 = params.variants[name].precision == "fp8"
        try:
            found[name] = plan(config, recipe, fp8, layout, machine)
            if nvidia:
                found[f"{name}, NVIDIA's"] = plan(config, *nvidia_setup(recipe, fp8, layout), machine)
        except ModelError as error:
            raise ModelError(f"{name} on {machine.name}: {error}") from None
    return found


def _kinds(params: Params) -> list[list[str]]:
    """Variants of equal architecture and precision."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, variant in params.variants.items():
        kinds.setdefault((variant.architecture, variant.precision), []).append(name)
    return list(kinds.values())


# --- Every stage ------------------------------------------------------------------------------------------------------

# Bytes of text a second: curation of a core, tokenization of a worker; bytes of text a token (docs/results/data.md).
CURATION, TOKENIZATION, TEXT_A_TOKEN = 5.67e6, 52.6e6, 100.1e6 / 27_921_734
DOCUMENT = 4000                 # bytes of text a document


class PlannedDecision(NamedTuple):
    """What workers decide over all documents between the passes over shards (docs/data.md, "At a snapshot's size").

    Attributes:
        part: documents, bytes of text or n-grams that one part of it is about.
        held: bytes of a worker for a full part.
        disk: bytes for each of them, surveys among them.
        seconds: of a core, for each of them, for a shard, and for each pair of parts.
    """

    part: float
    held: float
    disk: float
    seconds: tuple[float, float, float]

    def step(self, name: str, size: float, shards: float, workers: int) -> PlannedStep:
        """Of `size` documents, bytes of text or n-grams in so many shards."""
        parts = math.ceil(size / self.part)
        each, shard, pair = self.seconds
        taken = each * size + shard * shards + pair * parts**2
        return PlannedStep(name, taken / min(workers, parts), cores=min(workers, parts), disk=self.disk * size,
                    host=self.held * min(1.0, size / self.part))


NEAR_DUPLICATES = PlannedDecision(2**23, 1.1e9, 177 + 120, (8.7e-6, 8e-3, 6e-3))
REPEATED_STRINGS = PlannedDecision(2**30, 1.2e9, 1.3 + 0.17, (9.8e-9, 3e-3, 1e-3))
EVALUATION_TEXT = PlannedDecision(2**25, 1.9e9, 8 + 24, (0.3e-6, 4e-4, 2e-4))
TEXT_AN_NGRAM = 8.6             # bytes of Markdown and of Python, 13 words in a row from every word on


def steps(
    params: Params, grid: compression.Grid, pretraining: Mapping[str, Plan], machine: Machine
) -> list[PlannedStep]:
    """The stages in their order. Raises ModelError for a layout that cannot be."""
    parent = params.model_of(params.compress.parent)
    text, workers, recipe = text_bytes(params), params.runtime.workers, params.pretrain
    ids = text / TEXT_A_TOKEN * token_dtype(params.tokenizer.vocab_size)().itemsize
    # Curation writes all text twice at most, before it is compressed: annotated, and what was kept.
    shards = text / 1e6 / params.annotate.shard_megabytes
    rows = [PlannedStep("curation", text / CURATION / workers, cores=workers, disk=2 * text),
            NEAR_DUPLICATES.step("its near-duplicates", text / DOCUMENT, shards, workers),
            *([REPEATED_STRINGS.step("its repeated strings", text, shards, workers)]        # at most: of all domains
              if params.annotate.substring.domains else []),
            EVALUATION_TEXT.step("its evaluation text", params.annotate.held_out.fraction * text / TEXT_AN_NGRAM,
                                 shards, workers),                      # that of the sets besides is small
            PlannedStep("tokenization", text / TOKENIZATION / workers, cores=workers, disk=ids)]
    for names in _kinds(params):
        one = pretraining[names[0]]
        size = costs.parameters(one.config)
        rows.append(PlannedStep(f"pretraining {names[0]}" + f" and {len(names) - 1} like it" * (len(names) > 1),
                                len(names) * 86_400 * one.days, one.layout.processes, memory=one.memory.total,
                                disk=len(names) * size * (STATE * (recipe.checkpoints_kept + 1) + CHECKPOINT),
                                host=size * STATE / one.layout.tensor / one.layout.pipeline))  # its copy of a state
    rows += compression.steps(parent, params.compress, params.recipe_of(params.compress.parent),
                              compression_layout(params), machine, grid)
    tensor, asked = params.runtime.one_model.processes, params.evaluate
    written = paper_size.written(asked.paper_items, asked.generation)
    for name, config in evaluated(params, grid).items():
        size = costs.parameters(config) * (BF16 if params.export.dtype == "bfloat16" else FP32)
        table = config.vocab_size * config.hidden_size * FP32           # the largest tensor
        shard = min(size, max(1e9 * params.export.shard_gigabytes, table))
        taken = inference_seconds(config, evaluated_tokens(params), machine, tensor)
        taken += writing_seconds(config, written, asked.context_tokens, machine, tensor)
        held = costs.evaluation_bytes(config, asked.longest_context, tensor)
        rows += [PlannedStep(f"export {name}", None, disk=size, host=shard),
                 PlannedStep(f"evaluation {name}", taken, tensor, memory=held)]
    return [*rows, benchmark_step(params, grid.student, machine)]


def benchmark_step(params: Params, compressed: ModelConfig, machine: Machine) -> PlannedStep:
    """At least: the floors of reading prompts and of decoding, which the benchmark reports itself; weights of all three
    models beside their caches at the longest context. The published pairs, which take what memory there is, are not
    counted."""
    asked, tensor = params.benchmark, params.runtime.one_model.processes
    models = [*(ModelConfig(**params.model[name].model_dump(), vocab_size=params.tokenizer.vocab_size)
                for name in ("hybrid", "transformer")), compressed]
    ceilings = costs.Ceilings(machine.copy * tensor, machine.bf16 * tensor, machine.bf16 * tensor)
    seconds = sum(
        (asked.repeats + 1) * asked.decode_tokens * costs.decode_floor(
            config, asked.batch, context, torch.bfloat16, torch.float32, False, ceilings)
        + 3 * (context <= asked.longest_prompt) * costs.prefill_floor(config, context, ceilings)
        for config in models for context in asked.contexts)
    held = sum(costs.memory(config, costs.Deployment.of(max(asked.contexts), asked.batch)).total for config in models)
    return PlannedStep("benchmark, at least", seconds, tensor, memory=held / tensor + machine.reserved)


def evaluated(params: Params, grid: compression.Grid) -> dict[str, ModelConfig]:
    """Geometry of the models that are exported and evaluated."""
    return {name: params.model_of(name) if name in params.variants else grid.student for name in params.models}


def compression_grid(params: Params) -> compression.Grid:
    """The candidates of the profile's compression; seconds. Raises ModelError for budgets that nothing fits."""
    parent, pipeline = params.model_of(params.compress.parent), params.runtime.parallel.pipeline
    return compression.Grid.of(parent, params.compress, pipeline)


def compression_layout(params: Params) -> Layout:
    """The layout of the profile's compression."""
    return compression.layout_of(params.compress, params.recipe_of(params.compress.parent), layout_of(params))


def text_bytes(params: Params) -> float:
    """What the sources say, else as much as is trained on once."""
    sizes = [source.megabytes for source in params.annotate.sources]
    if None in sizes:
        return params.pretrain.tokens * TEXT_A_TOKEN
    return 1e6 * sum(sum(size.values()) if isinstance(size, dict) else size or 0.0 for size in sizes)


def evaluated_tokens(params: Params) -> float:
    """Of the stages' own text, the copy, recall and needle items, and the paper's tasks; other items are short."""
    config = params.evaluate
    domains = {domain for phase in params.tokenize.phases for domain in phase.weights}
    text = 1e3 * config.bits_per_byte_kilobytes * len(domains) / TEXT_A_TOKEN
    text += paper_size.read(config.paper_items, config.context_tokens, TEXT_A_TOKEN)
    return text + 3 * config.items_per_context * config.context_tokens * sum(config.context_multiples)


def describe_steps(found: Sequence[PlannedStep]) -> str:
    """Stages as a table, a row each."""
    def cell(value: float | None, form: str = ",.1f") -> str:
        return format(value, form) if value else "-"

    return table([{
        "stage": step.name, "time": _duration(step.seconds),
        "GPU-hours": cell(step.gpus * (step.seconds or 0.0) / 3600),
        "core-hours": cell(step.cores * (step.seconds or 0.0) / 3600), "GiB of a GPU": cell(step.memory / GIB),
        "GiB of a process": cell(step.host and step.host / GIB), "disk, GB": cell(step.disk / 1e9),
    } for step in found])


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    unit, size = next(((unit, size) for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)) if seconds >= size),
                      ("s", 1))
    return f"{seconds / size:,.1f} {unit}"


# --- Pretraining ------------------------------------------------------------------------------------------------------


def describe(found: dict[str, Plan]) -> str:
    """Plans as a table, a column each."""
    rows = [_row(label, [getattr(one.memory, part) / GIB for one in found.values()], found, ".1f")
            for part, label in MEMORY_ROWS.items()]
    rows.append(_row("memory of a GPU, GiB", [one.memory.total / GIB for one in found.values()], found, ".1f"))
    rows += [_row(label, [1000 * getattr(one.time, part) for one in found.values()], found, ",.0f")
             for part, label in TIME_ROWS.items()]
    rows.append(_row("a step, ms", [1000 * one.time.total for one in found.values()], found, ",.0f"))
    rows.append(_row("tokens/s", [one.tokens_per_second for one in found.values()], found, ",.0f"))
    per_gpu = [one.tokens_per_second / one.layout.processes for one in found.values()]
    rows.append(_row("tokens/s a GPU", per_gpu, found, ",.0f"))
    rows.append(_row("model FLOP utilization, %", [100 * one.utilization for one in found.values()], found, ".1f"))
    rows.append(_row("days", [one.days for one in found.values()], found, ",.2f"))
    rows.append(_row("GPU-hours", [one.gpu_hours for one in found.values()], found, ",.1f"))
    return table(rows)


def _row(label: str, values: Sequence[float], found: dict[str, Plan], form: str) -> dict[str, str]:
    return {"": label} | {name: format(value, form) for name, value in zip(found, values, strict=True)}


def refusals(params: Params, grid: compression.Grid | None, found: dict[str, Plan], machine: Machine) -> list[str]:
    """For each stage that does not fit (without `grid`, of pretraining): by how much, and the nearest layout that does.
    """
    lines = []
    for name, one in found.items():
        if one.fits:
            continue
        nearest = nearest_that_fits(one)
        lines.append(f"{name} does not fit: {one.memory.total / GIB:.1f} GiB, a {one.machine.name} has "
                     f"{one.machine.memory / GIB:.1f}.")
        if nearest is None:
            lines.append(f"No layout of {one.layout.processes} GPUs fits: take more of them.")
        else:
            lines.append(f"Nearest that fits: {nearest.layout}: {nearest.memory.total / GIB:.1f} GiB, "
                         f"{nearest.tokens_per_second:,.0f} tokens/s.")
    if grid is None:
        return lines
    tensor = params.runtime.one_model.processes
    wrong = [compression.refusal(params.model_of(params.compress.parent), params.compress,
                                 params.recipe_of(params.compress.parent), compression_layout(params), machine, grid)]
    longest = params.evaluate.longest_context
    wrong += [costs.evaluation_refusal(name, config, longest, tensor, machine.memory, machine.name)
              for name, config in evaluated(params, grid).items()]
    speed = benchmark_step(params, grid.student, machine)
    if speed.memory > machine.memory:
        wrong.append(f"benchmark does not fit: {speed.memory / GIB:.1f} GiB with tensor {tensor}, a {machine.name} "
                     f"has {machine.memory / GIB:.1f}.\n"
                     "Raise runtime.parallel.tensor, or lower benchmark.contexts or benchmark.batch.")
    return lines + [line for line in wrong if line]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", nargs="?", help="of profiles/; without it, params.yaml as it stands")
    parser.add_argument("--machine", choices=MACHINES, help="kind of GPU (that of the profile's name, or h100)")
    parser.add_argument("--nvidia", action="store_true", help="pretraining alone, beside NVIDIA's recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        file = Path("params.yaml")
        if options.profile:
            file = Path(directory, f"{options.profile}.yaml")
            file.write_text(profile.resolve(options.profile))
        try:
            params = load_params(file, tuple(options.set))
        except ParamsError as error:
            raise ParamsError(str(error).replace(f"{directory}/", "profiles/")) from None
    machine = MACHINES[options.machine or (params.profile if params.profile in MACHINES else "h100")]
    try:
        found = plans(params, machine, options.nvidia)
        grid = None if options.nvidia else compression_grid(params)
        stages = steps(params, grid, found, machine) if grid else []
    except ModelError as error:
        sys.exit(str(error))
    layout = layout_of(params)
    recipe = params.pretrain
    print(f"{params.profile}: {recipe.tokens:,} tokens in batches of {recipe.global_batch_size} sequences, on "
          f"{layout.processes} x {machine.name}\n{layout}\n\n{describe(found)}")
    if stages:
        print(f"\n{describe_steps(stages)}")
    if wrong := refusals(params, grid, found, machine):
        sys.exit("\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
