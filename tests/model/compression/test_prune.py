"""What is cut must not have mattered: exact where the structure says so."""

import pytest
import torch

from model import costs
from model.compression.prune import Selection, cut
from model.config import ModelConfig
from model.hybrid_lm import HybridLM

EVERY = {index: torch.arange(48) for index in (1, 4, 6)}


def logits(config: ModelConfig, state, ids):
    with torch.no_grad():
        return HybridLM.from_state(config, state, dtype=torch.float64)(ids)


def test_cutting_nothing_changes_nothing(parent, data):
    config, state = cut(*parent, Selection(range(7), EVERY))
    assert config == parent.config and state.keys() == parent.state.keys()
    assert all(torch.equal(state[name], parent.state[name]) for name in state)


def test_cutting_dead_neurons_keeps_the_logits(parent, data):
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    neurons = {}
    for index in (1, 4, 6):
        dead = torch.randperm(48, generator=torch.Generator().manual_seed(index))[:16]
        state[f"backbone.layers.{index}.mixer.up_proj.weight"][dead] = 0
        neurons[index] = torch.tensor([i for i in range(48) if i not in dead])
    config, smaller = cut(parent.config, state, Selection(range(7), neurons))
    assert config.ffn_hidden_size == 32
    before, after = (logits(c, s, data.calibration[:4]) for c, s in ((parent.config, state), (config, smaller)))
    assert (after - before).abs().max() < 1e-12 * before.abs().max()


def test_cutting_living_neurons_changes_the_logits(parent, data):
    neurons = {index: torch.arange(16, 48) for index in (1, 4, 6)}
    before = logits(*parent, data.calibration[:4])
    assert (logits(*cut(*parent, Selection(range(7), neurons)), data.calibration[:4]) - before).abs().max() > 1e-2


def test_a_layer_that_writes_nothing_can_go(parent, data):
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    for name in ("3.mixer.o_proj", "5.mixer.out_proj", "1.mixer.down_proj"):
        state[f"backbone.layers.{name}.weight"].zero_()
    config, smaller = cut(parent.config, state, Selection([0, 2, 4, 6], EVERY))
    assert config.pattern == "MM--"
    assert torch.equal(logits(config, smaller, data.calibration), logits(parent.config, state, data.calibration))


def test_neurons_stay_in_their_order_and_with_their_columns(parent):
    kept = torch.tensor([2, 3, 40])
    _, state = cut(*parent, Selection([1, 3], {1: kept}))
    assert torch.equal(
        state["backbone.layers.0.mixer.up_proj.weight"], parent.state["backbone.layers.1.mixer.up_proj.weight"][kept]
    )
    assert torch.equal(
        state["backbone.layers.0.mixer.down_proj.weight"],
        parent.state["backbone.layers.1.mixer.down_proj.weight"][:, kept],
    )
    assert torch.equal(
        state["backbone.layers.1.mixer.q_proj.weight"], parent.state["backbone.layers.3.mixer.q_proj.weight"]
    )


def test_the_cut_model_has_the_parameters_the_formula_says(parent):
    config, state = cut(*parent, Selection([0, 1, 3, 5, 6], {1: torch.arange(20), 6: torch.arange(20)}))
    assert config.pattern == "M-*M-" and config.ffn_hidden_size == 20
    assert sum(tensor.numel() for tensor in state.values()) == costs.parameters(config)
    HybridLM.from_state(config, state)


@pytest.mark.parametrize(("layers", "neurons"), [
    ([1, 0], {1: torch.arange(8)}), ([0, 0, 1], {1: torch.arange(8)}), ([1], {1: torch.tensor([3, 2])}),
    ([1], {1: torch.tensor([3, 3])}), ([1, 4], {1: torch.arange(8), 4: torch.arange(9)}),
])
def test_indices_must_ascend_and_widths_agree(parent, layers, neurons):
    with pytest.raises(ValueError):
        cut(*parent, Selection(layers, neurons))
