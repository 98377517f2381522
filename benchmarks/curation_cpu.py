"""Curation of text on one core, step by step, beside datatrove's blocks on the same documents.

    OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 python -m benchmarks.curation_cpu [--megabytes 16] [--files FILE ...]

Documents are a sample of the profile's embedded corpus, or of files of one's own, in any language. Both sides work on
all of them in every step, in one process and one thread; the table has processor time, per megabyte of text as read.
Ours is the stage itself, decisions with what they keep on disk. Reading the sources is in neither.

datatrove (a development requirement) has no counterpart for some steps: its language filter downloads a model, its
n-gram decontamination needs another package, and it has no quality scorers. Its filters are called document by
document, as its pipelines call them, so that those that follow each other share one list of words. It is measured with
its own words, which for English are spaCy's, where spaCy is installed (`pip install spacy`; the lock leaves it out),
and with words parted by white space.

The last lines compare wall time of two worker processes with one, over all that workers do in the stage `annotate`.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datatrove.data import Document as Page
from datatrove.pipeline import filters
from datatrove.pipeline.dedup import minhash
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from loguru import logger

from data_pipeline.annotate.annotation import WORK, Round, _files, _run, rounds
from data_pipeline.annotate.reading import READ_SCHEMA, Quota, Read, ReadRows
from data_pipeline.annotate.step import SCHEMA, GlobalStep
from data_pipeline.config import AnnotateConfig, FilesSource, InstalledSource, MinHashConfig
from data_pipeline.curate.heuristics import first_broken, rules_of
from data_pipeline.sources import Document, pieces
from data_pipeline.storage import write_table
from data_pipeline.workers.executor import InProcess, Processes, Workers
from data_pipeline.workers.meter import Meter
from stages.frame.common import out_file
from stages.frame.params import Params, load_params

Clock = defaultdict[str, float]         # seconds of processor time by step

# Our step, and the blocks of datatrove that do what it does.
COUNTERPARTS = {
    "normalise": ["FTFY"],
    "mask": ["PII"],
    "language": [],
    "features": ["Gopher quality", "Gopher repetition", "C4", "FineWeb"],
    "rules": [],
    "hold_out": [],
    "deduplicate": ["MinHash signatures", "MinHash buckets", "MinHash clusters", "MinHash filter"],
    "substring": [],
    "decontaminate": [],
    "quality": [],
}
FILTERS_AND_MINHASH = ["features", "deduplicate"]
RUNS = 2                                # of each side, of which the faster counts


def sample(config: AnnotateConfig, seed: int, megabytes: float, files: list[str]) -> list[Document]:
    """`megabytes` of documents: of `files`, as the domain `docs`, else of the first source, domains in proportion."""
    source = FilesSource(kind="files", paths=files, domain="docs") if files else config.sources[0]
    assert isinstance(source, FilesSource | InstalledSource), "this benchmark reads files or the embedded corpus"
    shares = source.megabytes if isinstance(source, InstalledSource) else {source.domain: 1.0}
    quota = Quota({domain: 1e6 * megabytes * share / sum(shares.values()) for domain, share in shares.items()})
    documents = []
    for piece in pieces(source, seed, 1 << 20):
        for document in piece.read():
            if not isinstance(document, Document) or not quota.wants(document.domain):
                continue
            if quota.take(document.domain, len(document.text.encode())) is None:
                documents.append(document)
        if not quota.wants_more():
            break
    return documents


def as_read(documents: list[Document], shards: int, directory: Path) -> Read:
    """What the stage `annotate` has when it has read these documents."""
    parts = []
    for number in range(shards):
        file, rows = directory / f"read-{number}.parquet", documents[number::shards]
        write_table(pa.Table.from_pylist([row._asdict() for row in rows], READ_SCHEMA), file)
        parts.append([ReadRows(str(file), None, sum(len(row.text.encode()) for row in rows))])
    return Read(parts, {}, {})


def annotated(plan: Sequence[Round], found: Read, directory: Path, pool: Workers) -> list[Path]:
    """The shards after all rounds of the stage `annotate`, and the decisions between them."""
    directory.mkdir()
    for number in range(len(plan)):
        _run(number, plan, directory, found, pool, Meter(lambda *_, **__: None, WORK))
    return _files(directory, len(plan), found)


@contextmanager
def timed(*clocks: Clock, name: str) -> Iterator[None]:
    before = time.process_time()
    yield
    for clock in clocks:
        clock[name] += time.process_time() - before


def our_seconds(params: Params, found: Read, directory: Path) -> tuple[Clock, Clock]:
    """Seconds of each step of the stage `annotate`, run in this process, and of the rules; and those of the first that
    are decisions."""
    clock: Clock = defaultdict(float)
    deciding: Clock = defaultdict(float)
    plan = rounds(params.annotate, params.seed)
    for step in chain(*plan):
        for name in ("apply", "survey", "decide") if isinstance(step, GlobalStep) else ("apply",):
            clocks = (clock, deciding) if name == "decide" else (clock,)
            setattr(step, name, timed(*clocks, name=step.name)(getattr(step, name)))
    for shard in annotated(plan, found, directory, Workers(InProcess())):
        table = pq.read_table(shard, schema=SCHEMA)
        with timed(clock, name="rules"):
            for domain, config in params.curate.rules.items():
                rows = table.filter(pc.equal(table["domain"], domain))
                first_broken(rows["features"], rules_of(config, f"curate.rules.{domain}"))
    return clock, deciding


class WhiteSpace(WordTokenizer):
    """Words parted by white space, sentences by . ! ? before it."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S.*?(?:[.!?](?=\s|$)|$)", text, re.S)]

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self.span_tokenize(text)]


def datatrove_seconds(texts: list[str], language: Any, recipe: MinHashConfig, directory: Path) -> Clock:
    """Seconds of each of datatrove's blocks, with as many bands and rows as ours. `language` names one of its
    tokenisers or is one."""
    clock: Clock = defaultdict(float)
    filtering = {
        "Gopher quality": filters.GopherQualityFilter(language=language),
        "Gopher repetition": filters.GopherRepetitionFilter(language=language),
        "C4": filters.C4QualityFilter(language=language),
        "FineWeb": filters.FineWebQualityFilter(language=language),
    }
    formatting = {"FTFY": FTFYFormatter(), "PII": PIIFormatter()}
    for text in texts:
        for name, formatter in formatting.items():
            with timed(clock, name=name):
                formatter.format(text)
        for name, block in filtering.items():
            page = Page(text=text, id="")       # C4 writes to it
            with timed(clock, name=name):
                block.filter(page)
    config = minhash.MinhashConfig(num_buckets=recipe.bands, hashes_per_bucket=recipe.rows,
                                   hash_config=HashConfig(precision=64, hash_fc="sha1"))        # FineWeb's
    signatures, duplicates, removed = (str(directory / name) for name in ("signatures", "buckets", "clusters"))

    def pages() -> Iterator[Page]:
        return (Page(text=text, id=str(index)) for index, text in enumerate(texts))

    stages: dict[str, Callable[[], Any]] = {
        "MinHash signatures": lambda: minhash.MinhashDedupSignature(signatures, config, language).run(pages(), 0, 1),
        "MinHash buckets": lambda: [
            minhash.MinhashDedupBuckets(signatures, duplicates, config=config).run(None, bucket, config.num_buckets)
            for bucket in range(config.num_buckets)
        ],
        "MinHash clusters": lambda: minhash.MinhashDedupCluster(duplicates, removed, config).run(None, 0, 1),
        "MinHash filter": lambda: sum(1 for _ in minhash.MinhashDedupFilter(removed).run(pages(), 0, 1)),
    }
    for name, stage in stages.items():
        with timed(clock, name=name):
            stage()
    return clock


class Clocked(Workers):
    """Knows how long it has waited for workers."""

    seconds = 0.0

    def all(self, *call: Any) -> Iterator[Any]:
        before = time.perf_counter()
        yield from super().all(*call)
        self.seconds += time.perf_counter() - before


def worker_seconds(params: Params, found: Read, directory: Path, counts: tuple[int, ...]) -> list[float]:
    """Wall time of so many processes for what workers do, once each has loaded and compiled what it needs: the best of
    three. The counts take turns, so that other programs disturb all alike.
    """
    plan = rounds(params.annotate, params.seed)
    backends = [Processes(count) for count in counts]
    walls: list[list[float]] = [[] for _ in counts]
    try:
        for turn in range(4):
            for backend, wall in zip(backends, walls, strict=True):
                annotated(plan, found, directory / f"{turn}-{backend.slots}", pool := Clocked(backend))
                wall.append(pool.seconds)
    finally:
        for backend in backends:
            backend.close()
    return [min(wall[1:]) for wall in walls]


def table_of(ours: Clock, theirs: dict[str, Clock], megabytes: float) -> list[str]:
    def cell(seconds: float | None) -> str:
        return f"{1000 * seconds / megabytes:12.1f}" if seconds is not None else f"{'':>12}"

    lines = ["ms a MB            ours  " + "".join(f"  datatrove, {name} words" for name in theirs)]
    for step, blocks in COUNTERPARTS.items():
        lines.append(f"{step:<14}{cell(ours[step])}")
        for block in blocks:
            lines.append(f"  {block:<24}" + "".join(f"{cell(clock[block]):>24}" for clock in theirs.values()))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=16.0, help="of text, in all")
    parser.add_argument("--files", nargs="+", default=[], help="text in place of the embedded corpus")
    parser.add_argument("--out", type=out_file, help="write the numbers as JSON")
    arguments = parser.parse_args()
    logger.remove()
    params = load_params(overrides=("annotate.held_out.unit=document",) if arguments.files else ())
    documents = sample(params.annotate, params.seed, arguments.megabytes, arguments.files)
    texts = [document.text for document in documents]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        found = as_read(documents, max(4, round(megabytes / params.annotate.shard_megabytes)), directory)
        runs = [our_seconds(params, found, directory / f"ours-{number}") for number in range(RUNS + 1)]  # one compiles
        ours, deciding = min(runs[1:], key=lambda run: sum(run[0].values()))
        tokenisers = {"white-space": WhiteSpace()} | ({"spaCy": "eng"} if find_spec("spacy") else {})
        theirs = {}
        for label, language in tokenisers.items():
            _, *others = (datatrove_seconds(some, language, params.annotate.minhash, directory / f"{label}-{number}")
                          for number, some in enumerate([texts[:3]] + RUNS * [texts]))
            theirs[label] = min(others, key=lambda clock: sum(clock.values()))
        walls = worker_seconds(params, found, directory, (1, 2))
    result = summary(ours, deciding, theirs, megabytes, len(documents), walls)
    print(*table_of(ours, theirs, megabytes), "", *lines_of(result), sep="\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def summary(
    ours: Clock, deciding: Clock, theirs: dict[str, Clock], megabytes: float, documents: int, walls: list[float]
) -> dict[str, Any]:
    compared = [block for step in FILTERS_AND_MINHASH for block in COUNTERPARTS[step]]
    chain = megabytes / sum(ours.values())
    same = megabytes / sum(ours[step] for step in [*FILTERS_AND_MINHASH, "rules"])
    others = {name: megabytes / sum(clock[block] for block in compared) for name, clock in theirs.items()}
    return {
        "megabytes": megabytes,
        "documents": documents,
        "ours_seconds": dict(ours),
        "datatrove_seconds": {name: dict(clock) for name, clock in theirs.items()},
        "megabytes_a_second": {
            "whole chain": chain, "filters and MinHash": same,
            "datatrove filters and MinHash": others,
        },
        "times_datatrove": {
            "whole chain": {name: chain / speed for name, speed in others.items()},
            "filters and MinHash": {name: same / speed for name, speed in others.items()},
        },
        "worker_wall_seconds": {"one": walls[0], "two": walls[1]},
        "two_workers_speedup": walls[0] / walls[1],
        "deciding_seconds": dict(deciding),
    }


def lines_of(result: dict[str, Any]) -> list[str]:
    speed, times = result["megabytes_a_second"], result["times_datatrove"]
    lines = [f"{result['documents']} documents, {result['megabytes']:.1f} MB",
             f"ours, whole chain: {speed['whole chain']:.2f} MB/s a core; "
             f"filters and MinHash alone: {speed['filters and MinHash']:.2f}"]
    for name, other in speed["datatrove filters and MinHash"].items():
        lines.append(f"datatrove, {name} words, filters and MinHash: {other:.3f} MB/s a core; as fast as that: our "
                     f"whole chain {times['whole chain'][name]:.1f} times, our filters and MinHash "
                     f"{times['filters and MinHash'][name]:.1f} times")
    lines.append(f"two worker processes: {result['two_workers_speedup']:.2f} times one, start-up left out; "
                 f"between rounds the main process decides for {sum(result['deciding_seconds'].values()):.2f} s")
    return lines


if __name__ == "__main__":
    main()
