from __future__ import annotations

import pytest
import torch
from tiny_engine import HYBRID

from model.costs import parameters
from model.presets import PRESETS
from model.throughput import flops_utilization, training_flops_per_token


def test_utilization_is_of_the_data_sheets_bf16_rate(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    gpu = torch.device("cuda")
    speed = 4 * 989.4e12 / training_flops_per_token(HYBRID)          # what four could do at most
    assert flops_utilization(HYBRID, speed / 2, 4, gpu) == pytest.approx(0.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    assert flops_utilization(HYBRID, speed, 4, gpu) is None
    assert flops_utilization(HYBRID, speed, 4, torch.device("cpu")) is None


def test_training_takes_about_six_operations_a_weight_and_token():
    model = PRESETS["nemotron_h_8b"]
    weights = parameters(model) - model.vocab_size * model.hidden_size           # looking an embedding up is no product
    assert 6 * weights < training_flops_per_token(model) < 6.6 * weights
