"""Read the sources and write down what a cut may ask about every document; cut nothing.

    python -m stages.annotate

The sources are installed packages, files, data sets of the Hugging Face Hub or web archives (annotate.sources in
params.yaml). Text is normalised and masked; language, features for the heuristics, copies and near-copies, repeated
strings, text shared with evaluation sets and quality scores become columns; whole sources are held out for evaluation
(Nemotron-CC, arXiv 2412.02595; Nemotron-H, section 2.2). `runtime.executor` says where the work is done. An interrupted
run keeps the shards it had finished.

Writes  data/PROFILE/annotated/   part-*.parquet, manifest.json
        runs/PROFILE/annotate/    refused.json (records that gave no document, or not the whole of one),
                                  passed_over.json (what is of no kind that holds any), metrics.json, provenance.json
"""

from __future__ import annotations

from typing import Any

from stages.frame.common import Progress, Stage, run_stage


def annotate(stage: Stage) -> dict[str, Any]:
    """Annotate what the sources hold; metrics."""
    from data_pipeline.annotate import annotation

    params = stage.params
    with stage.output("annotated") as out:
        manifest = annotation.annotate(params.annotate, params.seed, out, stage.scratch, params.runtime, Progress())
    stage.write_record("refused.json", manifest["refusals"])
    stage.write_record("passed_over.json", manifest["passed_over"])
    refused = sum(entry["documents"] for reasons in manifest["refusals"].values() for entry in reasons.values())
    return {
        "documents": sum(manifest["domains"].values()),
        **{f"documents_{domain}": documents for domain, documents in manifest["domains"].items()},
        "refused": refused,
        "shards": manifest["shards"],
    }


if __name__ == "__main__":
    run_stage(annotate, __doc__, sections=("annotate", "seed"))
