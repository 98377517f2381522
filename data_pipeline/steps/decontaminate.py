"""Training documents that share an n-gram of words with held-out text are dropped.

n = 13 as in GPT-3 (arXiv 2005.14165, appendix C), which cuts 200 characters around a hit and drops a document after ten
hits: at the size of the web, hits are many. Here sources are held out whole and hits are rare, so the rule is the
strict one: one shared n-gram is enough, and what is trained on shares none with what is held out.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from data_pipeline.steps.step import GlobalStep, Outcome
from data_pipeline.steps.words import UInt64, ngrams, words


def ngram_hashes(text: str, n: int) -> UInt64:
    """64-bit hashes of the n-grams of words in `text`, in order, shape (max(0, words - n + 1),).

    Words are those of `data_pipeline.steps.words`: case and punctuation do not count. A text with fewer than n words
    has no n-gram: it can neither contaminate nor be found. The hashes are the same in every process and version.
    """
    return ngrams(words(text)[0], n)


def is_in(values: UInt64, ordered: UInt64) -> np.ndarray:
    """Which of `values` stand in the sorted array `ordered`: bool, shape of `values`."""
    if not len(ordered):
        return np.zeros(len(values), dtype=bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


class Decontaminate(GlobalStep):
    name = "decontaminate"

    def __init__(self, n: int):
        self.n = n

    def survey(self, table: pa.Table) -> UInt64:
        texts = table.filter(table["held_out"])["text"].to_pylist()
        return np.unique(np.concatenate([np.empty(0, np.uint64), *(ngram_hashes(text, self.n) for text in texts)]))

    def decide(self, surveys: list[UInt64]) -> list[UInt64]:
        return [np.unique(np.concatenate(surveys))] * len(surveys)

    def apply(self, table: pa.Table, decision: UInt64) -> Outcome:
        reason = f"shares {self.n} words in a row with held-out text"
        rows = zip(table["text"].to_pylist(), table["held_out"].to_pylist(), strict=True)
        return Outcome(table, [
            reason if not held_out and is_in(ngram_hashes(text, self.n), decision).any() else None
            for text, held_out in rows
        ])
