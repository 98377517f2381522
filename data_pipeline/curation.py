"""Curation: the embedded corpus through every step, from files to quality-labelled Parquet with a held-out part.

The order is Nemotron-CC's (paper 2412.02595; Nemotron-H section 2.2) with evaluation text set aside on the way: read,
licence, normalise, heuristics, hold out, exact and near-duplicate removal, decontamination, quality. Documents lie in
shards; worker processes run a step over the shards, and each finished shard stays in the scratch directory, so that a
killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.config import CurateConfig, DataError
from data_pipeline.executor import ordered_map, worker_pool
from data_pipeline.sources.installed import Document, SourceFile, corpus, domain_of, read_documents
from data_pipeline.steps.decontaminate import Decontaminate
from data_pipeline.steps.exact_dedup import ExactDedup
from data_pipeline.steps.heuristics import Heuristics
from data_pipeline.steps.hold_out import HoldOut
from data_pipeline.steps.license import License
from data_pipeline.steps.minhash import MinHash
from data_pipeline.steps.normalise import Normalise
from data_pipeline.steps.quality import QualityLabels, QualityScores
from data_pipeline.steps.step import SCHEMA, GlobalStep, Step, text_id

FILES_PER_BATCH = 32
LARGEST_DOCUMENT = 0.1      # of a domain's cap: a sample of one file is none
FULL = 0.99                 # of its cap: a domain this full is read no further
HELD_OUT_COLUMNS = ["id", "text", "source", "path", "domain", "license"]
TRAIN_COLUMNS = [*HELD_OUT_COLUMNS, "quality", "label"]
COUNTS = b"curation"        # key of a shard's counts in its Parquet metadata

Funnel = list[dict[str, Any]]
Progress = Callable[..., None]
Report = Callable[[float], None]


def steps(config: CurateConfig, seed: int) -> list[Step]:
    return [
        License(),
        Normalise(),
        Heuristics(),
        HoldOut(config.held_out_fraction, seed),
        ExactDedup(),
        MinHash(config.minhash, seed),
        Decontaminate(config.decontamination_ngram),
        QualityScores(),
        QualityLabels(),
    ]


def curate(config: CurateConfig, seed: int, out: Path, scratch: Path, workers: int, progress: Progress) -> Funnel:
    """Write `out/train/part-*.parquet`, `out/heldout/part-*.parquet` and `out/manifest.json`; return the funnel.

    The result depends on `config`, `seed` and what is installed, not on `workers`. Work kept in `scratch` by an
    interrupted call is used again, and `scratch/resumed` then marks that it was. The funnel counts what is left to
    train on after each step: documents, bytes and, in `reasons`, documents removed.

    Raises DataError for a root that is not installed, a domain with no document left, and a killed worker.
    """
    installed = corpus(config.roots, seed)
    pieces = scratch / installed.digest[:12]
    if pieces.exists():
        (scratch / "resumed").touch()
    pieces.mkdir(parents=True, exist_ok=True)
    plan = steps(config, seed)
    works = ["read", *(step.name for step in plan), "write"]

    def report(work: str, share: float) -> None:
        progress(round(100 * (works.index(work) + share)), 100 * len(works), work=work)

    with worker_pool(workers) as pool:
        shards = [pieces / f"read-{index:05d}.parquet" for index in range(config.shards)]
        if not all(shard.exists() for shard in shards):
            _read(installed.files, config, pool, shards, partial(report, "read"))
        funnel = _rows("read", shards, config)
        for step in plan:
            shards = _run_step(step, shards, pool, partial(report, step.name))
            funnel += _rows(step.name, shards, config)
    _refuse_empty(shards, config)
    _write(shards, out, config)
    report("write", 1.0)
    return funnel


@dataclass(frozen=True)
class Batch:
    """Files to read in one worker, and the domains that were not full when the batch was started."""

    files: list[SourceFile]
    domains: frozenset[str]


def _read_batch(batch: Batch) -> list[list[Document] | str]:
    return [read_documents(file, batch.domains) for file in batch.files]


def _read(
    files: list[SourceFile], config: CurateConfig, pool: Executor | None, shards: list[Path], report: Report
) -> None:
    """Take documents in the order of `files` until each domain has its cap, and deal them to the shards.

    Raises DataError for a domain without any document.
    """
    cap: dict[str, float] = {domain: config.megabytes_per_domain[domain] * 1e6 for domain in config.domains}
    size = dict.fromkeys(cap, 0)
    reasons: dict[str, Counter[str]] = {domain: Counter() for domain in cap}
    documents: list[Document] = []

    def wanted() -> frozenset[str]:
        return frozenset(domain for domain in cap if size[domain] < FULL * cap[domain])

    def batches() -> Iterator[Batch]:
        for start in range(0, len(files), FILES_PER_BATCH):
            yield Batch(files[start : start + FILES_PER_BATCH], wanted())

    for batch, results in _paired(ordered_map(pool, _read_batch, batches()), files):
        for file, result in zip(batch, results, strict=True):
            if isinstance(result, str):
                if (domain := domain_of(file)) in wanted():
                    reasons[domain][result] += 1
                continue
            for document in result:
                domain, added = document.domain, len(document.text.encode())
                if domain not in wanted():
                    continue
                if added > min(LARGEST_DOCUMENT * cap[domain], cap[domain] - size[domain]):
                    reasons[domain]["too large for the sample"] += 1
                    continue
                size[domain] += added
                documents.append(document)
        report(min(size[domain] / cap[domain] for domain in cap))
        if not wanted():
            break
    for domain, found in size.items():
        if not found:
            raise DataError(
                f"Domain `{domain}`: no document was found in the closure of {', '.join(config.roots)}.\n"
                f"Add roots to curate.roots, raise curate.megabytes_per_domain.{domain}, or take {domain} out of "
                "curate.domains, in params.yaml."
            )
    for index, shard in enumerate(shards):
        removed = {domain: dict(counter) for domain, counter in reasons.items()} if index == 0 else {}
        _write_shard(_table(documents[index :: len(shards)]), removed, shard)


def _paired(
    results: Iterator[list[list[Document] | str]], files: list[SourceFile]
) -> Iterator[tuple[list[SourceFile], list[list[Document] | str]]]:
    for number, result in enumerate(results):
        start = number * FILES_PER_BATCH
        yield files[start : start + FILES_PER_BATCH], result


def _table(documents: list[Document]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [None] * len(documents) for name in SCHEMA.names}
    for name in Document._fields:
        columns[name] = [getattr(document, name) for document in documents]
    columns["id"] = [text_id(document.text) for document in documents]
    columns["held_out"] = [False] * len(documents)
    return pa.table(columns, SCHEMA)


def _run_step(step: Step, sources: list[Path], pool: Executor | None, report: Report) -> list[Path]:
    """Run `step` over the shards not yet done; the shards it made."""
    targets = [source.with_name(f"{step.name}-{index:05d}.parquet") for index, source in enumerate(sources)]
    missing = [index for index, target in enumerate(targets) if not target.exists()]
    decisions: list[Any] = [None] * len(sources)
    start = 0.0
    if missing and isinstance(step, GlobalStep):
        start = 0.5
        surveys = []
        for survey in ordered_map(pool, partial(_survey_shard, step), sources):
            surveys.append(survey)
            report(start * len(surveys) / len(sources))
        decisions = step.decide(surveys)
    jobs = ((sources[index], targets[index], decisions[index]) for index in missing)
    for number, _ in enumerate(ordered_map(pool, partial(_run_shard, step), jobs), start=1):
        report(start + (1 - start) * number / len(missing))
    return targets


def _survey_shard(step: GlobalStep, source: Path) -> Any:
    return step.survey(pq.read_table(source, schema=SCHEMA))


def _run_shard(step: Step, job: tuple[Path, Path, Any]) -> None:
    """Apply `step` to one shard, cut what it gives a reason for, and write the rest with the counts."""
    source, target, decision = job
    before = pq.read_table(source, schema=SCHEMA)
    outcome = step.apply(before, decision)
    removed: dict[str, Counter[str]] = defaultdict(Counter)
    held_out = zip(before["held_out"].to_pylist(), outcome.table["held_out"].to_pylist(), strict=True)
    rows = zip(before["domain"].to_pylist(), held_out, outcome.reasons, strict=True)
    for domain, (held_out_before, held_out_now), reason in rows:
        if held_out_now and not held_out_before:
            reason = "held out"
        if reason is not None and not held_out_before:
            removed[domain][reason] += 1
    kept = outcome.table.filter(pa.array([reason is None for reason in outcome.reasons], pa.bool_()))
    _write_shard(kept, {domain: dict(reasons) for domain, reasons in removed.items()}, target)


def _write_shard(table: pa.Table, removed: dict[str, dict[str, int]], target: Path) -> None:
    """Write `table` whole or not at all, with the reasons of what was removed in its metadata."""
    partial_file = target.with_suffix(".partial")
    table = table.replace_schema_metadata({COUNTS: json.dumps({"removed": removed, "left": _sizes(table, False)})})
    pq.write_table(table, partial_file, compression="zstd")
    partial_file.rename(target)


def _sizes(table: pa.Table, held_out: bool) -> dict[str, list[int]]:
    """Domain -> [documents, bytes of text] of the rows that are held out, or of those that are not."""
    chosen = table.filter(pc.equal(table["held_out"], held_out))
    grouped = chosen.append_column("bytes", pc.binary_length(chosen["text"])).group_by("domain", use_threads=False)
    totals = grouped.aggregate([("bytes", "count"), ("bytes", "sum")])
    columns = (totals[name].to_pylist() for name in ("domain", "bytes_count", "bytes_sum"))
    return {domain: [documents, size] for domain, documents, size in zip(*columns, strict=True)}


def _rows(name: str, shards: list[Path], config: CurateConfig) -> Funnel:
    """The funnel's rows of one step, a domain each."""
    counts = [json.loads(pq.read_schema(shard).metadata[COUNTS]) for shard in shards]
    rows = []
    for domain in config.domains:
        left = [count["left"].get(domain, [0, 0]) for count in counts]
        reasons: Counter[str] = Counter()
        for count in counts:
            reasons.update(count["removed"].get(domain, {}))
        documents, size = (sum(column) for column in zip(*left, strict=True))
        rows.append({"domain": domain, "step": name, "documents": documents, "bytes": size,
                     "reasons": dict(sorted(reasons.items()))})
    return rows


def _refuse_empty(shards: list[Path], config: CurateConfig) -> None:
    tables = [pq.read_table(shard, columns=["domain", "held_out"]) for shard in shards]
    found = {row for table in tables for row in zip(*(column.to_pylist() for column in table.columns), strict=True)}
    for domain in config.domains:
        for held_out, part, change in ((False, "to train on", "lower"), (True, "held out", "raise")):
            if (domain, held_out) not in found:
                raise DataError(
                    f"Domain `{domain}`: no document {part} is left after the last step.\n"
                    f"Raise curate.megabytes_per_domain.{domain}, or {change} curate.held_out_fraction, in params.yaml."
                )


def _write(shards: list[Path], out: Path, config: CurateConfig) -> None:
    """The curated Parquet and its manifest."""
    manifest: dict[str, Any] = {"corpus_digest": "", "decontamination_ngram": config.decontamination_ngram}
    digest = hashlib.sha256()
    for split, held_out, columns in (("train", False, TRAIN_COLUMNS), ("heldout", True, HELD_OUT_COLUMNS)):
        (out / split).mkdir(parents=True)
        found: dict[str, dict[str, Any]] = {
            domain: {"documents": 0, "bytes": 0, "sources": set()} for domain in config.domains
        }
        for index, shard in enumerate(shards):
            table = pq.read_table(shard, schema=SCHEMA)
            table = table.filter(pc.equal(table["held_out"], held_out)).select(columns)
            pq.write_table(table.replace_schema_metadata(), out / split / f"part-{index:05d}.parquet")
            digest.update("".join(table["id"].to_pylist()).encode())
            rows = zip(*(table[name].to_pylist() for name in ("domain", "text", "source")), strict=True)
            for domain, text, source in rows:
                found[domain]["documents"] += 1
                found[domain]["bytes"] += len(text.encode())
                found[domain]["sources"].add(source)
        manifest[split] = {domain: {**entry, "sources": sorted(entry["sources"])} for domain, entry in found.items()}
    manifest["corpus_digest"] = digest.hexdigest()
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
