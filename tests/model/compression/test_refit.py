"""The least-squares refit against plain least squares, and what it is worth."""

import pytest
import torch

from model.compression.comparison import compare
from model.compression.controls import random_selection, reverse_selection
from model.compression.importance import layer_importance
from model.compression.prune import Selection, cut
from model.compression.refit import refit
from model.compression.width_importance import select, width_importance
from model.config import ModelError
from model.hybrid_lm import HybridLM
from tests.model.compression.markov import silent


@pytest.fixture(scope="module")
def teacher(parent):
    return HybridLM.from_state(*parent)


def narrower(parent, teacher, data, **changes):
    importance = width_importance(teacher, data.calibration, 8, silent)
    shape = parent.config.model_copy(update=changes)
    return select(parent.config, shape, list(range(7)), importance)


def test_an_ffn_is_refitted_to_its_least_squares_solution(parent, teacher, data):
    selection = narrower(parent, teacher, data, ffn_hidden_size=24)
    config, state = cut(*parent, selection)
    found = refit(teacher, config, state, selection, data.calibration, 8, silent)
    with torch.no_grad():
        hidden = teacher.backbone.embeddings(data.calibration)
        for index in range(4):
            hidden = teacher.backbone.layers[index](hidden)
        layer = teacher.backbone.layers[4]
        normed = layer.norm(hidden).double()
        name = "backbone.layers.4.mixer.{}_proj.weight"
        x = (normed @ state[name.format("up")].double().T).relu().square().flatten(0, 1)
        y = layer.mixer(layer.norm(hidden)).double().flatten(0, 1)
        best, fitted, sliced = (x @ weights - y for weights in (
            torch.linalg.lstsq(x, y).solution, found[name.format("down")].double().T,
            state[name.format("down")].double().T))
    assert best.square().mean() <= fitted.square().mean() <= 1.02 * best.square().mean()
    assert fitted.square().mean() < 0.7 * sliced.square().mean()


@pytest.mark.parametrize("changes", [
    {"ffn_hidden_size": 24}, {"mamba_num_heads": 2}, {"num_attention_heads": 1}, {"hidden_size": 28},
    {"ffn_hidden_size": 32, "mamba_num_heads": 2, "hidden_size": 30},
])
def test_the_refit_brings_every_axis_closer_to_the_parent(parent, teacher, data, changes):
    selection = narrower(parent, teacher, data, **changes)
    config, state = cut(*parent, selection)
    mended = refit(teacher, config, state, selection, data.calibration, 8, silent)
    models = {"cut": HybridLM.from_state(config, state), "refit": HybridLM.from_state(config, mended)}
    close = compare(teacher, models, data.validation, 8, silent)
    assert close["refit"].kl < 0.9 * close["cut"].kl


def test_layers_that_keep_their_width_keep_their_weights(parent, teacher, data):
    selection = Selection([0, 1, 3, 6], {1: torch.arange(24), 6: torch.arange(24)})
    config, state = cut(*parent, selection)
    mended = refit(teacher, config, state, selection, data.calibration, 8, silent)
    changed = {name for name, tensor in state.items() if not torch.equal(mended[name], tensor)}
    assert changed == {"backbone.layers.1.mixer.down_proj.weight", "backbone.layers.3.mixer.down_proj.weight"}


def test_one_sample_is_too_few(parent, teacher, data):
    with pytest.raises(ModelError, match="1 sample"):
        refit(teacher, *cut(*parent, Selection(range(7))), Selection(range(7)), data.calibration[:1], 1, silent)


def test_importance_beats_random_beats_reverse_at_every_ffn_cut(parent, teacher, data):
    """On held-out tokens, against the mean of five draws; the refit takes at least a fifth of what is left."""
    importance = width_importance(teacher, data.calibration, 8, silent)
    layers = layer_importance(teacher, data.calibration, 8, silent)["mse"].mean(1).tolist()
    for width in (32, 24, 16):
        shape = parent.config.model_copy(update={"ffn_hidden_size": width})
        chosen = select(parent.config, shape, list(range(7)), importance)
        selections = {"importance": chosen, "reverse": reverse_selection(parent.config, shape, layers, importance)}
        for seed in range(5):
            selections[f"random {seed}"] = random_selection(parent.config, shape, torch.Generator().manual_seed(seed))
        models = {name: HybridLM.from_state(*cut(*parent, kept)) for name, kept in selections.items()}
        config, state = cut(*parent, chosen)
        mended = refit(teacher, config, state, chosen, data.calibration, 8, silent)
        models["refit"] = HybridLM.from_state(config, mended)
        kl = {name: value.kl for name, value in compare(teacher, models, data.validation, 8, silent).items()}
        random = sum(kl[f"random {seed}"] for seed in range(5)) / 5
        assert kl["importance"] < 0.6 * random and random < kl["reverse"], (width, kl)
        assert kl["refit"] < 0.8 * kl["importance"], (width, kl)
