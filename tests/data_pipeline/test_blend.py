from fractions import Fraction

import pytest

from data_pipeline.blend import phase_weights
from data_pipeline.config import DataError, Phase

TOKENS = {"train/code-high": 300, "train/code-medium": 100, "train/code-low": 700, "train/docs-high": 50,
          "train/docs-low": 0, "validation/code": 40}


def test_a_domains_weight_follows_the_tokens_of_its_labels():
    phases = [Phase(until=0.6, weights={"code": 0.75, "docs": 0.25}, labels=["high", "medium-high", "medium"]),
              Phase(until=1.0, weights={"code": 1.0, "docs": 0.0}, labels=["high", "low"])]
    first, last = phase_weights(phases, TOKENS)
    assert first == {"until": 0.6, "weights": {
        "train/code-high": pytest.approx(0.75 * 300 / 400), "train/code-medium": pytest.approx(0.75 * 100 / 400),
        "train/docs-high": pytest.approx(0.25)}}
    assert last["weights"] == {"train/code-high": pytest.approx(0.3), "train/code-low": pytest.approx(0.7)}


def test_weights_sum_to_one_whatever_the_scale():
    phase = Phase(until=1.0, weights={"code": 9.0, "docs": 1.0}, labels=["high", "low"])
    weights = phase_weights([phase], TOKENS)[0]["weights"]
    assert sum(map(Fraction, weights.values())) == pytest.approx(1, abs=1e-15)
    assert weights["train/docs-high"] == pytest.approx(0.1)


def test_a_domain_without_tokens_is_named():
    phases = [Phase(until=0.5, weights={"code": 1}, labels=["low"]),
              Phase(until=1.0, weights={"code": 0.5, "docs": 0.5}, labels=["low", "medium"])]
    with pytest.raises(DataError, match=r"phases\[1\] \(until 1\.0\): domain `docs` has no tokens.*low, medium.*\n"):
        phase_weights(phases, TOKENS)
    with pytest.raises(DataError, match="domain `poems`"):
        phase_weights([Phase(until=1.0, weights={"poems": 1}, labels=["high"])], TOKENS)


@pytest.mark.parametrize("weights", [{}, {"code": 0.0}, {"code": 1.5, "docs": -0.5}])
def test_weights_that_weigh_nothing_are_named(weights):
    with pytest.raises(DataError, match=r"phases\[0\]\.weights"):
        phase_weights([Phase(until=1.0, weights=weights, labels=["high"])], TOKENS)
