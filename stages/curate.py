"""Curate the embedded corpus: the text of this project's installed dependencies and of the standard library.

    python -m stages.curate

Reads what is installed, in place. Drops what is not under a permissive licence, normalises, filters, holds out whole
sources for evaluation, removes copies and near-copies, decontaminates and labels by quality (Nemotron-H, section 2.2).

Writes  data/PROFILE/curated/   train/part-*.parquet, heldout/part-*.parquet, manifest.json
        runs/PROFILE/curate/    funnel.json, metrics.json, provenance.json
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from stages.common import Progress, Stage, run_stage


def curate(stage: Stage) -> dict[str, Any]:
    import json

    from data_pipeline import curation

    params = stage.params
    with stage.output("curated") as out:
        funnel = curation.curate(params.curate, params.seed, out, stage.scratch, params.runtime.workers, Progress())
        manifest = json.loads((out / "manifest.json").read_text())
    stage.write_record("funnel.json", funnel)
    return {**sizes(manifest), **removed_shares(funnel)}


def sizes(manifest: dict[str, Any]) -> dict[str, Any]:
    """Documents and bytes of each part, in all and by domain."""
    metrics: dict[str, Any] = {}
    for part in ("train", "heldout"):
        for unit in ("documents", "bytes"):
            metrics[f"{unit}_{part}"] = sum(entry[unit] for entry in manifest[part].values())
        for domain, entry in manifest[part].items():
            metrics[f"bytes_{part}_{domain}"] = entry["bytes"]
    return metrics


def removed_shares(funnel: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the documents that reached a step and that it removed; `duplicate_share` for both kinds of copy."""
    left: Counter[str] = Counter()
    removed: Counter[str] = Counter()
    for row in funnel:
        left[row["step"]] += row["documents"]
        removed[row["step"]] += sum(row["reasons"].values())
    names = [name for name in left if name in ("license", "normalise", "heuristics", "decontaminate")]
    shares = {f"removed_share_{name}": removed[name] / (left[name] + removed[name]) for name in names}
    copies = removed["exact_dedup"] + removed["minhash"]
    return {**shares, "duplicate_share": copies / (left["minhash"] + copies)}


if __name__ == "__main__":
    run_stage(curate, __doc__, sections=("curate", "seed"))
