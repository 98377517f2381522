"""Referees: SciPy's tests, intervals and bootstrap; the rules at their boundaries."""

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats

from stages.report.statistics import (
    Answer,
    Estimate,
    Source,
    accuracy_gain,
    all_of,
    average,
    beats_chance,
    bits_per_byte_gain,
    controlled,
    equivalence,
    mean,
    over_seeds,
    superiority,
    tasks_equivalence,
    unpaired,
)

HOLDS, FAILS, UNDECIDED = Answer


def certain(value, error=0.01):
    return Estimate(value, (Source("item", error**2, 100, math.inf),))


def test_paired_interval_is_scipys():
    ours, theirs = np.random.default_rng(0).normal(size=(2, 7))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.9)
    assert mean(ours - theirs, "seed").interval() == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("count", [2, 4])
def test_unpaired_interval_is_welchs(count):
    draw = np.random.default_rng(1)
    ours, theirs = draw.normal(1, 1, count), draw.normal(0, 3, 9)
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert unpaired(ours, theirs, "draw").interval(0.05) == pytest.approx((expected.low, expected.high))


def test_one_value_against_draws_is_a_prediction_interval():
    draws = np.array([0.751, 0.702, 0.733, 0.69])
    found = unpaired([0.5], draws, "draw")
    half = stats.t.ppf(0.975, 3) * draws.std(ddof=1) * math.sqrt(1 + 1 / 4)
    assert found.value == pytest.approx(0.5 - draws.mean()) and found.half_width(0.05) == pytest.approx(half)


def documents(draw, sizes=(60, 45), noise=0.03, gain=0.03):
    theirs, ours = {}, {}
    for domain, count in zip("ab", sizes, strict=True):
        size = draw.integers(200, 900, count)
        nats = size * draw.uniform(0.7, 1.3, count)
        theirs[domain] = np.stack([-nats, size], 1).tolist()
        ours[domain] = np.stack([-nats * (1 - gain + draw.normal(0, noise, count)), size], 1).tolist()
    return ours, theirs


def test_gain_in_bits_per_byte_is_the_bootstraps():
    ours, theirs = documents(np.random.default_rng(2))
    found = bits_per_byte_gain(ours, theirs)
    resampled, draw = np.zeros((2, 9999)), np.random.default_rng(3)
    for domain, rows in theirs.items():
        drawn = draw.integers(0, len(rows), (9999, len(rows)))
        resampled += [np.array(of[domain])[:, 0][drawn].sum(1) for of in (ours, theirs)]
    gains = 1 - resampled[0] / resampled[1]
    assert found.value == pytest.approx(0.03, abs=0.01)
    assert found.error == pytest.approx(gains.std(), rel=0.05)
    assert found.interval(0.05) == pytest.approx(np.quantile(gains, (0.025, 0.975)), abs=0.001)


def test_gain_in_bits_per_byte_of_few_documents_is_cochrans():
    ours, theirs = documents(np.random.default_rng(5), (3, 2))
    mine, base = ([-np.array(of[domain])[:, 0] for domain in "ab"] for of in (ours, theirs))
    total = sum(map(sum, base))
    gain = 1 - sum(map(sum, mine)) / total
    left = [len(nats) * stats.sem((1 - gain) * nats - other) for nats, other in zip(base, mine, strict=True)]
    found = bits_per_byte_gain(ours, theirs)
    assert found.value == pytest.approx(gain) and found.sources[0].drawn == 5
    assert found.half_width(0.1) == pytest.approx(stats.t.ppf(0.95, 5 - 2) * math.hypot(*left) / total)
    one = bits_per_byte_gain(ours | {"b": ours["b"][:1]}, theirs | {"b": theirs["b"][:1]})
    assert math.isnan(one.error) and equivalence(one, 1.0).answer is UNDECIDED


def test_gain_in_accuracy_is_the_bootstraps_and_never_certain():
    draw = np.random.default_rng(4)
    theirs = (draw.random(600) < 0.6).astype(int)
    ours = np.where(draw.random(600) < 0.2, draw.random(600) < 0.7, theirs).astype(int)
    found = accuracy_gain(ours, theirs)
    referee = stats.bootstrap((ours, theirs), lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True,
                              method="percentile", n_resamples=4000, rng=draw).confidence_interval
    assert found.interval(0.05) == pytest.approx((referee.low, referee.high), abs=0.005)
    same = accuracy_gain([1] * 20, [1] * 20)
    assert same.value == 0 and same.half_width(0.1) > 0.1
    more, less = 3 / 6, 1 / 6                               # of four items, and of one more that each alone gets right
    found = accuracy_gain([1, 1, 1, 0], [0, 0, 1, 0])
    assert found.value == (2 - 0) / 4 and found.sources[0].drawn == 4
    assert found.half_width(0.1) == pytest.approx(
        stats.t.ppf(0.95, 6 - 1) * math.sqrt((more + less - (more - less) ** 2) / 6))


def test_chance_of_seeds_and_documents_adds_up():
    seeds, items = mean([0.01, 0.03, 0.02], "seed"), certain(0.5, 0.004)
    found = over_seeds(seeds, items)
    assert found.value == pytest.approx(0.02)
    assert found.error == pytest.approx(math.hypot(0.01 / math.sqrt(3), 0.004))
    assert found.df == pytest.approx(found.error**4 / ((0.01**2 / 3) ** 2 / 2))
    together = found.drawn_together()
    assert (together.error, together.df) == pytest.approx((found.error, found.df)) and len(together.sources) == 1
    tasks = average([certain(0.1, 0.03), certain(0.3, 0.04)])
    assert (tasks.value, tasks.error) == pytest.approx((0.2, 0.025))


def test_one_seed_decides_nothing_and_a_borrowed_spread_does():
    for found in (equivalence(mean([0.0], "seed"), 1.0), superiority(mean([5.0], "seed")),
                  superiority(mean([0.1, 0.1, 0.1], "seed")), superiority(unpaired([5.0], [0.0], "seed")),
                  superiority(unpaired([5.0, 5.1, 5.2], [0.0], "seed")),
                  equivalence(mean([0.0], "seed", floor=0.01), 1.0)):
        assert found.answer is UNDECIDED and math.isnan(found.seen) and not found.needed
    assert equivalence(mean([-5.0], "seed", spread_of=[0.1, 0.2, 0.0]), 1.0).answer is FAILS
    assert mean([1.0, 3.0], "seed", spread_of=[0.0, 9.0, 4.0]) == mean([1.0, 3.0], "seed")


@pytest.mark.parametrize(("value", "error", "two_sided", "or_better"), [
    (0.0, 0.01, HOLDS, HOLDS), (0.08, 0.01, HOLDS, HOLDS), (-0.08, 0.01, HOLDS, HOLDS),
    (0.2, 0.01, FAILS, HOLDS), (-0.2, 0.01, FAILS, FAILS),
    (0.09, 0.01, UNDECIDED, HOLDS), (-0.09, 0.01, UNDECIDED, UNDECIDED), (-0.117, 0.01, UNDECIDED, FAILS),
    (0.0, 0.1, UNDECIDED, UNDECIDED), (0.1, 0.0, UNDECIDED, HOLDS), (-0.1, 0.0, UNDECIDED, UNDECIDED),
    (math.nan, 0.01, UNDECIDED, UNDECIDED), (0.0, math.nan, UNDECIDED, UNDECIDED),
])
def test_equivalence_against_its_margin(value, error, two_sided, or_better):
    estimate = certain(value, error)
    assert equivalence(estimate, 0.1).answer is two_sided
    assert equivalence(estimate, 0.1, or_better=True).answer is or_better


@pytest.mark.parametrize(("value", "least", "answer"), [
    (0.03, 0.0, HOLDS), (-0.03, 0.0, FAILS), (0.01, 0.0, UNDECIDED), (0.03, 0.02, UNDECIDED), (0.0, 0.02, FAILS),
])
def test_superiority(value, least, answer):
    assert superiority(certain(value), least).answer is answer


of_three, of_five = partial(superiority, least=0.02, comparisons=3), partial(equivalence, margin=0.1, comparisons=5)


@pytest.mark.parametrize(("rule", "bound", "tail", "answer"), [
    (superiority, 0.0, 0.975, HOLDS), (superiority, 0.0, 0.025, FAILS),
    (of_three, 0.02, 0.975, HOLDS), (of_three, 0.02, 0.025 / 3, FAILS),
    (of_five, -0.1, 0.95, HOLDS), (of_five, -0.1, 0.025 / 5, FAILS),
    (of_five, 0.1, 0.05, HOLDS), (of_five, 0.1, 1 - 0.025 / 5, FAILS),
    (partial(of_five, or_better=True), -0.1, 0.95, HOLDS), (partial(of_five, or_better=True), -0.1, 0.05 / 5, FAILS),
    (lambda task: tasks_equivalence([task, certain(1.0)], certain(-0.1), 0.1), -0.1, 0.05 / 3, FAILS),
])
def test_any_of_several_comparisons_may_fail_only_together_once_in_twenty(rule, bound, tail, answer):
    """Answers turn where the normal quantile of `tail` lies beyond the bound."""
    turn = bound + 0.01 * stats.norm.ppf(tail)
    assert {rule(certain(turn + step)).answer for step in (-1e-6, 1e-6)} == {answer, UNDECIDED}


def test_a_task_far_worse_fails_what_the_mean_hides():
    good, bad = certain(0.1), certain(-0.1)
    assert tasks_equivalence([good, good], good, 0.02).answer is HOLDS
    found = tasks_equivalence([good, good, bad], good, 0.02)
    assert found.answer is FAILS and found.estimate is bad
    assert tasks_equivalence([good, good], mean([0.1], "seed"), 0.02).answer is UNDECIDED


def test_without_a_control_that_fails_nothing_is_told():
    for answer in Answer:
        assert controlled(answer, FAILS) is answer
        assert {controlled(answer, control) for control in (HOLDS, UNDECIDED, None)} == {UNDECIDED}


def test_all_of_several_answers():
    assert all_of([HOLDS, HOLDS]) is HOLDS
    assert all_of([HOLDS, UNDECIDED]) is all_of([]) is UNDECIDED
    assert all_of([HOLDS, UNDECIDED, FAILS]) is FAILS


def test_needed_is_named_where_undecided_only():
    assert equivalence(certain(0.0), 0.1).needed == {}
    one_sided, two_sided, power = stats.norm.ppf((0.95, 0.975, 0.9))
    found = equivalence(certain(0.05, 0.1), 0.1)            # no effect is told from either bound, whatever was seen
    assert found.needed == {"item": math.ceil(100 * (2 * one_sided) ** 2 + one_sided**2 / 2)}
    assert (found.seen, superiority(certain(0.01)).seen) == pytest.approx((0.1 * one_sided, 0.01 * two_sided))
    assert equivalence(certain(0.09), 0.1).needed == {"item": math.ceil(100 + one_sided**2 / 2)}    # no fewer than were
    lone = equivalence(mean([0.0], "seed", spread_of=[-1.0, 0.0, 1.0]), 0.5)
    assert lone.needed == {"seed": math.ceil((2 * one_sided / 0.5) ** 2 + one_sided**2 / 2)}
    most = (two_sided + power) * 0.01 / 1000                # a million times what was measured
    assert superiority(certain(1.01 * most)).needed and not superiority(certain(0.99 * most)).needed
    assert not superiority(certain(0.0)).needed
    (source,) = certain(0.0, 0.1).sources
    both = Estimate(0.01, (source, source))
    assert superiority(both).needed == {"item": 2 * superiority(both.drawn_together()).needed["item"]}
    assert not superiority(Estimate(0.01, (source, source._replace(drawn=0)))).needed


@pytest.mark.parametrize("effect", [0.5, 0.3, -0.5])
@pytest.mark.parametrize(("rule", "alpha", "bound", "comparisons"), [
    (superiority, 0.025, 0.0, 3), (superiority, 0.025, 0.1, 1), (partial(equivalence, or_better=True), 0.05, -0.1, 4),
])
def test_needed_is_what_noncentral_t_says(rule, alpha, bound, comparisons, effect):
    values = np.array([-2, -1, 0, 1, 2]) / math.sqrt(2.5) + effect
    decision = rule(mean(values, "seed"), abs(bound), comparisons=comparisons)
    alpha /= comparisons if effect < bound else 1           # of which any may decide against it

    def power(count):
        distance = abs(effect - bound) * math.sqrt(count)
        return stats.nct.sf(stats.t.ppf(1 - alpha, count - 1), count - 1, distance)

    assert decision.needed == {"seed": next(count for count in range(2, 999) if power(count) >= 0.9)}


@pytest.mark.parametrize(("items", "chance", "comparisons"), [(100, 0.25, 1), (41, 0.5, 7), (60, 0.125, 2)])
def test_chance(items, chance, comparisons):
    for right in range(items + 1):
        low = stats.binomtest(right, items).proportion_ci(1 - 0.05 / comparisons).low
        assert beats_chance(right, items, chance, comparisons) is bool(low > chance)
    assert [beats_chance(right, 100, 0.25) for right in (0, 34, 35, 100)] == [False, False, True, True]


def test_other_items_are_refused():
    rows = [[-1.0, 3]]
    for gain, ours, theirs, message in (
        (accuracy_gain, [1, 0, 1], [1, 0], "3 and 2 items"), (accuracy_gain, [1], [1, 0, 1], "1 and 3 items"),
        (accuracy_gain, [], [], "0 and 0 items"),
        (bits_per_byte_gain, {"a": rows}, {"a": [[-1.0, 4]]}, "1 and 1 items: not the same ones"),
        (bits_per_byte_gain, {"a": rows}, {"a": rows, "b": rows}, "1 and 2 items: not the same ones"),
        (bits_per_byte_gain, {"a": rows}, {"b": rows}, "1 and 1 items: not the same ones"),
    ):
        with pytest.raises(ValueError, match=message):
            gain(ours, theirs)
