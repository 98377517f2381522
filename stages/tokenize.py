"""Encode the curated documents into Megatron token files and weigh them for the phases of training.

Reads   data/PROFILE/curated/, data/PROFILE/tokenizer/
Writes  data/PROFILE/tokens/train/DOMAIN-LABEL.{bin,idx}     every training document
        data/PROFILE/tokens/validation/DOMAIN.{bin,idx}      held-out documents, some kilobytes a domain
        data/PROFILE/tokens/tokens.json, blend.json
        runs/PROFILE/tokenize/metrics.json: tokens and bytes a token

An interrupted run keeps the token files it had finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common import Progress, Stage, run_stage

if TYPE_CHECKING:
    import polars as pl

    from data_pipeline.tokenizer import Tokenizer

DOCUMENTS_A_BATCH = 256


def tokenize(stage: Stage) -> dict[str, Any]:
    from data_pipeline import tokenizer as library
    from data_pipeline.blend import phase_weights

    curated = stage.input("curated")
    tokenizer = library.Tokenizer(stage.input("tokenizer", library.MODEL_FILE))
    config = stage.params.tokenize
    sources = _sources(curated, config.validation_kilobytes_per_domain, stage.params.seed)
    sizes = {name: _size(frames) for name, frames in sources.items()}
    phase_weights(config.phases, {name: size["bytes"] for name, size in sizes.items()})     # fail before the work
    files = _encode(stage, tokenizer, sources, sizes)

    manifest = json.loads((curated / "manifest.json").read_text())
    tokens = {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "dtype": _dtype(tokenizer.vocab_size),
        "tokenizer_digest": tokenizer.digest,
        "corpus_digest": manifest["corpus_digest"],
        "files": files,
    }
    blend = {"phases": phase_weights(config.phases, {name: entry["tokens"] for name, entry in files.items()})}
    with stage.output("tokens") as out:
        for name in files:
            for suffix in ("bin", "idx"):
                (out / name).parent.mkdir(exist_ok=True)
                shutil.move(stage.scratch / f"{name}.{suffix}", out / f"{name}.{suffix}")
        (out / "tokens.json").write_text(json.dumps(tokens, indent=1) + "\n")
        (out / "blend.json").write_text(json.dumps(blend, indent=1) + "\n")
    return _metrics(files)


def _sources(curated: Path, validation_kilobytes: int, seed: int) -> dict[str, list[pl.LazyFrame]]:
    """Name of each token file -> the frames, a shard each, whose documents it holds."""
    import polars as pl

    from data_pipeline import tokenizer as library

    shards = [pl.scan_parquet(path) for path in library.shards(curated, "train")]
    pairs = library.scan(curated, "train").select("domain", "label").unique().sort("domain", "label").collect()
    sources = {
        f"train/{domain}-{label}": [shard.filter(domain=domain, label=label) for shard in shards]
        for domain, label in pairs.rows()
    }
    heldout = library.scan(curated, "heldout")
    domains = sorted(library.domain_bytes(heldout))
    chosen = library.sample(heldout, dict.fromkeys(domains, validation_kilobytes * 1000), seed)
    return sources | {f"validation/{domain}": [chosen.filter(domain=domain).lazy()] for domain in domains}


def _size(frames: list[pl.LazyFrame]) -> dict[str, int]:
    import polars as pl

    counts = pl.concat([frame.select(pl.len(), pl.col("text").str.len_bytes().sum()) for frame in frames])
    documents, size = counts.sum().collect().row(0)
    return {"documents": documents, "bytes": size}


def _encode(
    stage: Stage, tokenizer: Tokenizer, sources: dict[str, list[pl.LazyFrame]], sizes: dict[str, dict[str, int]]
) -> dict[str, dict[str, int]]:
    """Write every token file that is not yet in the scratch directory. Returns the `files` of tokens.json."""
    from data_pipeline.indexed_dataset import IndexedDatasetWriter, read_lengths

    progress, files = Progress(), {}
    done, total = 0, sum(size["documents"] for size in sizes.values())
    for name, frames in sources.items():
        prefix = stage.scratch / name
        if prefix.with_name(f"{prefix.name}.idx").exists():
            (stage.scratch / "resumed").touch()
        else:
            with IndexedDatasetWriter(prefix, tokenizer.vocab_size) as writer:
                for texts in _batches(frames):
                    for ids in tokenizer.encode_batch(texts, threads=stage.params.runtime.workers):
                        writer.add([*ids, tokenizer.eod_id])
                    progress(done + len(writer.lengths), total, file=name)
        done += sizes[name]["documents"]
        tokens = int(read_lengths(prefix)[1].sum(dtype="int64"))
        files[name] = {"documents": sizes[name]["documents"], "tokens": tokens, "bytes": sizes[name]["bytes"]}
    return files


def _batches(frames: list[pl.LazyFrame]) -> Iterator[list[str]]:
    for frame in frames:
        for batch in frame.select("text").collect().iter_slices(DOCUMENTS_A_BATCH):
            yield batch["text"].to_list()


def _dtype(vocab_size: int) -> str:
    from data_pipeline.indexed_dataset import token_dtype

    return token_dtype(vocab_size).__name__


def _metrics(files: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Totals by split and domain. The end-of-document marks count as tokens, not as bytes."""
    metrics: dict[str, Any] = {}
    for split in ("train", "validation"):
        names = [name for name in files if name.startswith(f"{split}/")]
        metrics[f"tokens_{split}"] = sum(files[name]["tokens"] for name in names)
        metrics[f"documents_{split}"] = sum(files[name]["documents"] for name in names)
    metrics["bytes_per_token"] = sum(f["bytes"] for f in files.values()) / sum(f["tokens"] for f in files.values())
    for domain in sorted(name.split("/")[1] for name in files if name.startswith("validation/")):
        train = [entry for name, entry in files.items() if name.startswith(f"train/{domain}-")]
        everything = [*train, files[f"validation/{domain}"]]
        metrics[f"tokens_train_{domain}"] = sum(entry["tokens"] for entry in train)
        metrics[f"tokens_validation_{domain}"] = files[f"validation/{domain}"]["tokens"]
        metrics[f"bytes_per_token_{domain}"] = sum(e["bytes"] for e in everything) / sum(
            e["tokens"] for e in everything
        )
    return metrics


if __name__ == "__main__":
    run_stage(tokenize, __doc__, sections=("seed", "tokenize"))
