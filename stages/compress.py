"""Compress a pretrained hybrid with MiniPuzzle, and make its random control (paper section 3).

Reads  data/PROFILE/tokens, data/PROFILE/checkpoints/PARENT (compress.parent).
Writes data/PROFILE/checkpoints/compressed and compressed-random,
       runs/PROFILE/compress/{importance,candidates,ranking,task,short,final,controls,costs,model,metrics}.json,
       distillation.csv.

Layers and widths are scored by forward passes; every largest model within the budgets is a candidate; the best by kept
importance, then next-token accuracy and agreement with the parent, then a task, then a short distillation is distilled
in full. The controls have the same shape: drawn at random, one of them with the same distillation, and the least
important kept. A killed run goes on where it was. docs/compression.md has the details.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.frame.common import OWN_TOKENIZER, Stage, run_stage
from stages.frame.worker import RUN_ONLY

DIRECTORIES = {"compressed": "compressed", "random": "compressed-random"}


def compress(stage: Stage) -> dict[str, Any]:
    """Compress the parent, and cut its random control; metrics."""
    from model.checkpoint import describe, read_description
    from stages.frame.schema import DistillationRow, csv_text

    params = stage.params
    config = params.compress
    stage.run_only = {"compress.checkpoint_every", *RUN_ONLY}
    tokens, parent = stage.input("tokens"), stage.input("checkpoints", config.parent)
    _, training = read_description(parent)
    result = stage.run_job({
        "task": "compress", "parent": str(parent.absolute()), "tokens": str(tokens.absolute()), "seed": params.seed,
        "compress": config.model_dump(mode="json"), "recipe": params.recipe_of(config.parent).model_dump(mode="json"),
    })
    metrics: dict[str, Any] = result["metrics"]
    print(*shortfalls(metrics, result["records"]["costs"]), sep="", end="", flush=True)
    for name, directory in result["models"].items():
        facts = {
            "parent": config.parent,
            "layers_kept": result["layers"][name],
            "precision": result["precision"],
            "seed": params.seed,
            "corpus_digest": json.loads((tokens / "tokens.json").read_text())["corpus_digest"],
            "distillation_tokens": metrics["distillation_tokens"],
            "validation_bits_per_byte": metrics[f"validation_bits_per_byte_{name}"],
            "validation_bits_per_byte_parent": metrics["validation_bits_per_byte_parent"],      # its own: of more text
            "parent_training": training,
        }
        with stage.output("checkpoints", DIRECTORIES[name]) as out:
            shutil.copytree(directory, out, dirs_exist_ok=True)
            describe(out, read_description(out)[0], facts)
            if (parent / OWN_TOKENIZER).exists():
                shutil.copytree(parent / OWN_TOKENIZER, out / OWN_TOKENIZER)
    for name, content in result["records"].items():
        stage.write_record(f"{name}.json", content)
    model = read_description(Path(result["models"]["compressed"]))[0]
    stage.write_record("model.json", model.model_dump(mode="json"))
    rows = (DistillationRow(model=name, step=step, tokens=seen, kl=kl) for name, step, seen, kl in result["curve"])
    stage.write_record("distillation.csv", csv_text(rows, digits=6))
    return metrics


def shortfalls(metrics: Mapping[str, float], costs: Mapping[str, Any]) -> list[str]:
    """A line for each model that its distillation took away from the parent, and for a decode step beyond its budget.

    Args:
        costs: the record `Costs`, as JSON has it.
    """
    from model.compression.schema import DECODE_STEP

    ends = {"compressed": ("kl_parent_cut", "kl_parent_compressed"),
            "compressed-random": ("kl_parent_random_cut", "kl_parent_random")}
    lines = [f"checkpoints/{name}: KL to the parent is {metrics[end]:.3g} nats after distillation, "
             f"{metrics[start]:.3g} just cut: distillation did harm. Lower compress.learning_rate.\n"
             for name, (start, end) in ends.items() if not metrics[end] < metrics[start]]
    limit = costs["budgets"].get(DECODE_STEP)
    if limit is not None and (step := costs["models"]["compressed"]["decode_seconds"]) > limit:
        lines.append(f"checkpoints/compressed: a decode step takes {1e3 * step:.3g} ms, the budget is "
                     f"{1e3 * limit:.3g}: layers do not quite add up. Lower compress.latency.budget_fraction.\n")
    return lines


if __name__ == "__main__":
    run_stage(compress, __doc__, sections=("compress", "pretrain", "variants", "seed"))
