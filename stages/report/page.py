"""The page from its templates; what cannot be read stands in its place as two lines."""

from __future__ import annotations

import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from pydantic import BaseModel
from ruamel.yaml import YAML

from stages.report import figures
from stages.report.claims import Claim
from stages.report.records import DataRecords, Reader, RecordError, Records
from stages.report.statistics import Answer
from stages.schema import Machine, Provenance

HERE = Path(__file__).parent
NONE = "–"
REASONS = 6                         # of a step that are named
# Controls but line feed and tab, format characters, lone surrogates, line and paragraph separators, private use.
INVISIBLE = re.compile("[" + "".join(
    re.escape(chr(code)) for code in range(0x10000)
    if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co") and chr(code) not in "\n\t") + "]")


class Page:
    """A page that fetches nothing.

    Attributes:
        text: HTML.
        plots: SVG by name.
        unread: two lines each, of what could not be read.
    """

    def __init__(self, title: str, profile: str, summary: str, data: DataRecords, records: Records | None = None,
                 claims: Sequence[Claim] = (), unread: Sequence[RecordError] = (), **others: Any):
        self.plots: dict[str, str] = {}
        self.unread: list[str] = []
        self.facts: dict[str, str] = others.get("facts", {})
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
            undefined=jinja2.StrictUndefined, extensions=["jinja2.ext.do"])
        environment.filters |= {"code": code, "commit": commit, "number": number, "percent": percent,
                                "reasons": reasons, "seen": seen, "yaml": yaml}
        environment.globals |= {"show": self.show, "plot": self.plot, "score_panel": figures.score_panel,
                                "threshold_panel": figures.threshold_panel}
        self.pieces: Any = environment.get_template("macros.html.jinja").module
        text = environment.get_template("page.html.jinja").render(
            title=title, profile=profile, summary=summary, r=records, data=data, claims=claims, counts=counts(claims),
            style=Markup((HERE / "style.css").read_text()), errors=unread, **others)
        lost = len(dict.fromkeys(self.unread))
        notice = f'<p class="unread" role="alert">Not read: {lost}. Each is named where it belongs.</p>' if lost else ""
        self.text = text.replace("<!-- unread -->", notice, 1)

    def show(self, make: Callable[..., Markup] | RecordError, *arguments: Any) -> Markup:
        """What a macro makes, or why it cannot."""
        try:
            if isinstance(make, RecordError):
                raise make
            return make(*arguments)
        except RecordError as error:
            self.unread.append(str(error))
            lines = Markup("<br>").join(map(code, str(error).split("\n")))
            return Markup('<p class="unread" role="alert">{}</p>').format(lines)

    def plot(self, name: str, title: str, caption: str, *arguments: Any) -> Markup:
        """The figure that the function `name` of `figures` draws of the arguments."""
        def draw() -> Markup:
            svg = getattr(figures, name)(*arguments)
            label = "-".join([name, *(text for text in arguments if isinstance(text, str))]).replace("_", "-")
            self.plots[label] = figures.labelled(svg, label, f"{title}. {caption}")
            return Markup(self.pieces.figure(label, title, caption, self.plots[label]))

        return self.show(draw)


# --- The page of a profile, of a curation -----------------------------------------------------------------------------


def report_page(records: Records, claims: Sequence[Claim], unread: Sequence[RecordError]) -> Page:
    """The page of a profile; `unread`: what could not be read beside its records."""
    runs: dict[str, Provenance] = {}
    lost: list[RecordError] = []
    for name in records.runs:
        try:
            runs[name] = records.provenance(name)
            records.reader.metrics(*name.split("@"))
        except RecordError as error:
            lost.append(error)
    return Page("Nemotron-H reproduced", records.params.profile, summary(records, claims), records.data, records,
                claims, unread, facts=facts(runs), runs=runs, lost=lost)


def counts(claims: Sequence[Claim]) -> dict[str, int]:
    found = Counter(claim.answer for claim in claims)
    return {str(answer): found[answer] for answer in Answer}


def summary(records: Records, claims: Sequence[Claim]) -> str:
    """One sentence: how the answers fall, at what size."""
    holds, fails, undecided = counts(claims).values()
    try:
        trained = [records.metrics("pretrain", name) for name in records.params.variants]
        parameters, tokens = (short(max(metrics[key] for metrics in trained)) for key in ("parameters", "tokens"))
        size = f"the models have {parameters} parameters and saw {tokens} tokens"
    except RecordError:
        size = "the records of training cannot be read"
    verbs = "holds" if holds == 1 else "hold", "does" if fails == 1 else "do"
    return (f"Of {len(claims)} claims of the paper, {holds} {verbs[0]} at this scale, {fails} {verbs[1]} not, and of "
            f"{undecided} it cannot be told: {size}; the paper's have 8 to 56 billion and saw 15 to 20 trillion.")


def facts(runs: Mapping[str, Provenance]) -> dict[str, str]:
    def words(machine: Machine) -> str:
        processor = f"{machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB"
        return f"{machine.accelerator}; {processor}" if machine.accelerator else processor

    return {"machine": " / ".join(dict.fromkeys(words(run.machine) for run in runs.values())),
            "commit": ", ".join(dict.fromkeys(commit(run.code.commit) for run in runs.values())),
            "time of all stages": f"{sum(run.wall_seconds for run in runs.values()) / 60:.1f} min"}


def write_data_page(runs: Path, out: Path, profile: str) -> Path:
    """Write OUT/index.html: what a curation left, cut and dropped, without the rest of the report; its path.

    Args:
        runs: directory of records, as `runs/PROFILE` or DIR/runs of a stage with `--out DIR`: `annotate` and `curate`
            must be there; where `tokenize` is, tokens are shown too.
        out: directory; it is made.
        profile: name to show.

    Raises RecordError where nothing says what was left.
    """
    records = DataRecords(Reader(runs), tokenized=(runs / "tokenize" / "metrics.json").exists())
    ends = ([records.steps(domain)[place] for domain in records.domains] for place in (0, -1))
    read, left = (f"{sum(row.documents for row in rows):,} documents ({sum(row.bytes for row in rows) / 1e6:,.2f} MB)"
                  for rows in ends)
    page = Page("Curated data", profile, f"Of {read} read, {left} are left to train on.", records)
    write(out / "index.html", page.text)
    return out / "index.html"


def write(path: Path, text: str) -> None:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


# --- Words ------------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """With a true minus sign; a dash for None."""
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", "−")


def percent(value: float, digits: int = 2) -> str:
    return f"{number(100 * value, digits)} %"


def short(value: float) -> str:
    """1.65 million for 1,652,736."""
    return next((f"{value / size:.3g} {word}" for size, word in (
        (1e12, "trillion"), (1e9, "billion"), (1e6, "million")) if value >= size), f"{value:,.0f}")


def commit(name: str | None) -> str:
    """Its first twelve digits, and whether the tree differed."""
    head, plus, changes = (name or "not in git").partition("+")
    return head[:12] + plus + changes


def reasons(found: Mapping[str, int]) -> str:
    """The most frequent with their documents."""
    ordered = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
    words = [f"{reason}: {count:,}" for reason, count in ordered[:REASONS]]
    rest = sum(count for _, count in ordered[REASONS:])
    return "; ".join([*words, f"others: {rest:,}"] if rest else words) or NONE


def yaml(model: BaseModel) -> str:
    text = io.StringIO()
    YAML().dump(model.model_dump(mode="json"), text)
    return text.getvalue()


def code(text: Any) -> Markup:
    """Escaped text with `code` marked."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def seen(text: str) -> Markup:
    """Escaped text whose invisible characters are written as Python writes them."""
    return Markup(INVISIBLE.sub(lambda character: f'<span class="control">{ascii(character[0])[1:-1]}</span>',
                                str(escape(text))))
