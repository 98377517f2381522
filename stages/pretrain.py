"""Pretrain one variant on megatron-core: an architecture, a precision (BF16 or FP8) and a seed (paper section 2).

Reads   data/PROFILE/tokens; sections pretrain, model and variants of the parameters
Writes  data/PROFILE/checkpoints/VARIANT and, in runs/PROFILE/pretrain/VARIANT, training.csv (every step),
        validation.csv (before training and at every tenth, per domain), with pretrain.fp8_statistics
        fp8_statistics.csv (at every tenth, per linear layer and tensor), metrics.json and tensorboard/

While it runs, the same files grow in .scratch/pretrain-VARIANT-*/: `tensorboard --logdir .scratch`. A killed run goes
on from its last resume state when the same command is given again. `runtime.launcher` says where it runs: in this
process, or by torchrun or Slurm in several, laid out by `runtime.parallel`. Without a GPU, FP8 is emulated: BF16
products of FP8 values, marked by fp8_emulated in metrics.json.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from stages.frame.common import Stage, StageError, run_stage
from stages.frame.worker import RUN_ONLY


def pretrain(stage: Stage) -> dict[str, Any]:
    """Train one variant, here or by the launcher; metrics."""
    from stages.frame.schema import TrainingRow, ValidationRow, csv_text

    params = stage.params
    assert stage.variant is not None
    variant = params.variants[stage.variant]
    config, recipe = params.model_of(stage.variant), params.recipe_of(stage.variant)
    tokens = stage.input("tokens")
    stage.run_only = RUN_ONLY
    check_tokenizer(stage.place("tokenizer", "tokenizer.model"), tokens / "tokens.json")
    check_budget(tokens / "blend.json", recipe.tokens)
    with stage.output("checkpoints", stage.variant) as out:
        run = stage.run_job({
            "task": "pretrain", "model": config.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json"),
            **variant.model_dump(), "tokens": str(tokens.absolute()), "out": str(out.absolute()),
        })
    stage.write_record("training.csv", csv_text(TrainingRow(**row) for row in run["training"]))
    stage.write_record("validation.csv", csv_text(ValidationRow(**row) for row in run["validation"]))
    if params.pretrain.fp8_statistics:
        stage.write_record("fp8_statistics.csv", csv_text(run["fp8_statistics"]))
    shutil.rmtree(stage.records / "tensorboard", ignore_errors=True)
    shutil.copytree(stage.scratch / "tensorboard", stage.records / "tensorboard")
    metrics: dict[str, Any] = run["metrics"]
    return metrics


def check_tokenizer(model: Path, tokens: Path) -> None:
    """Raise StageError where the tokenizer beside the tokens, if there is one, is not the one that made them."""
    if not (model.exists() and tokens.exists()):
        return
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    made_with = json.loads(tokens.read_text()).get("tokenizer_digest")
    if made_with != digest:
        raise StageError(
            f"{tokens}: made with tokenizer {str(made_with)[:12]}, and {model} is {digest[:12]}.\n"
            "Run `dvc repro tokenize` again, with tokenize.tokenizer null."
        )


def check_budget(blend: Path, tokens: int) -> None:
    """Raise StageError for more tokens than those for which it was counted how often each file is read."""
    made_for = json.loads(blend.read_text()).get("tokens", tokens)
    if tokens > made_for:
        raise StageError(
            f"{blend}: made for {made_for:,} tokens, and pretrain.tokens is {tokens:,}: files would be read more often "
            "than tokenize.repeats says.\nRun the stage `tokenize` with it first, or lower it."
        )


if __name__ == "__main__":
    run_stage(
        pretrain, __doc__, ("seed", "pretrain", "model", "variants", "tokenizer"),
        members=lambda params: list(params.variants),
    )
