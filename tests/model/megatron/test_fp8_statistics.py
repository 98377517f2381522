from __future__ import annotations

import csv
import math

import pytest
import torch
from tiny_engine import HYBRID, train_job

from kernels.fp8_quantize import quantize
from model.megatron.fp8_statistics import statistics


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_statistics_are_those_of_the_quantised_tensor(format):
    torch.manual_seed(0)
    x = torch.randn(64, 48) * torch.logspace(-9, 0, 48)
    x[0, :5] = 0.0
    values, inverse_scale = quantize(x, format)
    left, scale = values.float() * inverse_scale, 1 / inverse_scale
    amax, underflow, saturated, snr = statistics(x, scale, format).tolist()
    assert amax == x.abs().max()
    lost = ((x != 0) & (left == 0)).sum() / (x != 0).sum()
    assert underflow == pytest.approx(lost.item(), abs=1e-3) and underflow > 0.01
    assert saturated == 0
    error = (x.double() - left.double()).square().sum()
    assert snr == pytest.approx(10 * math.log10(x.double().square().sum() / error), abs=0.01)


def test_without_a_scale_small_values_are_lost_and_large_ones_saturate():
    one = torch.ones(())
    assert statistics(torch.tensor([1e-5, -1e-5, 1.0, 0.0]), one, "e4m3")[1] == pytest.approx(2 / 3)
    assert statistics(torch.tensor([1e3, 1.0]), one, "e4m3")[2] == 0.5
    assert statistics(torch.tensor([1e3, 1.0]), one, "e5m2")[2] == 0.0


@pytest.mark.parametrize(("precision", "changes"), [
    ("bf16", {}), ("fp8", {"recompute": "M*-"}),
    ("fp8", {"bf16_layers_at_start": 0, "bf16_layers_at_end": 0}),
])
def test_every_linear_layer_is_measured_and_training_is_not_disturbed(tokens, precision, changes, tmp_path):
    job = {"tokens": str(tokens), "parallelism": {}, "precision": precision} | changes
    plain = train_job(out=str(tmp_path / "a"), scratch=str(tmp_path / "plain"), **job)
    seen = train_job(out=str(tmp_path / "b"), scratch=str(tmp_path / "seen"), fp8_statistics=True, **job)
    assert seen["training"] == plain["training"]
    assert not (tmp_path / "plain" / "fp8_statistics.csv").exists()
    rows = list(csv.DictReader((tmp_path / "seen" / "fp8_statistics.csv").open()))
    linears = {"M": ["mixer.in_proj", "mixer.out_proj"], "-": ["mlp.linear_fc1", "mlp.linear_fc2"],
               "*": ["self_attention.linear_proj", "self_attention.linear_qkv"]}
    assert {(row["step"], row["layer"], row["linear"], row["tensor"]) for row in rows} == {
        (step, str(layer), linear, tensor)
        for step in ("3", "6") for layer, symbol in enumerate(HYBRID.pattern) for linear in linears[symbol]
        for tensor in ("input", "weight", "gradient")
    }
    assert len(rows) == 2 * 8 * 3
    in_fp8 = {int(row["layer"]) for row in rows if row["in_fp8"] == "1"}
    expected: set[int] = set() if precision == "bf16" else {0, 1, 2, 3} if "bf16_layers_at_start" in changes else {1, 2}
    assert in_fp8 == expected
    for row in rows:
        assert 10 < float(row["snr_db"]) < 60 and 0 <= float(row["underflow_share"]) < 0.5, row
        assert row["format"] == ("e5m2" if row["tensor"] == "gradient" else "e4m3")
