"""The page from its templates; what cannot be read stands in its place as two lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from stages.common import write
from stages.report import figures
from stages.report.claims import Claim, counts, plain
from stages.report.records import LABELS, DataRecords, RecordError, Records
from stages.schema import Machine, Provenance
from stages.study_schema import Study

HERE = Path(__file__).parent
NONE = "–"


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
        environment.globals |= {"show": self.show, "plot": self.plot, "areas": figures.panel, "labels": LABELS}
        self.pieces: Any = environment.get_template("macros.html.jinja").module
        text = environment.get_template("page.html.jinja").render(
            style=Markup((HERE / "style.css").read_text()), **values)
        lost = len(dict.fromkeys(self.unread))
        notice = f'<p class="unread" role="alert">Not read: {lost}. Each is named where it belongs.</p>' if lost else ""
        self.text = text.replace("<!-- unread -->", notice, 1)

    def show(self, make: Callable[..., Markup], *arguments: Any) -> Markup:
        """What a macro makes, or why it cannot: an argument or what it reads is a RecordError."""
        try:
            for error in (one for one in arguments if isinstance(one, RecordError)):
                raise error
            return make(*arguments)
        except RecordError as error:
            self.unread.append(str(error))
            lines = Markup("<br>").join(map(code, str(error).split("\n")))
            return Markup('<p class="unread" role="alert">{}</p>').format(lines)

    def plot(self, records: Records, name: str, title: str, caption: str) -> Markup:
        """The figure that the function `name` of `figures` draws."""
        def draw() -> Markup:
            label = name.replace("_", "-")
            self.plots[label] = figures.labelled(getattr(figures, name)(records), label, f"{title}. {caption}")
            return Markup(self.pieces.figure(label, title, caption, self.plots[label]))

        return self.show(draw)


def report_page(records: Records, claims: Sequence[Claim], studies: Mapping[str, Study | RecordError]) -> Page:
    """The page of a profile."""
    runs: dict[str, Provenance] = {}
    trained: list[tuple[float, float]] = []            # parameters, tokens
    lost: list[RecordError] = []
    for name in records.runs:
        try:
            runs[name] = records.provenance(name)
            metrics = records.reader.metrics(*name.split("@"))
            trained += [(metrics["parameters"], metrics["tokens"])] if name.startswith("pretrain@") else []
        except RecordError as error:
            lost.append(error)
    facts = {"machine": " / ".join(dict.fromkeys(machine(run.machine) for run in runs.values())),
             "commit": ", ".join(dict.fromkeys(commit(run.code.commit) for run in runs.values())),
             "time of all stages": f"{sum(run.wall_seconds for run in runs.values()) / 60:.1f} min"}
    return Page(title="Nemotron-H reproduced", profile=records.params.profile, summary=summary(claims, trained),
                r=records, data=records, tokenized=True, claims=claims, counts=counts(claims), facts=facts, runs=runs,
                lost=lost, studies=studies)


def summary(claims: Sequence[Claim], trained: Sequence[tuple[float, float]]) -> str:
    """One sentence: how the answers fall, at what size."""
    holds, fails, undecided = counts(claims).values()
    size = "the records of training cannot be read"
    if trained:
        parameters, tokens = (max(column) / 1e6 for column in zip(*trained, strict=True))
        size = f"the models have {parameters:,.3g} million parameters and saw {tokens:,.3g} million tokens"
    verbs = "holds" if holds == 1 else "hold", "does" if fails == 1 else "do"
    return (f"Of {len(claims)} claims of the paper, {holds} {verbs[0]} at this scale, {fails} {verbs[1]} not, and of "
            f"{undecided} it cannot be told: {size}; the paper's have 8 to 56 billion and saw 15 to 20 trillion.")


def write_data_page(runs: Path, out: Path, profile: str) -> Path:
    """Write OUT/index.html: what a curation left, cut and dropped, without the rest of the report; its path.

    Args:
        runs: directory of records, as `runs/PROFILE` or DIR/runs of a stage with `--out DIR`: `annotate` and `curate`
            must be there; where `tokenize` is, tokens are shown too.
        out: directory; it is made.
        profile: name to show.

    Raises RecordError where nothing says what was left.
    """
    records = DataRecords(runs)
    read, left = (f"{sum(row.documents for row in rows):,} documents ({sum(row.bytes for row in rows) / 1e6:,.2f} MB)"
                  for rows in zip(*((steps[0], steps[-1]) for steps in records.steps.values()), strict=True))
    page = Page(title="Curated data", profile=profile, summary=f"Of {read} read, {left} are left to train on.", r=None,
                data=records, tokenized=(runs / "tokenize" / "metrics.json").exists(), claims=[])
    write(out / "index.html", page.text)
    return out / "index.html"


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else plain(value, f",.{digits}f")


def machine(of: Machine) -> str:
    processor = f"{of.processor}, {of.cores} cores, {of.memory_gib:g} GiB"
    return f"{of.accelerator}; {processor}" if of.accelerator else processor


def commit(name: str | None) -> str:
    """Its first twelve digits, and whether the tree differed."""
    head, plus, changes = (name or "not in git").partition("+")
    return head[:12] + plus + changes


def code(text: Any) -> Markup:
    """Escaped text with `code` marked."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def seen(text: str) -> Markup:
    """Escaped text whose invisible characters are written as Python writes them."""
    return Markup("".join(one if one.isprintable() or one in "\n\t" else
                          f'<span class="control">{ascii(one)[1:-1]}</span>' for one in escape(text)))
