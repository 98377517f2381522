"""Curate text of one's own: the stages annotate and curate on files, directories or web archives, apart from a profile.

    python -m flows.curate_own texts/ more/*.jsonl.gz --domain web --out curated-web
    make curate SOURCE="texts/ crawl.warc.gz" DOMAIN=web OUT=curated-web

JSONL, JSON, CSV and Parquet need a column `text` (--text-column); .txt, .md, .rst and .html are a document each; WARC
and WET files and listings of them (wet.paths.gz) are crawls. All may be packed (gzip, bzip2, xz, zstd, LZ4), lie in
.tar or .zip, or be addresses; what is of no such kind is passed over and counted. Nothing is held out for evaluation.
What no flag says stands in params.yaml; `--set` changes that, as in `--set annotate.held_out.fraction=0.01`. Paths are
relative to the directory the command is given in. An interrupted run goes on where it was.

`make curate` takes the flags as SOURCE, DOMAIN, OUT, TEXT_COLUMN, EXTRACTOR, LANGUAGES, AGAINST, LABELS and SET. Where
several words are taken, a path with blanks that is not the only one is quoted: SOURCE="'my texts' more/".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.config import PAPER_TASKS
from flows import SOCKS
from flows.console import table
from stages.frame.common import out_directory
from stages.frame.params import read_yaml, refuse_unread

ROOT = Path(__file__).resolve().parent.parent
NOT_UTF8 = re.compile("[\udc80-\udcff]")     # a byte of a name, as Python hands it over
# Heuristics by what a domain's name begins with: a set of rules, and the labels they are for. Those of the web are for
# lower quality (Nemotron-CC, section 2.2); what is no running English has its own.
EVERY_LABEL = ["high", "medium-high", "medium", "medium-low", "low"]
RULES: dict[str, dict[str, Any]] = {
    "code": {"set": "code", "labels": EVERY_LABEL},
    "headers": {"set": "code", "labels": EVERY_LABEL},
    "docs": {"set": "prose", "labels": EVERY_LABEL},
    "reference": {"set": "reference", "labels": EVERY_LABEL},
}
WEB_RULES = {"set": "web", "labels": ["medium", "medium-low", "low"]}
MEGABYTES_PER_SHARD = 32
# Files of every depth and ending that a run leaves below OUT, one cut short among them.
RESULTS = ("data/annotated/part-00000.parquet", "data/annotated/manifest.json", "data/curated/train/part-00000.parquet",
           "runs/curate/funnel.json", "report/index.html", ".scratch/annotate-012345/depends.json",
           ".scratch/annotate-012345/6789ab/round1-00000.parquet", ".scratch/annotate-012345/6789ab/read/000-0.parquet")
# In place of "in params.yaml", which the flags overrule, in what the stages say.
SETTINGS = ("by SOURCE, --text-column, --extractor, --languages, --against, --labels or --set KEY=VALUE "
            "(make: TEXT_COLUMN= ... SET=)")


def words(given: str) -> list[str]:
    """A path as it is where it is there; else words, quoted as for a shell. Raises SystemExit."""
    if Path(given).expanduser().exists():
        return [given]
    try:
        found = shlex.split(given)
    except ValueError as error:
        raise SystemExit(f"{given}: {error}.\n"
                         "Quote a path with blanks or quotes, as in \"'my texts' more/\".") from None
    if found != [given] and (missing := [word for word in found if not _is_there(word)]):
        raise SystemExit(f"{given!r} is no file or directory, nor is its word {missing[0]!r}.\n"
                         "Correct it, or quote a path with blanks within others: \"'my texts' more/\".")
    return found


def _is_there(word: str) -> bool:
    """Whether it is an address, or stands for a file or directory."""
    from data_pipeline.config import DataError
    from data_pipeline.sources.locations import locate

    try:
        return "://" in word or Path(word).exists() or bool(locate(word).files)
    except DataError:
        return False


def sources_of(
    given: Sequence[str], domain: str, text_column: str = "text", extractor: str | None = None
) -> list[dict[str, Any]]:
    """annotate.sources for these paths and addresses."""
    return [{"kind": "files", "paths": [_absolute(path) for path in given], "domain": domain,
             "text_column": text_column} | ({"extractor": extractor} if extractor else {})]


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def settings(
    sources: list[dict[str, Any]], domain: str, languages: Sequence[str] = (), against: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> dict[str, Any]:
    """What differs from params.yaml, by key."""
    kind = domain.split("_")[0]
    prose = [] if kind in ("code", "headers") else [domain]
    return {
        "profile": "own",
        "annotate.sources": sources,
        "annotate.shard_megabytes": MEGABYTES_PER_SHARD,
        "annotate.held_out": {"fraction": 0, "unit": "document"},
        "annotate.substring.domains": prose,
        "curate.language.domains": [domain] if languages else prose,
        "curate.rules": {domain: RULES.get(kind, WEB_RULES) | ({"labels": labels} if labels else {})},
    } | ({"curate.language.keep": languages} if languages else {}) | (
        {"annotate.decontamination.against": [PAPER_TASKS, *map(_absolute, against)]} if against else {})


def run(stage: str, out: Path, params: Path, assignments: list[str]) -> int:
    """One stage with its results and resume state under `out`; of the user's directory it imports nothing (-P)."""
    command = [sys.executable, "-P", "-m", f"stages.{stage}", "--params", str(params), "--out", str(out),
               "--settings", SETTINGS]
    command += [word for assignment in assignments for word in ("--set", assignment)]
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, **SOCKS, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, env=environment).returncode


def show(out: Path) -> None:
    """The funnel as a table, the labels, where the result lies, and a page of what went and why."""
    from data_pipeline.annotate.reading import counts
    from stages.report.page import write_data_page

    funnel = json.loads((out / "runs/curate/funnel.json").read_text())
    rows = []
    for entry in funnel:
        reasons = sorted(entry["reasons"].items(), key=lambda reason: (-reason[1], reason[0]))
        rows.append({"step": entry["step"].replace("_", " "), "documents": f"{entry['documents']:,}",
                     "MB": f"{entry['bytes'] / 1e6:,.2f}",
                     "most frequent reasons": ", ".join(f"{why} ({count:,})" for why, count in reasons[:3])})
    print(f"\n{table(rows)}\n")
    for unit, kinds in json.loads((out / "runs/annotate/passed_over.json").read_text()).items():
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


def domain_name(given: str) -> str:
    from pydantic import TypeAdapter, ValidationError

    from data_pipeline.config import Domain

    try:
        return str(TypeAdapter(Domain).validate_python(given))
    except ValidationError:
        raise SystemExit(f"--domain {given}: not a domain's name.\n"
                         "Write it with lower-case letters, digits and _, a letter first.") from None


def refuse_own_results(given: Sequence[str], out: Path) -> None:
    """Raise SystemExit where the results of one run, or of one cut short, would be read as text by the next."""
    from data_pipeline.sources.locations import matches

    files = [place / result for place in {out.absolute(), out.resolve()} for result in RESULTS]
    places = {str(place) for file in files for place in (file, *file.parents)}
    for path in given:
        absolute = _absolute(path)
        if out.resolve().is_relative_to(Path(absolute).resolve()) or any(map(matches(absolute), places)):
            raise SystemExit(f"{out}: lies in {path}, so that the next run would read this one's results as text.\n"
                             "Name a directory outside with --out (make: OUT=).")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.curate_own", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="+", type=words, help="files, wildcards, directories; archives also by address")
    parser.add_argument("--domain", default="web", type=domain_name,
                        help="code, headers, docs, reference or what begins so (code_x); any other for text of the web")
    parser.add_argument("--out", type=out_directory, default=Path("curated-own"),
                        help="directory for results (curated-own)")
    parser.add_argument("--text-column", default="text", help="of JSONL and Parquet (text)")
    parser.add_argument("--extractor", help="of web pages: justext, as Nemotron-CC, or resiliparse (justext)")
    parser.add_argument("--languages", type=str.split, default=[], help="to keep, as in 'en de' (those of params.yaml)")
    parser.add_argument("--against", nargs="+", type=words, default=[], action="extend", metavar="FILE",
                        help="evaluation sets that no document may share text with")
    parser.add_argument("--labels", type=str.split, default=[],
                        help="whose documents the heuristics are for, as in 'medium low' (by domain)")
    parser.add_argument("--params", type=Path, default=ROOT / "params.yaml", help="parameter file (params.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    options = parser.parse_args()
    given, against = list(chain.from_iterable(options.source)), list(chain.from_iterable(options.against))
    if odd := [path for path in given if NOT_UTF8.search(path)]:
        wildcard = NOT_UTF8.sub("?", odd[0])
        sys.exit(f"{odd[0]!a}: a name that is not UTF-8 cannot be a parameter.\n"
                 f"Name its directory, or a wildcard: '{wildcard}'.")
    read_yaml(options.params)                   # refuse it here, once
    refuse_own_results(given, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    values = settings(sources_of(given, options.domain, options.text_column, options.extractor), options.domain,
                      options.languages, against, options.labels)
    assignments = [*(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()), *options.set]
    refuse_unread(options.params, assignments, ("annotate", "curate", "seed"), "curation")
    try:
        for stage in ("annotate", "curate"):
            if status := run(stage, options.out, options.params, assignments):
                sys.exit(status)
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again: finished shards are kept.", file=sys.stderr)
        sys.exit(130)
    show(options.out)


if __name__ == "__main__":
    main()
