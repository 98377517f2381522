"""Time, memory and disk of what global steps decide about many documents, by one worker and by several.

    python -m benchmarks.curation_decisions deduplicate 1e6 1e7 1e8 [--workers 1 2] [--scratch DIR]
    python -m benchmarks.curation_decisions decontaminate 1e7 1e8           n-grams of 13 words
    python -m benchmarks.curation_decisions substring 1e5 1e6               documents of 4,000 bytes

Surveys are synthetic. Those of deduplication and decontamination are made when they are asked for, which is timed alone
and part of the time that is shown: nothing of them is on disk. Of the documents, 30 % are in clusters of all sizes from
one to many thousands, a third of those with the cluster's text, the others with 60 % of its bands. A substring survey
is real, of random text in which one document of ten holds one of 1,000 strings of 400 bytes.

The digest is of all decisions: where it is not the same for every number of workers, the command ends with status 1.
Memory is what a process holds for itself (USS), looked at every 20 ms; with one worker it is the main process's, with
more the largest worker's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from data_pipeline.annotate.decontaminate import Decontaminate
from data_pipeline.annotate.dedup.deduplicate import BANDS_AT_ONCE, Deduplicate
from data_pipeline.annotate.dedup.substring import Substring
from data_pipeline.annotate.passes import Arrays, Made, Passes
from data_pipeline.annotate.step import SCHEMA, GlobalStep, text_id
from data_pipeline.config import DecontaminationConfig, ExecutorConfig, MinHashConfig, SubstringConfig
from data_pipeline.storage import Surveys, write_arrays
from data_pipeline.text.words import UInt64, mix
from data_pipeline.workers.executor import Workers, workers

ROOT = Path(__file__).resolve().parent.parent
SHARD = 1 << 16                 # documents, or n-grams, of a survey
CLUSTERED, COPIES, SHARED = 0.3, 1 / 3, 0.6
SPAN, SPANS, DOCUMENT = 400, 1000, 4000


class Synthetic(Mapping[str, np.ndarray]):
    """A survey whose arrays are made when they are asked for."""

    def __init__(self, make: Callable[[str, range], np.ndarray], own: range):
        self.make, self.own = make, own

    def __getitem__(self, name: str) -> np.ndarray:
        return np.array([len(self.own)]) if name == "size" else self.make(name, self.own)

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError("asked for by name")

    def __len__(self) -> int:
        raise NotImplementedError("asked for by name")


class SyntheticSurveys(Sequence[Arrays]):
    """Those of `size` documents."""

    def __init__(self, make: Callable[[str, range], np.ndarray], size: int):
        self.make, self.size = make, size

    def __getitem__(self, shard: int) -> Arrays:            # type: ignore[override]
        own = range(self.size)[shard * SHARD : (shard + 1) * SHARD]
        if not own:
            raise IndexError(shard)
        return Synthetic(self.make, own)

    def __len__(self) -> int:
        return -(-self.size // SHARD)


def drawn(numbers: UInt64, salt: int) -> UInt64:
    """A random number for each."""
    return mix(numbers ^ mix(np.array([salt], np.uint64)))


def of_documents(size: int, name: str, own: range) -> np.ndarray:
    """An array of a deduplication survey."""
    documents = np.arange(own.start, own.stop, dtype=np.uint64)
    if name == "held_out":
        return drawn(documents, 5) < np.uint64(2**64 // 100)
    share = drawn(documents, 1) / 2.0**64
    clusters = np.uint64(size) + ((drawn(documents, 2) / 2.0**64) ** 2 * (CLUSTERED * size / 3)).astype(np.uint64)
    text = np.where(share < CLUSTERED * COPIES, clusters, documents)        # numbers of texts
    if name == "ids":
        return np.stack([drawn(text, 3), drawn(text, 4)], axis=1)
    band = 10 + int(name.removeprefix("band"))
    common = (drawn(text, 100 + band) < np.uint64(SHARED * 2**64)) | (text == clusters)
    return drawn(np.where((share < CLUSTERED) & common, clusters, text), band)


def of_ngrams(name: str, own: range) -> np.ndarray:
    """The array of a decontamination survey."""
    assert name == "hashes"
    return drawn(np.arange(own.start, own.stop, dtype=np.uint64), 1)


def write_text(step: Substring, surveys: Surveys, documents: int, shard: int) -> None:
    """Survey a shard of synthetic text."""
    spans = np.random.default_rng(0).integers(97, 123, (SPANS, SPAN), dtype=np.uint8)
    random, texts = np.random.default_rng((1, shard)), []
    for _ in range(documents):
        text = random.integers(97, 123, DOCUMENT, dtype=np.uint8)
        if random.random() < 0.1:
            start = random.integers(DOCUMENT - SPAN)
            text[start : start + SPAN] = spans[random.integers(SPANS)]
        texts.append(text.tobytes().decode())
    table = pa.Table.from_pylist([
        {"id": text_id(text), "text": text, "domain": "docs", "held_out": False} for text in texts], SCHEMA)
    write_arrays(step.survey(table), surveys.file(shard))


def step_and_surveys(
    name: str, size: int, bands: int, directory: Path, pool: Workers
) -> tuple[GlobalStep, Sequence[Arrays]]:
    if name == "deduplicate":
        config = MinHashConfig(shingle_characters=24, bands=bands, rows=13)
        return Deduplicate(config, 1), SyntheticSurveys(partial(of_documents, size), size)
    if name == "decontaminate":
        return Decontaminate(DecontaminationConfig(ngram=13, against=[])), SyntheticSurveys(of_ngrams, size)
    step = Substring(SubstringConfig(bytes=200, domains=["docs"]))
    surveys = Surveys(directory, "survey", -(-size // 10_000))
    for _ in pool.all(partial(write_text, step, surveys, min(size, 10_000)), range(len(surveys)), str):
        pass
    return step, surveys


def processor_seconds() -> float:
    """Of this process and its workers."""
    processes = [psutil.Process(), *psutil.Process().children()]
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


class Weighed(Passes):
    """Knows the most that its passes had on disk at once."""

    most = 0

    def run(self, name: str, function: Callable[[int], Arrays], count: int) -> Made:
        made = super().run(name, function, count)
        self.most = max(self.most, sum(file.stat().st_size for file in self.directory.iterdir()))
        return made


def decide(name: str, size: int, count: int, bands: int, directory: Path) -> dict[str, object]:
    """What `main` shows of a decision, in a process of its own."""
    with workers(ExecutorConfig(executor="local", workers=count)) as pool:
        step, surveys = step_and_surveys(name, size, bands, directory, pool)
        started = time.perf_counter()
        asked_for = {"substring": [], "decontaminate": ["hashes"], "deduplicate": [
            *["ids", "held_out"] * (1 + -(-bands // BANDS_AT_ONCE)), *(f"band{band}" for band in range(bands))]}
        for array in asked_for[name]:
            surveys[0][array]
        making = (time.perf_counter() - started) * len(surveys)
        passes = Weighed(directory / "decide", pool)
        started, before = time.perf_counter(), processor_seconds()
        decision = step.decide(surveys, passes)
        wall, cpu = time.perf_counter() - started, processor_seconds() - before
        digest, found = hashlib.sha256(), 0
        for own in decision.shards:
            for array in own.values():
                digest.update(array)
                found += np.count_nonzero(array)
        for array in (decision.shared[key] for key in decision.shared if key.startswith("known")):
            entries = np.sort(array[array > 0])
            digest.update(entries)
            found += len(entries)
    return {"wall": wall, "cpu": cpu, "making": making,
            "disk": passes.most / 1e9,
            "found": int(found), "digest": digest.hexdigest()[:12]}


def peaks(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """MiB that a process, to its end, and the largest of its workers hold for themselves at most."""
    watched = psutil.Process(process.pid)
    main = worker = 0
    while process.poll() is None:
        try:
            main = max(main, watched.memory_full_info().uss)
            for child in watched.children(recursive=True):
                worker = max(worker, child.memory_full_info().uss)
        except psutil.Error:
            continue
        time.sleep(0.02)
    return main / 2**20, worker / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["deduplicate", "decontaminate", "substring"])
    parser.add_argument("sizes", nargs="+", type=float, help="documents, or n-grams")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--bands", type=int, default=20, help="of deduplication's recipe")
    parser.add_argument("--scratch", type=Path, default=Path(".scratch"), help="where what passes make is kept")
    parser.add_argument("--inner", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        record = decide(options.step, int(options.sizes[0]), options.workers[0], options.bands, options.inner)
        (options.inner / "record.json").write_text(json.dumps(record))
        return
    options.scratch.mkdir(exist_ok=True)
    print("    size workers  seconds    CPU s  main MiB worker MiB disk GB  load  found, digest, surveys")
    for size in options.sizes:
        digests = set()
        for count in options.workers:
            with tempfile.TemporaryDirectory(dir=options.scratch) as name:
                command = [sys.executable, "-m", "benchmarks.curation_decisions", options.step, str(size), "--workers",
                           str(count), "--bands", str(options.bands), "--inner", name]
                process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
                main_peak, worker_peak = peaks(process)
                if process.returncode:
                    raise SystemExit("failed; it says why above.")
                record = json.loads(Path(name, "record.json").read_text())
            print(f"{size:>8.0e} {count:>7} {record['wall']:>8.1f} {record['cpu']:>8.1f} {main_peak:>9.0f} "
                  f"{worker_peak:>10.0f} {record['disk']:>7.2f} {os.getloadavg()[0]:>5.1f}  {record['found']}, "
                  f"{record['digest']}, {record['making']:.1f} s", flush=True)
            digests.add(record["digest"])
        if len(digests) > 1:
            raise SystemExit(f"{size:.0e}: other decisions by another number of workers.")


if __name__ == "__main__":
    main()
