"""Importance of widths against plain recomputation, and against structures planted in the weights."""

import pytest
import torch
from torch import Tensor

from model.compression.candidates import random_selection, reverse_selection
from model.compression.comparison import compare
from model.compression.importance import layer_importance, rank_correlation
from model.compression.layerwise import Kept
from model.compression.width_importance import (
    WidthImportance,
    kept_share,
    select,
    top,
    top_of_groups,
    width_importance,
)
from model.config import ModelError
from model.hybrid_lm import HybridLM
from tests.model.compression.markov import silent
from tests.model.compression.plain import PlainLayerwise


def minitron(activation: Tensor) -> Tensor:
    """(batch, sequence, channels) -> (channels,)."""
    return activation.double().abs().mean(1).square().sum(0).sqrt()


def test_every_axis_is_minitrons_rule(parent, data):
    model, config = HybridLM.from_state(*parent), parent.config
    sequences = data.calibration[:5]
    found = width_importance(PlainLayerwise(model), sequences, 2, silent, "l2_then_mean")
    assert sorted(found.neurons) == [1, 4, 6] and sorted(found.mamba) == [0, 2, 5]
    seen: dict[int, Tensor] = {}
    for index, symbol in enumerate(config.pattern):
        name = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}[symbol]
        module = model.get_submodule(f"backbone.layers.{index}.mixer.{name}")
        module.register_forward_pre_hook(lambda _, inputs, at=index: seen.update({at: inputs[0]}))
    with torch.no_grad():
        model(sequences)
    for index, score in {**found.neurons, **found.mamba}.items():
        torch.testing.assert_close(score.flatten(), minitron(seen[index]), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.mamba_heads()[0], found.mamba[0].norm(dim=1))
    torch.testing.assert_close(found.mamba_channels()[0], found.mamba[0].norm(dim=0))


@pytest.mark.parametrize(("order", "score"), [
    ("mean_then_l2", lambda a: a.mean(dim=0).norm(dim=0)),                  # over the batch, then over the sequence
    ("l2_then_mean", lambda a: a.mean(dim=1).norm(dim=0)),                  # L2 over the batch, mean over the sequence
])
def test_both_orders_of_the_neurons_score_are_a_direct_computation_in_float64(parent, data, order, score):
    """squared_relu(x W1^T) of float64 weights on the FFN's float64 inputs."""
    model = HybridLM.from_state(*parent).double()
    sequences = data.calibration[:7]
    found = width_importance(PlainLayerwise(HybridLM.from_state(*parent)), sequences, 3, silent, order)
    hidden = model.backbone.embeddings(sequences)
    with torch.no_grad():
        for index, layer in enumerate(model.backbone.layers):
            if layer.symbol == "-":
                activation = torch.relu(layer.norm(hidden) @ layer.mixer.up_proj.weight.T).square()
                torch.testing.assert_close(found.neurons[index], score(activation), rtol=1e-4, atol=1e-9)
            hidden = layer(hidden)
    other = width_importance(PlainLayerwise(HybridLM.from_state(*parent)), sequences, 3, silent,
                             next(name for name in ("mean_then_l2", "l2_then_mean") if name != order))
    assert not any(torch.allclose(found.neurons[index], other.neurons[index], rtol=1e-3) for index in found.neurons)
    assert all(torch.equal(found.mamba[index], other.mamba[index]) for index in found.mamba)


def test_reliability_is_the_rank_correlation_of_two_halves(parent, data):
    model = HybridLM.from_state(*parent)
    found = width_importance(PlainLayerwise(model), data.calibration, 3, silent)
    halves = [width_importance(PlainLayerwise(model), data.calibration[half::2], 3, silent) for half in (0, 1)]
    assert set(found.reliability) == {"neurons", "mamba"}
    neurons = [rank_correlation(halves[0].neurons[i], halves[1].neurons[i]) for i in (1, 4, 6)]
    assert found.reliability["neurons"] == pytest.approx(sum(neurons) / 3, abs=1e-9)
    heads = [rank_correlation(*(half.mamba_heads()[index] for half in halves)) for index in (0, 2, 5)]
    assert found.reliability["mamba"] == pytest.approx(sum(heads) / 3, abs=1e-9)
    assert found.reliability["neurons"] > 0.9
    dead = {name: tensor * (name != "backbone.layers.1.mixer.up_proj.weight") for name, tensor in parent.state.items()}
    found = width_importance(PlainLayerwise(HybridLM.from_state(parent.config, dead)), data.calibration, 8, silent)
    assert 0.9 < found.reliability["neurons"] <= 1           # of the layers that have ranks


def test_no_hook_stays(parent, data):
    model = HybridLM.from_state(*parent)
    width_importance(PlainLayerwise(model), data.calibration[:2], 2, silent)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_what_is_dead_is_cut_first(parent, data):
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    dead = torch.tensor([0, 7, 8, 20, 47])
    state["backbone.layers.4.mixer.up_proj.weight"][dead] = 0
    state["backbone.layers.0.mixer.in_proj.weight"][16:32] = 0         # gate of head 1
    model = PlainLayerwise(HybridLM.from_state(parent.config, state))
    importance = width_importance(model, data.calibration, 8, silent)
    assert (importance.neurons[4][dead] == 0).all()
    kept = top(importance.neurons[4], 43)
    assert set(kept.tolist()) == set(range(48)) - set(dead.tolist()) and (kept.diff() > 0).all()
    assert kept_share(importance.neurons[4], 43) == pytest.approx(1.0, abs=1e-12)
    assert kept_share(importance.neurons[4], 42) < 1
    assert importance.mamba_heads()[0].argmin() == 1 and importance.mamba_heads()[0][1] == 0
    smaller = parent.config.model_copy(update={"mamba_num_heads": 2, "ffn_hidden_size": 43})
    selection = select(parent.config, smaller, list(range(7)), importance)
    assert torch.equal(selection.neurons[4], kept)
    assert selection.mamba_heads[0][0] == 0 and selection.mamba_heads[0][1] in (2, 3)     # one of each group


@pytest.mark.parametrize(("field", "size"), [
    ("mamba_num_heads", 3), ("mamba_num_heads", 8), ("ffn_hidden_size", 64), ("hidden_size", 16),
    ("mamba_state_dim", 4),
])
def test_a_shape_that_no_cut_gives_is_refused(parent, field, size):
    heads = (parent.config.mamba_num_heads, parent.config.mamba_head_dim)
    scores = WidthImportance({index: torch.rand(parent.config.ffn_hidden_size) for index in (1, 4, 6)},
                             {index: torch.rand(heads) for index in (0, 2, 5)}, {})
    with pytest.raises(ValueError, match=rf"{field}: {size}"):
        select(parent.config, parent.config.model_copy(update={field: size}), list(range(7)), scores)


def test_kept_share_and_ties():
    importance = torch.tensor([1.0, 4.0, 1.0, 2.0]).double()
    assert kept_share(importance, 2) == 0.75
    assert top(importance, 3).tolist() == [0, 1, 3]
    assert kept_share(torch.zeros(4).double(), 2) == 0.0
    assert top_of_groups(torch.tensor([5.0, 6, 7, 1, 3, 2]), 4, 2).tolist() == [1, 2, 4, 5]


def test_activations_that_overflow_are_refused(parent, data):
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    state["backbone.layers.1.mixer.up_proj.weight"][3] = 1e30
    with pytest.raises(ModelError, match="neurons, layer 1: an activation is not finite") as error:
        width_importance(PlainLayerwise(HybridLM.from_state(parent.config, state)), data.calibration, 8, silent)
    assert len(str(error.value).splitlines()) == 2


def test_importance_beats_random_beats_reverse_at_every_ffn_cut(parent, data):
    """On held-out tokens, against the mean of five draws."""
    teacher = PlainLayerwise(HybridLM.from_state(*parent))
    importance = width_importance(teacher, data.calibration, 8, silent)
    layers = layer_importance(teacher, data.calibration, 8, silent).mean(1).tolist()
    for width in (32, 24, 16):
        shape = parent.config.model_copy(update={"ffn_hidden_size": width})
        chosen = select(parent.config, shape, list(range(7)), importance)
        selections = {"importance": chosen, "reverse": reverse_selection(parent.config, shape, layers, importance)}
        for seed in range(5):
            selections[f"random {seed}"] = random_selection(parent.config, shape, torch.Generator().manual_seed(seed))
        models = {name: Kept.of(parent.config, kept) for name, kept in selections.items()}
        kl = {name: value.kl for name, value in compare(teacher, models, data.validation, 8, silent).items()}
        random = sum(kl[f"random {seed}"] for seed in range(5)) / 5
        assert kl["importance"] < 0.6 * random and random < kl["reverse"], (width, kl)
