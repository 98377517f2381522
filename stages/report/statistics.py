"""How a claim is decided: an estimate with its sources of chance, an interval, one of three answers.

Effects are gains: positive where the candidate is the better one. Their chance comes from what was drawn, seeds and
documents or items, whose variances add; t quantiles take the degrees of freedom of Welch and Satterthwaite. An answer
that is wrong comes at most once in 20 times (tests/stages/report/test_simulation.py); one that says "cannot be told"
names the smallest difference that was in sight and how much more would decide. Pure functions; nothing is drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

ALPHA = 0.05                    # how often an answer may be wrong
POWER = 0.9                     # with which the numbers that `needed` names would decide
MOST = 1e6                      # times what was measured; beyond it no number is named


class Answer(StrEnum):
    """What the evidence says of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "cannot be told"


class Source(NamedTuple):
    """One source of chance: `variance` is what `drawn` units leave in the estimate, known to `df` degrees of
    freedom; not a number where one unit alone was drawn."""

    unit: str                   # seed, document, item, repeat, draw
    variance: float
    drawn: int                  # 0: more of them would not make it smaller
    df: float


class Estimate(NamedTuple):
    """An effect and where its chance comes from."""

    value: float
    sources: tuple[Source, ...]

    @property
    def error(self) -> float:
        """Standard error."""
        return math.sqrt(math.fsum(source.variance for source in self.sources))

    @property
    def df(self) -> float:
        """Degrees of freedom, after Satterthwaite (1946): infinite where nothing varies, not a number where a spread is
        unknown."""
        if math.isnan(self.error):
            return math.nan
        parts = math.fsum(source.variance**2 / source.df for source in self.sources)
        return self.error**4 / parts if parts else math.inf

    def drawn_together(self) -> Estimate:
        """With all sources as one, of units that are drawn for each at once, as a repeat at both of two contexts: of
        these so many decide, and not so many for each."""
        return Estimate(self.value, (self.sources[0]._replace(variance=self.error**2, df=self.df),))

    def half_width(self, alpha: float) -> float:
        """Of the interval with `alpha` outside, half of it on each side."""
        return self.error * float(special.stdtrit(self.df, 1 - alpha / 2))

    def interval(self, alpha: float = 2 * ALPHA) -> tuple[float, float]:
        """Both ends at confidence 1 - `alpha`; by default that of two one-sided tests."""
        half = self.half_width(alpha)
        return self.value - half, self.value + half


class Verdict(NamedTuple):
    """`seen`: the smallest difference in sight, half the interval; `needed`: units that would decide, by kind, where
    the answer is undecided and they can be named."""

    answer: Answer
    estimate: Estimate
    alpha: float                # outside the interval that is shown
    needed: Mapping[str, int]

    @property
    def seen(self) -> float:
        """Half the interval: the smallest difference that could have been told."""
        return self.estimate.half_width(self.alpha)


def mean(values: Sequence[float], unit: str, spread_of: Sequence[float] | None = None, floor: float = 0.0) -> Estimate:
    """Of one value a unit, as of paired differences (a log ratio for timings).

    Args:
        spread_of: the values whose spread one value, too few for one of its own, is taken to share.
        floor: least variance of the mean. Values that are all alike, as coarse ones may be by chance, show no spread:
            without a floor it counts as unknown.
    """
    drawn = np.asarray(values if spread_of is None or len(values) > 1 else spread_of, dtype=float)
    spread = float(drawn.var(ddof=1)) / len(values) if np.ptp(drawn) > 0 else 0.0
    variance = max(spread, floor) if len(drawn) > 1 else 0.0
    return Estimate(float(np.mean(values)), (Source(unit, variance or math.nan, len(values), len(drawn) - 1),))


def unpaired(candidate: Sequence[float], reference: Sequence[float], unit: str) -> Estimate:
    """Difference of two means (Welch). One value against several: against where a further one of theirs would fall."""
    ours, theirs = mean(candidate, unit, reference), mean(reference, unit)
    sources = (*ours.sources, *theirs.sources)
    if len(candidate) == 1:                 # the two variances are multiples of one estimate
        sources = (theirs.sources[0]._replace(variance=sum(source.variance for source in sources), drawn=0),)
    return Estimate(ours.value - theirs.value, sources)


def bits_per_byte_gain(candidate: Mapping[str, Sequence[Any]], reference: Mapping[str, Sequence[Any]]) -> Estimate:
    """Share of the reference's bits per byte that the candidate saves on the same documents.

    Both: (log-likelihood in nats, bytes) of each document by domain. The variance is that of a ratio of sums with
    documents drawn within their domain (Cochran, Sampling Techniques, chapter 6). Raises ValueError for others.
    """
    _check_same(np.array(sorted(candidate)), np.array(sorted(reference)))
    pairs = []
    for domain, rows in candidate.items():
        ours, theirs = np.asarray(rows, dtype=float), np.asarray(reference[domain], dtype=float)
        _check_same(ours[:, 1], theirs[:, 1])
        pairs.append((ours[:, 0] - theirs[:, 0], -theirs[:, 0]))
    saved, total = (float(sum(pair[column].sum() for pair in pairs)) for column in (0, 1))
    gain, count = saved / total, sum(len(nats) for _, nats in pairs)
    variance = math.fsum(len(nats) * (difference - gain * nats).var(ddof=1) if len(nats) > 1 else math.nan
                         for difference, nats in pairs)
    return Estimate(gain, (Source("document", variance / total**2, count, count - len(pairs)),))


def accuracy_gain(candidate: Sequence[Any], reference: Sequence[Any]) -> Estimate:
    """Difference of accuracies on the same items: 1 or 0 for each, or each item's mean over seeds.

    The variance after Bonett and Price (2012): with one more item that each alone gets right, so that agreement on few
    items is not taken for certainty. Raises ValueError for other items.
    """
    ours, theirs = np.asarray(candidate, dtype=float), np.asarray(reference, dtype=float)
    _check_same(ours, theirs, lengths_only=True)
    differences = np.append(ours - theirs, (1, -1))
    count = len(ours)
    return Estimate(float((ours - theirs).mean()),
                    (Source("item", float(differences.var()) / (count + 2), count, count + 1),))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Of estimates that share no unit, such as tasks."""
    count = len(estimates)
    return Estimate(math.fsum(one.value for one in estimates) / count, tuple(
        source._replace(variance=source.variance / count**2) for one in estimates for source in one.sources))


def over_seeds(seeds: Estimate, items: Estimate) -> Estimate:
    """An effect measured once a seed on the same items: the value of `seeds` with the chance of both."""
    return Estimate(seeds.value, (*seeds.sources, *items.sources))


def beats_chance(right: int, items: int, chance: float, comparisons: int = 1) -> bool:
    """Whether the exact interval of an accuracy (Clopper-Pearson 1934), at 95 % over all `comparisons`, lies above a
    guess: whether as many right by guessing are less likely than half of the rest."""
    return bool(special.bdtrc(right - 1, items, chance) < ALPHA / comparisons / 2)


def equivalence(estimate: Estimate, margin: float, or_better: bool = False, comparisons: int = 1) -> Verdict:
    """Two one-sided tests (Schuirmann 1987): holds where the 90 % interval lies within the margin, with `or_better`
    above its lower end; what is needed is then what tells the effect that was seen from that end, else no effect from
    either. Does not hold where the effect lies beyond the margin at 95 %, over both sides and, with
    `comparisons` of which any may decide so, over all of them."""
    sides, power = (1, POWER) if or_better else (2, (1 + POWER) / 2)
    above, distance = (math.inf, estimate.value + margin) if or_better else (margin, margin)
    return _decided(estimate, -margin, above, 2 * ALPHA, comparisons * sides, distance, power)


def tasks_equivalence(tasks: Sequence[Estimate], overall: Estimate, margin: float) -> Verdict:
    """Not worse in the mean over tasks, and in none by itself beyond the margin: one that is decides."""
    decision, *each = (equivalence(estimate, margin, True, len(tasks) + 1) for estimate in (overall, *tasks))
    return next((one for one in (decision, *each) if one.answer is Answer.FAILS), decision)


def superiority(estimate: Estimate, least: float = 0.0, comparisons: int = 1) -> Verdict:
    """Whether the effect is above `least`: holds, or does not, where the 95 % interval lies on one side of it. With
    `comparisons` of which any may decide against it, that side is taken at 95 % over all of them."""
    return _decided(estimate, least, math.inf, ALPHA, comparisons, estimate.value - least, POWER)


def controlled(answer: Answer, control: Answer | None) -> Answer:
    """`answer` where its negative control is seen to fail by the same rule; else it cannot be told."""
    return answer if control is Answer.FAILS else Answer.UNDECIDED


def all_of(answers: Sequence[Answer]) -> Answer:
    """Of answers that must all hold; undecided for none."""
    if Answer.FAILS in answers:
        return Answer.FAILS
    return Answer.HOLDS if set(answers) == {Answer.HOLDS} else Answer.UNDECIDED


def _decided(estimate: Estimate, above: float, below: float, alpha: float, comparisons: int, distance: float,
             power: float) -> Verdict:
    """Holds where the interval lies between two bounds; one corrected for `comparisons` fails beyond one of them.
    With what must be drawn to tell `distance`, below 0 by the corrected one: normal quantiles, and Guenther's (1981)
    correction for t."""
    low, high = estimate.interval(alpha)
    fail_low, fail_high = estimate.interval(alpha / comparisons)
    answer = (Answer.HOLDS if above < low and high < below else
              Answer.FAILS if fail_high < above or below < fail_low else Answer.UNDECIDED)
    quantile = float(special.ndtri(1 - alpha / (comparisons if distance < 0 else 1) / 2))
    factor = ((quantile + float(special.ndtri(power))) * estimate.error / distance) ** 2 if distance else math.inf
    needed: Counter[str] = Counter()
    if answer is Answer.UNDECIDED and factor < MOST and all(source.drawn for source in estimate.sources):
        for source in estimate.sources:
            needed[source.unit] += math.ceil(max(factor, 1) * source.drawn + quantile**2 / 2)
    return Verdict(answer, estimate, alpha, needed)


def _check_same(ours: NDArray[Any], theirs: NDArray[Any], lengths_only: bool = False) -> None:
    if len(ours) != len(theirs) or not len(ours) or not (lengths_only or np.array_equal(ours, theirs)):
        raise ValueError(f"{len(ours)} and {len(theirs)} items: not the same ones")
