"""Annotation: read the sources and write down, document by document, everything a cut may ask about.

The steps are Nemotron-CC's (arXiv 2412.02595; Nemotron-H section 2.2), with evaluation text set aside on the way. They
go in rounds. A round is one pass of the workers over the shards: load, apply the round's steps, survey for the global
steps of the next round, write. Between two rounds the global steps decide. Nothing is cut: `data_pipeline.curate` does
that, in seconds, as often as thresholds change.

Shards, surveys and decisions lie in the scratch directory until the end, so that a killed run goes on where it was.
What a worker holds is bounded by a shard, and by a part of a decision (`passes`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from data_pipeline.annotate.decontaminate import Decontaminate
from data_pipeline.annotate.dedup.deduplicate import Deduplicate
from data_pipeline.annotate.dedup.substring import Substring
from data_pipeline.annotate.features.features import Features
from data_pipeline.annotate.hold_out import HoldOut
from data_pipeline.annotate.language import Language
from data_pipeline.annotate.mask import Mask
from data_pipeline.annotate.normalise import Normalise
from data_pipeline.annotate.passes import Arrays, Passes
from data_pipeline.annotate.quality.quality import Quality
from data_pipeline.annotate.reading import PIECES_PER_SHARD, Read, ReadRows, load, read
from data_pipeline.annotate.step import SCHEMA, GlobalStep, Step
from data_pipeline.config import AnnotateConfig, ExecutorConfig
from data_pipeline.sources import Piece, digest, pieces
from data_pipeline.sources.identity import identity, pinned
from data_pipeline.sources.readers import strings
from data_pipeline.storage import StoredArrays, Surveys, place, shared_arrays, write_arrays, write_json, write_table
from data_pipeline.workers.executor import Workers, workers
from data_pipeline.workers.meter import Meter, Progress
from durable import drop_damaged, sha256, write

Round = list[Step | GlobalStep]
Decided = tuple[Step | GlobalStep, Path | None, Path | None]        # and the arrays decided for all shards and for one

WORK = {"read": 60, "describe": 15, "hold out": 5, "deduplicate": 10, "score": 10}     # about a hundredth of the time


def rounds(config: AnnotateConfig, seed: int) -> list[Round]:
    """The steps of each pass. A global step is decided on before its round, from surveys made in the one before."""
    return [
        [Normalise(), Mask(config.mask), Language(), Features()],
        [HoldOut(config.held_out, seed)],
        [Deduplicate(config.minhash, seed)],
        [Substring(config.substring), Decontaminate(config.decontamination, strings), Quality(config.scorers, seed)],
    ]


def annotate(
    config: AnnotateConfig, seed: int, out: Path, scratch: Path, executor: ExecutorConfig, progress: Progress
) -> dict[str, Any]:
    """Write `out/part-*.parquet` (`step.SCHEMA`) and `out/manifest.json`, which is returned.

    The documents and their order depend on `config`, `seed` and the sources, not on workers, executor or shards. Work
    kept in `scratch` by an interrupted call is used again, and `scratch/resumed` then marks that it was.

    Raises DataError for a source that cannot be read, and for a shard that fails; the others are done first.
    """
    config = pinned(config)
    plan = rounds(config, seed)
    piece_bytes = max(1, int(config.shard_megabytes * 1e6 / PIECES_PER_SHARD))
    cut = [pieces(source, seed, piece_bytes) for source in config.sources]
    directory = (scratch / _digest(config, seed, cut)).absolute()
    if directory.exists():
        (scratch / "resumed").touch()
        drop_damaged(directory)
    directory.mkdir(parents=True, exist_ok=True)
    meter = Meter(progress, WORK)
    try:
        with workers(executor) as pool:
            found = _read(config, cut, directory, pool, meter)
            for number in range(len(plan)):
                _run(number, plan, directory, found, pool, meter)
    except GoneError:
        print(f"{directory}: what was damaged is made of what is kept no longer; annotated anew.", flush=True)
        shutil.rmtree(directory)
        return annotate(config, seed, out, scratch, executor, progress)
    manifest = _manifest(config, found, directory, len(plan))
    for index, shard in enumerate(_files(directory, len(plan), found)):
        place(shard, out / f"part-{index:05d}.parquet")
    write(out / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def _digest(config: AnnotateConfig, seed: int, cut: list[list[Piece]]) -> str:
    """Of what is asked for and what there is to read: a run resumed after a source changed begins anew."""
    parts = [config.model_dump_json(), str(seed), json.dumps(identity(config)), *map(digest, cut)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _read(config: AnnotateConfig, cut: list[list[Piece]], directory: Path, pool: Workers, meter: Meter) -> Read:
    record = directory / "read.json"
    if not record.exists():
        (directory / "read").mkdir(exist_ok=True)
        meter("read", 0.0, 0)
        found = read(config, cut, directory / "read", pool, lambda share, new: meter("read", share, new))
        write_json(found._asdict(), record)
    stored = json.loads(record.read_text())
    return Read([[ReadRows(*part) for part in shard] for shard in stored["shards"]], stored["refusals"],
                stored["passed_over"])


def _files(directory: Path, number: int, found: Read) -> list[Path]:
    """The shards after so many rounds."""
    return [directory / f"round{number}-{index:05d}.parquet" for index in range(len(found.shards))]


class GoneError(Exception):
    """A piece is to be made again, and what it is made of was removed when its round had ended."""


class Job(NamedTuple):
    """One shard of one round."""

    source: list[ReadRows] | Path                       # as read, or the round before
    target: Path
    steps: list[Decided]
    surveys: list[tuple[GlobalStep, Path]]          # to make, and where

    @property
    def files(self) -> list[Path]:
        """Those of `source`."""
        return [self.source] if isinstance(self.source, Path) else [Path(part.file) for part in self.source]


def _run(number: int, plan: Sequence[Round], directory: Path, found: Read, pool: Workers, meter: Meter) -> None:
    """Round `number` (0 ...) over the shards it is not done for, and what the next round's global steps decide."""
    targets = _files(directory, number + 1, found)
    following = [step for step in (plan[number + 1] if number + 1 < len(plan) else []) if isinstance(step, GlobalStep)]
    if any(file.exists() for later in range(number + 2, len(plan) + 1) for file in _files(directory, later, found)):
        return                                          # a round after this one had begun
    work = list(WORK)[number + 1]
    jobs = list(_jobs(number, plan[number], following, directory, found))
    decided = (_is_decided(step, directory, len(targets)) for step in plan[number] if isinstance(step, GlobalStep))
    if not (all(decided) and all(file.exists() for job in jobs for file in job.files)):
        raise GoneError
    done = len(targets) - len(jobs)
    meter(work, 0.9 * done / len(targets), 0)
    for job, documents in pool.all(run_job, jobs, lambda job: f"{work}, shard {job.target.stem[-5:]}"):
        done += job.target.exists()
        meter(work, 0.9 * done / len(targets), documents)
    for step in following:
        _decide(step, directory, len(targets), pool)
    for survey in directory.glob("survey-*.npz"):
        survey.unlink()
    for earlier in [*_files(directory, number, found), *(directory / "read").glob("*.parquet")]:
        earlier.unlink(missing_ok=True)
    meter(work, 1.0, 0)


def _jobs(
    number: int, steps: Round, following: list[GlobalStep], directory: Path, found: Read
) -> Iterator[Job]:
    sources: Sequence[list[ReadRows] | Path] = found.shards if number == 0 else _files(directory, number, found)
    undecided = [step for step in following if not _is_decided(step, directory, len(found.shards))]
    for index, (source, target) in enumerate(zip(sources, _files(directory, number + 1, found), strict=True)):
        surveys = [(step, _survey(step, directory, index)) for step in undecided]
        if not target.exists() or not all(survey.exists() for _, survey in surveys):
            decided: list[Decided] = [
                (step, *_decision(step, directory, index)) if isinstance(step, GlobalStep) else (step, None, None)
                for step in steps
            ]
            yield Job(source, target, decided, surveys)


def _survey(step: GlobalStep, directory: Path, index: int) -> Path:
    return Surveys(directory, f"survey-{step.name}", index + 1).file(index)


def _decision(step: GlobalStep, directory: Path, index: int) -> tuple[Path, Path]:
    """Where the arrays decided for all shards lie, and those for one."""
    return directory / f"decision-{step.name}.npz", directory / f"decision-{step.name}-{index:05d}.npz"


def _is_decided(step: GlobalStep, directory: Path, shards: int) -> bool:
    return all(file.exists() for index in range(shards) for file in _decision(step, directory, index))


def _decide(step: GlobalStep, directory: Path, shards: int, pool: Workers) -> None:
    """Let `step` decide, unless it did. What its passes make is kept until then."""
    if _is_decided(step, directory, shards):
        return
    passes = Passes(directory / f"decide-{step.name}-{pool.backend.slots}", pool)       # parts follow from the workers
    decision = step.decide(Surveys(directory, f"survey-{step.name}", shards), passes)
    for _ in pool.all(partial(_write_own, step, directory), enumerate(decision.shards),
                      lambda own: f"{step.name}, decision on shard {own[0]:05d}"):
        pass
    write_arrays(decision.shared, _decision(step, directory, 0)[0])
    for made in directory.glob(f"decide-{step.name}-*"):
        shutil.rmtree(made)


def _write_own(step: GlobalStep, directory: Path, own: tuple[int, Arrays]) -> None:
    write_arrays(own[1], _decision(step, directory, own[0])[1])


def run_job(job: Job) -> int:
    """One shard through one round, in a worker; its number of documents."""
    source = job.source
    table = pq.read_table(source, schema=SCHEMA).combine_chunks() if isinstance(source, Path) else load(source)
    for step, shared, own in job.steps:
        if isinstance(step, GlobalStep):
            assert shared is not None and own is not None
            table = step.apply(table, shared_arrays(shared), StoredArrays(own))
        else:
            table = step.apply(table)
    assert table.schema.equals(SCHEMA)
    for survey, file in job.surveys:
        write_arrays(survey.survey(table), file)
    write_table(table, job.target)
    return int(table.num_rows)


def _manifest(config: AnnotateConfig, found: Read, directory: Path, last: int) -> dict[str, Any]:
    """What was read and how: all a cut must know besides the documents."""
    domains, digest = Counter[str](), hashlib.sha256()
    for shard in _files(directory, last, found):
        digest.update(sha256(shard).encode())
        counts = pq.read_table(shard, columns=["domain"])["domain"].value_counts()
        domains.update({entry["values"]: entry["counts"] for entry in counts.to_pylist()})
    counts = shared_arrays(directory / f"decision-{Decontaminate.name}.npz")["texts"].tolist()
    texts = dict(zip(("ngrams", "whole", "too_short"), counts, strict=True))       # how they are looked for
    return {"config": config.model_dump(mode="json"), "shards": len(found.shards), "domains": dict(domains),
            "refusals": found.refusals, "passed_over": found.passed_over, "evaluation_texts": texts,
            "digest": digest.hexdigest()}
