"""Referee: SciPy's exact binomial test and its paired bootstrap."""

import math

import numpy as np
import pytest
from scipy import stats

from stages.paired import compare_accuracy, compare_bits_per_byte, mcnemar


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (1, 0), (5, 5), (3, 14), (40, 22), (0, 9), (200, 180)])
def test_mcnemar_is_the_exact_binomial_test(ours, theirs):
    expected = stats.binomtest(ours, ours + theirs, 0.5).pvalue if ours + theirs else 1.0
    assert mcnemar(ours, theirs) == pytest.approx(expected)


def test_accuracy_counts_items_one_alone_gets_right():
    draw = np.random.default_rng(1)
    theirs = (draw.random(400) < 0.6).astype(int)
    ours = np.where(draw.random(400) < 0.1, 1, theirs)              # never worse
    found = compare_accuracy(ours.tolist(), theirs.tolist())
    assert found.difference == pytest.approx(ours.mean() - theirs.mean())
    assert found.items == 400
    assert found.p == pytest.approx(stats.binomtest(0, int((ours != theirs).sum())).pvalue)
    referee = stats.bootstrap((ours, theirs), lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True,
                              method="percentile", n_resamples=4000, rng=draw).confidence_interval
    assert (found.low, found.high) == pytest.approx((referee.low, referee.high), abs=0.006)
    same = compare_accuracy(theirs.tolist(), theirs.tolist())
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_bits_per_byte_over_documents_of_both():
    draw = np.random.default_rng(2)
    sizes = draw.integers(200, 900, 60)
    theirs = {"a": [[-1.4 * size * draw.uniform(0.7, 1.3), int(size)] for size in sizes]}
    ours = {"a": [[0.97 * score * draw.uniform(0.97, 1.03), size] for score, size in theirs["a"]]}
    found = compare_bits_per_byte(ours, theirs)
    expected = [-sum(score for score, _ in rows["a"]) / sizes.sum() / math.log(2) for rows in (ours, theirs)]
    assert (found.candidate, found.reference) == pytest.approx(expected)
    assert found.difference < 0 and found.high < 0 and found.p == 1 / 2000
    spread = stats.bootstrap(
        (np.array(ours["a"])[:, 0], np.array(theirs["a"])[:, 0], sizes),
        lambda a, b, size, axis: (b.sum(axis) - a.sum(axis)) / size.sum(axis) / math.log(2),
        paired=True, method="percentile", n_resamples=4000, rng=draw).confidence_interval
    assert (found.low, found.high) == pytest.approx((spread.low, spread.high), abs=0.004)
    assert compare_bits_per_byte(ours, ours).p == 1


def test_other_items_are_refused():
    with pytest.raises(ValueError, match="3 and 2 items"):
        compare_accuracy([1, 0, 1], [1, 0])
