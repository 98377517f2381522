"""README's counts and table of claims, from the committed results of runs: docs/results/claims-PROFILE.json.

    python -m stages.report.readme [--check]

Those files are reports/PROFILE/claims.json of a run (`stages.report`). The table stands between two markers; --check
changes nothing and ends with 1 where README does not say what the files do.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from jinja2 import Template
from pydantic import BaseModel

from stages.report.records import Reader, RecordError
from stages.report.statistics import Answer

README, RESULTS = Path("README.md"), Path("docs/results")
START, END = "<!-- claims: python -m stages.report.readme -->", "<!-- end of claims -->"
MARKS = {Answer.HOLDS: ("hold", "✓"), Answer.FAILS: ("do not", "✗"), Answer.UNDECIDED: ("cannot be told", "○")}


class Row(BaseModel):
    """A claim as the table has it."""

    number: str
    title: str
    answer: Answer


class Claims(BaseModel):
    """Of claims.json, what README says."""

    claims: list[Row]


def table() -> str:
    """Markdown: the counts of each profile, then a line a claim; nothing where no run is committed. Raises RecordError.
    """
    reader = Reader(RESULTS, lambda _: "Copy reports/PROFILE/claims.json of a run there.")
    profiles = {path.stem.removeprefix("claims-"): {
        (row.number, row.title): row.answer for row in reader.read(Claims, path.name).claims}
        for path in sorted(RESULTS.glob("claims-*.json"))}
    template = Template(Path(__file__).with_name("readme.md.jinja").read_text(), trim_blocks=True)
    return template.render(profiles=profiles, marks=MARKS)


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, or 1 where --check finds another table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, text = parser.parse_args(arguments).check, README.read_text()
    try:
        wanted, places = re.subn(f"{START}\n.*{END}", lambda _: f"{START}\n{table()}{END}", text, flags=re.DOTALL)
        if not places:
            raise RecordError(f"{README}: `{START}` and `{END}` do not both stand in it.\n"
                              "Put them where the claims belong.")
        if check and wanted != text:
            raise RecordError(f"{README}: its claims are not those of {RESULTS}/claims-*.json.\n"
                              "Run `python -m stages.report.readme`.")
    except RecordError as error:
        print(error)
        return 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
