"""Overlap with held-out text by n-grams of words (13 as in GPT-3, arXiv 2005.14165 appendix C)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_pipeline.steps.words import ngrams, words


def ngram_hashes(text: str, n: int) -> NDArray[np.uint64]:
    """64-bit hashes of the n-grams of words in `text`, in order, shape (max(0, words - n + 1),).

    Words are those of `data_pipeline.steps.words`: case and punctuation do not count. A text with fewer than n words
    has no n-gram: it can neither contaminate nor be found. The hashes are the same in every process and version.
    """
    return ngrams(words(text)[0], n)
