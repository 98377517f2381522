"""Training steps on several GPUs, ours beside stock megatron-core + Transformer Engine + mamba_ssm, and the plan.

    python -m benchmarks.parallel_gpu [--layouts one,tp2,dp2] [--kernels ours,captured,stock] [--precisions fp8,bf16]
    python -m benchmarks.parallel_gpu --whole TOKENS --scratch DIR [--weights DIR] [--layers 52] [--out FILE]

Steps: the widths of Nemotron-H-8B in 19 layers, a micro-batch of 8,192 tokens, one layer at each end in BF16, weights
at random. A layout's processes run ours and stock one after the other, launched by Python, and ours with forward and
backward captured, as `pretrain.cuda_graph` has them: Megatron's schedule, DDP with FP32 gradients, AdamW with FP32
master weights. `tp2` is tensor and sequence parallel; `dp2` spreads the optimizer, gradients travel during the backward
and weights during the forward, of a captured step after it. Communication is the share of a step in which NCCL works,
and in brackets that in which nothing else does. tokens/s are a GPU's, the median of ten steps; memory is the most that
PyTorch held allocated.

--whole: Nemotron-H-8B of 52 layers trained in FP8 on token files by the trainer itself: 30 steps at tp2, a state after
20, and from that state again at dp2 (every layer recomputed), whose losses must be those of tp2 to rounding.
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

from benchmarks.step_gpu import GEOMETRIES, KERNELS, RECIPE, STEPS, TINY, WARMUPS, draw, release
from model.config import ModelConfig, PretrainConfig
from model.megatron.distributed import Parallelism, device, is_main_process, process_groups
from model.megatron.optimizer import build_optimizer, data_parallel
from model.megatron.step_graph import StepGraph
from model.presets import PRESETS
from model.training.plan import GIB, MACHINES, Layout, Plan, plan

# isort: split
from megatron.core.pipeline_parallel import get_forward_backward_func

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(processes=2, tensor=2, sequence=True),
    "dp2": Layout(processes=2, distributed_optimizer=True),
    "tp4": Layout(processes=4, tensor=4, sequence=True),
    "tp2 dp2": Layout(processes=4, tensor=2, sequence=True, distributed_optimizer=True),
}
STEPS_OF_WHOLE, STATE_AFTER, GLOBAL_BATCH = 30, 20, 8
ROUNDING = 5e-3                 # of a loss in FP8, as in tests/model/training/test_trainer_gpu.py


class Case(NamedTuple):
    """What a layout's processes measure, as a line of JSON."""

    layout: str
    kernels: list[str]
    precisions: list[str]
    tiny: bool


def recipe_of(layout: Layout, captured: bool) -> PretrainConfig:
    return RECIPE.model_copy(update={"global_batch_size": layout.data, "tokens": layout.data * 8192,
                                     "distributed_optimizer": layout.distributed_optimizer, "cuda_graph": captured})


@contextmanager
def whole_step(model: nn.Module, config: ModelConfig, layout: Layout, captured: bool) -> Iterator[Callable[[], Tensor]]:
    """A step of training, as a function that returns the loss."""
    recipe = recipe_of(layout, captured)

    def forward_backward(sequences: Tensor) -> list[Tensor]:
        [result] = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter([sequences]), model=[ddp], num_microbatches=1,
            seq_length=config.sequence_length, micro_batch_size=1, forward_only=False)
        return [result["loss"]]

    graph = StepGraph(model, forward_backward) if captured else None
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


def measure(config: ModelConfig, kernels: str, precision: str, layout: Layout) -> dict[str, Any]:
    """A row. What fails leaves its error in it."""
    row: dict[str, Any] = {"kernels": kernels, "precision": precision}
    try:
        built_as = "ours" if kernels == "captured" else kernels
        model = KERNELS[built_as](config, precision, Parallelism(layout.tensor, 1, layout.sequence))
        draw(model)
        with whole_step(model, config, layout, kernels == "captured") as step:
            seconds = step_seconds(step)
            rates = [layout.data * config.sequence_length / layout.processes / each for each in seconds]
            row |= {"loss": step().item(), "tokens_per_second": statistics.median(rates), "least": min(rates),
                    "most": max(rates)}
            if torch.cuda.is_available():
                row |= {"gib": torch.cuda.max_memory_allocated() / GIB, **communication(step)}
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def work(case: Case, out: Path) -> None:
    """What torchrun starts: the rows of one layout, written by the first process."""
    layout, (config, _) = LAYOUTS[case.layout], GEOMETRIES["8b"]
    config = config.model_copy(update=TINY) if case.tiny else config
    rows = []
    with process_groups(Parallelism(layout.tensor, 1, layout.sequence)):
        for precision in case.precisions:
            for kernels in case.kernels:
                if torch.cuda.is_available():
                    release()
                rows.append(measure(config, kernels, precision, layout))
                if is_main_process():
                    out.write_text(json.dumps(rows))


def torchrun(processes: int, *arguments: str, seconds: float) -> None:
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                    "-m", *arguments], check=True, timeout=seconds, env=os.environ | {"OMP_NUM_THREADS": "1"})


def predict(config: ModelConfig, precision: str, layout: Layout, captured: bool) -> Plan:
    return plan(config, recipe_of(layout, captured), precision == "fp8", layout, MACHINES["h200"])


def steps_of_layouts(cases: list[Case], figures: dict[str, Any], report: Callable[[], None]) -> None:
    config, _ = GEOMETRIES["8b"]
    print(f"{'':24} {'tokens/s a GPU':>14} {'plan':>7} {'least-most':>15} {'GiB':>6} {'plan':>6} "
          f"{'NCCL (waited for)':>18} {'loss':>8}")
    for case in cases:
        layout = LAYOUTS[case.layout]
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory, "rows.json")
            try:
                torchrun(layout.processes, "benchmarks.parallel_gpu", "--worker", json.dumps(case), "--out", str(out),
                         seconds=400)
            except subprocess.SubprocessError as error:
                print(f"{case.layout}: {error}", flush=True)
            rows = json.loads(out.read_text()) if out.exists() else []
        for row in rows:
            predicted = predict(config, row["precision"], layout, row["kernels"] == "captured")
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


def print_row(layout: str, row: dict[str, Any]) -> None:
    name = f"{layout:8} {row['kernels']:8} {row['precision']:5} "
    if "error" in row:
        print(name + row["error"], flush=True)
        return
    ends = f"{row['least']:.0f}-{row['most']:.0f}"
    nccl = f"{row.get('communication', 0):.1%} ({row.get('waited_for', 0):.1%})"
    print(name + f"{row['tokens_per_second']:15.0f} {row['plan_tokens_per_second']:7.0f} {ends:>15} "
          f"{row.get('gib', 0):6.1f} {row['plan_gib']:6.1f} {nccl:>18} {row['loss']:8.3f}", flush=True)


def train_whole(
    tokens: Path, scratch: Path, weights: Path, layers: int, tiny: bool, figures: dict[str, Any]
) -> None:
    """Train the 8B itself at tp2, then again from its state at dp2. Raises SystemExit where the losses differ."""
    full = PRESETS["nemotron_h_8b"]
    sizes = TINY | {"vocab_size": full.vocab_size} if tiny else {}
    config = full.model_copy(update={"pattern": full.pattern[:layers]} | sizes)
    recipe = RECIPE.model_copy(update={
        "tokens": STEPS_OF_WHOLE * GLOBAL_BATCH * config.sequence_length, "global_batch_size": GLOBAL_BATCH,
        "learning_rate": 2e-4, "min_learning_rate": 2e-6, "warmup_fraction": 0.2, "bf16_layers_at_start": 4,
        "bf16_layers_at_end": 4, "checkpoint_every": STATE_AFTER})
    losses = {}
    for name, recompute in (("tp2", ""), ("dp2", "M*-")):
        layout = LAYOUTS[name]._replace(recompute=recompute)
        part = recipe.model_copy(update={"recompute": recompute, "distributed_optimizer": True})
        job = {"task": "pretrain", "model": config.model_dump(mode="json"), "recipe": part.model_dump(mode="json"),
               "architecture": "hybrid", "precision": "fp8", "seed": 1, "tokens": str(tokens.absolute()),
               "out": str(weights), "scratch": str(scratch / "run"), "threads": 8,
               "parallelism": {"tensor": layout.tensor, "sequence": layout.sequence}}
        file = scratch / f"{name}.json"
        scratch.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job))
        started = time.monotonic()
        torchrun(2, "stages.frame.worker", str(file), seconds=1200)
        run = json.loads((scratch / f"{name}-result.json").read_text())
        shutil.rmtree(weights)
        rows = run["training"]
        losses[name] = [row["loss"] for row in rows]
        rate = statistics.median(rates(scratch / "run" / "tensorboard")[-8:])
        predicted = plan(config, part, True, layout, MACHINES["h200"])
        figures["whole"][name] = {
            "resumed_from": run["resumed_from"], "training": rows, "validation": run["validation"],
            "tokens_per_second": rate / 2, "plan_tokens_per_second": predicted.tokens_per_second / 2,
            "gib": run["metrics"]["peak_memory_gib"], "plan_gib": predicted.memory.allocated / GIB,
            "seconds": time.monotonic() - started}
        figure = figures["whole"][name]
        print(f"{name}: from step {run['resumed_from'] or 0}; loss {losses[name][0]:.4f}, "
              f"{losses[name][STATE_AFTER]:.4f}, {losses[name][-1]:.4f}; "
              f"{figure['tokens_per_second']:.0f} tokens/s a GPU (plan "
              f"{figure['plan_tokens_per_second']:.0f}), {figure['gib']:.1f} GiB (plan {figure['plan_gib']:.1f}); "
              f"{figure['seconds']:.0f} s", flush=True)
    if figures["whole"]["dp2"]["resumed_from"] != STATE_AFTER:
        raise SystemExit("dp2 did not go on from the state of tp2.")        # or its losses would say nothing
    worst = max(abs(a / b - 1) for a, b in zip(losses["dp2"][STATE_AFTER:], losses["tp2"][STATE_AFTER:], strict=True))
    figures["whole"]["largest_relative_difference"] = worst
    print(f"steps {STATE_AFTER + 1} to {STEPS_OF_WHOLE} at dp2 and at tp2: losses differ by at most {worst:.2e}")
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
    parser.add_argument("--layouts", default="one,tp2,dp2", help=f"of {', '.join(LAYOUTS)} (default: %(default)s)")
    parser.add_argument("--kernels", default="ours,captured,stock", help="by comma (default: %(default)s)")
    parser.add_argument("--precisions", default="fp8,bf16", help="by comma (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    parser.add_argument("--whole", type=Path, metavar="TOKENS", help="train the 8B on these token files instead")
    parser.add_argument("--scratch", type=Path, help="with --whole: 130 GB for weights and a state")
    parser.add_argument("--weights", type=Path, help="with --whole: 17 GB of these elsewhere; removed again")
    parser.add_argument("--layers", type=int, default=52, help="with --whole: of its layers (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return work(Case(*json.loads(arguments.worker)), arguments.out)
    if bool(arguments.whole) != bool(arguments.scratch):
        parser.error("--whole and --scratch go together: token files, and a directory with 130 GB free")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    figures: dict[str, Any] = {"machine": f"{torch.cuda.device_count()} x {machine}, torch {torch.__version__}, "
                                          f"Python {platform.python_version()}", "steps": {}, "whole": {}}
    print(figures["machine"])
    report = partial(write, arguments.out, figures)
    try:
        if arguments.whole:
            train_whole(arguments.whole, arguments.scratch, arguments.weights or arguments.scratch / "out",
                        arguments.layers, arguments.tiny, figures)
        else:
            steps_of_layouts([Case(layout, arguments.kernels.split(","), arguments.precisions.split(","),
                                   arguments.tiny) for layout in arguments.layouts.split(",")], figures, report)
    finally:
        report()


def write(out: Path | None, figures: dict[str, Any]) -> None:
    if out:
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
