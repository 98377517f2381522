"""Training steps on several GPUs, ours beside stock megatron-core + Transformer Engine + mamba_ssm, and the plan.

    python -m benchmarks.parallel_gpu [--layouts one,tp2,dp2] [--kernels ours,captured,stock] [--precisions fp8,bf16]
    python -m benchmarks.parallel_gpu --model nemotron_h_56b --layouts tp8 --bf16-gradients
    python -m benchmarks.parallel_gpu --whole TOKENS --scratch DIR [--weights DIR] [--layouts tp2,dp2] [--out FILE]

Steps: the widths of Nemotron-H-8B in 19 layers, or a published model whole; a micro-batch of 8,192 tokens, one layer at
each end in BF16, weights at random. A layout's processes run ours and stock one after the other, launched by Python,
and ours with forward and backward captured, as `pretrain.cuda_graph` has them: Megatron's schedule, DDP with FP32
gradients, AdamW with FP32 master weights. `tp2` and `tp8` are tensor and sequence parallel; `dp2` spreads the
optimizer, gradients travel during the backward and weights during the forward, of a captured step after it.
Communication is the share of a step in which NCCL works, and in brackets that in which nothing else does. tokens/s are
a GPU's, the median of ten steps; TFLOP/s too, by our count (`model.costs`) and by NVIDIA's, whose FFN has a gate;
memory is the most that PyTorch held allocated. `--recompute` is of ours: stock's MambaStack does not read it.

--whole: a published model, trained in the first precision on token files by the trainer itself: 30 steps at the first
layout. With a second one, a state after 20, and from that state again at the second (every layer recomputed), whose
losses must be those of the first to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.step_gpu import (
    GEOMETRIES,
    RECIPE,
    STEPS,
    TINY,
    WARMUPS,
    draw,
    our_model,
    release,
    stock_model,
    stop_on_errors,
)
from model.config import ModelConfig, PretrainConfig
from model.costs import training_flops_per_token
from model.megatron.distributed import Parallelism, device, is_main_process, process_groups
from model.megatron.optimizer import build_optimizer, data_parallel
from model.megatron.step_graph import StepGraph
from model.presets import PRESETS
from model.training.plan import GIB, MACHINES, Layout, plan
from stages.frame.common import out_file

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(processes=2, tensor=2, sequence=True),
    "dp2": Layout(processes=2, distributed_optimizer=True),
    "tp8": Layout(processes=8, tensor=8, sequence=True),
    "tp4": Layout(processes=4, tensor=4, sequence=True),
    "tp2 dp2": Layout(processes=4, tensor=2, sequence=True, distributed_optimizer=True),
}
KERNELS, PRECISIONS = ("ours", "captured", "stock"), ("fp8", "bf16")
STEPS_OF_WHOLE, STATE_AFTER, GLOBAL_BATCH = 30, 20, 8
ROUNDING = 5e-3                 # of a loss in FP8, as in tests/model/training/test_trainer_gpu.py


class Case(NamedTuple):
    """What a layout's processes measure, as a line of JSON."""

    layout: str
    model: str
    layers: int | None
    kernels: list[str]
    precisions: list[str]
    recompute: str
    bf16_gradients: bool
    tiny: bool

    @property
    def config(self) -> ModelConfig:
        """The model of the case."""
        config = GEOMETRIES["8b"][0] if self.model == "8b" else PRESETS[self.model]
        return config.model_copy(update={"pattern": config.pattern[:self.layers]} | (TINY if self.tiny else {}))

    def recipe(self, kernels: str) -> PretrainConfig:
        """How its steps train."""
        layout = LAYOUTS[self.layout]
        return RECIPE.model_copy(update={
            "global_batch_size": layout.data, "tokens": layout.data * 8192, "cuda_graph": kernels == "captured",
            "distributed_optimizer": layout.distributed_optimizer, "grad_reduce_in_fp32": not self.bf16_gradients,
            "recompute": "" if kernels == "stock" else self.recompute})


@contextmanager
def whole_step(
    model: nn.Module, config: ModelConfig, layout: Layout, recipe: PretrainConfig
) -> Iterator[Callable[[], Tensor]]:
    """A step of training, as a function that returns the loss."""

    def forward_backward(sequences: Tensor) -> list[Tensor]:
        [result] = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([sequences]), model=[ddp], num_microbatches=1,
            seq_length=config.sequence_length, micro_batch_size=1, forward_only=False)
        return [result["loss"]]

    graph = StepGraph(model, forward_backward) if recipe.cuda_graph else None
    with graph.on_stream() if graph else nullcontext():
        ddp = data_parallel(recipe, model, layout.data)
    optimizer = build_optimizer(recipe, ddp)
    torch.manual_seed(layout.data)
    sequences = torch.randint(config.vocab_size, (1, config.sequence_length + 1)).to(device())

    def forward(batches: Iterator[Tensor], module: nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        losses = module(batch[:, :-1].contiguous(), None, None, labels=batch[:, 1:].contiguous())
        return losses, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})

    def step() -> Tensor:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        [loss] = (graph or forward_backward)(sequences)
        optimizer.step()
        return loss

    yield step
    if graph:
        graph.close()


def step_seconds(step: Callable[[], Tensor]) -> list[float]:
    for _ in range(WARMUPS):
        step()
    seconds = []
    for _ in range(STEPS):
        wait()
        started = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - started)
    return seconds


def wait() -> None:
    """For every process's device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def communication(step: Callable[[], Tensor]) -> dict[str, float]:
    """Shares of a step's time on this GPU in which NCCL works, and in which nothing else does."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spans = [(event.time_range.start, event.time_range.end, "nccl" in event.name)
             for event in profiler.events() if event.device_type.name == "CUDA"]
    whole = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
    of_nccl, others = (covered([span[:2] for span in spans if span[2] == nccl]) for nccl in (True, False))
    return {"communication": of_nccl / whole, "waited_for": (covered([span[:2] for span in spans]) - others) / whole}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def nvidia_flops_per_token(config: ModelConfig) -> float:
    """Forward and backward as NVIDIA's published TFLOP/s count them (Megatron-Bridge, `_hybrid_model_flops`): the FFN
    as if gated, three matrices where squared ReLU has two."""
    hidden, inner = config.hidden_size, config.mamba_num_heads * config.mamba_head_dim
    shared = config.num_query_groups / config.num_attention_heads
    attention = hidden * (2 * hidden + 2 * hidden * shared + config.sequence_length)
    in_proj = hidden * (2 * inner + 2 * config.mamba_num_groups * config.mamba_state_dim + config.mamba_num_heads)
    layers = {"*": attention, "M": in_proj + inner * (config.mamba_state_dim + hidden),
              "-": 3 * hidden * config.ffn_hidden_size}
    return 6 * (sum(layers[symbol] for symbol in config.pattern) + hidden * config.vocab_size)


def measure(case: Case, kernels: str, precision: str) -> dict[str, Any]:
    """A row. What fails leaves its error in it."""
    row: dict[str, Any] = {"kernels": kernels, "precision": precision}
    config, layout, recipe = case.config, LAYOUTS[case.layout], case.recipe(kernels)
    try:
        parallelism = Parallelism(layout.tensor, 1, layout.sequence)
        model = stock_model(config, precision, parallelism) if kernels == "stock" else our_model(
            config, precision, parallelism, recipe.recompute)
        draw(model)
        with whole_step(model, config, layout, recipe) as step:
            seconds = step_seconds(step)
            rates = [layout.data * config.sequence_length / layout.processes / each for each in seconds]
            rate = statistics.median(rates)
            row |= {"loss": step().item(), "tokens_per_second": rate, "least": min(rates), "most": max(rates),
                    "flops_per_second": rate * training_flops_per_token(config),
                    "nvidia_flops_per_second": rate * nvidia_flops_per_token(config)}
            if torch.cuda.is_available():
                row |= {"gib": torch.cuda.max_memory_allocated() / GIB, **communication(step)}
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def work(case: Case, out: Path) -> None:
    """What torchrun starts: the rows of one layout, written by the first process."""
    layout, rows = LAYOUTS[case.layout], []
    with process_groups(Parallelism(layout.tensor, 1, layout.sequence)):
        for precision in case.precisions:
            for kernels in case.kernels:
                if torch.cuda.is_available():
                    release()
                rows.append(measure(case, kernels, precision))
                if is_main_process():
                    out.write_text(json.dumps(rows))


def torchrun(processes: int, *arguments: str, seconds: float) -> None:
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                    "-m", *arguments], check=True, timeout=seconds, env=os.environ | {"OMP_NUM_THREADS": "1"})


def steps_of_layouts(cases: list[Case], figures: dict[str, Any], report: Callable[[], None]) -> None:
    print(f"{'':24} {'tokens/s a GPU':>14} {'plan':>7} {'least-most':>15} {'TFLOP/s':>8} {'NVIDIA':>6} {'GiB':>6} "
          f"{'plan':>6} {'NCCL (waited for)':>18} {'loss':>8}")
    stopped: list[dict[str, Any]] = []
    for case in cases:
        layout = LAYOUTS[case.layout]
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, "rows.json")
            try:
                torchrun(layout.processes, "benchmarks.parallel_gpu", "--worker", json.dumps(case), "--out", str(out),
                         seconds=580)
            except subprocess.SubprocessError as error:
                print(f"{case.layout}: {error}", flush=True)
                stopped.append({"error": str(error)})
            rows = json.loads(out.read_text()) if out.exists() else []
        for row in rows:
            recipe = case.recipe(row["kernels"])
            predicted = plan(case.config, recipe, row["precision"] == "fp8",
                             layout._replace(recompute=recipe.recompute), MACHINES["h200"])
            row |= {"plan_tokens_per_second": predicted.tokens_per_second / layout.processes,
                    "plan_gib": predicted.memory.allocated / GIB}
            print_row(case.layout, row)
        figures["steps"][case.layout] = rows
        report()
    by = {(layout, row["kernels"], row["precision"]): row["tokens_per_second"]
          for layout, rows in figures["steps"].items() for row in rows if "error" not in row}
    for (layout, kernels, precision), rate in by.items():
        for label, other in (("one GPU's", ("one", kernels, precision)), ("stock's", (layout, "stock", precision))):
            if other in by and other != (layout, kernels, precision):
                print(f"{layout:8} {kernels:8} {precision:5} {rate / by[other]:5.2f} times {label} tokens/s a GPU")
    stop_on_errors([*stopped, *(row for rows in figures["steps"].values() for row in rows)])


def print_row(layout: str, row: dict[str, Any]) -> None:
    name = f"{layout:8} {row['kernels']:8} {row['precision']:5} "
    if "error" in row:
        print(name + row["error"], flush=True)
        return
    ends = f"{row['least']:.0f}-{row['most']:.0f}"
    nccl = f"{row.get('communication', 0):.1%} ({row.get('waited_for', 0):.1%})"
    print(name + f"{row['tokens_per_second']:15.0f} {row['plan_tokens_per_second']:7.0f} {ends:>15} "
          f"{row['flops_per_second'] / 1e12:8.1f} {row['nvidia_flops_per_second'] / 1e12:6.1f} "
          f"{row.get('gib', 0):6.1f} {row['plan_gib']:6.1f} {nccl:>18} {row['loss']:8.3f}", flush=True)


def train_whole(
    case: Case, tokens: Path, scratch: Path, weights: Path, layouts: list[str], figures: dict[str, Any]
) -> None:
    """Train a model at the first layout, then again from its state at the second. Raises SystemExit where the losses
    differ."""
    config = case.config
    if case.tiny:
        vocab_size = json.loads((tokens / "tokens.json").read_text())["vocab_size"]
        config = config.model_copy(update={"vocab_size": vocab_size})
    recipe = RECIPE.model_copy(update={
        "tokens": STEPS_OF_WHOLE * GLOBAL_BATCH * config.sequence_length, "global_batch_size": GLOBAL_BATCH,
        "learning_rate": 2e-4, "min_learning_rate": 2e-6, "warmup_fraction": 0.2, "bf16_layers_at_start": 4,
        "bf16_layers_at_end": 4, "checkpoint_every": STATE_AFTER if len(layouts) > 1 else 10**6,
        "grad_reduce_in_fp32": not case.bf16_gradients})
    losses = {}
    for name, recompute in zip(layouts, (case.recompute, "M*-"), strict=False):
        layout = LAYOUTS[name]._replace(recompute=recompute)
        part = recipe.model_copy(update={"recompute": recompute, "distributed_optimizer": len(layouts) > 1})
        job = {"task": "pretrain", "model": config.model_dump(mode="json"), "recipe": part.model_dump(mode="json"),
               "architecture": "hybrid", "precision": case.precisions[0], "seed": 1, "tokens": str(tokens.absolute()),
               "out": str(weights), "scratch": str(scratch / "run"), "threads": 8,
               "parallelism": {"tensor": layout.tensor, "sequence": layout.sequence}}
        file = scratch / f"{name}.json"
        scratch.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job))
        started = time.monotonic()
        torchrun(layout.processes, "stages.frame.worker", str(file), seconds=1200)
        run = json.loads((scratch / f"{name}-result.json").read_text())
        shutil.rmtree(weights)
        rows = run["training"]
        losses[name] = [row["loss"] for row in rows]
        rate = statistics.median(rates(scratch / "run" / "tensorboard")[-8:])
        predicted = plan(config, part, case.precisions[0] == "fp8", layout, MACHINES["h200"])
        figures["whole"][name] = {
            "resumed_from": run["resumed_from"], "training": rows, "validation": run["validation"],
            "tokens_per_second": rate / layout.processes,
            "plan_tokens_per_second": predicted.tokens_per_second / layout.processes,
            "gib": run["metrics"]["peak_memory_gib"], "plan_gib": predicted.memory.allocated / GIB,
            "seconds": time.monotonic() - started}
        figure = figures["whole"][name]
        print(f"{name}: from step {run['resumed_from'] or 0}; loss {losses[name][0]:.4f}, "
              f"{losses[name][STATE_AFTER]:.4f}, {losses[name][-1]:.4f}; "
              f"{figure['tokens_per_second']:.0f} tokens/s a GPU (plan "
              f"{figure['plan_tokens_per_second']:.0f}), {figure['gib']:.1f} GiB (plan {figure['plan_gib']:.1f}); "
              f"{figure['seconds']:.0f} s", flush=True)
    if len(layouts) == 1:
        return
    first, second = layouts
    if figures["whole"][second]["resumed_from"] != STATE_AFTER:
        raise SystemExit(f"{second} did not go on from the state of {first}.")      # or its losses would say nothing
    worst = max(abs(a / b - 1) for a, b in zip(losses[second][STATE_AFTER:], losses[first][STATE_AFTER:], strict=True))
    figures["whole"]["largest_relative_difference"] = worst
    print(f"steps {STATE_AFTER + 1} to {STEPS_OF_WHOLE}: losses at {second} and {first} differ by {worst:.2e} at most")
    if not worst < ROUNDING:
        raise SystemExit(f"More than rounding, {ROUNDING}.")


def rates(directory: Path) -> list[float]:
    """tokens/s of each step, from TensorBoard's events of the last process to write there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [event.value for event in events.Scalars("training/tokens_per_second")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["8b", *PRESETS], help="8b is 19 layers; nemotron_h_8b with --whole")
    parser.add_argument("--layers", type=int, help="the first of the pattern (default: all)")
    parser.add_argument("--layouts", help=f"of {', '.join(LAYOUTS)} (default: one,tp2,dp2; with --whole tp2,dp2)")
    parser.add_argument("--kernels", default="ours,captured,stock", help="by comma (default: %(default)s)")
    parser.add_argument("--precisions", default="fp8,bf16", help="by comma (default: %(default)s)")
    parser.add_argument("--recompute", default="", help="symbols of layers that recompute their activations")
    parser.add_argument("--bf16-gradients", action="store_true", help="added up in BF16, half the memory")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--whole", type=Path, metavar="TOKENS", help="train on these token files instead")
    parser.add_argument("--scratch", type=Path, help="with --whole: 130 GB for the 8B's weights and a state")
    parser.add_argument("--weights", type=Path, help="with --whole: the weights elsewhere; removed again")
    parser.add_argument("--out", type=out_file, help="write the figures as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(Case(*json.loads(arguments.worker)), arguments.out)
    layouts = (arguments.layouts or ("tp2,dp2" if arguments.whole else "one,tp2,dp2")).split(",")
    kernels, precisions = arguments.kernels.split(","), arguments.precisions.split(",")
    for name, given, known in (("layouts", layouts, LAYOUTS), ("kernels", kernels, KERNELS),
                               ("precisions", precisions, PRECISIONS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{name}: {', '.join(unknown)} is none of {', '.join(known)}")
    if arguments.whole and len(layouts) > 2:
        parser.error("--layouts: --whole takes one, or two of which the second goes on from the first one's state")
    cases = [Case(layout, arguments.model or ("nemotron_h_8b" if arguments.whole else "8b"), arguments.layers,
                  kernels, precisions, arguments.recompute, arguments.bf16_gradients, arguments.tiny)
             for layout in layouts]
    if bool(arguments.whole) != bool(arguments.scratch):
        parser.error("--whole and --scratch go together: token files, and a directory with 130 GB free")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    figures: dict[str, Any] = {"machine": f"{torch.cuda.device_count()} x {machine}, torch {torch.__version__}, "
                                          f"Python {platform.python_version()}", "steps": {}, "whole": {}}
    print(figures["machine"])
    report = partial(write, arguments.out, figures)
    try:
        if arguments.whole:
            train_whole(cases[0], arguments.whole, arguments.scratch, arguments.weights or arguments.scratch / "out",
                        layouts, figures)
        else:
            steps_of_layouts(cases, figures, report)
    finally:
        report()


def write(out: Path | None, figures: dict[str, Any]) -> None:
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
