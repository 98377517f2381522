"""Closeness against float64 arithmetic of SciPy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from model.compression import comparison
from model.compression.comparison import compare
from model.hybrid_lm import HybridLM
from tests.model.compression.markov import silent
from tests.model.compression.plain import PlainLayerwise


def test_closeness_equals_scipy(parent, data, monkeypatch):
    monkeypatch.setitem(comparison.ROWS, "cpu", 50)
    state = {name: tensor + 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
             for name, tensor in parent.state.items()}
    teacher, student = HybridLM.from_state(*parent), HybridLM.from_state(parent.config, state)
    sequences = data.validation[:5]
    found = compare(PlainLayerwise(teacher), {"noisy": PlainLayerwise(student)}, sequences, 2, silent)["noisy"]
    with torch.no_grad():
        expected, given = (model(sequences[:, :-1]).double().numpy() for model in (teacher, student))
    kl = rel_entr(softmax(expected, -1), softmax(given, -1)).sum(-1).mean()
    loss = -np.take_along_axis(log_softmax(given, -1), sequences[:, 1:, None].numpy(), -1).mean()
    assert found.kl == pytest.approx(kl, rel=1e-5) and kl > 0.01
    assert found.accuracy == (given.argmax(-1) == sequences[:, 1:].numpy()).mean()
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert found.agreement == (expected.argmax(-1) == given.argmax(-1)).mean() < 1


def test_the_parent_agrees_with_itself(parent, data):
    teacher, twin = PlainLayerwise(HybridLM.from_state(*parent)), PlainLayerwise(HybridLM.from_state(*parent))
    found = compare(teacher, {"parent": teacher, "twin": twin}, data.validation, 4, silent)
    assert found["parent"] == found["twin"]
    assert found["parent"].kl == 0 and found["parent"].agreement == 1
