"""Train the SentencePiece tokenizer on a sample of the curated training documents.

Reads   data/PROFILE/curated/
Writes  data/PROFILE/tokenizer/tokenizer.model
        runs/PROFILE/tokenizer/metrics.json: vocabulary, megabytes it was trained on, of which the corpus may have fewer
        than were asked for, and bytes a token on held-out text it was not trained on
"""

from __future__ import annotations

from typing import Any

from stages.frame.common import Stage, run_stage

MEASURED_BYTES = 200_000     # held-out text a domain on which bytes a token are measured


def tokenizer(stage: Stage) -> dict[str, Any]:
    """Train the tokenizer; metrics."""
    from data_pipeline.curated import sample, shards
    from data_pipeline.tokenize import tokenizer as library

    curated, seed = stage.input("curated"), stage.params.seed
    heldout = sample(shards(curated, "heldout"), MEASURED_BYTES, seed)      # where there is none: before the work
    with stage.output("tokenizer") as out:
        used = library.train(curated, stage.params.tokenizer, seed, out)
        trained = library.Tokenizer(out / library.MODEL_FILE)
    metrics: dict[str, Any] = {"vocab_size": trained.vocab_size, "digest": trained.digest,
                               "training_megabytes": used / 1e6}
    texts = heldout.select(["domain", "text"]).to_pylist()
    all_bytes = all_tokens = byte_tokens = 0
    for domain in sorted({row["domain"] for row in texts}):
        documents = [row["text"] for row in texts if row["domain"] == domain]
        size = sum(len(text.encode()) for text in documents)
        ids = [token for encoded in trained.encode_batch(documents) for token in encoded]
        metrics[f"bytes_per_token_{domain}"] = size / len(ids)
        all_bytes, all_tokens = all_bytes + size, all_tokens + len(ids)
        byte_tokens += sum(token in library.BYTE_IDS for token in ids)
    metrics["bytes_per_token"] = all_bytes / all_tokens
    metrics["byte_fallback_share"] = byte_tokens / all_tokens
    return metrics


if __name__ == "__main__":
    run_stage(tokenizer, __doc__, sections=("seed", "tokenizer"))
