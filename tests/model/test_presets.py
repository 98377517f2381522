"""The presets against the published parameter counts and the rules of the paper's Figure 2."""

import pytest

from model import costs
from model.presets import PEERS, PRESETS

PUBLISHED = {
    "nemotron_h_4b": 4_489_223_040, "nemotron_h_8b": 8_100_852_736, "nemotron_h_47b": 46_791_554_816,
    "nemotron_h_56b": 56_324_350_464, "llama_3_2_3b": 3_212_749_824, "llama_3_1_8b": 8_030_261_248,
    "llama_3_1_70b": 70_553_706_496, "qwen_2_5_7b": 7_615_616_512, "qwen_2_5_72b": 72_706_203_648,
}


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(name, parameters):
    assert costs.parameters({**PRESETS, **PEERS}[name]) == parameters


@pytest.mark.parametrize(("name", "counts"), [
    ("nemotron_h_8b", (24, 4, 24)), ("nemotron_h_56b", (54, 10, 54)), ("nemotron_h_47b", (45, 5, 48)),
])
def test_layer_counts(name, counts):
    assert tuple(PRESETS[name].pattern.count(symbol) for symbol in "M*-") == counts


@pytest.mark.parametrize("name", ["nemotron_h_8b", "nemotron_h_56b"])
def test_patterns_keep_the_papers_rules(name):
    pattern = PRESETS[name].pattern
    attention = [i for i, symbol in enumerate(pattern) if symbol == "*"]
    assert attention == list(range(7, len(pattern) - 10, 11))
    assert pattern.startswith("M") and pattern.endswith("-")
    assert all(pattern[i - 1 : i + 2] == "M*-" for i in attention)
    assert len(attention) / len(pattern) == pytest.approx(0.08, abs=0.006)


def test_47b_is_a_subsequence_of_56b():
    layers = iter(PRESETS["nemotron_h_56b"].pattern)
    assert all(symbol in layers for symbol in PRESETS["nemotron_h_47b"].pattern)


def test_presets_pass_the_configs_own_checks():
    for config in PRESETS.values():
        assert type(config).model_validate(config.model_dump()) == config
