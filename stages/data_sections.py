"""What the report says of the data: what each step left, what thresholds cut, what went, what tokens came of it.

`write_data_page` is this part as a page of its own.
"""

from __future__ import annotations

import html
from collections import Counter
from dataclasses import replace
from pathlib import Path

from data_pipeline.config import DataError
from stages.data_plots import data_plots, millions, tokens_left
from stages.histograms import score_panel, threshold_panel
from stages.records import Blend, DataRecords, Dropped, Metrics, load_data
from stages.report_page import (
    Block,
    Document,
    Excerpts,
    Figures,
    Fold,
    Panels,
    Paragraph,
    Section,
    Table,
    write_page,
)

NONE = "–"
SHORTENED = "substring"             # the reason that strings were taken out of documents that stay
REASONS = 8                         # of a step that are named
EXCERPT_BYTES = 500_000             # of all excerpts in a page, about


def write_data_page(runs: Path, out: Path, profile: str) -> Path:
    """Write OUT/index.html and OUT/report.md: what a curation left, cut and dropped, without the rest of the report.

    Args:
        runs: directory of records, as `runs/PROFILE` or DIR/runs of a stage with `--out DIR`: `annotate` and `curate`
            must be there; where `tokenize` is, tokens are shown too.
        out: directory; it is made.
        profile: name to show.

    Returns:
        The page.

    Raises:
        DataError: a record is missing or malformed.
    """
    def find(*parts: str) -> Path:
        path = runs.joinpath(*parts)
        if not path.exists():
            raise DataError(f"{path}: not found; stage `{parts[0]}` writes it.\nRun that stage first.")
        return path

    records = load_data(find, tokenized=(runs / "tokenize" / "metrics.json").exists())
    document = Document(
        title="Curated data", profile=profile, summary=summary(records), facts=[],
        sections=[replace(section, command="") for section in sections(records)],
        about="Which documents a curation kept, which it dropped and why, with the thresholds that decided it.")
    return write_page(document, out)


def summary(records: DataRecords) -> str:
    """One sentence: what was read and what is left."""
    read, left = ([records.steps(domain)[place] for domain in records.domains] for place in (0, -1))
    sizes = [sum(row.bytes for row in rows) / 1e6 for rows in (read, left)]
    documents = [sum(row.documents for row in rows) for rows in (read, left)]
    tokens = f", {millions(sum(file.tokens for file in records.blend.files))} tokens" if records.blend else ""
    return (f"Of {documents[0]:,} documents ({sizes[0]:,.2f} MB) read, {documents[1]:,} ({sizes[1]:,.2f} MB{tokens}) "
            "are left to train on.")


def sections(records: DataRecords) -> list[Section]:
    """The data part of the report."""
    drawn = data_plots(records)
    funnels = Figures([drawn[f"funnel-{domain}"] for domain in records.domains], narrow=True)
    metrics = Fold("All metrics of the data stages", [_metrics(records.metrics)])
    found = [
        Section("data", "Data: what each step left", "dvc repro curate",
                [funnels, *_funnel(records), metrics]),
        Section("thresholds", "Data: thresholds and scores", "dvc repro curate", _thresholds(records)),
        Section("dropped", "Data: what was dropped", "dvc repro curate", _dropped(records)),
    ]
    if records.blend:
        figures = Figures([drawn["blend"], drawn["repeats"]])
        tokens: list[Block] = [_densities(records), figures, _files(records, records.blend)]
        found.append(Section("tokens", "Data: tokens", "dvc repro tokenize", tokens))
    return found


# --- What each step left ----------------------------------------------------------------------------------------------


def _funnel(records: DataRecords) -> list[Block]:
    """A table a domain: what is left after each step, what the step took and why."""
    blocks: list[Block] = []
    for domain in records.domains:
        steps, rows = records.steps(domain), []
        for before, row in zip([steps[0], *steps], steps, strict=False):
            mark = "" if row is steps[-1] else "≈ "
            rows.append([
                row.step.replace("_", " "), _reasons(row.reasons), f"{row.documents:,}",
                _change(before.documents, row.documents), f"{row.bytes / 1e6:,.3f}", _change(before.bytes, row.bytes),
                *([f"{mark}{tokens_left(records, row):,.0f}"] if records.blend else [])])
        header = ["Step", "Reasons (documents)", "Documents", "Change", "MB", "Change"]
        blocks.append(Table(f"Left of {domain}", header + ["Tokens"] * (records.blend is not None), rows,
                            text_columns=2))
    if records.blend:
        blocks.append(Paragraph("≈ marks tokens reckoned from bytes, by the bytes a token of the domain's training "
                                "text has; the last row is counted."))
    return blocks


def _reasons(reasons: dict[str, int]) -> str:
    """The most frequent reasons with their documents."""
    ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    words = [f"{reason}: {count:,}" for reason, count in ordered[:REASONS]]
    rest = sum(count for _, count in ordered[REASONS:])
    return "; ".join([*words, f"others: {rest:,}"] if rest else words) or NONE


def _change(before: int, after: int) -> str:
    if after == before:
        return NONE
    percent = 100 * (after / before - 1)
    return f"{percent:+.{2 if abs(percent) >= 0.01 else 4}f} %".replace("-", "−")


# --- Thresholds -------------------------------------------------------------------------------------------------------


def _thresholds(records: DataRecords) -> list[Block]:
    """Scores with the labels' boundaries, then every threshold of each domain."""
    scores = [score_panel(item) for item in records.histograms if item.labels]
    blocks: list[Block] = [
        Paragraph("Documents by value; heights are logarithmic. Counted are the documents that labels are made "
                  "from: training text without copies, in the languages that stay, before any rule."),
        Paragraph("Scores of the quality scorers, in the colours of the labels. A document has the best label that any "
                  "scorer gives it; the boundaries are percentiles of each domain, weighted by bytes."),
        Panels(scores, large=True),
        Paragraph("Thresholds of each domain. Documents go for the first rule they break, held-out ones too; rules "
                  "may spare documents with a good label. So more may lie beyond a threshold than went for it."),
    ]
    for domain in records.domains:
        reasons: Counter[str] = Counter()
        for row in records.steps(domain):
            reasons.update(row.reasons)
        panels = [threshold_panel(item, reasons) for item in records.histograms
                  if item.domain == domain and not item.labels]
        if panels:
            blocks.append(Fold(f"{domain}: {len(panels)} thresholds", [Panels(panels)]))
    return blocks


# --- What was dropped -------------------------------------------------------------------------------------------------


def _dropped(records: DataRecords) -> list[Block]:
    """Examples by domain and reason, the most frequent reason first."""
    most = examples_shown(records.dropped)
    blocks: list[Block] = [Paragraph(
        f"Up to {most} documents a reason, drawn by lot: where they come from, what broke the rule, and their text. "
        "Invisible characters are written as `\\x1b` or `\\u200b`.")]
    for domain in records.domains:
        found = sorted((item for item in records.dropped if item.domain == domain),
                       key=lambda item: (-item.documents, item.reason))
        if found:
            inner: list[Block] = [
                Fold(_dropped_title(item), [Excerpts(item.examples[:most])]) if item.examples
                else Paragraph(_dropped_title(item)) for item in found]
            gone = sum(item.documents for item in found if item.reason != SHORTENED)
            blocks.append(Fold(f"{domain}: {gone:,} dropped", inner))
    return blocks


def examples_shown(dropped: list[Dropped]) -> int:
    """Examples of each reason that a page has room for."""
    most = max((len(item.examples) for item in dropped), default=0)
    while most > 1 and sum(len(html.escape(example.excerpt).encode(errors="replace")) for item in dropped
                           for example in item.examples[:most]) > EXCERPT_BYTES:
        most -= 1
    return most


def _dropped_title(item: Dropped) -> str:
    what = "repeated strings taken out of" if item.reason == SHORTENED else f"{item.reason}:"
    return f"{what} {item.documents:,} {'document' if item.documents == 1 else 'documents'}"


# --- Tokens -----------------------------------------------------------------------------------------------------------


def _densities(records: DataRecords) -> Table:
    metrics, rows = records.metrics["tokenize"], []
    for domain in [*records.domains, "all"]:
        end = "" if domain == "all" else f"_{domain}"
        rows.append([
            domain, f"{metrics[f'tokens_train{end}']:,.0f}", f"{metrics[f'tokens_validation{end}']:,.0f}",
            f"{metrics[f'bytes_per_token{end}']:.3f}", f"{metrics[f'tokens_per_document{end}']:,.0f}",
            f"{100 * metrics[f'unknown_share{end}']:.4f}", f"{100 * metrics[f'byte_fallback_share{end}']:.4f}"])
    return Table("Tokens of each domain", [
        "Domain", "Tokens to train on", "Tokens to validate on", "Bytes a token", "Tokens a document",
        "Unknown tokens (%)", "Tokens that are single bytes (%)"], rows)


def _files(records: DataRecords, mixture: Blend) -> Table:
    rows = [[file.domain, file.label, f"{file.documents:,}", f"{file.tokens:,}", f"{file.bytes / file.tokens:.3f}",
             f"{file.repeats:.3f}", f"{100 * file.repeats * file.tokens / mixture.tokens:.2f}"]
            for domain in records.domains for file in records.files(domain)]
    return Table(f"What training reads: {mixture.tokens:,} tokens, nothing more than {mixture.repeats_at_most:g} times",
                 ["Domain", "Label", "Documents", "Tokens", "Bytes a token", "Times read", "Share of training (%)"],
                 rows, text_columns=2)


def _metrics(metrics: dict[str, Metrics]) -> Table:
    rows = [[stage, f"`{key}`", f"{value:,.6g}" if isinstance(value, float) else f"{value:,}"]
            for stage, values in metrics.items() for key, value in values.items()]
    return Table("Metrics", ["Stage", "Metric", "Value"], rows, text_columns=2)
