from random import Random

import pytest

from data_pipeline.config import DataError, Phase
from data_pipeline.tokenize.blend import blend, share_out, shortfalls

TOKENS = {"train/code-high": 300, "train/code-medium": 100, "train/code-low": 700, "train/docs-high": 50,
          "train/docs-low": 0, "validation/code": 40}


def phase_weights(phases: list[Phase], budget: int = 100, repeats: float = 8) -> list[dict]:
    return blend(phases, TOKENS, budget, repeats)["phases"]


def test_a_domains_weight_follows_the_tokens_of_its_labels():
    phases = [Phase(until=0.6, weights={"code": 0.75, "docs": 0.25}, labels=["high", "medium-high", "medium"]),
              Phase(until=1.0, weights={"code": 1.0, "docs": 0.0}, labels=["high", "low"])]
    first, last = phase_weights(phases)
    assert first == {"until": 0.6, "weights": {
        "train/code-high": pytest.approx(0.75 * 300 / 400), "train/code-medium": pytest.approx(0.75 * 100 / 400),
        "train/docs-high": pytest.approx(0.25)}}
    assert last["weights"] == {"train/code-high": pytest.approx(0.3), "train/code-low": pytest.approx(0.7)}


def test_a_domain_without_tokens_is_named():
    phases = [Phase(until=0.5, weights={"code": 1}, labels=["low"]),
              Phase(until=1.0, weights={"code": 0.5, "docs": 0.5}, labels=["low", "medium"])]
    with pytest.raises(DataError, match=r"phases\[1\] \(until 1\.0\): domain `docs` has no tokens.*low, medium.*\n"):
        phase_weights(phases)
    with pytest.raises(DataError, match="domain `poems`"):
        phase_weights([Phase(until=1.0, weights={"poems": 1}, labels=["high"])])


def test_a_domain_that_no_phase_weighs_is_named():
    """Its text would be read, curated and tokenized, and never trained on. A weight of 0 says that this is meant."""
    with pytest.raises(DataError, match=r"phases: no weight for domain `docs`, .*\nGive it one.* 0 "):
        phase_weights([Phase(until=1.0, weights={"code": 1}, labels=["high"])])
    assert phase_weights([Phase(until=1.0, weights={"code": 1, "docs": 0}, labels=["high"])])


@pytest.mark.parametrize("weights", [{}, {"code": 0.0}, {"code": 1.5, "docs": -0.5}])
def test_weights_that_weigh_nothing_are_named(weights):
    with pytest.raises(DataError, match=r"phases\[0\]\.weights"):
        phase_weights([Phase(until=1.0, weights=weights, labels=["high"])])


def test_what_a_file_cannot_give_its_domain_does_then_the_other_domains_by_weight():
    tokens = {"train/a-high": 10, "train/a-low": 100, "train/b-high": 1000, "train/c-high": 1000}
    phases = [Phase(until=0.75, weights={"a": 8, "b": 1, "c": 1}, labels=["high", "low"]),
              Phase(until=1.0, weights={"a": 0.2, "b": 0.8}, labels=["high"])]
    mixture = blend(phases, tokens, 400, 2)
    first, last = (phase["weights"] for phase in mixture["phases"])
    # The last phase takes all of a-high: 20 of 100 tokens. The first asks 240 of 300 from `a`, whose low file has 200.
    assert last == {"train/a-high": pytest.approx(0.2), "train/b-high": pytest.approx(0.8)}
    assert first == {"train/a-high": pytest.approx(0), "train/a-low": pytest.approx(200 / 300),
                     "train/b-high": pytest.approx(50 / 300), "train/c-high": pytest.approx(50 / 300)}
    assert mixture["repeats"]["train/a-low"] == mixture["repeats"]["train/a-high"] == pytest.approx(2)
    assert shortfalls(phases, mixture, 2) == [
        "tokenize.phases[0] (until 0.75): domain `a`, read 2 times in all, gives 0.6667 of the phase, not the 0.8 it "
        "weighs; the others give more."]
    assert not shortfalls(phases, blend(phases, tokens, 20, 2), 2)


def test_a_corpus_too_small_for_the_budget_is_an_error_and_one_just_large_enough_is_used_up():
    phases = [Phase(until=0.8, weights={"code": 0.5, "docs": 0.5}, labels=["high", "low"]),
              Phase(until=1.0, weights={"code": 1}, labels=["high"])]
    mixture = blend(phases, TOKENS, 4 * 1050, 4)
    assert mixture["repeats"].keys() == {name for name in TOKENS if name.startswith("train/")}
    for name in ("code-high", "code-low", "docs-high"):
        assert mixture["repeats"][f"train/{name}"] == pytest.approx(4)
    with pytest.raises(DataError, match=r"phases\[0\] \(until 0\.8\): needs 3,440 tok.*read 4 .*3,340 .*\n.*repeats"):
        blend(phases, TOKENS, 4300, 4)
    with pytest.raises(DataError, match=r"phases\[1\] \(until 1\.0\): needs 840 tokens.*read 1 .*300 at most"):
        blend(phases, TOKENS, 4200, 1)
    with pytest.raises(DataError, match=r"needs 400 tokens.*read 1 .*300 at most"):     # a label named twice is one
        blend([Phase(until=1.0, weights={"code": 1, "docs": 0}, labels=["high", "high"])], TOKENS, 400, 1)


def test_no_file_passes_the_bound_whatever_the_corpus():
    draw, refused = Random(5), 0
    labels = ["high", "medium-high", "medium", "medium-low", "low"]
    for _ in range(300):
        tokens = {f"train/{domain}-{label}": draw.choice([0, draw.randint(1, 50), draw.randint(1, 5000)])
                  for domain in "abc" for label in labels}
        phases = [Phase(until=until, weights={domain: draw.random() for domain in "abc"}, labels=labels[:count])
                  for until, count in ((0.6, 5), (0.8, 3), (0.95, 2), (1.0, 1))]
        budget = draw.randint(100, 40_000)
        try:
            mixture = blend(phases, tokens, budget, 4)
        except DataError:
            refused += 1
            continue
        drawn = dict.fromkeys(tokens, 0.0)
        for phase, start in zip(mixture["phases"], (0.0, 0.6, 0.8, 0.95), strict=True):
            assert sum(phase["weights"].values()) == pytest.approx(1)
            assert min(phase["weights"].values()) >= 0
            for name, weight in phase["weights"].items():
                drawn[name] += weight * (phase["until"] - start) * budget
        for name, amount in drawn.items():
            assert amount <= 4 * tokens[name] * (1 + 1e-9)
            assert mixture["repeats"][name] == pytest.approx(amount / tokens[name] if amount else 0)
    assert 50 < refused < 250


def test_share_out():
    assert share_out(12, {"a": 1, "b": 1, "c": 2}, {"a": 100, "b": 2, "c": 100}) == {
        "a": pytest.approx(10 / 3), "b": 2, "c": pytest.approx(20 / 3)}
    assert share_out(9, {"a": 1, "b": 8}, {"a": 4, "b": 5}) == {"a": 4, "b": 5}
