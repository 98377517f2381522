"""Evaluate an exported model with lm-evaluation-harness, offline, on the items of the stage `items`.

Reads data/PROFILE/items, data/PROFILE/curated (for the card, where that text trained it) and data/PROFILE/hub/VARIANT.
Writes, in runs/PROFILE/evaluate/VARIANT,
  metrics.json      bits per byte by domain, accuracy of every task; beside each what no training at all reaches
  scores.json       the same by item, for paired comparisons
  samples.json      a few items of each task with what the model chose
  paper_tasks.json  the paper's own tasks, and why one was left out
  README.md         the model card with these results, to be published in place of the directory's

Every model gets the same items: see `items_digest`. With `runtime.parallel.tensor` a model is split over so many
processes, on as many GPUs.
"""

from __future__ import annotations

import json
from typing import Any

from stages.frame.common import Stage, go_offline, run_stage


def evaluate(stage: Stage) -> dict[str, Any]:
    """Score one exported model on its items and the paper's; metrics."""
    go_offline()
    asked, curated = stage.input("items", "items.json"), stage.input("curated", "manifest.json")
    directory = stage.input("hub", stage.variant or "")
    from data_pipeline.items import evaluation_items
    from model import hub
    from model.costs import parameters
    from model.evaluation.harness import card_scores, cut_contexts
    from model.model_card import Measured, model_card

    items, controls = evaluation_items.read(asked)
    geometry = hub.read_config(directory)
    result = stage.run_job({
        "task": "evaluate", "directory": str(directory.absolute()), "items": str(asked.absolute()),
        "evaluate": stage.params.evaluate.model_dump(),
    }, one_model=True)
    metrics: dict[str, Any] = {**result["metrics"], **controls}
    for line in cut_contexts(metrics):
        print(line, flush=True)
    training, text = hub.read_json(directory / "training.json"), json.loads(curated.read_text())
    is_its_own = training.get("corpus_digest") == text["corpus_digest"]         # not a model's from elsewhere
    measured = Measured(card_scores(metrics), text["train"] if is_its_own else {}, items.digest())
    dtype = hub.read_json(directory / "config.json")["torch_dtype"]
    stage.write_record("README.md", model_card(geometry, parameters(geometry), training, dtype, measured))
    stage.write_record("samples.json", result["samples"])
    stage.write_record("scores.json", json.dumps(result["scores"], separators=(",", ":")) + "\n")
    stage.write_record("paper_tasks.json", result["paper"])
    return {**metrics, "items_refused": items.refused, "items_digest": items.digest()}


if __name__ == "__main__":
    run_stage(evaluate, __doc__, sections=("seed", "evaluate"), members=lambda params: params.models)
