"""The page: its sections, filled from the records; what cannot be read stands in its place as two lines."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from markupsafe import Markup, escape

from data_pipeline.schema import Dropped
from model.evaluation_schema import ChoiceSample, Samples
from stages.report import figures, tables
from stages.report.claims import Answer, Claim
from stages.report.figures import Panel
from stages.report.records import DataRecords, Reader, RecordError, Records
from stages.schema import Machine, Provenance

HERE = Path(__file__).parent
SAVED = ("validation", "decoding", "fp8-gap", "distillation")   # plots that are files of their own, too
EXAMPLES = 3                        # of each reason that are shown
SHORTENED = "substring"             # the reason of strings taken out of documents that stay
# Controls but line feed and tab, format characters, lone surrogates, line and paragraph separators, private use.
INVISIBLE = re.compile("[" + "".join(
    re.escape(chr(code)) for code in range(0x10000)
    if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co") and chr(code) not in "\n\t") + "]")
Blocks = Sequence[Any]              # tables.Table, figures.Plot, those below: the template knows them by `kind`


@dataclass(frozen=True)
class Words:
    """A paragraph; `code` in backticks."""

    kind: ClassVar[str] = "words"
    text: str


@dataclass(frozen=True)
class Unread:
    """The two lines of a RecordError."""

    kind: ClassVar[str] = "unread"
    text: str


@dataclass(frozen=True)
class Fold:
    kind: ClassVar[str] = "fold"
    title: str
    blocks: Blocks


@dataclass(frozen=True)
class Panels:
    kind: ClassVar[str] = "panels"
    panels: list[Panel]


@dataclass(frozen=True)
class Excerpts:
    """(heading, text) of documents or items, word for word."""

    kind: ClassVar[str] = "excerpts"
    items: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """`command` makes the section's figures again; empty where there is nothing to run."""

    name: str
    title: str
    command: str
    blocks: Blocks


@dataclass(frozen=True)
class Page:
    title: str
    profile: str
    summary: str
    sections: list[Section]
    facts: dict[str, str] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    first: Blocks = ()              # below the claims

    @property
    def counts(self) -> dict[str, int]:
        """Claims by answer."""
        found = Counter(claim.answer for claim in self.claims)
        return {str(answer): found[answer] for answer in Answer} if self.claims else {}

    def blocks(self, kind: str) -> list[Any]:
        """All blocks of one kind, those within others too."""
        def inside(blocks: Blocks) -> list[Any]:
            return [found for block in blocks for found in [block, *inside(getattr(block, "blocks", ()))]]

        return [block for block in inside([*self.first, *self.sections]) if getattr(block, "kind", "") == kind]

    def write(self, directory: Path) -> Path:
        """Write DIRECTORY/index.html, which fetches nothing; its path."""
        environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                         lstrip_blocks=True, undefined=jinja2.StrictUndefined)
        environment.filters |= {"code": code, "seen": seen}
        template, style = environment.get_template("page.html.jinja"), (HERE / "style.css").read_text()
        write(directory / "index.html", template.render(page=self, style=Markup(style)))
        return directory / "index.html"


def write(path: Path, text: str) -> None:
    """The file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def code(text: str) -> Markup:
    """Escaped text with `code` marked."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def seen(text: str) -> Markup:
    """Escaped text whose invisible characters are written as Python writes them."""
    return Markup(INVISIBLE.sub(lambda character: f'<span class="control">{ascii(character[0])[1:-1]}</span>',
                                str(escape(text))))


def read(*makers: Callable[[], Any]) -> list[Any]:
    """The block, or blocks, of each; in place of what cannot be read, why."""
    blocks: list[Any] = []
    for make in makers:
        try:
            made = make()
        except RecordError as error:
            made = Unread(str(error))
        blocks += made if isinstance(made, list) else [made]
    return blocks


# --- The whole report -------------------------------------------------------------------------------------------------


def report_page(records: Records, claims: Callable[[], list[Claim]], others: Sequence[RecordError] = ()) -> Page:
    """The page of a profile.

    Args:
        claims: makes them.
        others: what could not be read besides.
    """
    found = [claim for claim in read(claims) if isinstance(claim, Claim)]
    unread = [block for block in read(claims) if isinstance(block, Unread)] + [Unread(str(error)) for error in others]
    runs, lost = provenances(records)
    r, draw, table = records, figures, tables
    sections = [
        Section("training", "Training", "dvc repro pretrain", read(
            lambda: draw.training_loss(r), lambda: draw.fp8_gap(r) if r.fp8_pairs else [], lambda: table.models(r))),
        Section("compression", "Compression", "dvc repro compress", read(
            lambda: draw.layer_importance(r), lambda: draw.candidates(r), lambda: draw.distillation(r),
            lambda: table.compression(r), lambda: table.candidates(r), lambda: table.costs(r))),
        Section("evaluation", "Evaluation", "dvc repro evaluate", read(
            lambda: draw.bits_per_byte(r), lambda: table.evaluation(r), lambda: table.paper_tasks(r),
            lambda: [samples(r.samples[name], name) for name in r.params.models[:1]])),
        Section("inference", "Inference", "dvc repro benchmark", read(
            lambda: draw.cache(r), lambda: table.decoding(r), lambda: table.export(r))),
        *data_sections(r.data),
        Section("runs", "Stage times and provenance", "", [
            *read(lambda: draw.stage_times(runs)), *lost,
            *(Fold(block.caption, [block]) for block in table.provenance(runs)),
            Fold("Versions and parameters", [
                Words(", ".join(sorted({f"{name} {version}" for run in runs.values()
                                        for name, version in run.versions.items()}))),
                Excerpts([("params.yaml", table.parameters(r))])])]),
    ]
    return Page("Nemotron-H reproduced", records.params.profile, summary(records, found), sections, facts(runs), found,
                [*unread, *read(lambda: draw.validation(r), lambda: draw.decoding(r))])


def provenances(records: Records) -> tuple[dict[str, Provenance], list[Unread]]:
    """Of every run; and what is wrong with the others, or with their metrics."""
    found: dict[str, Provenance] = {}
    lost: list[Unread] = []

    for name, run in records.runs.items():
        try:
            found[name] = run.provenance
            run.metrics.keys()
        except RecordError as error:
            lost.append(Unread(str(error)))
    return found, lost


def summary(records: Records, claims: list[Claim]) -> str:
    """One sentence: how the answers fall, at what size."""
    counts = Counter(claim.answer for claim in claims)
    answers = (f"Of {len(claims)} claims of the paper, {counts[Answer.HOLDS]} hold at this scale, "
               f"{counts[Answer.FAILS]} do not, and of {counts[Answer.UNDECIDED]} it cannot be told" if claims
               else "No claim could be judged")
    try:
        trained = [records.metrics("pretrain", name) for name in records.params.variants]
        size = (f"the models have {tables.short(max(metrics['parameters'] for metrics in trained))} parameters and saw "
                f"{tables.short(max(metrics['tokens'] for metrics in trained))} tokens")
    except RecordError:
        size = "the records of training cannot be read"
    return f"{answers}: {size}; the paper's have 8 to 56 billion and saw 15 to 20 trillion."


def facts(runs: dict[str, Provenance]) -> dict[str, str]:
    def words(machine: Machine) -> list[str]:
        processor = f"{machine.processor}, {machine.cores} cores, {machine.memory_gib:g} GiB"
        return [machine.accelerator, processor] if machine.accelerator else [processor]

    machines = dict.fromkeys(word for run in runs.values() for word in words(run.machine))
    commits = dict.fromkeys(tables.commit(run.code.commit) for run in runs.values())
    return {"machine": "; ".join(machines), "commit": ", ".join(commits),
            "time, stages added up": f"{sum(run.wall_seconds for run in runs.values()) / 60:.1f} min"}


def samples(found: Samples, model: str) -> Fold:
    """An item of each task with what the model chose of it."""
    items = []
    for task, rows in found.items():
        row = rows[0]
        if isinstance(row, ChoiceSample):
            marks = {row.answer: "right answer", row.chosen: "chosen"} | (
                {row.answer: "right answer, chosen"} if row.answer == row.chosen else {})
            choices = "\n".join(f"→ {choice}" + (f"   ({marks[place]})" if place in marks else "")
                                for place, choice in enumerate(row.choices))
            items.append((task.replace("_", " "), f"{row.context}\n{choices}"))
        else:
            items.append((f"{task.replace('_', ' ')}: {row.bits_per_byte:.3f}", row.text))
    return Fold(f"What {model} was asked and chose", [Excerpts(items)])


# --- Data -------------------------------------------------------------------------------------------------------------


def write_data_page(runs: Path, out: Path, profile: str) -> Path:
    """Write OUT/index.html: what a curation left, cut and dropped, without the rest of the report; its path.

    Args:
        runs: directory of records, as `runs/PROFILE` or DIR/runs of a stage with `--out DIR`: `annotate` and `curate`
            must be there; where `tokenize` is, tokens are shown too.
        out: directory; it is made.
        profile: name to show.
    """
    records = DataRecords(Reader(runs), tokenized=(runs / "tokenize" / "metrics.json").exists())
    steps = records.steps
    read_, left = ([steps(domain)[place] for domain in records.domains] for place in (0, -1))
    sizes = [f"{sum(row.documents for row in rows):,} documents ({sum(row.bytes for row in rows) / 1e6:,.2f} MB)"
             for rows in (read_, left)]
    sections = [Section(section.name, section.title, "", section.blocks) for section in data_sections(records)]
    return Page("Curated data", profile, f"Of {sizes[0]} read, {sizes[1]} are left to train on.", sections).write(out)


def data_sections(records: DataRecords) -> list[Section]:
    def each(make: Callable[[str], Any]) -> list[Any]:
        return [made for domain in records.domains if (made := make(domain))]

    return [
        Section("data", "Data: what each step left", "dvc repro curate", read(
            lambda: each(lambda domain: figures.funnel(records, domain)),
            lambda: each(lambda domain: Fold(f"Steps of {domain}", [tables.funnel(records, domain)])),
            lambda: tables.tokens(records))),
        Section("thresholds", "Data: thresholds and scores", "dvc repro curate", read(
            lambda: Words("Documents by value; heights are logarithmic. Counted is training text without copies, in "
                          "the languages that stay, before any rule. A document has the best label that any scorer "
                          "gives it, and goes for the first rule it breaks; rules may spare good labels."),
            lambda: Panels([figures.score_panel(*item) for item in records.histograms if item[2].labels]),
            lambda: each(lambda domain: thresholds(records, domain)))),
        Section("dropped", "Data: what was dropped", "dvc repro curate", read(
            lambda: each(lambda domain: dropped(domain, records.dropped.get(domain, {}))))),
    ]


def thresholds(records: DataRecords, domain: str) -> Fold:
    reasons: Counter[str] = Counter()
    for row in records.steps(domain):
        reasons.update(row.reasons)
    panels = [figures.threshold_panel(*item, reasons) for item in records.histograms
              if item[1] == domain and not item[2].labels]
    return Fold(f"{domain}: {len(panels)} thresholds", [Panels(panels)])


def dropped(domain: str, reasons: dict[str, Dropped]) -> Fold:
    """Examples by reason, the most frequent first."""
    folds = []
    for reason, item in sorted(reasons.items(), key=lambda pair: (-pair[1].documents, pair[0])):
        what = "repeated strings taken out of" if reason == SHORTENED else f"{reason}:"
        title = f"{what} {item.documents:,} document{'s' * (item.documents != 1)}"
        shown = [(f"{example.source} {example.path}: {example.value}", example.excerpt)
                 for example in item.examples[:EXAMPLES]]
        folds.append(Fold(title, [Excerpts(shown)]) if shown else Words(title))
    gone = sum(item.documents for reason, item in reasons.items() if reason != SHORTENED)
    return Fold(f"{domain}: {gone:,} dropped", folds)
