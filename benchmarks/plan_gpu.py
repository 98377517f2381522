"""What `make plan` predicts beside what a GPU measures: memory and speed of whole training steps, one GPU.

    python -m benchmarks.plan_gpu [--only NAMES] [--out FILE.json]

Each configuration trains a few steps (Megatron's DDP with FP32 gradients, AdamW with FP32 master weights) with `model.
spec`, as one CUDA graph or launched by Python. Memory is the most that PyTorch held allocated, so the plan's is without
what CUDA takes for itself; time is the median step. The plan should be within 10 % of the memory and 20 % of the speed:
the last line says whether it is. The rates it rests on are those of `model.training.plan.MACHINES`; the machine's own
are shown.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from typing import Any, NamedTuple

import torch

from benchmarks.step_gpu import GEOMETRIES, RECIPE, draw, median_milliseconds, our_model, release, steps
from model.benchmark.roofline import measure_ceilings
from model.config import ModelConfig
from model.megatron.distributed import process_groups
from model.presets import matched_transformer
from model.training.plan import GIB, MACHINES, Layout, Plan, plan
from stages.frame.common import out_file

MEMORY_TOLERANCE, SPEED_TOLERANCE = 0.10, 0.20

_8B, _ = GEOMETRIES["8b"]
_222M, _ = GEOMETRIES["222m"]
# The hybrid of the h200 profile: 41 layers, 100.6 million parameters.
_100M = _222M.model_copy(update={
    "pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "hidden_size": 512, "ffn_hidden_size": 1536,
    "num_attention_heads": 8, "num_query_groups": 2, "mamba_num_heads": 16, "mamba_state_dim": 64,
    "mamba_num_groups": 4, "sequence_length": 2048,
})


class Case(NamedTuple):
    config: ModelConfig
    batch: int
    precision: str
    captured: bool = True


CASES = {
    "8b width, 10 layers, bf16": Case(_8B.model_copy(update={"pattern": "M-M-M*-M-M"}), 1, "bf16"),
    "8b width, 10 layers, fp8": Case(_8B.model_copy(update={"pattern": "M-M-M*-M-M"}), 1, "fp8"),
    "222m, bf16": Case(_222M, 8, "bf16"),
    "222m, fp8": Case(_222M, 8, "fp8"),
    "100m, bf16": Case(_100M, 32, "bf16"),
    "100m, bf16, by Python": Case(_100M, 32, "bf16", captured=False),
    "100m transformer, bf16": Case(matched_transformer(_100M), 32, "bf16"),
    "100m transformer, by Python": Case(matched_transformer(_100M), 32, "bf16", captured=False),
}


def predict(case: Case, machine: str) -> Plan:
    """The plan of a step of `case`."""
    recipe = RECIPE.model_copy(update={
        "tokens": case.batch * case.config.sequence_length, "global_batch_size": case.batch,
        "micro_batch_size": case.batch, "cuda_graph": case.captured,
    })
    return plan(case.config, recipe, case.precision == "fp8", Layout(micro_batch_size=case.batch), MACHINES[machine])


def measure(case: Case) -> tuple[float, float]:
    """Bytes allocated at most, and seconds of a step."""
    release()
    model = our_model(case.config, case.precision)
    draw(model)
    model.batch_size = case.batch
    stages = steps(model, case.captured)
    next(stages)                # forward and backward alone
    step = next(stages)
    milliseconds = median_milliseconds(step)
    return torch.cuda.max_memory_allocated(), milliseconds / 1e3


def row_of(name: str, case: Case, machine: str) -> dict[str, Any]:
    """Predicted and measured figures of a case. What fails leaves its error in it."""
    predicted = predict(case, machine)
    row: dict[str, Any] = {
        "case": name, "predicted_gib": predicted.memory.allocated / GIB, "predicted_ms": 1e3 * predicted.time.total,
        "predicted_parts_gib": {part: size / GIB for part, size in predicted.memory._asdict().items()},
        "predicted_parts_ms": {part: 1e3 * value for part, value in predicted.time._asdict().items()},
    }
    started = time.monotonic()
    try:
        size, seconds = measure(case)
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        row |= {"measured_gib": size / GIB, "measured_ms": 1e3 * seconds,
                "memory_error": predicted.memory.allocated / size - 1,
                "speed_error": seconds / predicted.time.total - 1}
    row["seconds"] = time.monotonic() - started
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases by their beginning, by comma; all without it")
    parser.add_argument("--out", type=out_file, help="write the figures as JSON")
    arguments = parser.parse_args()
    wanted = tuple(arguments.only.split(",")) if arguments.only else ("",)
    if unknown := [start for start in wanted if not any(name.startswith(start) for name in CASES)]:
        parser.error(f"--only: no such case: {', '.join(unknown)}")
    if not torch.cuda.is_available():
        raise SystemExit("No GPU was found.\nThis compares a plan with steps on one: `make plan` works anywhere.")
    from benchmarks.gpu_timing import parallel_compilation

    device = torch.cuda.get_device_name()
    machine = "h200" if "H200" in device else "h100"
    found = measure_ceilings(torch.device("cuda"), torch.bfloat16, fp8=True)
    rows = []
    with process_groups(), parallel_compilation():
        for name, case in CASES.items():
            if name.startswith(wanted):
                rows.append(row_of(name, case, machine))
                print(f"{name}: {rows[-1]['seconds']:.0f} s", flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")
    print(f"\n{device}, torch {torch.__version__}, Python {platform.python_version()}; large products and copies here: "
          f"{found.flops_per_second / 1e12:.0f} BF16 and {found.layer_flops_per_second / 1e12:.0f} FP8 TFLOP/s, "
          f"{found.bytes_per_second / 1e12:.2f} TB/s")
    print(f"{'':28} {'GiB: plan':>10} {'measured':>9} {'error':>7} | {'ms: plan':>9} {'measured':>9} {'speed':>7}")
    for row in rows:
        if "error" in row:
            print(f"{row['case']:28} {row['error']}")
            continue
        print(f"{row['case']:28} {row['predicted_gib']:10.2f} {row['measured_gib']:9.2f} {row['memory_error']:+7.1%} | "
              f"{row['predicted_ms']:9.1f} {row['measured_ms']:9.1f} {row['speed_error']:+7.1%}")
    good = all("error" not in row and abs(row["memory_error"]) <= MEMORY_TOLERANCE
               and abs(row["speed_error"]) <= SPEED_TOLERANCE for row in rows)
    print(f"{'' if good else 'NOT '}within 10 % of memory and 20 % of speed everywhere.")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
