"""Pretrain one variant on megatron-core: an architecture, a precision (BF16 or FP8) and a seed (paper section 2).

Reads   data/PROFILE/tokens; sections pretrain, model and variants of the parameters
Writes  data/PROFILE/checkpoints/VARIANT and, in runs/PROFILE/pretrain/VARIANT, training.csv (every step),
        validation.csv (before training and at every tenth, per domain), with pretrain.fp8_statistics
        fp8_statistics.csv (at every tenth, per linear layer and tensor), metrics.json and tensorboard/

While it runs, the same files grow in .scratch/pretrain-VARIANT-*/: `tensorboard --logdir .scratch`. A killed run goes
on from its last resume state when the same command is given again. Without a GPU, FP8 is emulated: BF16 products of FP8
values, marked by fp8_emulated in metrics.json.
"""

from __future__ import annotations

import shutil
from typing import Any

from stages.common import Progress, Stage, run_stage


def pretrain(stage: Stage) -> dict[str, Any]:
    import torch

    from model.trainer import train

    params = stage.params
    assert stage.variant is not None
    variant = params.variants[stage.variant]
    torch.set_num_threads(params.runtime.threads)
    tokens = stage.input("tokens")
    with stage.output("checkpoints", stage.variant) as out:
        run = train(
            params.model_of(stage.variant), params.pretrain, variant.architecture, variant.precision, variant.seed,
            tokens, out, stage.scratch, Progress(),
        )
    stage.write_record("training.csv", csv_text(run.training))
    stage.write_record("validation.csv", csv_text(run.validation))
    if params.pretrain.fp8_statistics:
        stage.write_record("fp8_statistics.csv", csv_text(run.fp8_statistics))
    shutil.rmtree(stage.records / "tensorboard", ignore_errors=True)
    shutil.copytree(stage.scratch / "tensorboard", stage.records / "tensorboard")
    return run.metrics


def csv_text(rows: list[dict[str, Any]]) -> str:
    """Rows with a header of their keys; numbers to eight digits."""
    lines = [",".join(rows[0])]
    for row in rows:
        lines.append(",".join(f"{value:.8g}" if isinstance(value, float) else str(value) for value in row.values()))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_stage(
        pretrain, __doc__, ("seed", "pretrain", "model", "variants", "tokenizer"),
        members=lambda params: list(params.variants),
    )
