"""Our encoding beside plain SentencePiece and Hugging Face tokenizers: megabytes of UTF-8 a second and core.

    OMP_NUM_THREADS=1 python -m benchmarks.tokenize_cpu [--megabytes 48] [--vocab-size 32768] [--repeats 3]

Documents are the Python files of this environment, in a fixed mixed order; the tokenizer is trained on the first of
them and the others are encoded by everyone, in the same run, to ids that must be equal. Time is processor time in the
fastest repeat; ours begins each repeat with nothing remembered. The last rows are the whole task, from Parquet shards
to .bin and .idx, with one worker process and with two: time on the clock, workers started before.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

os.environ["RAYON_NUM_THREADS"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"      # before tokenizers is imported

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece
import tokenizers
import xxhash

from data_pipeline.text.words import texts_of
from data_pipeline.tokenize import fast_tokenizer, tokenizer
from data_pipeline.tokenize.segment_encoder import SegmentEncoder
from data_pipeline.tokenize.tokenization import encode_shard, tokenize_shards
from data_pipeline.workers.executor import Processes, Workers

TRAINING_SHARE = 0.4            # megabytes to train on, for each encoded
SHARDS = 8
LABELS = ("high", "medium", "low")
TASKS = ("shards to .bin/.idx, one worker", "shards to .bin/.idx, two workers")
Result = TypeVar("Result")


def documents(megabytes: float) -> tuple[list[str], list[str]]:
    """Texts to train on and, of other files, `megabytes` to encode."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = sorted(root.rglob("*.py"), key=lambda file: xxhash.xxh3_64_intdigest(str(file.relative_to(root)).encode()))
    training: list[str] = []
    encoded: list[str] = []
    room = {id(training): TRAINING_SHARE * megabytes * 1e6, id(encoded): megabytes * 1e6}
    for file in files:
        text = file.read_text(errors="ignore")
        texts = training if room[id(training)] > 0 else encoded
        if room[id(texts)] <= 0:
            break
        texts.append(text)
        room[id(texts)] -= len(text.encode())
    return training, encoded


def fastest(function: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Processor seconds of the fastest repeat, and what the function returned."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return min(seconds), result


def write_shards(texts: Sequence[str], directory: Path) -> list[Path]:
    files = []
    for number in range(SHARDS):
        part = texts[number::SHARDS]
        labels = [LABELS[row % len(LABELS)] for row in range(len(part))]
        files.append(directory / f"part-{number:05d}.parquet")
        pq.write_table(pa.table({"text": part, "domain": ["code"] * len(part), "label": labels}), files[-1],
                       compression="zstd")
    return files


def seconds_of_task(shards: Sequence[Path], model: Path, directory: Path, count: int, repeats: int) -> float:
    """Fastest time on the clock of the whole task with `count` workers."""
    seconds = []
    for repeat in range(repeats):
        backend = Processes(count)
        try:
            workers = Workers(backend)
            for warm in workers.map(WarmUp(model, directory), range(count), str):
                assert warm.error is None, warm.error
            scratch = directory / f"{count}-{repeat}"
            start = time.monotonic()
            tokenize_shards(shards, model, scratch, workers, lambda *_, **__: None)
            seconds.append(time.monotonic() - start)
        finally:
            backend.close()
    return min(seconds)


class WarmUp:
    """Imports, compiled code and the model are in the worker before the clock runs; nothing of the text is."""

    def __init__(self, model: Path, directory: Path):
        self.model, self.directory = model, directory

    def __call__(self, number: int) -> None:
        shard = self.directory / f"warm-{number}.parquet"
        pq.write_table(pa.table({"text": ["a"], "domain": ["code"], "label": ["high"]}), shard)
        encode_shard(shard, self.model, self.directory / f"warm-{os.getpid()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=48)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        compare(arguments.megabytes, arguments.vocab_size, arguments.repeats, Path(name))


def compare(megabytes: float, vocab_size: int, repeats: int, directory: Path) -> None:
    training, texts = documents(megabytes)
    model = directory / tokenizer.MODEL_FILE
    model.write_bytes(tokenizer.train_on(training, vocab_size))
    fast_tokenizer.export(model, directory)
    ours = tokenizer.Tokenizer(model)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(model))
    fast = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.encode_special_tokens = True
    table = texts_of(pa.table({"text": texts}))

    seconds: dict[str, float] = {}
    encoder = SegmentEncoder(ours)
    encoder.encode(texts_of(pa.table({"text": texts[:1]})))             # compiled
    seconds["sentencepiece encode"], lists = fastest(lambda: plain.encode(texts), repeats)
    expected = [np.array(ids, np.int32) for ids in lists]
    seconds["tokenizers encode_batch"], encodings = fastest(
        lambda: fast.encode_batch(texts, add_special_tokens=False), repeats)
    for one, other in zip(expected, encodings, strict=True):
        assert np.array_equal(one, other.ids), "tokenizer.json differs"
    seconds["ours, nothing remembered"], ids = fastest(lambda: SegmentEncoder(ours).encode(table), repeats)
    assert np.array_equal(ids, np.concatenate([np.append(one, ours.eod_id) for one in expected])), "ours differs"
    encoder.encode(table)
    seconds["ours, all remembered"], _ = fastest(lambda: encoder.encode(table), repeats)
    shards = write_shards(texts, directory)
    for count, name in enumerate(TASKS, 1):
        seconds[name] = seconds_of_task(shards, model, directory, count, repeats)

    size = len(table.buffer) / 1e6
    print(f"{len(texts)} documents, {size:.1f} MB, {len(ids)} tokens, vocabulary {vocab_size}; all ids equal")
    for name, value in seconds.items():
        ratio = seconds["sentencepiece encode"] / value
        print(f"{name:36} {size / value:8.1f} MB/s   {ratio:6.1f} x sentencepiece")
    print(f"two workers over one: {seconds[TASKS[0]] / seconds[TASKS[1]]:.2f}")


if __name__ == "__main__":
    main()
