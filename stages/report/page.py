"""The page from its templates; what cannot be read stands in its place as two lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from model.evaluation.schema import REFERENCE, REFERENCE_IS
from stages.frame.common import write
from stages.frame.schema import MachineRecord, Provenance
from stages.report import figures
from stages.report.claims import Claim, counts, plain
from stages.report.records import LABELS, DataRecords, RecordError, Records
from stages.report.statistics import beats_chance
from stages.report.study_schema import Study

HERE = Path(__file__).parent


class Page:
    """A page that fetches nothing, from page.html.jinja with these values.

    Attributes:
        values: as they were given.
        text: HTML.
        plots: SVG by name.
        unread: two lines each, of what could not be read.
    """

    def __init__(self, **values: Any):
        self.values = values
        self.plots: dict[str, str] = {}
        self.unread: list[str] = []
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
            undefined=jinja2.StrictUndefined, extensions=["jinja2.ext.do"])
        environment.filters |= {"code": code, "commit": commit, "number": number, "seen": seen}
        environment.globals |= {"show": self.show, "draw": self.draw, "areas": figures.panel, "histogram": histogram,
                                "labels": LABELS, "beats_chance": beats_chance, "reference_name": REFERENCE,
                                "reference_is": REFERENCE_IS}
        self.text = environment.get_template("page.html.jinja").render(
            style=Markup((HERE / "style.css").read_text()), unread=self.unread, **values)

    def show(self, make: Callable[..., Markup], *arguments: Any) -> Markup:
        """What a macro makes, or why it cannot: an argument or what it reads is a RecordError."""
        try:
            for error in (one for one in arguments if isinstance(one, RecordError)):
                raise error
            return make(*arguments)
        except RecordError as error:
            self.unread.append(str(error))
            return Markup('<p class="unread" role="alert">{}</p>').format(code(error))

    def draw(self, records: Records, label: str, words: str) -> Markup:
        """The figure that the function of this name, of `figures`, draws."""
        self.plots[label] = figures.labelled(getattr(figures, label.replace("-", "_"))(records), label, words)
        return Markup(self.plots[label])


def histogram(of: figures.Panel, name: str, words: str) -> Markup:
    """A panel as SVG, with `words` for who cannot see it."""
    return Markup(figures.labelled(figures.histogram(of), name, words))


def report_page(records: Records, claims: Sequence[Claim], studies: Mapping[str, Study | RecordError]) -> Page:
    """The page of a profile."""
    runs: dict[str, Provenance] = {}
    lost: list[RecordError] = []
    for name in records.runs:
        try:
            runs[name] = records.provenance(name)
        except RecordError as error:
            lost.append(error)
    facts = {"machine": " / ".join(dict.fromkeys(machine(run.machine) for run in runs.values())),
             "commit": ", ".join(dict.fromkeys(commit(run.code.commit) for run in runs.values())),
             "time of all stages": f"{sum(run.wall_seconds for run in runs.values()) / 60:.1f} min"}
    return Page(title="Nemotron-H reproduced", profile=records.params.profile, r=records, data=records, tokenized=True,
                claims=claims, counts=counts(claims), facts=facts, runs=runs, lost=lost, studies=studies)


def write_data_page(runs: Path, out: Path, profile: str) -> Path:
    """Write OUT/index.html: what a curation left, cut and dropped, without the rest of the report; its path.

    Args:
        runs: directory of records, as `runs/PROFILE` or DIR/runs of a stage with `--out DIR`: `annotate` and `curate`
            must be there; where `tokenize` is, tokens are shown too.
        out: directory; it is made.
        profile: name to show.

    Raises RecordError where nothing says what was left.
    """
    page = Page(title="Curated data", profile=profile, r=None, data=DataRecords(runs), claims=[],
                tokenized=(runs / "tokenize" / "metrics.json").exists())
    write(out / "index.html", page.text)
    return out / "index.html"


def number(value: float | None, digits: int = 3) -> str:
    """With thousands' separators; a dash where there is none."""
    return "–" if value is None else plain(value, f",.{digits}f")


def machine(of: MachineRecord) -> str:
    """A machine in words."""
    return "; ".join(filter(None, (of.accelerator, f"{of.processor}, {of.cores} cores, {of.memory_gib:g} GiB")))


def commit(name: str | None) -> str:
    """Its first twelve digits, and whether the tree differed."""
    return re.sub(r"^(\w{12})\w+", r"\1", name or "not in git")


def code(text: Any) -> Markup:
    """Escaped text with `code` marked."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def seen(text: str) -> Markup:
    """Escaped text whose invisible characters are written as Python writes them."""
    return Markup("".join(one if one.isprintable() or one in "\n\t" else
                          f'<span class="control">{ascii(one)[1:-1]}</span>' for one in escape(text)))
