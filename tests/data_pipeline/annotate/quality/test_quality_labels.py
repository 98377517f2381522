"""Percentiles, bins and labels against a plain reading of the recipe."""

import bisect

import numpy as np
import pytest

from data_pipeline.annotate.quality.quality_labels import (
    best_bins,
    label_of,
    merge,
    perplexity_limit,
    sample_of,
    thresholds,
)

LABELS = {"low": range(7), "medium-low": range(7, 12), "medium": range(12, 18), "medium-high": [18], "high": [19]}


def corpus(documents: int, seed: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """ids, scores (one scorer of few values, so that many tie), perplexities and bytes."""
    random = np.random.default_rng(seed)
    scores = [random.normal(size=documents), random.integers(0, 6, documents) / 5, random.gamma(2, 1, documents)]
    ids = [f"{i:032x}" for i in random.permutation(documents)]
    perplexity, sizes = random.lognormal(5, 1, documents), random.integers(1, 9000, documents)
    return ids, np.stack(scores, axis=1).astype(np.float32), perplexity, sizes


def recipe_thresholds(scores: list[float], sizes: list[int]) -> list[float]:
    """Percentiles 5, 10 ... 95: the first score, going up, at which the share of bytes so far reaches it."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    total, so_far, shares = sum(sizes), 0, []
    for i in order:
        so_far += sizes[i]
        shares.append(so_far / total)
    return [scores[order[bisect.bisect_left(shares, percent / 100.0)]] for percent in range(5, 100, 5)]


@pytest.mark.parametrize("documents", [1, 2, 30, 2000])
def test_bins_and_labels_are_the_recipes(documents):
    ids, scores, perplexity, sizes = corpus(documents, seed=documents)
    cuts = thresholds(sample_of(ids, scores, perplexity, sizes))
    expected = [recipe_thresholds(column, sizes.tolist()) for column in scores.astype(float).T.tolist()]
    assert cuts.tolist() == expected
    by_scorer = [[sum(value >= cut for cut in cuts) for value, cuts in zip(row, expected, strict=True)]
                 for row in scores.astype(float).tolist()]
    best = best_bins(scores, cuts).tolist()
    assert best == [max(row) for row in by_scorer]
    assert all(value in LABELS[label_of(value)] for value in best)


def test_labels_by_bin():
    assert {label: [b for b in range(20) if label_of(b) == label] for label in LABELS} == {
        label: list(members) for label, members in LABELS.items()
    }


@pytest.mark.parametrize("limit", [50, 10_000])
def test_sample_is_the_same_for_any_shards_in_any_order(limit):
    ids, scores, perplexity, sizes = corpus(700, seed=1)
    whole = sample_of(ids, scores, perplexity, sizes, limit)
    assert len(whole.keys) == min(limit, 700)
    parts = np.array_split(np.random.default_rng(2).permutation(700), 7)
    pieces = [sample_of([ids[i] for i in p], scores[p], perplexity[p], sizes[p], limit) for p in parts]
    for merged in (merge(pieces, limit), merge([merge(pieces[4:], limit), merge(pieces[:4], limit)], limit)):
        for ours, expected in zip(merged, whole, strict=True):
            assert np.array_equal(ours, expected)


def test_a_sample_gives_nearly_the_thresholds_of_all():
    ids, scores, perplexity, sizes = corpus(20_000, seed=3)
    cuts = thresholds(sample_of(ids, scores, perplexity, sizes, 2000))
    everything = thresholds(sample_of(ids, scores, perplexity, sizes))
    share_below = [(scores[:, 0] < cut).mean() for cut in cuts[0]]
    assert np.abs(share_below - np.arange(1, 20) / 20).max() < 0.04
    assert not np.array_equal(cuts, everything)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_perplexity_limit(share):
    ids, scores, perplexity, sizes = corpus(3000, seed=4)
    limit = perplexity_limit(sample_of(ids, scores, perplexity, sizes), share)
    above = perplexity > limit
    assert sizes[above].sum() <= share * sizes.sum()
    if share:
        more = perplexity >= limit                          # the next document would be too much
        assert sizes[more].sum() > share * sizes.sum()
