"""What a stage runs on its GPUs: here in one process, or in each of the processes that torchrun starts.

    torchrun --nproc-per-node=2 -m stages.frame.worker JOB.json

The job file names the task, its settings, layout and directories. The first process writes JOB-result.json; a process
that fails for a known reason writes it to JOB-error.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.frame.common import Progress, die_with_parent, write


def pretrain(job: dict[str, Any], progress: Callable[..., None]) -> Any:
    """Train a model: `model.training.trainer.TrainingRun`."""
    from model.config import ModelConfig, PretrainConfig
    from model.megatron.distributed import Parallelism
    from model.training.trainer import train

    return train(
        ModelConfig(**job["model"]), PretrainConfig(**job["recipe"]), job["architecture"], job["precision"],
        job["seed"], Path(job["tokens"]), Path(job["out"]), Path(job["scratch"]), progress,
        Parallelism(**job["parallelism"]),
    )


def compress(job: dict[str, Any], progress: Callable[..., None]) -> Any:
    """Compress a checkpoint: `model.compression.funnel.Compression`."""
    from model.checkpoint import read_description
    from model.compression.config import CompressConfig
    from model.compression.data import read_data
    from model.compression.funnel import compress
    from model.config import PretrainConfig
    from model.megatron.distributed import Parallelism, process_groups
    from model.training.token_data import check

    config, parallelism, parent = CompressConfig(**job["compress"]), Parallelism(**job["parallelism"]), job["parent"]
    tokens, scratch, seed = Path(job["tokens"]), Path(job["scratch"]), job["seed"]
    geometry, _ = read_description(Path(parent))
    check(tokens, geometry.vocab_size)          # a parent from elsewhere may have another tokenizer
    with process_groups(parallelism):
        data = read_data(tokens, geometry.sequence_length, config, seed, scratch / "index")
        return compress(Path(parent), tokens, data, config, PretrainConfig(**job["recipe"]), seed, scratch, progress,
                        parallelism)


def evaluate(job: dict[str, Any], progress: Callable[..., None]) -> dict[str, Any]:
    """Ask an exported model its items and the paper's tasks: what the stage writes."""
    from data_pipeline import evaluation_sets
    from data_pipeline.items import evaluation_items
    from model.evaluation import harness
    from model.evaluation.paper_tasks import PAPER_TASKS, run_paper_tasks
    from model.processes import job_processes
    from stages.frame.params import EvaluateConfig

    config = EvaluateConfig(**job["evaluate"])
    items, _ = evaluation_items.read(Path(job["items"]))
    with job_processes():
        model = harness.load(Path(job["directory"]), config.context_tokens, config.longest_context,
                             scratch=Path(job["scratch"]), progress=progress)
        result = harness.evaluate(model, *items.rows)
        paper = run_paper_tasks(model.within(config.context_tokens), PAPER_TASKS, evaluation_sets, config.paper_items,
                                config.generation)
    return {"metrics": result.metrics, "samples": result.samples, "scores": result.scores, "paper": paper}


def benchmark(job: dict[str, Any], progress: Callable[..., None]) -> dict[str, Any]:
    """Time models as the stage describes, and the published ones: rows of `model.benchmark.decode.measure`, metrics."""
    import torch

    from model.benchmark.decode import measure
    from model.benchmark.serving import published_pairs
    from model.config import ModelConfig
    from model.processes import TensorRanks, job_processes

    config, device = job["benchmark"], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: ModelConfig(**geometry) for name, geometry in job["models"].items()}
    with job_processes():
        ranks = TensorRanks.of_job()
        published = published_pairs(config["published"], device, ranks)
        rows = list(measure(models, config["contexts"], config["batch"], config["decode_tokens"], config["repeats"],
                            config["longest_prompt"], config["output_tokens"], job["seed"], torch.bfloat16, device,
                            progress, ranks))
    return {"metrics": published, "rows": rows}


# Settings that say how it is run, not what comes out.
RUN_ONLY = {"pretrain.checkpoint_every", "pretrain.checkpoints_kept", "pretrain.check_kernels"}
TASKS = {"pretrain": pretrain, "compress": compress, "evaluate": evaluate, "benchmark": benchmark}


def run(job: dict[str, Any], progress: Callable[..., None]) -> dict[str, Any]:
    """Do what the job says. Returns its result as JSON has it, which only the first of several processes knows whole.

    Raises:
        ModelError: the task's.
    """
    import torch
    from pydantic_core import to_jsonable_python

    torch.set_num_threads(job["threads"])
    result: dict[str, Any] = to_jsonable_python(TASKS[job["task"]](job, progress))
    return result


def main() -> None:
    """Do what the job file says, as one of torchrun's processes."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.frame.worker", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", type=Path, help="job file of a stage")
    file = parser.parse_args().job
    die_with_parent()                           # torchrun

    from model.config import ModelError

    first = os.environ.get("RANK", "0") == "0"
    try:
        result = run(json.loads(file.read_text()), Progress() if first else _silent)
    except ModelError as error:
        write(file.with_name(f"{file.stem}-error.txt"), str(error))
        sys.exit(1)
    if first:
        write(file.with_name(f"{file.stem}-result.json"), result)


def _silent(step: int, total: int, **figures: object) -> None:
    pass


if __name__ == "__main__":
    main()
