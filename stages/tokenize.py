"""Encode the curated documents into Megatron token files and weigh them for the phases of training.

Reads   data/PROFILE/curated/, data/PROFILE/tokenizer/ (or what tokenize.tokenizer names)
Writes  data/PROFILE/tokens/train/DOMAIN-LABEL.{bin,idx}     every training document
        data/PROFILE/tokens/validation/DOMAIN.{bin,idx}      held-out documents, some kilobytes a domain
        data/PROFILE/tokens/tokens.json, blend.json, token_bytes.npy (UTF-8 bytes each id stands for)
        runs/PROFILE/tokenize/metrics.json: tokens, bytes a token, unknown and byte tokens, times each file is read
        runs/PROFILE/tokenize/blend.json: blend.json, with the bound on repeats and what each file holds

One shard is one task. An interrupted run keeps the shards it had finished.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.frame.common import Progress, Stage, StageError, run_stage

if TYPE_CHECKING:
    from data_pipeline.tokenize.tokenization import Counts


def tokenize(stage: Stage) -> dict[str, Any]:
    """Encode what was curated and blend it into phases; metrics."""
    import numpy as np

    from data_pipeline.curated import manifest, shards
    from data_pipeline.schema import Blend
    from data_pipeline.tokenize import tokenization
    from data_pipeline.tokenize.blend import blend, shortfalls
    from data_pipeline.tokenize.hub_tokenizer import HubTokenizer
    from data_pipeline.tokenize.indexed_dataset import token_dtype
    from data_pipeline.tokenize.tokenizer import MODEL_FILE
    from data_pipeline.workers.executor import workers

    curated, config, budget = stage.input("curated"), stage.params.tokenize, stage.params.pretrain.tokens
    if config.tokenizer and not Path(config.tokenizer).is_dir():
        raise StageError(f"tokenize.tokenizer: {config.tokenizer} is no directory.\nName a Hugging Face one, or null.")
    model = Path(config.tokenizer) if config.tokenizer else stage.input("tokenizer", MODEL_FILE)
    tokenizer, train = tokenization.encoder_of(model).tokenizer, shards(curated, "train")
    if isinstance(tokenizer, HubTokenizer):
        stage.inputs += tokenizer.files
    with workers(stage.params.runtime) as pool:
        most = tokenization.most_tokens(train, pool)
        blend(config.phases, most, budget, config.repeats)                  # what cannot be fails before the work
        files = tokenization.tokenize_shards(train, model, stage.scratch, pool, Progress())
    heldout = shards(curated, "heldout")
    files |= tokenization.tokenize_sample(
        heldout, config.validation_kilobytes_per_domain * 1000, stage.params.seed, model, stage.scratch
    )
    mixture = blend(config.phases, {name: counts.tokens for name, counts in files.items()}, budget, config.repeats)
    for line in shortfalls(config.phases, mixture, config.repeats):
        print(line, flush=True)
    contents = {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": token_dtype(tokenizer.vocab_size).__name__,
        "tokenizer_digest": tokenizer.digest,
        "corpus_digest": manifest(curated, "corpus_digest")[0],
        "files": {
            name: {"documents": counts.documents, "tokens": counts.tokens, "bytes": counts.bytes}
            for name, counts in files.items()
        },
    }
    with stage.output("tokens") as out:
        for name in files:
            move(stage.scratch / name, out / name)
        (out / "tokens.json").write_text(json.dumps(contents, indent=1) + "\n")
        np.save(out / "token_bytes.npy", tokenizer.token_bytes)
        (out / "blend.json").write_text(json.dumps(mixture, indent=1) + "\n")
    record = Blend(**mixture, repeats_at_most=config.repeats, files=contents["files"])
    stage.write_record("blend.json", record)
    return {**sizes(files), **repeats(mixture["repeats"])}


def move(prefix: Path, target: Path) -> None:
    """Move both files of `prefix` to `target`, whose folder is made."""
    target.parent.mkdir(exist_ok=True)
    for suffix in ("bin", "idx"):
        shutil.move(f"{prefix}.{suffix}", f"{target}.{suffix}")


def sizes(files: dict[str, Counts]) -> dict[str, Any]:
    """Totals of each split and figures of each domain, both splits together. Marks of ends count as tokens."""
    metrics: dict[str, Any] = {}
    for split in ("train", "validation"):
        counts = [count for name, count in files.items() if name.startswith(f"{split}/")]
        metrics[f"tokens_{split}"] = sum(count.tokens for count in counts)
        metrics[f"documents_{split}"] = sum(count.documents for count in counts)
    metrics |= densities(list(files.values()), "")
    for domain in sorted({name.split("/")[1].split("-")[0] for name in files}):
        train = [count for name, count in files.items() if name.startswith(f"train/{domain}-")]
        validation = [count for name, count in files.items() if name == f"validation/{domain}"]
        metrics[f"tokens_train_{domain}"] = sum(count.tokens for count in train)
        metrics[f"tokens_validation_{domain}"] = sum(count.tokens for count in validation)
        metrics |= densities(train + validation, f"_{domain}")
    return metrics


def densities(counts: list[Counts], suffix: str) -> dict[str, float]:
    """Bytes a token, tokens a document, and the shares of tokens that are <unk> and single bytes."""
    tokens = sum(count.tokens for count in counts)
    return {
        f"bytes_per_token{suffix}": sum(count.bytes for count in counts) / tokens,
        f"tokens_per_document{suffix}": tokens / sum(count.documents for count in counts),
        f"unknown_share{suffix}": sum(count.unknown for count in counts) / tokens,
        f"byte_fallback_share{suffix}": sum(count.single_bytes for count in counts) / tokens,
    }


def repeats(by_file: dict[str, float]) -> dict[str, float]:
    """Times each training file is read (`train/code-high` as `repeats_code_high`), and the most of them."""
    named = {f"repeats_{name.removeprefix('train/').replace('-', '_')}": value for name, value in by_file.items()}
    return {"repeats_most": max(by_file.values()), **named}


if __name__ == "__main__":
    run_stage(tokenize, __doc__, sections=("seed", "tokenize", "pretrain"))
