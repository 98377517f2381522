"""Curated shards to token files, a shard a task: its documents to a partial file for each domain and quality label, and
the partial files of a name to one. Neither holds more than a batch of documents; both can be interrupted.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.curated import batches, sample
from data_pipeline.storage import write_json
from data_pipeline.text.words import Int32, Int64, texts_of
from data_pipeline.tokenize.hub_tokenizer import HubEncoder, HubTokenizer
from data_pipeline.tokenize.indexed_dataset import IndexedDatasetWriter, is_there, merge
from data_pipeline.tokenize.segment_encoder import SegmentEncoder
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.workers.executor import Workers
from durable import drop_damaged

COUNTS_FILE = "counts.json"
Encoder = SegmentEncoder | HubEncoder


class Counts(NamedTuple):
    """What a token file holds; tokens include the end-of-document marks, which have no bytes."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0              # of the UTF-8 text as it is decoded: SentencePiece makes U+2581 the one byte of a space
    unknown: int = 0            # tokens that are <unk>
    single_bytes: int = 0       # tokens that stand for a byte of a character outside the vocabulary

    def plus(self, other: Counts) -> Counts:
        """The sum of both, field by field."""
        return Counts(*(one + another for one, another in zip(self, other, strict=True)))


def tokenize_shards(
    shards: Sequence[Path], model: Path, scratch: Path, workers: Workers, progress: Callable[..., None],
) -> dict[str, Counts]:
    """Encode `shards` into `scratch`/NAME.bin and .idx, NAME being `train/DOMAIN-LABEL`; what each holds, by name.

    Documents keep the order of the shards. The files do not depend on how many shards or workers there are. Shards and
    files found complete in `scratch` are not done again.

    Args:
        shards: curated Parquet files with columns text, domain, label; their names differ.
        model: the tokenizer: a SentencePiece model, or a Hugging Face directory.
        workers: what encodes the shards, of `data_pipeline.workers.executor`.

    Raises:
        DataError: a shard is damaged; it is named.
    """
    drop_damaged(scratch / "shards")
    drop_damaged(scratch / "train")
    finished = {shard for shard in shards if _finished(shard, scratch) is not None}
    if finished:
        (scratch / "resumed").touch()
    totals: dict[str, Counts] = {}
    parts: dict[str, list[Path]] = {}
    started, documents = time.monotonic(), 0
    results = workers.all(partial(encode_shard, model=model, scratch=scratch), shards, _name)
    for done, (shard, counts) in enumerate(results, 1):
        for name, count in counts.items():
            totals[name] = totals.get(name, Counts()).plus(count)
            parts.setdefault(name, []).append(_part(scratch, shard) / name)
            documents += 0 if shard in finished else count.documents
        progress(done, len(shards), **{"documents/s": documents / (time.monotonic() - started)})
    merges = [(parts[name], scratch / name) for name in sorted(parts)]
    list(workers.all(_merge, merges, lambda merge: merge[1].name))
    return {name: totals[name] for name in sorted(totals)}


def most_tokens(shards: Sequence[Path], workers: Workers) -> dict[str, int]:
    """Tokens that each training file cannot exceed: one a byte of text and one a document. Raises DataError."""
    most: Counter[str] = Counter()
    for _, counts in workers.all(_most_tokens, shards, _name):
        most.update(counts)
    return dict(sorted(most.items()))


def _most_tokens(shard: Path) -> Counter[str]:
    most: Counter[str] = Counter()
    for batch in batches(shard, ("text", "domain", "label")):
        sizes = pc.add(pc.binary_length(batch["text"]).cast(pa.int64()), 1)
        groups = batch.append_column("size", sizes).group_by(["domain", "label"]).aggregate([("size", "sum")])
        for row in groups.to_pylist():
            most[f"train/{row['domain']}-{row['label']}"] += row["size_sum"]
    return most


def encode_shard(shard: Path, model: Path, scratch: Path) -> dict[str, Counts]:
    """Encode one shard into a directory of its own under `scratch`, unless that was done; what each file holds."""
    if (finished := _finished(shard, scratch)) is not None:
        return finished
    directory, encoder, counts = _part(scratch, shard), encoder_of(model), dict[str, Counts]()
    with ExitStack() as files:
        writers: dict[str, IndexedDatasetWriter] = {}
        for batch in batches(shard, ("text", "domain", "label")):
            for name, documents in _by_name(batch):
                if name not in writers:
                    writers[name] = files.enter_context(
                        IndexedDatasetWriter(directory / name, encoder.tokenizer.vocab_size))
                ids, lengths, count = encode_documents(encoder, documents)
                writers[name].extend(ids, lengths)
                counts[name] = counts.get(name, Counts()).plus(count)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(counts, directory / COUNTS_FILE)
    return counts


def _finished(shard: Path, scratch: Path) -> dict[str, Counts] | None:
    """What each file holds of a shard that was encoded, if all of that is there, by itself or merged."""
    directory = _part(scratch, shard)
    if not (directory / COUNTS_FILE).exists():
        return None
    stored = json.loads((directory / COUNTS_FILE).read_text())
    whole = all(is_there(directory / name) or is_there(scratch / name) for name in stored)
    return {name: Counts(*count) for name, count in stored.items()} if whole else None


def tokenize_sample(
    files: Sequence[Path], limit: float, seed: int, model: Path, scratch: Path
) -> dict[str, Counts]:
    """Encode up to `limit` bytes of each domain of `files`, whole documents (`curated.sample`), into
    `scratch`/validation/DOMAIN.bin and .idx; what each holds, by name."""
    encoder, documents, totals = encoder_of(model), sample(files, limit, seed), {}
    for domain in sorted(documents["domain"].unique().to_pylist()):
        name = f"validation/{domain}"
        with IndexedDatasetWriter(scratch / name, encoder.tokenizer.vocab_size) as writer:
            ids, lengths, totals[name] = encode_documents(encoder, documents.filter(pc.field("domain") == domain))
            writer.extend(ids, lengths)
    return totals


def encode_documents(encoder: Encoder, documents: pa.Table) -> tuple[Int32, Int64, Counts]:
    """Ids of the column `text` end to end, each document with its mark; the tokens of each document; the sums."""
    tokenizer, ids = encoder.tokenizer, encoder.encode(texts_of(documents))
    lengths = np.diff(np.flatnonzero(ids == tokenizer.eod_id), prepend=-1)
    size = tokenizer.token_bytes[ids].sum(dtype=np.int64)
    unknown, single_bytes = np.count_nonzero(ids == tokenizer.unk_id), np.count_nonzero(tokenizer.is_byte[ids])
    return ids, lengths, Counts(len(lengths), len(ids), int(size), int(unknown), int(single_bytes))


def _by_name(batch: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The documents of each token file, in the order they stand in."""
    pairs = list(zip(batch["domain"].to_pylist(), batch["label"].to_pylist(), strict=True))
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    grouped, first = batch.take(order), 0
    for last, row in enumerate(order, 1):
        if last == len(order) or pairs[order[last]] != pairs[row]:
            domain, label = pairs[row]
            yield f"train/{domain}-{label}", grouped.slice(first, last - first)
            first = last


@lru_cache(maxsize=1)
def encoder_of(model: Path) -> Encoder:
    """One a process: what it remembers serves all its shards. Raises DataError."""
    return HubEncoder(HubTokenizer(model)) if model.is_dir() else SegmentEncoder(Tokenizer(model))


def _name(shard: Path) -> str:
    return f"shard {shard.stem}"


def _part(scratch: Path, shard: Path) -> Path:
    return scratch / "shards" / shard.stem


def _merge(task: tuple[list[Path], Path]) -> None:
    """Make one file of parts, and remove them, unless that was done."""
    parts, prefix = task
    if not is_there(prefix):
        merge(parts, prefix)
    for part in parts:
        for suffix in ("bin", "idx"):
            part.with_name(f"{part.name}.{suffix}").unlink(missing_ok=True)
