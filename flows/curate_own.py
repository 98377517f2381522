"""Curate text of one's own: the stages annotate and curate on files, directories or web archives, apart from a profile.

    python -m flows.curate_own texts/ more/*.jsonl.gz --domain web --out curated-web
    make curate SOURCE="texts/ crawl.warc.gz" DOMAIN=web OUT=curated-web

JSONL, CSV and Parquet need a column `text`; .txt, .md, .rst and .html are a document each; WARC and WET files and
listings of them (wet.paths.gz) are crawls. All may be packed (gzip, bzip2, xz, zstd, LZ4), lie in .tar or .zip, or be
addresses; what is of no such kind is passed over and counted. Nothing is held out for evaluation. Thresholds and steps
are those of params.yaml; `--set` changes them, as in `--set annotate.held_out.fraction=0.01`. An interrupted run goes
on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from flows import SOCKS
from flows.console import table
from stages.params import read_yaml

ROOT = Path(__file__).resolve().parent.parent
NOT_UTF8 = re.compile("[\udc80-\udcff]")     # a byte of a name, as Python hands it over
# Heuristics by domain: a set of rules, and the labels they are for. Those of the web are for lower quality
# (Nemotron-CC, section 2.2); what is no running English has its own.
EVERY_LABEL = ["high", "medium-high", "medium", "medium-low", "low"]
RULES: dict[str, dict[str, Any]] = {
    "code": {"set": "code", "labels": EVERY_LABEL},
    "docs": {"set": "prose", "labels": EVERY_LABEL},
    "reference": {"set": "reference", "labels": EVERY_LABEL},
}
WEB_RULES = {"set": "web", "labels": ["medium", "medium-low", "low"]}
MEGABYTES_PER_SHARD = 32


def sources_of(given: list[str], domain: str, text_column: str) -> list[dict[str, Any]]:
    """annotate.sources for these paths and addresses."""
    return [{"kind": "files", "paths": [_absolute(path) for path in given], "domain": domain,
             "text_column": text_column}]


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())


def settings(sources: list[dict[str, Any]], domain: str) -> dict[str, Any]:
    """What differs from params.yaml, by key."""
    prose = [] if domain.split("_")[0] in ("code", "headers") else [domain]
    return {
        "profile": "own",
        "annotate.sources": sources,
        "annotate.shard_megabytes": MEGABYTES_PER_SHARD,
        "annotate.held_out": {"fraction": 0, "unit": "document"},
        "annotate.substring.domains": prose,
        "curate.language.domains": prose,
        "curate.rules": {domain: RULES.get(domain, WEB_RULES)},
    }


def run(stage: str, out: Path, params: Path, assignments: list[str]) -> int:
    """One stage with its results and resume state under `out`."""
    command = [sys.executable, "-m", f"stages.{stage}", "--params", str(params.absolute()), "--out", "."]
    command += [word for assignment in assignments for word in ("--set", assignment)]
    environment = {**os.environ, **SOCKS, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=out, env=environment).returncode


def show(out: Path) -> None:
    """The funnel as a table, the labels, where the result lies, and a page of what went and why."""
    from data_pipeline.reading import counts
    from stages.report.page import write_data_page

    funnel = json.loads((out / "runs/curate/funnel.json").read_text())
    rows = []
    for entry in funnel:
        reasons = sorted(entry["reasons"].items(), key=lambda reason: (-reason[1], reason[0]))
        rows.append({"step": entry["step"].replace("_", " "), "documents": f"{entry['documents']:,}",
                     "MB": f"{entry['bytes'] / 1e6:,.2f}",
                     "most frequent reasons": ", ".join(f"{why} ({count:,})" for why, count in reasons[:3])})
    print(f"\n{table(rows)}\n")
    for unit, kinds in json.loads((out / "data/annotated/manifest.json").read_text())["passed_over"].items():
        print(f"Passed over: {sum(entry['count'] for entry in kinds.values()):,} {unit} ({counts(kinds)}).")
    labels = _labels(out / "data/curated/train")
    print("Labels: " + ", ".join(f"{label} {labels[label]:,}" for label in EVERY_LABEL) + " documents.")
    print(f"Curated text: {out / 'data/curated/train'}/part-*.parquet\n"
          f"What went, and why: {write_data_page(out / 'runs', out / 'report', 'own')}")


def _labels(train: Path) -> Counter[str]:
    import pyarrow.parquet as pq

    found: Counter[str] = Counter()
    for file in sorted(train.glob("part-*.parquet")):
        counts = pq.read_table(file, columns=["label"])["label"].value_counts().to_pylist()
        found.update({entry["values"]: entry["counts"] for entry in counts})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.curate_own", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="+", help="files, wildcards, directories; web archives also by address")
    parser.add_argument("--domain", default="web", help="code, docs, reference, or another name for text of the web")
    parser.add_argument("--out", type=Path, default=Path("curated-own"), help="directory for results (curated-own)")
    parser.add_argument("--text-column", default="text", help="of JSONL and Parquet (text)")
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml", help="parameter file (params.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    options = parser.parse_args()
    if odd := [path for path in options.source if NOT_UTF8.search(path)]:
        wildcard = NOT_UTF8.sub("?", odd[0])
        sys.exit(f"{odd[0]!a}: a name that is not UTF-8 cannot be a parameter.\n"
                 f"Name its directory, or a wildcard: '{wildcard}'.")
    read_yaml(options.params)                   # refuse it here, once
    options.out.mkdir(parents=True, exist_ok=True)
    values = settings(sources_of(options.source, options.domain, options.text_column), options.domain)
    assignments = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    try:
        for stage in ("annotate", "curate"):
            if status := run(stage, options.out, options.params, [*assignments, *options.set]):
                sys.exit(status)
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again: finished shards are kept.", file=sys.stderr)
        sys.exit(130)
    show(options.out)


if __name__ == "__main__":
    main()
