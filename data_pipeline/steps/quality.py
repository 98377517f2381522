"""Quality labels by an ensemble of scorers, after Nemotron-CC (arXiv 2412.02595; step 3 of its public recipe).

The ensemble is the paper's: each scorer ranks a domain into 20 quantile bins weighted by bytes, a document's bin is the
best of its three, and bins make five labels. The scorers are small stand-ins for the paper's classifiers:

    fluency     mean log2 probability of a word under a word-bigram model of the standard library's text, which is
                edited and reviewed; a standard-library document is scored without its own counts
    density     how near its compression is to what is usual in the domain: neither repetitive nor noise
    structure   how much it explains: sentences, reasons, sections, examples; in code comments, definitions, types
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.steps.step import GlobalStep, Outcome, with_column
from data_pipeline.steps.words import UInt64, ngrams, words

Float64 = NDArray[np.float64]

SCORERS = ("fluency", "density", "structure")
BINS = 20
# Lowest bin of each label, from the paper's annealing study of single bins.
LABELS = ((19, "high"), (18, "medium-high"), (12, "medium"), (7, "medium-low"), (0, "low"))

ANCHOR = "python/"              # sources of the reference text
SMOOTHING = 20.0                # pseudo-counts of the unigram behind each bigram
DENSITY_WINDOW = 2048           # bytes: a short document is not denser than a long one for being short

# Patterns and the number of matches in 1000 characters that is as good as any more.
PROSE_FEATURES = {
    r"[a-z)`][.!?](\s|$)": 8.0,
    r"(?i)\b(because|therefore|thus|for example|e\.g\.|i\.e\.|note that|so that|if|when|which|instead)\b": 6.0,
    r"(?im)^\s*(parameters|args|arguments|returns|raises|examples?|notes?|see also|references)\b": 2.0,
    r"(?m)^\s*(>>>|```|\.\. )": 2.0,
}
CODE_FEATURES = {
    r"(?m)#\s+\w+.*$": 4.0,
    r"(?m)^\s*(async\s+)?(def|class)\s": 2.0,
    r"->|:\s*(int|str|bool|float|None|Any|list|dict|tuple)\b": 3.0,
    r"\braise\s+\w+\(|\bassert\b": 1.0,
}
FEATURES = {"code": CODE_FEATURES, "docs": PROSE_FEATURES, "reference": PROSE_FEATURES}


class Counts(NamedTuple):
    """Sorted n-gram hashes and how often each was seen."""

    hashes: UInt64
    counts: Float64

    def of(self, values: UInt64) -> Float64:
        if not len(self.hashes):
            return np.zeros(len(values))
        index = np.minimum(np.searchsorted(self.hashes, values), len(self.hashes) - 1)
        return np.where(self.hashes[index] == values, self.counts[index], 0.0)


def counts_of(values: UInt64) -> Counts:
    hashes, counts = np.unique(values, return_counts=True)
    return Counts(hashes, counts.astype(np.float64))


class BigramModel(NamedTuple):
    """p(w | v) = (c(v w) + k p(w)) / (c(v) + k), p(w) = (c(w) + 1) / (words + distinct words + 1)."""

    unigrams: Counts
    bigrams: Counts

    def mean_log2(self, text: str, own: bool) -> float:
        """Mean log2 p(w | v) over the words after the first; with `own`, as if the text had not been counted."""
        hashes = words(text)[0]
        if len(hashes) < 2:
            return -64.0
        pairs = ngrams(hashes, 2)
        single, double = self.unigrams.of(hashes), self.bigrams.of(pairs)
        total = self.unigrams.counts.sum()
        if own:
            single, double = single - counts_of(hashes).of(hashes), double - counts_of(pairs).of(pairs)
            total -= len(hashes)
        unigram = (single + 1) / (total + len(self.unigrams.hashes) + 1)
        return float(np.log2((double + SMOOTHING * unigram[1:]) / (single[:-1] + SMOOTHING)).mean())


class QualityScores(GlobalStep):
    """Fills `scores`, one value a scorer, for training documents."""

    name = "quality_scores"

    def survey(self, table: pa.Table) -> tuple[UInt64, UInt64]:
        """All words and word pairs of the shard's reference text."""
        rows = zip(*(table[name].to_pylist() for name in ("text", "source", "held_out")), strict=True)
        hashes = [words(text)[0] for text, source, held_out in rows if source.startswith(ANCHOR) and not held_out]
        none = np.empty(0, np.uint64)
        return np.concatenate([none, *hashes]), np.concatenate([none, *(ngrams(values, 2) for values in hashes)])

    def decide(self, surveys: list[tuple[UInt64, UInt64]]) -> list[BigramModel]:
        unigrams, bigrams = (np.concatenate(part) for part in zip(*surveys, strict=True))
        return [BigramModel(counts_of(unigrams), counts_of(bigrams))] * len(surveys)

    def apply(self, table: pa.Table, decision: BigramModel) -> Outcome:
        structures = structure(table)
        scores: list[list[float] | None] = []
        rows = zip(*(table[name].to_pylist() for name in ("text", "source", "held_out")), strict=True)
        for (text, source, held_out), structure_score in zip(rows, structures, strict=True):
            if held_out:
                scores.append(None)
                continue
            fluency = decision.mean_log2(text, own=source.startswith(ANCHOR))
            scores.append([fluency, compressed_share(text), structure_score])
        return Outcome(with_column(table, "scores", scores), [None] * len(table))


def compressed_share(text: str) -> float:
    """Compressed over plain bytes, window by window."""
    data = text.encode()
    windows = [data[start : start + DENSITY_WINDOW] for start in range(0, len(data), DENSITY_WINDOW)]
    return sum(len(zlib.compress(window, 6)) for window in windows) / len(data)


def structure(table: pa.Table) -> list[float]:
    """Mean over the domain's features of how near each is to its saturation: 0 to 1."""
    frame = pl.from_arrow(table.select(["text", "domain"]))
    assert isinstance(frame, pl.DataFrame)
    text = pl.col("text")
    thousands = text.str.len_chars() / 1000
    score = pl.lit(0.0)
    for domain, features in FEATURES.items():
        saturated = [
            (text.str.count_matches(pattern) / thousands / enough).clip(0, 1) for pattern, enough in features.items()
        ]
        score = pl.when(pl.col("domain") == domain).then(pl.mean_horizontal(saturated)).otherwise(score)
    return frame.select(score.alias("score"))["score"].to_list()


class Scored(NamedTuple):
    scores: Float64                 # (training documents, scorers)
    bytes: NDArray[np.int64]
    domains: list[str]
    held_out: list[bool]            # of every document of the shard


class QualityLabels(GlobalStep):
    """Fills `quality`, the best of a document's bins (0 to 19), and `label`, for training documents."""

    name = "quality_labels"

    def survey(self, table: pa.Table) -> Scored:
        held_out = table["held_out"].to_pylist()
        train = table.filter(pa.array([not flag for flag in held_out], pa.bool_()))
        sizes = [len(text.encode()) for text in train["text"].to_pylist()]
        scores = np.array(train["scores"].to_pylist(), dtype=np.float64).reshape(-1, len(SCORERS))
        return Scored(scores, np.array(sizes, dtype=np.int64), train["domain"].to_pylist(), held_out)

    def decide(self, surveys: list[Scored]) -> list[list[int | None]]:
        scores = np.concatenate([survey.scores for survey in surveys])
        sizes = np.concatenate([survey.bytes for survey in surveys])
        members: dict[str, list[int]] = defaultdict(list)
        for index, domain in enumerate(domain for survey in surveys for domain in survey.domains):
            members[domain].append(index)
        best = np.zeros(len(scores), dtype=np.int64)
        for rows in members.values():
            best[rows] = ensemble_bins(scores[rows], sizes[rows])
        remaining = iter(best.tolist())
        return [[None if flag else next(remaining) for flag in survey.held_out] for survey in surveys]

    def apply(self, table: pa.Table, decision: list[int | None]) -> Outcome:
        quality = [None if best is None else float(best) for best in decision]
        labels = [None if best is None else label_of(best) for best in decision]
        return Outcome(with_column(with_column(table, "quality", quality), "label", labels), [None] * len(table))


def ensemble_bins(scores: Float64, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Best bin (0 to 19) of each document of one domain. scores: (documents, scorers); sizes: bytes."""
    scores = scores.copy()
    density = scores[:, SCORERS.index("density")]
    scores[:, SCORERS.index("density")] = -np.abs(density - weighted_quantiles(density, sizes, np.array([0.5])))
    cuts = np.arange(1, BINS) / BINS
    bins = [np.digitize(column, weighted_quantiles(column, sizes, cuts)) for column in scores.T]
    return np.max(bins, axis=0)


def weighted_quantiles(values: Float64, weights: NDArray[np.int64], shares: Float64) -> Float64:
    """Inverted distribution function: the least value with at least `share` of the weight at or below it."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(weights[order]) / weights.sum()
    return values[order][np.searchsorted(cumulative, shares, side="left")]


def label_of(best: int) -> str:
    return next(label for lowest, label in LABELS if best >= lowest)
