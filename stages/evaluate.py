"""Evaluate an exported model with lm-evaluation-harness on held-out text, offline.

Reads data/PROFILE/curated and data/PROFILE/hub/VARIANT. Writes metrics.json (bits per byte by domain, syntax pairs,
cloze, associative recall; beside each score what a compressor reaches with no training at all) and samples.json (a few
items of each task with what the model chose). Every model gets the same items: see `items_digest`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from typing import Any

from stages.common import Progress, Stage, run_stage


def evaluate(stage: Stage) -> dict[str, Any]:
    curated, directory = stage.input("curated"), stage.input("hub", stage.variant or "")
    # Read by huggingface_hub, datasets, transformers and tqdm when they are imported.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
    from data_pipeline import evaluation_items
    from model import evaluation

    config = stage.params.evaluate
    items = evaluation_items.build(curated, **config.model_dump(), seed=stage.params.seed)
    model = evaluation.load(directory, config.context_tokens, scratch=stage.scratch, progress=Progress())
    result = evaluation.evaluate(
        model,
        {domain: [asdict(item) for item in texts] for domain, texts in items.texts.items()},
        {task: [asdict(item) for item in choices] for task, choices in items.tasks.items()},
    )
    stage.write_record("samples.json", result.samples)
    texts = [item.text for domain in items.texts.values() for item in domain]
    tokens = sum(len(model.tok_encode(text)) for text in texts)
    window_bytes = sum(len(text.encode()) for text in texts) * config.context_tokens // tokens
    return {
        **result.metrics,
        **evaluation_items.control(items, window_bytes),
        "items_refused": items.refused,
        "items_digest": items.digest(),
    }


if __name__ == "__main__":
    run_stage(evaluate, __doc__, sections=("seed", "evaluate"), members=lambda params: params.models)
