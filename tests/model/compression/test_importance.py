"""Importance of layers against plain recomputation, and against structures planted in the weights."""

import itertools

import pytest
import torch
from scipy.stats import spearmanr

from model.compression.comparison import compare
from model.compression.importance import layer_importance, mean_ranks, rank_correlation, split_half_correlation
from model.compression.layerwise import Kept
from model.compression.prune import Selection, cut
from model.config import ModelError
from model.hybrid_lm import HybridLM
from tests.model.compression.markov import silent
from tests.model.compression.plain import PlainLayerwise


def test_mean_squared_errors_equal_those_of_models_without_the_layer(parent, data):
    model = PlainLayerwise(HybridLM.from_state(*parent))
    sequences = data.calibration[:3]
    errors = layer_importance(model, sequences, 2, silent)
    assert errors.shape == (7, 3) and errors.dtype == torch.float64
    with torch.no_grad():
        reference = HybridLM.from_state(*parent, dtype=torch.float64).backbone(sequences)
        for left_out in range(7):
            config, state = cut(*parent, Selection([i for i in range(7) if i != left_out]))
            without = HybridLM.from_state(config, state, dtype=torch.float64).backbone(sequences)
            expected = (without - reference).square().mean(dim=(1, 2))
            torch.testing.assert_close(errors[left_out], expected, rtol=1e-3, atol=0)


def test_split_half_correlation_is_spearmans():
    errors = torch.rand(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = spearmanr(errors[:, ::2].mean(1), errors[:, 1::2].mean(1)).statistic
    assert split_half_correlation(errors) == pytest.approx(expected, abs=1e-12)


def test_ranks_of_equal_values_are_shared():
    one, other = torch.tensor([1.0, 2, 2, 3, 5]), torch.tensor([2.0, 1, 4, 4, 4])
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


def test_mean_ranks_average_the_places_and_not_the_errors():
    """One sample with large errors decides the mean; it is one of three for the ranks. Equal errors share a place."""
    errors = torch.tensor([[1.0, 2.0, 900.0], [2.0, 3.0, 5.0], [3.0, 3.0, 1.0]], dtype=torch.float64)
    assert mean_ranks(errors).tolist() == pytest.approx([(1 + 1 + 3) / 3, (2 + 2.5 + 2) / 3, (3 + 2.5 + 1) / 3])
    assert errors.mean(dim=1).argmax() == 0 and mean_ranks(errors).argmin() == 0


def test_too_few_samples_and_overflowing_activations_are_refused(parent, data):
    model = PlainLayerwise(HybridLM.from_state(*parent))
    with pytest.raises(ModelError, match="1 sample") as error:
        layer_importance(model, data.calibration[:1], 2, silent)
    assert len(str(error.value).splitlines()) == 2
    state = {name: tensor.clone() for name, tensor in parent.state.items()}
    state["backbone.layers.4.mixer.down_proj.weight"][0, 0] = float("nan")
    with pytest.raises(ModelError, match="an activation is not finite"):
        layer_importance(PlainLayerwise(HybridLM.from_state(parent.config, state)), data.calibration, 8, silent)


def test_it_chooses_well_among_all_subsets(parent, data):
    """Two and three layers of seven gone: in the nearest 15 % to the parent of all subsets, on held-out tokens."""
    teacher = PlainLayerwise(HybridLM.from_state(*parent))
    scores = layer_importance(teacher, data.calibration, 8, silent)
    for gone in (2, 3):
        subsets = list(itertools.combinations(range(7), gone))
        kept = {subset: Selection([i for i in range(7) if i not in subset]) for subset in subsets}
        models = {str(subset): Kept.of(parent.config, selection) for subset, selection in kept.items()}
        kl = {name: value.kl for name, value in compare(teacher, models, data.validation, 8, silent).items()}
        nearest = sorted(kl, key=kl.get)
        for order in (scores.mean(1), mean_ranks(scores)):
            chosen = tuple(order.argsort()[:gone].sort().values.tolist())
            assert nearest.index(str(chosen)) < 0.15 * len(subsets), gone
