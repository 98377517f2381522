"""Cut the annotated documents by the thresholds of params.yaml and label what stays by quality.

    python -m stages.curate

The first reason wins, in this order: licence, language, copies, near-copies, heuristics, perplexity, text shared with
evaluation sets, repeated strings (Nemotron-CC, arXiv 2412.02595; Nemotron-H, section 2.2). Quality labels come from
byte-weighted percentiles of the scores; where curate.synthesis is enabled, a language model rephrases some of what
stays. Held-out documents are set apart. Takes seconds: a threshold can be tuned without annotating again.

Reads   data/PROFILE/annotated/
Writes  data/PROFILE/curated/   train/part-*.parquet, heldout/part-*.parquet, manifest.json
        runs/PROFILE/curate/    funnel.json (what each step left), histograms.json (what thresholds cut), dropped.json
                                (examples of what went), metrics.json, provenance.json
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.frame.common import Progress, Stage, run_stage

if TYPE_CHECKING:
    from data_pipeline.schema import FunnelStep

REPLIES = Path(".cache/replies.jsonl")      # of a language model: they cost money and outlive results


def curate(stage: Stage) -> dict[str, Any]:
    """Cut and label what was annotated; metrics."""
    import json

    from data_pipeline.curate import curation

    params, annotated = stage.params, stage.input("annotated")
    with stage.output("curated") as out:
        records = curation.curate(
            annotated, params.curate, params.seed, out, stage.scratch, REPLIES, params.runtime, Progress()
        )
        manifest = json.loads((out / "manifest.json").read_text())
    stage.write_record("funnel.json", records.funnel)
    stage.write_record("histograms.json", records.histograms)
    stage.write_record("dropped.json", records.dropped)
    return {**sizes(manifest), **removed_shares(records.funnel)}


def sizes(manifest: dict[str, Any]) -> dict[str, Any]:
    """Documents and bytes of each part, in all and by domain."""
    metrics: dict[str, Any] = {}
    for part in ("train", "heldout"):
        for unit in ("documents", "bytes"):
            metrics[f"{unit}_{part}"] = sum(entry[unit] for entry in manifest[part].values())
        for domain, entry in manifest[part].items():
            metrics[f"bytes_{part}_{domain}"] = entry["bytes"]
    return metrics


def removed_shares(funnel: list[FunnelStep]) -> dict[str, float]:
    """Share of the documents that reached a step and that it removed; `duplicate_share` for both kinds of copy."""
    left: Counter[str] = Counter()
    for row in funnel:
        left[row.step] += row.documents
    steps = list(left)

    def removed(first: str, last: str) -> float:
        before = left[steps[steps.index(first) - 1]]
        return (before - left[last]) / before if before else 0.0

    names = ("license", "language", "heuristics", "perplexity", "decontaminate", "substring")
    shares = {f"removed_share_{name}": removed(name, name) for name in names}
    return {**shares, "duplicate_share": removed("copies", "near_duplicates")}


if __name__ == "__main__":
    run_stage(curate, __doc__, sections=("curate", "seed"))
