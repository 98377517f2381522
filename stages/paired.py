"""Two models on the same items, item by item: how large is the difference, and could it be chance?

Every model answers the same items, so most of what makes a score uncertain (which items were drawn) is common to both.
Accuracies: McNemar's exact test over the items that one of the two alone gets right. Bits per byte: the bootstrap over
documents, the same ones for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Comparison:
    """`difference`: candidate minus reference; `low`, `high`: 95 % interval; `p`: two-sided, of no difference."""

    candidate: float
    reference: float
    difference: float
    low: float
    high: float
    p: float
    items: int


def compare_accuracy(candidate: Sequence[int], reference: Sequence[int]) -> Comparison:
    """Of 1 (right) and 0 for each item, in the same order. Raises ValueError where the lengths differ."""
    ours, theirs = np.asarray(candidate, dtype=float), np.asarray(reference, dtype=float)
    _check_same_items(ours, theirs)
    draws = _resamples(len(ours))
    spread = ours[draws].mean(1) - theirs[draws].mean(1)
    only_ours, only_theirs = int(((ours == 1) & (theirs == 0)).sum()), int(((ours == 0) & (theirs == 1)).sum())
    return _comparison(ours.mean(), theirs.mean(), spread, mcnemar(only_ours, only_theirs), len(ours))


def compare_bits_per_byte(
    candidate: Mapping[str, Sequence[Any]], reference: Mapping[str, Sequence[Any]]
) -> Comparison:
    """Of (log-likelihood in nats, bytes) for each document by domain; documents are drawn within their domain."""
    totals, draws = [], []
    for domain, rows in candidate.items():
        ours, theirs = np.asarray(rows, dtype=float), np.asarray(reference[domain], dtype=float)
        _check_same_items(ours[:, 1], theirs[:, 1])
        drawn = _resamples(len(ours))
        both = np.stack([ours[:, 0], theirs[:, 0], ours[:, 1]], -1)
        totals.append(both.sum(0))
        draws.append(both[drawn].sum(1))
    found, resampled = np.sum(totals, 0), np.sum(draws, 0)
    ours, theirs = (-found[column] / found[2] / math.log(2) for column in (0, 1))
    spread = (resampled[:, 1] - resampled[:, 0]) / resampled[:, 2] / math.log(2)
    tail = min((spread <= 0).mean(), (spread >= 0).mean())
    p = min(1.0, max(2 * float(tail), 1 / RESAMPLES))
    return _comparison(ours, theirs, spread, p, sum(len(rows) for rows in candidate.values()))


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """Two-sided p that the items only one of two gets right fall so unevenly by the toss of a coin."""
    tosses = only_ours + only_theirs
    tail = sum(math.comb(tosses, k) for k in range(min(only_ours, only_theirs) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def _comparison(candidate: float, reference: float, spread: NDArray[Any], p: float, items: int) -> Comparison:
    low, high = np.quantile(spread, (0.025, 0.975))
    return Comparison(float(candidate), float(reference), float(candidate - reference), float(low), float(high), p,
                      items)


def _resamples(items: int) -> NDArray[np.int64]:
    return np.random.default_rng(SEED).integers(0, items, (RESAMPLES, items))


def _check_same_items(ours: NDArray[Any], theirs: NDArray[Any]) -> None:
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} and {len(theirs)} items: not the same ones")
