"""Curation: from annotated shards to labelled training text and held-out text, by the thresholds of one configuration.

Two passes of the workers over the shards: the first takes a bounded sample of scores, from which the thresholds follow;
the second cuts (`data_pipeline.curate.cut`) and writes. A changed threshold costs these two passes and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.annotate.quality.quality_labels import merge
from data_pipeline.annotate.step import SCHEMA
from data_pipeline.config import AnnotateConfig, CurateConfig, DataError, ExecutorConfig
from data_pipeline.curate.cut import (
    EXAMPLES,
    SHORTENED,
    STEPS,
    Cut,
    ScoreSurvey,
    apply,
    cut_of,
    survey,
    with_thresholds,
)
from data_pipeline.curate.synthesis import Parent, Synthesis, annotate, synthesize
from data_pipeline.schema import Dropped, Example, FunnelStep, Histogram
from data_pipeline.storage import place, write_json, write_table
from data_pipeline.workers.executor import Workers, workers
from data_pipeline.workers.meter import Meter, Progress
from durable import drop_damaged, write

LICENSE = "license"             # the reason of a refusal that has a row of its own in the funnel
WORK = {"survey": 30, "cut": 70}


class CurationRecords(NamedTuple):
    """What the report shows of a curation."""

    funnel: list[FunnelStep]
    histograms: dict[str, dict[str, Histogram]]     # by measure and domain
    dropped: dict[str, dict[str, Dropped]]          # by domain and reason


def curate(
    annotated: Path, config: CurateConfig, seed: int, out: Path, scratch: Path, cache: Path, executor: ExecutorConfig,
    progress: Progress,
) -> CurationRecords:
    """Write `out/train/part-*.parquet`, `out/heldout/part-*.parquet` and `out/manifest.json`.

    Args:
        annotated: what `annotation.annotate` wrote.
        seed: of the choice of documents to rephrase.
        scratch: for finished shards: an interrupted call goes on where it was.
        cache: file that keeps a language model's answers, where synthesis is enabled.

    Raises DataError for a rule about no feature, a shard that fails, a domain with no document left, and synthesis that
    finds nothing to rephrase.
    """
    manifest = json.loads((annotated / "manifest.json").read_text())
    shards = [annotated / f"part-{index:05d}.parquet" for index in range(manifest["shards"])]
    key = json.dumps([config.model_dump(mode="json"), manifest, seed, str(annotated.absolute())])
    directory = (scratch / hashlib.sha256(key.encode()).hexdigest()[:12]).absolute()
    if directory.exists():
        (scratch / "resumed").touch()
        drop_damaged(directory)
    directory.mkdir(parents=True, exist_ok=True)
    meter = Meter(progress, WORK)
    with workers(executor) as pool:
        blank = cut_of(config, manifest)
        cut = with_thresholds(blank, _survey(blank, shards, pool, meter))
        pieces = _cut(cut, shards, directory, pool, meter)
        funnel = _funnel(pieces, manifest)
        if config.synthesis.enabled:
            synthesis = synthesize(_parents(pieces, config), config.synthesis, seed, cache, progress)
            if not synthesis.requests:
                raise DataError(
                    f"curate.synthesis: no document to rephrase in {config.synthesis.megabytes:g} megabytes of the "
                    f"domains {', '.join(config.language.domains) or '(none)'}.\n"
                    "Raise megabytes, add to curate.language.domains, or set enabled to false, in params.yaml.")
            pieces.append(_cut_synthetic(synthesis, cut, manifest, shards, seed, directory, pool))
            funnel += _synthetic_rows(synthesis, pieces[-1], funnel)
    reports = [piece.report for piece in pieces]
    _refuse_empty(funnel, reports, manifest)
    _write(pieces, out, manifest)
    return CurationRecords(funnel, _histograms(cut, reports), _dropped(reports, manifest))


def _survey(cut: Cut, shards: list[Path], pool: Workers, meter: Meter) -> ScoreSurvey:
    """The surveys of all shards as one: as large as one, because samples are bounded."""
    found = ScoreSurvey({}, {})
    meter("survey", 0.0, 0)
    surveys = pool.all(partial(survey_shard, cut=cut), shards, lambda shard: f"annotated shard {shard.name}")
    for done, (_, one) in enumerate(surveys, start=1):
        for domain, sample in one.samples.items():
            found.samples[domain] = merge([found.samples[domain], sample]) if domain in found.samples else sample
        for key, (low, high) in one.ranges.items():
            least, largest = found.ranges.get(key, (low, high))
            found.ranges[key] = (min(low, least), max(high, largest))
        meter("survey", done / len(shards), 0)
    return found


def survey_shard(shard: Path, cut: Cut) -> ScoreSurvey:
    """`cut.survey` of an annotated shard, in a worker."""
    return survey(pq.read_table(shard, schema=SCHEMA), cut)


class CutPiece(NamedTuple):
    """A shard after the cut: PREFIX-train.parquet, PREFIX-heldout.parquet, and PREFIX.json."""

    prefix: Path

    def file(self, split: str) -> Path:
        """The documents of a split, `train` or `heldout`."""
        return self.prefix.with_name(f"{self.prefix.name}-{split}.parquet")

    @property
    def record(self) -> Path:
        """The file of the report."""
        return self.prefix.with_name(f"{self.prefix.name}.json")

    @property
    def report(self) -> dict[str, Any]:
        """`cut.CutShard.report`, and what each split holds."""
        return dict(json.loads(self.record.read_text()))

    @property
    def is_whole(self) -> bool:
        """Whether all its files are there."""
        return all(file.exists() for file in (self.record, self.file("train"), self.file("heldout")))


def _cut(cut: Cut, shards: list[Path], directory: Path, pool: Workers, meter: Meter) -> list[CutPiece]:
    pieces = [CutPiece(directory / f"cut-{index:05d}") for index in range(len(shards))]
    missing = [(shard, piece) for shard, piece in zip(shards, pieces, strict=True) if not piece.is_whole]
    meter("cut", 1 - len(missing) / len(shards), 0)
    jobs = pool.all(partial(cut_shard, cut=cut), missing, lambda job: f"annotated shard {job[0].name}")
    for done, (_, documents) in enumerate(jobs, start=len(shards) - len(missing) + 1):
        meter("cut", done / len(shards), documents)
    return pieces


def cut_shard(job: tuple[Path, CutPiece], cut: Cut, best: list[int] | None = None) -> int:
    """Cut one shard and write what stays and what is to be said about it, in a worker; its number of documents."""
    source, piece = job
    table = pq.read_table(source, schema=SCHEMA).combine_chunks()
    result = apply(table, cut, None if best is None else np.array(best, dtype=np.int64))
    write_table(result.train, piece.file("train"))
    write_table(result.heldout, piece.file("heldout"))
    contents = {"train": _contents(result.train), "heldout": _contents(result.heldout)}
    write_json(result.report | contents, piece.record)
    return int(table.num_rows)


def _contents(table: pa.Table) -> dict[str, dict[str, Any]]:
    """Domain -> documents, bytes of text and sources, as in the manifest."""
    found: dict[str, dict[str, Any]] = {}
    for domain in sorted(set(table["domain"].to_pylist())):
        rows = table.filter(pc.equal(table["domain"], domain))
        found[domain] = {"documents": rows.num_rows, "bytes": pc.sum(pc.binary_length(rows["text"])).as_py(),
                         "sources": sorted(set(rows["source"].to_pylist()))}
    return found


def _funnel(pieces: list[CutPiece], manifest: dict[str, Any]) -> list[FunnelStep]:
    """The rows of every step, a domain each. A document refused for its licence was read, and then was not."""
    left: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    reasons: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for piece in pieces:
        report = piece.report
        for step, by_domain in report["left"].items():
            for domain, (documents, size) in by_domain.items():
                left[step, domain].update({"documents": documents, "bytes": size})
        for step, by_domain in report["reasons"].items():
            for domain, counts in by_domain.items():
                reasons[step, domain].update(counts)
    for domain in manifest["domains"]:
        refused = {why: entry["documents"] for why, entry in manifest["refusals"].get(domain, {}).items()}
        license_refused = refused.pop(LICENSE, 0)
        left[LICENSE, domain] = Counter(left["read", domain])
        left["read", domain]["documents"] += license_refused
        reasons["read", domain].update(refused)
        reasons[LICENSE, domain].update({"not permissive": license_refused} if license_refused else {})
    return [
        FunnelStep(domain=domain, step=step, documents=left[step, domain]["documents"],
                   bytes=left[step, domain]["bytes"], reasons=dict(sorted(reasons[step, domain].items())))
        for step in ("read", LICENSE, *STEPS) for domain in manifest["domains"]
    ]


def _parents(pieces: list[CutPiece], config: CurateConfig) -> Iterator[Parent]:
    """Training documents in natural language, with their labels."""
    for piece in pieces:
        table = pq.read_table(piece.file("train"), columns=list(Parent._fields))
        for row in table.filter(pc.is_in(table["domain"], pa.array(config.language.domains, pa.string()))).to_pylist():
            yield Parent(**row)


def _cut_synthetic(
    synthesis: Synthesis, cut: Cut, manifest: dict[str, Any], shards: list[Path], seed: int, directory: Path,
    pool: Workers,
) -> CutPiece:
    """Synthetic documents through the steps that every document went through, and the same cut: one more shard."""
    config = AnnotateConfig.model_validate(manifest["config"])
    source, piece = directory / "synthetic.parquet", CutPiece(directory / "cut-synthetic")
    write_table(annotate(synthesis, shards, config, seed, directory, pool), source)
    cut_shard((source, piece), cut, [int(document.quality) for document in synthesis.documents])
    return piece


def _synthetic_rows(synthesis: Synthesis, piece: CutPiece, funnel: list[FunnelStep]) -> list[FunnelStep]:
    """One more step, which adds; its reasons are of requests and replies that gave no document that stays."""
    report, rows = piece.report, []
    for before in funnel[-len({row.domain for row in funnel}) :]:
        domain = before.domain
        reasons = Counter(synthesis.reasons.get(domain, {}))
        for by_domain in report["reasons"].values():
            reasons.update(by_domain.get(domain, {}))
        added = report["train"].get(domain, {"documents": 0, "bytes": 0})
        rows.append(FunnelStep(domain=domain, step="synthesis", documents=before.documents + added["documents"],
                               bytes=before.bytes + added["bytes"], reasons=dict(sorted(reasons.items()))))
    return rows


def _refuse_empty(funnel: list[FunnelStep], reports: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Raise DataError for a domain that has nothing to train on, or nothing held out where some was asked for."""
    wanted = ["train", "heldout"] if manifest["config"]["held_out"]["fraction"] else ["train"]
    for domain in manifest["domains"]:
        for split in wanted:
            if any(domain in report[split] for report in reports):
                continue
            lost: Counter[str] = Counter()
            for row in funnel:
                lost.update(row.reasons if row.domain == domain and row.step != "read" else {})
            most = ", ".join(f"{why} ({count})" for why, count in lost.most_common(3))
            what = "to train on" if split == "train" else "held out"
            first = "Read" if split == "train" else "Raise annotate.held_out.fraction, read"
            raise DataError(
                f"Domain `{domain}`: no document {what} is left; most went for: {most or 'nothing'}.\n"
                f"{first} more of it (annotate.sources) or change thresholds, curate.rules.{domain}, in params.yaml."
            )


def _write(pieces: list[CutPiece], out: Path, annotated: dict[str, Any]) -> None:
    """The curated Parquet and its manifest. The digest is over ids and labels in order, however they lie in shards."""
    manifest: dict[str, Any] = {
        "corpus_digest": "", "decontamination_ngram": annotated["config"]["decontamination"]["ngram"]
    }
    digest = hashlib.sha256()
    for split in ("train", "heldout"):
        (out / split).mkdir(parents=True)
        found: dict[str, dict[str, Any]] = {
            domain: {"documents": 0, "bytes": 0, "sources": set()} for domain in annotated["domains"]
        }
        for index, piece in enumerate(pieces):
            place(piece.file(split), out / split / f"part-{index:05d}.parquet")
            columns = pq.read_table(piece.file(split), columns=["id", "label"] if split == "train" else ["id"])
            digest.update("".join(chain.from_iterable(zip(*columns.to_pydict().values(), strict=True))).encode())
            for domain, contents in piece.report[split].items():
                for name in ("documents", "bytes"):
                    found[domain][name] += contents[name]
                found[domain]["sources"].update(contents["sources"])
        manifest[split] = {domain: {**entry, "sources": sorted(entry["sources"])} for domain, entry in found.items()}
    manifest["corpus_digest"] = digest.hexdigest()
    write(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _histograms(cut: Cut, reports: list[dict[str, Any]]) -> dict[str, dict[str, Histogram]]:
    """Measure -> domain -> edges, documents in each bin, and the thresholds with where they come from."""
    counts: dict[tuple[str, str], np.ndarray] = {}
    for report in reports:
        for name, domain, values in report["histograms"]:
            counts[name, domain] = counts.get((name, domain), 0) + np.array(values)
    found: dict[str, dict[str, Histogram]] = {}
    for (name, domain), values in counts.items():
        low, high, source = cut.thresholds_of(name, domain)
        found.setdefault(name, {})[domain] = Histogram(
            edges=[float(f"{edge:.6g}") for edge in cut.edges[name, domain]], counts=values.tolist(),
            low=low, high=high, source=source, labels=cut.labels_of(name, domain),
        )
    return found


def _dropped(reports: list[dict[str, Any]], manifest: dict[str, Any]) -> dict[str, dict[str, Dropped]]:
    """Domain -> reason -> how many went and a few of them; what reading refused, then what the cut took."""
    found: dict[str, dict[str, Dropped]] = {}
    for domain in manifest["domains"]:
        refused = manifest["refusals"].get(domain, {})
        counts = Counter({why: entry["documents"] for why, entry in refused.items()})
        examples: dict[str, list[list[Any]]] = defaultdict(list)        # as `Removal`
        for report in reports:
            for by_domain in report["reasons"].values():
                counts.update(by_domain.get(domain, {}))
            counts[SHORTENED] += report["shortened"].get(domain, 0)
            for why, shown in report["examples"].get(domain, {}).items():
                examples[why] += shown
        found[domain] = {}
        for why in [*refused, *sorted(examples.keys() - refused.keys())]:        # "empty" may be a reason of both
            where = refused[why]["where"] if why in refused else []
            found[domain][why] = Dropped(documents=counts[why], examples=[
                *(Example(source=place, path="", value=why, excerpt="") for place in where),
                *(Example(source=source, path=path, value=value, excerpt=excerpt)
                  for _, source, path, value, excerpt in sorted(examples[why])[:EXAMPLES])])
    return found
