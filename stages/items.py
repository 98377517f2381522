"""Make the evaluation items: what every model is asked, and what no training at all reaches on it.

Reads  data/PROFILE/curated, data/PROFILE/tokenizer.
Writes data/PROFILE/items/items.json, runs/PROFILE/items/metrics.json (how many of each task, how many were refused).

Items come from held-out text, none of them shares an n-gram of words with training text. A compressor's figures and a
guess's stand beside them, as controls.
"""

from __future__ import annotations

from typing import Any

from stages.frame.common import Stage, run_stage


def items(stage: Stage) -> dict[str, Any]:
    """Make the evaluation items; metrics."""
    from data_pipeline.items import evaluation_items
    from data_pipeline.tokenize.segment_encoder import SegmentEncoder
    from data_pipeline.tokenize.tokenizer import MODEL_FILE, Tokenizer

    config = stage.params.evaluate
    curated, encoder = stage.input("curated"), SegmentEncoder(Tokenizer(stage.input("tokenizer", MODEL_FILE)))

    made = evaluation_items.build(
        curated,
        items_per_task=config.items_per_task,
        bits_per_byte_kilobytes=config.bits_per_byte_kilobytes,
        recall_pairs=config.recall_pairs,
        context_tokens=config.context_tokens,
        context_multiples=config.context_multiples,
        items_per_context=config.items_per_context,
        encode=encoder.encode_text,
        seed=stage.params.seed,
    )
    texts = [item.text for domain in made.texts.values() for item in domain]
    tokens = sum(len(encoder.encode_text(text)) for text in texts)
    window_bytes = sum(len(text.encode()) for text in texts) * config.context_tokens // tokens
    with stage.output("items") as out:
        controls = evaluation_items.control(made, window_bytes, encoder.encode_text)
        evaluation_items.write(out / "items.json", made, controls)
    return {
        **{f"{domain}_texts": len(members) for domain, members in made.texts.items()},
        **{f"{task}_items": len(members) for task, members in made.tasks.items()},
        "items_refused": made.refused,
        "items_digest": made.digest(),
    }


if __name__ == "__main__":
    run_stage(items, __doc__, sections=("seed", "evaluate"))
