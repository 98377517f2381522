"""Say what a profile's pretraining will take: memory of a GPU, speed, days, GPU-hours.

    python -m flows.plan nemotron-h-56b                         each variant of the profile
    python -m flows.plan nemotron-h-8b --machine h200 --set runtime.parallel.tensor=1

The layout is `runtime.launcher` and `runtime.parallel`; without a profile, params.yaml is read. Exits 1 where a layout
does not fit into a GPU's memory, and names the nearest that does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from flows import profile
from flows.console import table
from model.config import ModelError
from model.training.plan import GIB, MACHINES, Layout, Machine, Plan, nearest_that_fits, plan
from stages.params import Params, load_params

MEMORY_ROWS = {
    "weights": "weights, BF16", "fp8_copies": "weights, FP8 copies", "gradients": "gradients, FP32",
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


def plans(params: Params, machine: Machine) -> dict[str, Plan]:
    """The first seed of each architecture and precision. Raises ModelError for a layout that cannot be."""
    found: dict[str, Plan] = {}
    seen = set()
    for name, variant in params.variants.items():
        if (kind := (variant.architecture, variant.precision)) not in seen:
            seen.add(kind)
            config = params.model_of(name)
            found[name] = plan(config, params.recipe_of(name), variant.precision == "fp8", layout_of(params), machine)
    return found


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


def refusals(found: dict[str, Plan]) -> list[str]:
    """For each plan that does not fit: by how much, and the nearest layout that does."""
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
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", nargs="?", help="of profiles/; without it, params.yaml as it stands")
    parser.add_argument("--machine", choices=MACHINES, default="h100", help="kind of GPU (h100)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        file = Path("params.yaml")
        if options.profile:
            file = Path(directory, f"{options.profile}.yaml")
            file.write_text(profile.resolve(options.profile))
        params = load_params(file, tuple(options.set))
    try:
        found = plans(params, MACHINES[options.machine])
    except ModelError as error:
        sys.exit(str(error))
    layout = layout_of(params)
    recipe = params.pretrain
    machine = MACHINES[options.machine]
    print(f"{params.profile}: {recipe.tokens:,} tokens in batches of {recipe.global_batch_size} sequences, on "
          f"{layout.processes} x {machine.name}\n{layout}\n\n{describe(found)}")
    if wrong := refusals(found):
        sys.exit("\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
