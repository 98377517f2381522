"""Quality labels from scores, after Nemotron-CC (arXiv 2412.02595; step 3 of its public recipe).

The paper's ensemble: each scorer's scores are cut at the byte-weighted percentiles 5, 10 ... 95 into 20 bins, a
document's bin is the best of its scorers', and bins make five labels. Everything here is for one domain. Percentiles
come from a `Sample`, small, of at least one document, and the same however they lie in shards:

    sample = merge([sample_of(ids, scores, perplexity, sizes, limit) for each shard], limit)
    quality = best_bins(scores, thresholds(sample))          # 0 to 19
    labels = [label_of(best) for best in quality]
    limit = perplexity_limit(sample, share)                  # above it is dropped, where the label is a low one
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import numpy as np
import xxhash
from numpy.typing import ArrayLike

from data_pipeline.config import Label
from data_pipeline.text.words import Float64, Int64, UInt64

BINS = 20
SHARES = np.arange(1, BINS) / BINS
# Lowest bin of each label, from the paper's annealing study of single bins.
LOWEST_BINS: dict[Label, int] = dict(zip(get_args(Label), (19, 18, 12, 7, 0), strict=True))
SAMPLE_DOCUMENTS = 1_000_000        # a domain's percentiles from so many are exact to a tenth of a percent


class Sample(NamedTuple):
    """Some documents of a domain, in the order of `keys`."""

    keys: UInt64                    # (documents,) xxh3-64 of the id: those with the lowest are the sample
    scores: Float64                 # (documents, scorers)
    perplexity: Float64             # (documents,)
    sizes: Int64                    # (documents,) bytes of text


def sample_of(
    ids: Sequence[str], scores: ArrayLike, perplexity: ArrayLike, sizes: ArrayLike, limit: int = SAMPLE_DOCUMENTS
) -> Sample:
    """The `limit` of these documents with the lowest keys.

    Args:
        ids: of documents of one domain; those labels are not made from (duplicates ...) left out.
        scores: (documents, scorers), as in the column `scores`.
        perplexity: (documents,).
        sizes: (documents,) bytes of UTF-8 text.
        limit: documents in the sample, at most.
    """
    columns = np.asarray(scores, np.float64), np.asarray(perplexity, np.float64), np.asarray(sizes, np.int64)
    return _lowest(Sample(keys_of(ids), *columns), limit)


def merge(samples: Sequence[Sample], limit: int = SAMPLE_DOCUMENTS) -> Sample:
    """The sample of all the documents `samples` were made from with the same limit, in any order and number."""
    return _lowest(Sample._make(map(np.concatenate, zip(*samples, strict=True))), limit)


def keys_of(ids: Sequence[str]) -> UInt64:
    """xxh3-64 of each id: an order of documents that has nothing to do with their content, (documents,)."""
    return np.array([xxhash.xxh3_64_intdigest(document.encode()) for document in ids], dtype=np.uint64)


def _lowest(sample: Sample, limit: int) -> Sample:
    order = np.argsort(sample.keys, kind="stable")[:limit]
    return Sample._make(column[order] for column in sample)


def thresholds(sample: Sample) -> Float64:
    """Byte-weighted percentiles 5, 10 ... 95 of each scorer: (scorers, 19), ascending; scores from the sample."""
    return np.quantile(sample.scores, SHARES, axis=0, weights=sample.sizes, method="inverted_cdf").T


def best_bins(scores: ArrayLike, thresholds: Float64) -> Int64:
    """The ensemble's value of each document, 0 to 19: the largest of its scorers' bins. Shape (documents,).

    A bin is the number of thresholds that are not above the score.
    """
    columns = zip(np.asarray(scores, np.float64).T, thresholds, strict=True)
    return np.max([np.digitize(column, cuts) for column, cuts in columns], axis=0)


def label_of(best: int) -> Label:
    """The label of an ensemble value."""
    return next(label for label, lowest in LOWEST_BINS.items() if best >= lowest)


def perplexity_limit(sample: Sample, share: float) -> float:
    """The perplexity that `share` of the sample's bytes, at most, lie above; infinity for 0."""
    if share == 0:
        return np.inf
    return float(np.quantile(sample.perplexity, 1 - share, weights=sample.sizes, method="inverted_cdf"))
