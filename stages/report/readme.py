"""README's counts and table of claims, from the committed results of runs: docs/results/claims-PROFILE.json.

    python -m stages.report.readme [--check]

Those files are reports/PROFILE/claims.json of a run (`stages.report`). The table stands between two markers; --check
changes nothing and ends with 1 where README does not say what the files do.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from pydantic import BaseModel

from stages.report.records import Reader, RecordError
from stages.report.statistics import Answer

README, RESULTS = Path("README.md"), Path("docs/results")
START, END = "<!-- claims: python -m stages.report.readme -->", "<!-- end of claims -->"
MARKS = {Answer.HOLDS: "✓", Answer.FAILS: "**✗**", Answer.UNDECIDED: "○"}


class Row(BaseModel):
    number: str
    title: str
    answer: Answer


class Result(BaseModel):
    """Of claims.json, what README says."""

    claims: list[Row]


def table() -> str:
    """Markdown: the counts of each profile, then a line a claim; nothing where no run is committed. Raises RecordError.
    """
    reader, lines = Reader(RESULTS, lambda _: "Copy reports/PROFILE/claims.json of a run there."), []
    profiles = {path.stem.removeprefix("claims-"): {
        (row.number, row.title): MARKS[row.answer] for row in reader.read(Result, path.name).claims}
        for path in sorted(RESULTS.glob("claims-*.json"))}
    for name, rows in profiles.items():
        holds, fails, open_ = (Counter(rows.values())[mark] for mark in MARKS.values())
        lines.append(f"`{name}`: of {len(rows)}, {holds} hold (✓), {fails} do not (✗), {open_} cannot be told (○).  ")
    if profiles:
        lines += ["", f"| | the paper | {' | '.join(f'`{name}`' for name in profiles)} |",
                  f"| --- | --- |{' :-: |' * len(profiles)}"]
    for number, title in dict.fromkeys(claim for rows in profiles.values() for claim in rows):
        marks = " | ".join(rows.get((number, title), "") for rows in profiles.values())
        lines.append(f"| {number} | {title} | {marks} |")
    return "".join(f"{line}\n" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, text = parser.parse_args(arguments).check, README.read_text()
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    try:
        if not (start and end):
            raise RecordError(f"{README}: `{START}` and `{END}` do not both stand in it.\n"
                              "Put them where the claims belong.")
        wanted = f"{before}{START}\n{table()}{END}{after}"
        if check and wanted != text:
            raise RecordError(f"{README}: its claims are not those of {RESULTS}/claims-*.json.\n"
                              "Run `python -m stages.report.readme`.")
    except RecordError as error:
        print(error)
        return 1
    if not check:
        README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
