"""Importance against plain recomputation, and against structures planted in the weights."""

import pytest
import torch
from scipy.stats import spearmanr

from model.compression.importance import (
    kept_share,
    layer_errors,
    neuron_importance,
    split_half_correlation,
    top_neurons,
)
from model.compression.prune import cut
from model.hybrid_lm import HybridLM
from tests.model.compression.markov import silent


def test_layer_errors_equal_those_of_models_without_the_layer(parent, data):
    model = HybridLM.from_state(*parent)
    sequences = data.calibration[:3]
    errors = layer_errors(model, sequences, 2, silent)
    assert errors.shape == (7, 3) and errors.dtype == torch.float64
    everything = {index: torch.arange(48) for index in (1, 4, 6)}
    with torch.no_grad():
        reference = HybridLM.from_state(*parent, dtype=torch.float64).backbone(sequences)
        for left_out in range(7):
            config, state = cut(*parent, [i for i in range(7) if i != left_out], everything)
            without = HybridLM.from_state(config, state, dtype=torch.float64).backbone(sequences)
            expected = (without - reference).square().mean(dim=(1, 2))
            torch.testing.assert_close(errors[left_out], expected, rtol=1e-3, atol=0)


def test_a_layer_that_writes_nothing_is_least_important(parent, data):
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    state["backbone.layers.3.mixer.o_proj.weight"].zero_()
    errors = layer_errors(HybridLM.from_state(parent.config, state), data.calibration, 8, silent)
    assert (errors[3] == 0).all() and (errors[[0, 1, 2, 4, 5, 6]] > 0).all()


def test_a_layer_that_writes_more_is_more_important(parent, data):
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    state["backbone.layers.4.mixer.down_proj.weight"] *= 30
    before = layer_errors(HybridLM.from_state(*parent), data.calibration, 8, silent).mean(dim=1)
    after = layer_errors(HybridLM.from_state(parent.config, state), data.calibration, 8, silent).mean(dim=1)
    assert before[1:].argmax() + 1 != 4 and after[1:].argmax() + 1 == 4


def test_neuron_importance_is_minitrons_rule(parent, data):
    model = HybridLM.from_state(*parent)
    sequences = data.calibration[:5]
    found = neuron_importance(model, sequences, 2, silent)
    assert sorted(found) == [1, 4, 6]
    hidden = model.backbone.embeddings(sequences)
    with torch.no_grad():
        for index, layer in enumerate(model.backbone.layers):
            if index in found:
                matrix = parent.state[f"backbone.layers.{index}.mixer.up_proj.weight"].double()
                rise = layer.norm(hidden).double() @ matrix.T
                activation = rise.clamp_min(0) ** 2
                expected = (activation.mean(1) ** 2).sum(0).sqrt()
                torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-9)
            hidden = layer(hidden)


def test_neuron_importance_leaves_no_hook_behind(parent, data):
    model = HybridLM.from_state(*parent)
    neuron_importance(model, data.calibration[:2], 2, silent)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dead_neurons_are_cut_first(parent, data):
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    dead = torch.tensor([0, 7, 8, 20, 47])
    state["backbone.layers.4.mixer.up_proj.weight"][dead] = 0
    importance = neuron_importance(HybridLM.from_state(parent.config, state), data.calibration, 8, silent)[4]
    assert (importance[dead] == 0).all()
    kept = top_neurons(importance, 43)
    assert set(kept.tolist()) == set(range(48)) - set(dead.tolist()) and (kept.diff() > 0).all()
    assert kept_share(importance, 43) == pytest.approx(1.0, abs=1e-12)
    assert kept_share(importance, 42) < 1


def test_kept_share_and_ties():
    importance = torch.tensor([1.0, 4.0, 1.0, 2.0]).double()
    assert kept_share(importance, 2) == 0.75
    assert top_neurons(importance, 3).tolist() == [0, 1, 3]
    assert kept_share(torch.zeros(4).double(), 2) == 0.0


def test_split_half_correlation_is_spearmans():
    errors = torch.rand(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = spearmanr(errors[:, ::2].mean(1), errors[:, 1::2].mean(1)).statistic
    assert split_half_correlation(errors) == pytest.approx(expected, abs=1e-12)
