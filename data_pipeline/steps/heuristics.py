"""Rules that drop text no model should learn from: machine output, data, fragments and repetition.

Thresholds belong to a domain and to a way of counting. Prose follows Gopher (arXiv 2112.11446, table A1) on words
parted by white space; code follows StarCoder (arXiv 2305.06161, section 3) and NeMo Curator's code filters. Where API
documentation and code differ from the web text those were made for, the threshold is wider and the constant says so.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa

from data_pipeline.steps.step import Outcome, Step
from data_pipeline.steps.words import ngrams, words

GENERATED = r"(?im)^\s*#.*(auto-?generated|@generated|generated (by|from|automatically)|do not (edit|modify))"
ENCODED = r"[A-Za-z0-9+/=]{256}|(\\x[0-9a-fA-F]{2}){64}"       # base64, hexadecimal, escaped bytes
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
# domain -> (share of characters in repeated lines, in the commonest 2-, 3-, 4-word run, in repeated 10-word runs).
# Gopher: 0.20, (0.20, 0.18, 0.16), 0.10. Parameters documented again in each function of a module, and lines such as
# `else:` and `return result`, repeat by design.
REPETITION = {
    "code": (0.60, (0.30, 0.30, 0.30), 0.60),
    "docs": (0.40, (0.20, 0.18, 0.16), 0.40),
    "reference": (0.60, (0.30, 0.30, 0.30), 0.60),
}

text = pl.col("text")
characters = text.str.len_chars()
lines = text.str.count_matches("\n").clip(lower_bound=1)
longest_line = text.str.split("\n").list.eval(pl.element().str.len_chars()).list.max()
white_space_words = text.str.count_matches(r"\S+")


def share(pattern: str, of: pl.Expr = characters) -> pl.Expr:
    return text.str.count_matches(pattern) / of


COMMON: dict[str, pl.Expr] = {
    "encoded data": text.str.contains(ENCODED),
    "too long": characters > 400_000,
    "long lines": longest_line > 1000,
}
CODE: dict[str, pl.Expr] = {
    "too short": (lines < 5) | (characters < 200),
    **COMMON,
    "generated": text.str.head(1500).str.contains(GENERATED),
    "long lines on average": characters > 100 * lines,
    "few letters": share("[A-Za-z]") < 0.25,
    "mostly numbers": share("[0-9]") > 0.20,
    "mostly comments": share(r"(?m)^\s*#.*$", lines) > 0.85,
}
RULES: dict[str, dict[str, pl.Expr]] = {
    "code": CODE,
    "reference": CODE,
    "docs": {
        "too short": (white_space_words < 30) | (characters < 200),
        **COMMON,
        "word length": ~((characters - text.str.count_matches(r"\s")) / white_space_words).is_between(2.5, 12),
        "symbols": share(r"#|\.\.\.|…", white_space_words) > 0.1,
        "few words with letters": share(r"\S*[A-Za-z]\S*", white_space_words) < 0.7,
        "few stop words": pl.sum_horizontal(text.str.contains(rf"(?i)\b{word}\b") for word in STOP_WORDS) < 2,
        "bullets": share(r"(?m)^\s*[-*•]\s", lines) > 0.9,
        "ellipses": share(r"(?m)(\.\.\.|…)$", lines) > 0.3,
    },
}


class Heuristics(Step):
    """The first rule a document breaks is the reason it goes; repetition is looked at last."""

    name = "heuristics"

    def apply(self, table: pa.Table, decision: None) -> Outcome:
        frame = pl.from_arrow(table.select(["text", "domain"]))
        assert isinstance(frame, pl.DataFrame)
        by_domain = [
            pl.when((pl.col("domain") == domain) & broken).then(pl.lit(reason))
            for domain, rules in RULES.items() for reason, broken in rules.items()
        ]
        reasons: list[str | None] = frame.select(pl.coalesce(by_domain)).to_series().to_list()
        for index, (document, domain) in enumerate(frame.iter_rows()):
            if reasons[index] is None:
                reasons[index] = repetition(document, domain)
        return Outcome(table, reasons)


def repetition(document: str, domain: str) -> str | None:
    """The repetition rule of `domain` that `document` breaks, if any. Shares are of characters, in UTF-8 bytes."""
    line_limit, run_limits, ngram_limit = REPETITION[domain]
    seen: set[str] = set()
    repeated = total = 0
    for line in document.split("\n"):
        stripped = line.strip()
        total += len(stripped)
        repeated += len(stripped) if stripped in seen else 0
        seen.add(stripped)
    if repeated > line_limit * total:
        return "repeated lines"
    hashes, starts, ends = words(document)
    for n, limit in zip((2, 3, 4), run_limits, strict=True):
        if commonest_run_share(hashes, starts, ends, n) > limit:
            return "one phrase over and over"
    return "repeated phrases" if repeated_run_share(hashes, starts, ends, 10) > ngram_limit else None


def commonest_run_share(hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Share of the words' characters that lies in occurrences of the commonest run of n words."""
    runs = ngrams(hashes, n)
    if len(runs) < 2:
        return 0.0
    _, first, counts = np.unique(runs, return_index=True, return_counts=True)
    top = counts.argmax()
    return float(counts[top] * (ends - starts)[first[top] : first[top] + n].sum() / (ends - starts).sum())


def repeated_run_share(hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Share of the words' characters covered by runs of n words that stood in the document before."""
    runs = ngrams(hashes, n)
    if len(runs) < 2:
        return 0.0
    repeats = np.ones(len(runs), dtype=bool)
    repeats[np.unique(runs, return_index=True)[1]] = False
    change = np.zeros(len(hashes) + 1, dtype=np.int64)
    change[: len(runs)] += repeats
    change[n : n + len(runs)] -= repeats
    covered = np.cumsum(change[:-1]) > 0
    return float((ends - starts)[covered].sum() / (ends - starts).sum())
