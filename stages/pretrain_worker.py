"""One process of a pretraining run on several: what torchrun starts for `stages.pretrain`.

    torchrun --nproc-per-node=2 -m stages.pretrain_worker JOB.json

The job file names the model, recipe, layout and directories. The first process writes JOB-result.json, the records of
the run; a process that fails for a known reason writes it to JOB-error.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from stages.common import Progress, die_with_parent, write


def main() -> None:
    """Train what the job file says, as one of torchrun's processes."""
    parser = argparse.ArgumentParser(
        prog="python -m stages.pretrain_worker", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", type=Path, help="job file of stages.pretrain")
    file = parser.parse_args().job
    die_with_parent()                           # torchrun

    import torch

    from model.config import ModelConfig, ModelError, PretrainConfig
    from model.megatron.distributed import Parallelism
    from model.training.trainer import train

    job = json.loads(file.read_text())
    torch.set_num_threads(job["threads"])
    first = os.environ.get("RANK", "0") == "0"
    try:
        run = train(
            ModelConfig(**job["model"]), PretrainConfig(**job["recipe"]), job["architecture"], job["precision"],
            job["seed"], Path(job["tokens"]), Path(job["out"]), Path(job["scratch"]),
            Progress() if first else _silent, Parallelism(**job["parallelism"]),
        )
    except ModelError as error:
        write(file.with_name(f"{file.stem}-error.txt"), str(error))
        sys.exit(1)
    if first:
        write(file.with_name(f"{file.stem}-result.json"), asdict(run))


def _silent(step: int, total: int, **figures: object) -> None:
    pass


if __name__ == "__main__":
    main()
