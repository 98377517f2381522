"""The latency table: additive, fitted, and within its model exact."""

import pytest

from model.compression import latency
from model.compression.config import LatencyBudget
from model.compression.latency import measure_table
from model.config import ModelError
from tests.model.compression.markov import CONFIG, silent

WORKLOAD = LatencyBudget(context=64, batch=2, decode_tokens=2, repeats=1)
WIDTHS = [CONFIG.model_copy(update={"ffn_hidden_size": width}) for width in (48, 32, 16)]


def machine(config) -> float:
    """Seconds a step on a machine whose layers add up."""
    return 5e-3 + sum({"M": 2e-4, "*": 3e-4, "-": 1e-5 * config.ffn_hidden_size}[symbol] for symbol in config.pattern)


def whole(count):
    return [CONFIG.model_copy(update={"pattern": CONFIG.pattern[number:]}) for number in range(count)]


def test_layers_that_add_up_are_predicted_exactly(monkeypatch):
    monkeypatch.setattr(latency, "step_seconds", lambda configs, *_: {k: machine(c) for k, c in configs.items()})
    table = measure_table(CONFIG, WIDTHS, whole(5), WORKLOAD, 1, silent)
    assert table.overhead == pytest.approx(5e-3) and len(table.layers) == 5
    unseen = CONFIG.model_copy(update={"pattern": "M-*---MM", "ffn_hidden_size": 32})
    assert table.seconds(unseen) == pytest.approx(machine(unseen))
    record = table.record()
    assert record["overhead_milliseconds"] == pytest.approx(5.0)
    assert [layer["milliseconds"] for layer in record["layers"] if layer["symbol"] != "-"] == pytest.approx([0.2, 0.3])
    assert {tuple(layer["widths"][:1]) for layer in record["layers"] if layer["symbol"] == "-"} == {(48,), (32,), (16,)}


def test_noise_does_not_make_a_wider_layer_cheaper(monkeypatch):
    noise = {48: 0.8, 32: 1.0, 16: 0.3}
    monkeypatch.setattr(latency, "step_seconds", lambda configs, *_: {
        name: 1e-3 * config.pattern.count("-") * noise[config.ffn_hidden_size] for name, config in configs.items()})
    table = measure_table(CONFIG, WIDTHS, whole(5), WORKLOAD, 1, silent)
    widths = [table.layers["-", width, 0, 32] for width in (16, 32, 48)]
    assert widths == pytest.approx([3e-4, 1e-3, 1e-3])


def test_a_step_that_something_else_slowed_down_is_no_measure(monkeypatch):
    slowed = []

    def disturbed(configs, *_):
        return {name: machine(config) * (1.5 if name in slowed else 1.0) for name, config in configs.items()}

    monkeypatch.setattr(latency, "step_seconds", disturbed)
    measure_table(CONFIG, WIDTHS, whole(7), WORKLOAD, 1, silent)
    slowed.append("3")                                              # one of the whole models, the others are within
    with pytest.raises(ModelError, match=r"(?s)compress.latency: a step of \*-M- .* nothing beside it"):
        measure_table(CONFIG, WIDTHS, whole(7), WORKLOAD, 1, silent)


def test_an_unknown_layer_and_a_fit_to_too_few_models_are_refused(monkeypatch):
    monkeypatch.setattr(latency, "step_seconds", lambda configs, *_: {k: machine(c) for k, c in configs.items()})
    table = measure_table(CONFIG, WIDTHS, whole(5), WORKLOAD, 1, silent)
    with pytest.raises(ModelError, match="the table has no layer"):
        table.seconds(CONFIG.model_copy(update={"ffn_hidden_size": 40}))
    with pytest.raises(ModelError, match="at least 5"):
        measure_table(CONFIG, WIDTHS, whole(4), WORKLOAD, 1, silent)


def test_steps_are_really_timed():
    seconds = latency.step_seconds({"small": CONFIG, "deep": CONFIG.model_copy(update={"pattern": "M-" * 20})},
                                   WORKLOAD, 1, silent)
    assert 0 < seconds["small"] < seconds["deep"] < 5


def test_steps_before_the_first_token_are_refused():
    with pytest.raises(ValueError, match=r"decode_tokens \(20\) must not exceed context \(8\)"):
        LatencyBudget(context=8, batch=1, decode_tokens=20, repeats=1)
