"""The task of held-out tokens: its items, and answers against plain recomputation."""

import pytest
import torch

from model.compression.comparison import task_accuracy, task_items
from model.config import ModelError
from model.hybrid_lm import HybridLM
from tests.model.compression.markov import CONFIG, silent
from tests.model.compression.plain import PlainLayerwise


def test_items_hold_the_truth_and_three_others(data):
    asked = task_items(data.validation, 12, 1)
    assert asked.shape == (12, 4, 33)                        # 25 tokens of context, 8 to choose
    assert (asked[:, :1, :25] == asked[:, :, :25]).all()
    rows = {tuple(row.tolist()) for row in data.validation}
    assert all(tuple(item[0].tolist()) in rows for item in asked)
    assert not any(torch.equal(item[0], other) for item in asked for other in item[1:])
    assert torch.equal(asked, task_items(data.validation, 12, 1))
    assert not torch.equal(asked, task_items(data.validation, 12, 2))


def test_long_sequences_hold_several_stretches():
    sequences = torch.arange(3 * 129).view(3, 129)
    asked = task_items(sequences, 6, 1)
    assert asked.shape == (6, 4, 64)
    assert sorted(asked[:, 0, 0].tolist()) == [0, 64, 129, 193, 258, 322]


def test_accuracy_equals_plain_recomputation_and_a_trained_model_knows_more(parent, data):
    asked = task_items(data.validation, 16, 1)
    torch.manual_seed(1)
    models = {"trained": HybridLM.from_state(*parent), "fresh": HybridLM(CONFIG)}
    layerwise = {name: PlainLayerwise(model) for name, model in models.items()}
    found = task_accuracy(layerwise["trained"], layerwise, asked, 3, silent)
    for name, model in models.items():
        right = 0
        with torch.no_grad():
            for item in asked:
                logs = model(item[:, :-1]).double().log_softmax(-1)
                likelihood = [sum(float(logs[c, t - 1, row[t]]) for t in range(25, 33)) for c, row in enumerate(item)]
                right += likelihood[0] > max(likelihood[1:])
        assert found[name] == right / 16
    assert found["trained"] > found["fresh"]


def test_more_items_than_there_are_is_an_error(data):
    with pytest.raises(ModelError, match="task_items") as error:
        task_items(data.validation, 17, 1)
    assert len(str(error.value).splitlines()) == 2
