"""README's counts and table of claims, from the committed results of runs: docs/results/claims-PROFILE.json.

    python -m stages.report.readme [--check]

Those files are reports/PROFILE/claims.json of a run (`stages.report`). The table stands between two markers; --check
changes nothing and ends with 1 where README does not say what the files do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stages.report.records import RecordError
from stages.report.statistics import Answer

README, RESULTS = Path("README.md"), Path("docs/results")
START, END = "<!-- claims: python -m stages.report.readme -->", "<!-- end of claims -->"
MARKS = {Answer.HOLDS: "✓", Answer.FAILS: "**✗**", Answer.UNDECIDED: "○"}


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Claims by profile and key: title, number, answer. Raises RecordError."""
    found = {}
    for path in sorted(folder.glob("claims-*.json")):
        try:
            rows = json.loads(path.read_text())["claims"]
            found[path.stem.removeprefix("claims-")] = {
                row["key"]: {"number": row["number"], "title": row["title"], "answer": Answer(row["answer"])}
                for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}: not the claims of a report ({error!r}).\n"
                              "Copy reports/PROFILE/claims.json of a run there.") from None
    return found


def table(profiles: dict[str, dict[str, Any]]) -> str:
    """Markdown: the counts of each profile, then a line a claim; nothing where no run is committed."""
    if not profiles:
        return ""
    counts = []
    for name, rows in profiles.items():
        number = {answer: sum(row["answer"] is answer for row in rows.values()) for answer in Answer}
        counts.append(f"`{name}`: of {len(rows)}, {number[Answer.HOLDS]} hold (✓), {number[Answer.FAILS]} do not (✗), "
                      f"{number[Answer.UNDECIDED]} cannot be told (○).  ")
    every = {key: row for rows in profiles.values() for key, row in rows.items()}
    lines = [f"| | the paper | {' | '.join(f'`{name}`' for name in profiles)} |",
             f"| --- | --- |{' :-: |' * len(profiles)}"]
    for key, row in every.items():
        marks = (MARKS[rows[key]["answer"]] if key in rows else "" for rows in profiles.values())
        lines.append(f"| {row['number']} | {row['title']} | {' | '.join(marks)} |")
    return "\n".join([*counts, "", *lines]) + "\n"


def replaced(text: str, block: str) -> str:
    """README's text with `block` between the markers. Raises RecordError."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise RecordError(f"{README}: `{START}` and `{END}` do not both stand in it.\n"
                          "Put them where the claims belong.")
    return f"{before}{start}\n{block}{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    text = README.read_text()
    try:
        wanted = replaced(text, table(read()))
    except RecordError as error:
        print(error)
        return 1
    if check and wanted != text:
        print(f"{README}: its claims are not those of {RESULTS}/claims-*.json.\nRun `python -m stages.report.readme`.")
        return 1
    if not check:
        README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
