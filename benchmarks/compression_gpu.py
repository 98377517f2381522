"""Compression on a GPU: memory and decode latency of unseen candidates, predicted and measured; distillation's speed.

    python -m benchmarks.compression_gpu [--model h200|nemotron_h_8b] [--context 65536] [--batch 16] [--out FILE.json]

First a latency table of the parent's layers and widths and an overhead fitted on five models, as the compress stage
makes them; then ten candidates drawn from the grid, none of them among those, each predicted and then built with random
weights and timed (CUDA graph). Memory is the most that was allocated while it decoded. Last, for the h200 profile's
model, the loss kernel beside PyTorch's operations.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_timing import milliseconds
from kernels.forward_kl import forward_kl
from model import costs
from model.benchmark.decode import fill_caches, step_seconds
from model.compression.candidates import maximal_cells, share_budget
from model.compression.config import Workload
from model.compression.importance import rank_correlation
from model.compression.latency import measure_table
from model.config import Geometry, ModelConfig
from model.inference.decoder import Decoder
from model.inference.random_weights import random_model
from model.presets import PRESETS
from stages.params import read_yaml

CANDIDATES = 10
PARAMETERS_KEPT = 0.83
STEPS, REPEATS = 32, 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def silent(*_: Any, **__: Any) -> None:
    """No lines between those of the tables."""


def parent_of(name: str) -> tuple[ModelConfig, list[int]]:
    """The geometry, and FFN widths from two thirds of its own up, in steps of a twelfth."""
    if name in PRESETS:
        config = PRESETS[name]
    else:
        profile = read_yaml(Path(f"profiles/{name}.yaml"))
        geometry = Geometry(**profile["model"]["hybrid"])
        config = ModelConfig(**geometry.model_dump(), vocab_size=profile["tokenizer"]["vocab_size"])
    return config, [config.ffn_hidden_size * part // 12 for part in (8, 9, 10, 11, 12)]


def measured(config: ModelConfig, workload: Workload) -> tuple[float, int]:
    """Seconds of a decode step, and the most bytes allocated over it beyond what was before."""
    before = 0
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    decoder = Decoder(random_model(config, torch.bfloat16, DEVICE), workload.context, workload.batch)
    fill_caches(decoder, 0)
    seconds = step_seconds(decoder, workload.context, workload.decode_tokens, workload.repeats)
    if DEVICE == "cuda":
        return seconds, torch.cuda.max_memory_allocated() - before
    return seconds, decoder.cache_bytes + sum(parameter.nbytes for parameter in decoder.model.parameters())


def predictions(name: str, context: int, batch: int, seed: int) -> dict[str, Any]:
    """Ten unseen candidates, predicted and measured."""
    parent, widths = parent_of(name)
    workload = Workload(context=context, batch=batch, decode_tokens=STEPS, repeats=REPEATS)
    deployment = costs.Deployment.of(context, batch)
    budget = share_budget("parameters", PARAMETERS_KEPT, costs.parameters, parent, "")
    cells = maximal_cells(parent, widths, 1, [budget])
    draw = random.Random(seed)
    drawn = [cell.config(parent) for cell in draw.sample(cells, min(len(cells), CANDIDATES + 4))]
    fitted, unseen = [parent, *drawn[:4]], drawn[4:]
    geometries = [parent.model_copy(update={"ffn_hidden_size": width}) for width in widths]
    started = time.perf_counter()
    table = measure_table(parent, geometries, fitted, workload, seed, silent)
    table_seconds = time.perf_counter() - started
    # what the runtime takes besides weights and caches: workspaces of matrix products, logits
    small = parent.model_copy(update={"pattern": "M*-"})
    workspace = measured(small, workload)[1] - costs.memory(small, deployment).total
    rows = []
    for config in unseen:
        seconds, peak = measured(config, workload)
        predicted = costs.memory(config, deployment).total
        rows.append({
            "mamba": config.pattern.count("M"), "attention": config.pattern.count("*"),
            "ffn": config.pattern.count("-"), "ffn_hidden_size": config.ffn_hidden_size,
            "predicted_ms": 1e3 * table.seconds(config), "measured_ms": 1e3 * seconds,
            "latency_error": table.seconds(config) / seconds - 1,
            "predicted_bytes": predicted, "measured_bytes": peak, "memory_error": (predicted + workspace) / peak - 1,
        })
    parent_seconds = measured(parent, workload)[0]
    ranks = rank_correlation(*(torch.tensor([row[key] for row in rows]) for key in ("predicted_ms", "measured_ms")))
    return {
        "model": name, "context": context, "batch": batch, "table": table.record(), "table_seconds": table_seconds,
        "workspace_bytes": workspace, "parent_ms": 1e3 * parent_seconds, "candidates": rows,
        "largest_latency_error": max(abs(row["latency_error"]) for row in rows),
        "largest_memory_error": max(abs(row["memory_error"]) for row in rows),
        "latency_rank_correlation": ranks,
        "speedups": sorted(1e3 * parent_seconds / row["measured_ms"] for row in rows),
    }


def loss_kernel(rows: int, vocab: int) -> dict[str, float]:
    """Forward and gradient of the loss, ours and of PyTorch's operations, BF16 logits."""
    student, teacher = (2 * torch.randn(rows, vocab, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    student.requires_grad_()

    def ours() -> None:
        student.grad = None
        forward_kl(student, teacher).backward()

    def theirs() -> None:
        student.grad = None
        F.kl_div(student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True,
                 reduction="batchmean").backward()

    exact = F.kl_div(student[:256].double().log_softmax(-1), teacher[:256].double().log_softmax(-1), log_target=True,
                     reduction="batchmean")
    error = abs(forward_kl(student[:256].detach(), teacher[:256]).item() / exact.item() - 1)
    return {"kl_ours_ms": milliseconds(ours), "kl_pytorch_ms": milliseconds(theirs), "kl_relative_error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="h200", choices=["h200", *PRESETS])
    parser.add_argument("--context", type=int, default=65_536)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    found = predictions(options.model, options.context, options.batch, options.seed)
    if options.model == "h200":
        found |= loss_kernel(8192, 32_768)
    found["device"] = torch.cuda.get_device_name()
    found["seconds"] = time.perf_counter() - started
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print("  M   *   -  width  predicted ms  measured ms   error  memory")
    for row in found["candidates"]:
        print(f"{row['mamba']:>3} {row['attention']:>3} {row['ffn']:>3} {row['ffn_hidden_size']:>6} "
              f"{row['predicted_ms']:>13.3f} {row['measured_ms']:>12.3f} {row['latency_error']:>+7.1%} "
              f"{row['memory_error']:>+7.2%}")
    for name, value in found.items():
        if isinstance(value, float | int | str):
            print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"speedups: {', '.join(f'{value:.2f}' for value in found['speedups'])}")


if __name__ == "__main__":
    main()
