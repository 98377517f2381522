"""The cut: which documents of an annotated shard stay, the first reason each other one goes, and their labels.

The order is Nemotron-CC's (arXiv 2412.02595): language, copies, near-duplicates, heuristics and perplexity on the lower
labels, then shared text. A held-out document has no label that could spare it the heuristics; perplexity, contamination
and repeats are about training alone.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.annotate.dedup.substring import without
from data_pipeline.annotate.quality.quality_labels import (
    LOWEST_BINS,
    Sample,
    best_bins,
    keys_of,
    label_of,
    perplexity_limit,
    sample_of,
    thresholds,
)
from data_pipeline.annotate.step import text_id
from data_pipeline.config import AnnotateConfig, CurateConfig, DataError, Label
from data_pipeline.curate.heuristics import Rule, first_broken, reason, rules_of
from data_pipeline.text.language import codes
from data_pipeline.text.words import Bool, Float64, Int64

STEPS = ("language", "copies", "near_duplicates", "heuristics", "perplexity", "decontaminate", "substring", "held_out")
BINS = 30                   # of a histogram
WIDE = 1000                 # a range wider than this has logarithmic edges
SHORTENED = "substring"     # stands among the reasons for strings taken out of documents that stay
EXAMPLES = 6                # of what went, for a domain and reason
EXCERPT = 600               # characters
ENCODED = re.compile(r"[A-Za-z0-9+/=]{256}|(\\x[0-9a-fA-F]{2}){64}")

Ranges = dict[tuple[str, str], tuple[float, float]]     # (measure, domain) -> least and largest value


@dataclass(frozen=True)
class Cut:
    """What is cut of each domain, once the scores of all shards are known."""

    config: CurateConfig
    rules: dict[str, list[Rule]]
    scorers: list[str]
    ngram: int                                          # of decontamination
    bins: dict[str, Float64] = field(default_factory=dict)              # domain -> (scorers, 19)
    perplexity: dict[str, float] = field(default_factory=dict)          # domain -> the largest that stays
    edges: dict[tuple[str, str], Float64] = field(default_factory=dict)     # (measure, domain) -> of its histogram

    def smallest(self, domain: str) -> float:
        """Characters a document of `domain` must have."""
        lows = (rule.low for rule in self.rules.get(domain, []) if rule.feature == "characters")
        return next((low for low in lows if low is not None), 1)

    def thresholds_of(self, name: str, domain: str) -> tuple[float | None, float | None, str]:
        """Low, high and where they come from, of a measure in a domain."""
        if name == "perplexity":
            share = f"the largest {self.config.perplexity.share:.0%} of the bytes"
            return None, self.perplexity[domain] if np.isfinite(self.perplexity[domain]) else None, share
        if name == "language_share":
            return self.config.language.share, None, "configuration"
        if name in self.scorers:
            return None, None, "quality score"
        rule = next(rule for rule in self.rules[domain] if rule.feature == name)
        return rule.low, rule.high, rule.source

    def labels_of(self, name: str, domain: str) -> dict[Label, float]:
        """The least score of a scorer for each label but the lowest; empty for what is no scorer."""
        if name not in self.scorers:
            return {}
        least = self.bins[domain][self.scorers.index(name)]
        return {label: float(least[lowest - 1]) for label, lowest in LOWEST_BINS.items() if lowest}


def cut_of(config: CurateConfig, annotated: dict[str, Any]) -> Cut:
    """The cut of a corpus with this manifest, still without thresholds. Raises DataError for an unknown feature or
    language."""
    if unknown := sorted(set(config.language.keep) - codes()):
        raise DataError(f"curate.language.keep names {', '.join(unknown)}, which no text is found to be in.\n"
                        f"Choose from CLD2's codes, in params.yaml: {', '.join(sorted(codes()))}")
    rules = {domain: rules_of(rules, f"curate.rules.{domain}") for domain, rules in config.rules.items()}
    given = AnnotateConfig.model_validate(annotated["config"])
    return Cut(config, rules, given.scorer_names, given.decontamination.ngram)


class ScoreSurvey(NamedTuple):
    """Of one shard or more: a sample of scores by domain, and the ranges of what is measured."""

    samples: dict[str, Sample]
    ranges: Ranges


def survey(table: pa.Table, cut: Cut) -> ScoreSurvey:
    """What thresholds need to know of a shard: samples of its scores and the range of each measure."""
    samples, ranges = {}, {}
    for domain, rows in _scored(table, cut).items():
        chosen = table.filter(pa.array(rows))
        sizes = pc.binary_length(chosen["text"]).to_numpy()
        samples[domain] = sample_of(chosen["id"].to_pylist(), _scores(chosen), chosen["perplexity"].to_numpy(), sizes)
        for name, values in measures(chosen, domain, cut).items():
            ranges[name, domain] = (float(values.min()), float(values.max()))
    return ScoreSurvey(samples, ranges)


def with_thresholds(cut: Cut, found: ScoreSurvey) -> Cut:
    """`cut` with the thresholds that follow from the surveys of all shards."""
    return Cut(
        cut.config, cut.rules, cut.scorers, cut.ngram,
        {domain: thresholds(sample) for domain, sample in found.samples.items()},
        {domain: perplexity_limit(sample, cut.config.perplexity.share) for domain, sample in found.samples.items()},
        {key: edges(*values) for key, values in found.ranges.items()},
    )


def edges(low: float, high: float) -> Float64:
    """Edges of BINS bins from `low` to `high`, logarithmic where the range asks."""
    if high <= low:
        return np.linspace(low - 0.5, low + 0.5, BINS + 1)
    if low >= 1 and high - low > WIDE:
        return np.geomspace(low, high, BINS + 1)
    if low >= 0 and high - low > WIDE:
        return np.concatenate([[low], np.geomspace(1, high, BINS)])
    return np.linspace(low, high, BINS + 1)


def measures(table: pa.Table, domain: str, cut: Cut) -> dict[str, NDArray[Any]]:
    """What is measured of scored documents of one domain and has a threshold or a rank."""
    features = pa.table({"features": table["features"]}).flatten()
    found = {rule.feature: features[f"features.{rule.feature}"].to_numpy() for rule in cut.rules.get(domain, [])}
    if domain in cut.config.language.domains:
        found["language_share"] = table["language_share"].to_numpy()
    found["perplexity"] = table["perplexity"].to_numpy()
    return found | dict(zip(cut.scorers, _scores(table).T, strict=True))


class Removal(NamedTuple):
    """A document that went, or a string that was taken out."""

    key: int                # xxh3-64 of the id: the lowest are shown
    source: str
    path: str
    value: str              # what broke the rule
    excerpt: str


class CutShard(NamedTuple):
    """A shard after the cut.

    Attributes:
        train: with quality and label.
        report: JSON values: `left` (step -> domain -> documents and bytes to train on after it), `reasons` (step ->
            domain -> reason -> documents), `shortened` (domain -> documents that repeated strings were taken out of),
            `examples` (domain -> reason -> `Removal`) and `histograms` (measure, domain, documents in each bin).
    """

    train: pa.Table
    heldout: pa.Table
    report: dict[str, Any]


class CutRows:
    """The rows of a shard on their way through the cut."""

    def __init__(self, table: pa.Table, cut: Cut, best: Int64 | None):
        self.table, self.cut = table, cut
        self.texts: list[str] = table["text"].to_pylist()
        self.domains = _column(table, "domain")
        self.held_out = _column(table, "held_out").astype(bool)
        self.sizes = pc.binary_length(table["text"]).to_numpy().astype(np.int64)
        self.keys = keys_of(table["id"].to_pylist())
        self.stays = np.ones(len(table), dtype=bool)
        self.best = _best(table, cut) if best is None else best
        self.labels = np.array([label_of(value) if value >= 0 else None for value in self.best], dtype=object)
        self.left: dict[str, dict[str, list[int]]] = {}
        self.reasons: dict[str, dict[str, Counter[str]]] = {}
        self.shortened: Counter[str] = Counter()
        self.examples: dict[str, dict[str, list[Removal]]] = defaultdict(lambda: defaultdict(list))

    def drop(self, step: str, reasons: dict[int, tuple[str, str]], places: dict[int, int] | None = None) -> None:
        """Rows that go, with reason and value, if they are still there; `places` says where in the text to look."""
        counted: dict[str, Counter[str]] = defaultdict(Counter)
        for row, (why, value) in sorted(reasons.items()):
            if self.stays[row]:
                self.stays[row] = False
                counted[self.domains[row]][why] += 1
                if step != "held_out":
                    start = max(0, (places or {}).get(row, 0) - EXCERPT // 4)
                    self.show(row, why, value, self.texts[row][start : start + EXCERPT])
        self.reasons[step] = counted
        self.count(step)

    def show(self, row: int, why: str, value: str, excerpt: str) -> None:
        """Keep an example, if its key is among the lowest."""
        key, shown = int(self.keys[row]), self.examples[self.domains[row]][why]
        if len(shown) == EXAMPLES and key > shown[-1].key:
            return
        source, path = (self.table[name][row].as_py() for name in ("source", "path"))
        shown.append(Removal(key, source, path, value, excerpt))
        shown.sort()
        del shown[EXAMPLES:]

    def count(self, step: str) -> None:
        """Note the documents and bytes of each domain that are left after `step`."""
        self.left[step] = {
            domain: [int(np.count_nonzero(chosen)), int(self.sizes[chosen].sum())]
            for domain in sorted(set(self.domains)) for chosen in [self.stays & (self.domains == domain)]
        }


def apply(table: pa.Table, cut: Cut, best: Int64 | None = None) -> CutShard:
    """Cut one annotated shard.

    Args:
        best: ensemble values (0 to 19) where they are known beforehand, as of synthetic documents.
    """
    rows = CutRows(table, cut, best)
    rows.count("read")
    rows.drop("language", _language(rows))
    duplicates = table["duplicate"].to_pylist()
    found = {row: (why, why) for row, why in enumerate(duplicates) if why}
    rows.drop("copies", {row: why for row, why in found.items() if why[0].startswith("copy")})
    rows.drop("near_duplicates", {row: why for row, why in found.items() if not why[0].startswith("copy")})
    rows.drop("heuristics", *_heuristics(rows))
    rows.drop("perplexity", _perplexity(rows))
    rows.drop("decontaminate", _contaminated(rows))
    rows.drop("substring", _without_repeats(rows))
    heldout = _documents(rows, rows.stays & rows.held_out)
    rows.drop("held_out", dict.fromkeys(np.flatnonzero(rows.held_out).tolist(), ("held out", "")))
    train = _documents(rows, rows.stays)
    train = train.append_column("quality", pa.array(rows.best[rows.stays].astype(np.float64)))
    train = train.append_column("label", pa.array(rows.labels[rows.stays].tolist(), pa.string()))
    return CutShard(train, heldout, {
        "left": rows.left, "reasons": rows.reasons, "shortened": rows.shortened, "examples": rows.examples,
        "histograms": _histograms(table, cut)})


def _language(rows: CutRows) -> dict[int, tuple[str, str]]:
    config = rows.cut.config.language
    codes, shares = rows.table["language"].to_pylist(), rows.table["language_share"].to_pylist()
    found = {}
    for row in np.flatnonzero(np.isin(rows.domains, config.domains)).tolist():
        code, share = codes[row], shares[row]
        if code not in config.keep:
            found[row] = (f"language {code}", f"language {code}, {share:.0%} of the text")
        elif share < config.share:
            found[row] = (f"share of {code} < {config.share:g}", f"share of {code} {share:.2f} < {config.share:g}")
    return found


def _heuristics(rows: CutRows) -> tuple[dict[int, tuple[str, str]], dict[int, int]]:
    """Documents without text, and those that break a rule and have a label the rules apply to, or none."""
    found = {row: ("empty", "no text after normalisation") for row, text in enumerate(rows.texts) if not text.strip()}
    places: dict[int, int] = {}
    for domain, rules in rows.cut.rules.items():
        labels = [*rows.cut.config.rules[domain].labels, None]
        subject = np.flatnonzero((rows.domains == domain) & np.array([label in labels for label in rows.labels], bool))
        broken = first_broken(rows.table["features"].take(pa.array(subject)), rules)
        for row, index, above, value in zip(subject.tolist(), *(part.tolist() for part in broken), strict=True):
            if index >= 0 and row not in found:
                rule = rules[index]
                limit = reason(rule, above).removeprefix(rule.feature)
                found[row] = (reason(rule, above), f"{rule.feature} {_figure(value)}{limit} ({rule.source})")
                places[row] = _place(rule.feature, rows.texts[row])
    return found, places


def _figure(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def _place(feature: str, text: str) -> int:
    """Where in `text` the value of a feature comes from, if from one place."""
    if feature in ("longest_line", "mean_line_length"):
        return text.index(max(text.split("\n"), key=len))
    match = ENCODED.search(text) if feature == "encoded_run" else None
    return match.start() if match else 0


def _perplexity(rows: CutRows) -> dict[int, tuple[str, str]]:
    config = rows.cut.config.perplexity
    values = rows.table["perplexity"].to_pylist()
    found = {}
    for row, (domain, label) in enumerate(zip(rows.domains, rows.labels, strict=True)):
        limit = rows.cut.perplexity.get(domain, np.inf)
        if label in config.labels and values[row] is not None and values[row] > limit:
            found[row] = ("perplexity", f"perplexity {values[row]:,.0f} > {limit:,.0f}")
    return found


def _contaminated(rows: CutRows) -> dict[int, tuple[str, str]]:
    limit, ngram = rows.cut.config.contamination, rows.cut.ngram
    counts, sets = rows.table["contamination"].to_pylist(), rows.table["contaminated_by"].to_pylist()
    return {row: (f"shares {ngram} words in a row with {name}", f"{count} runs of {ngram} words > {limit}")
            for row, (count, name) in enumerate(zip(counts, sets, strict=True)) if (count or 0) > limit}


def _without_repeats(rows: CutRows) -> dict[int, tuple[str, str]]:
    """Take repeated strings out of training text; documents with too little left."""
    found = {}
    for row, spans in enumerate(rows.table["repeats"].to_pylist()):
        if not spans or not rows.stays[row] or rows.held_out[row]:
            continue
        text, removed = without(rows.texts[row], spans)
        rows.shortened[rows.domains[row]] += 1
        rows.show(row, SHORTENED, f"strings taken out: {len(removed)}", max(removed, key=len)[:EXCERPT])
        if len(text.strip()) < (least := rows.cut.smallest(rows.domains[row])):
            found[row] = ("little but repeats", f"{len(text.strip())} characters < {least:g} without repeated strings")
        else:
            rows.texts[row] = text
            rows.sizes[row] = len(text.encode())
    return found


def _documents(rows: CutRows, chosen: Bool) -> pa.Table:
    """The columns of the curated Parquet that both splits have."""
    table = rows.table.select(["source", "path", "domain", "license"]).filter(pa.array(chosen))
    texts = [rows.texts[row] for row in np.flatnonzero(chosen)]
    table = table.add_column(0, "text", pa.array(texts, pa.string()))
    return table.add_column(0, "id", pa.array([text_id(text) for text in texts], pa.string()))


def _histograms(table: pa.Table, cut: Cut) -> list[tuple[str, str, list[int]]]:
    """Measure, domain, documents in each bin."""
    found = []
    for domain, rows in _scored(table, cut).items():
        chosen = table.filter(pa.array(rows))
        for name, values in measures(chosen, domain, cut).items():
            bins = cut.edges[name, domain]
            counts = np.histogram(np.clip(values.astype(np.float64), bins[0], bins[-1]), bins)[0]
            found.append((name, domain, counts.tolist()))
    return found


def _scored(table: pa.Table, cut: Cut) -> dict[str, Bool]:
    """Documents of each domain that labels are made from: training text, no duplicate, in a language that stays."""
    config, domains = cut.config.language, _column(table, "domain")
    stays = np.isin(_column(table, "language"), config.keep) & (table["language_share"].to_numpy() >= config.share)
    exempt = ~np.isin(domains, config.domains)
    scored = pc.is_valid(table["scores"]).to_numpy() & (stays | exempt)
    return {domain: scored & (domains == domain) for domain in sorted(set(domains[scored]))}


def _best(table: pa.Table, cut: Cut) -> Int64:
    """Ensemble value of each document, -1 where it has none."""
    best = np.full(len(table), -1, dtype=np.int64)
    for domain, chosen in _scored(table, cut).items():
        best[chosen] = best_bins(_scores(table.filter(pa.array(chosen))), cut.bins[domain])
    return best


def _scores(table: pa.Table) -> Float64:
    """(documents, scorers), of documents that all have scores."""
    return np.array(table["scores"].to_pylist(), dtype=np.float64)


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    return np.array(table[name].to_pylist(), dtype=object)
