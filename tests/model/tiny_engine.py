"""Models and recipes small enough for the engine's tests, and worker processes that train in parallel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from model.config import ModelConfig, PretrainConfig

ROOT = Path(__file__).resolve().parents[2]

HYBRID = ModelConfig(
    pattern="M-*M", hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    mamba_num_heads=4, mamba_head_dim=8, mamba_state_dim=8, mamba_num_groups=2, chunk_size=8, sequence_length=16,
    init_method_std=0.1, vocab_size=64,
)
TRANSFORMER = ModelConfig(
    pattern="*-*-", hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    position_embedding="rope", sequence_length=16, init_method_std=0.1, vocab_size=64,
)
RECIPE = PretrainConfig(
    tokens=4 * 16 * 6, global_batch_size=4, micro_batch_size=2, learning_rate=1e-2, min_learning_rate=1e-4,
    warmup_fraction=0.2, decay_fraction=0.4, decay_style="minus_sqrt", weight_decay=0.1, adam_betas=(0.9, 0.95),
    clip_grad=1.0, bf16_layers_at_start=1, bf16_layers_at_end=1, evaluations=2, checkpoint_every=100,
)


def run_processes(count: int, jobs: list[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """Train each of `jobs` (arguments of `train_job`) on `count` gloo processes; the results, in order."""
    jobs_file, results_file = directory / "jobs.json", directory / "results.json"
    jobs_file.write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, str(jobs_file), str(results_file)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), errors
    return json.loads(results_file.read_text())


def train_job(tokens: str, out: str, scratch: str, parallelism: dict[str, Any], precision: str = "float32",
              checkpoint_every: int = 100) -> dict[str, Any]:
    """One training run of the hybrid, as JSON."""
    from model.distributed import Parallelism
    from model.trainer import train

    recipe = RECIPE.model_copy(update={"checkpoint_every": checkpoint_every})
    run = train(
        HYBRID, recipe, "hybrid", precision, 1, Path(tokens), Path(out), Path(scratch), lambda *_, **__: None,
        Parallelism(**parallelism),
    )
    return {"training": run.training, "validation": run.validation, "resumed_from": run.resumed_from}


def main() -> None:
    """A worker process: train all jobs, the first process writes the results."""
    import torch

    torch.set_num_threads(1)
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        results.append(train_job(**job))
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)     # the old store may still close
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":          # Megatron's checkpoint writer starts processes that import this file
    main()
