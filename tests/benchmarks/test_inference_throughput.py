"""The throughput benchmark at tiny sizes on a CPU: it runs from end to end, and its figures follow from one another."""

import json
import sys

import pytest

from benchmarks import inference_gpu, plan_gpu
from model.benchmark.serving import PAIRS, fitting_batch
from model.config import ModelError
from model.presets import PRESETS


def test_tiny(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["inference_gpu", "--tiny", "--out", str(out)])
    monkeypatch.setattr(inference_gpu, "SMOKE", inference_gpu.SMOKE._replace(context=64, output=8))
    inference_gpu.main()
    figures = json.loads(out.read_text())
    assert capsys.readouterr().out.count("asked") == 3
    for name, pair in PAIRS.items():
        rows = figures[name]["rows"]
        assert [row["model"] for row in rows] == list(pair.models)
        for row in rows:
            step = row["step_milliseconds"] / 1e3
            assert row["decode_tokens_per_second"] == pytest.approx(3 / step)
            assert row["output_tokens_per_second"] == pytest.approx(
                3 * 8 / (3 * row["time_to_first_token"] + 8 * step))
        assert figures[name]["output_ratio"] == pytest.approx(
            rows[0]["output_tokens_per_second"] / rows[1]["output_tokens_per_second"])
    assert all(row["logits_relative_difference"] < 0.03 for row in figures["transformers"])


def test_an_unknown_part(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inference_gpu", "--only", "9b"])
    with pytest.raises(SystemExit):
        inference_gpu.main()
    assert "no such part: 9b" in capsys.readouterr().err


def test_the_largest_batch_that_fits():
    """Nemotron-H-8B at 66,560 tokens: 1.02 GiB of keys and values, 96 MiB of states, 1.4 of convolutions' inputs."""
    config, free = PRESETS["nemotron_h_8b"], 60 * 2**30
    sequence = 66_560 * 16_384 + (96 * 2**20) + 24 * 10_240 * 3 * 2
    assert fitting_batch("8b", config, 66_560, free) == free // (sequence + 6 * 131_072)
    with pytest.raises(ModelError, match=r"8b: 66560 tokens need 1\.1 GiB beside the weights, 1\.0 are free"):
        fitting_batch("8b", config, 66_560, 2**30)


def test_a_plan_is_not_right_of_no_cases(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan_gpu", "--only", "222m,nosuch"])
    with pytest.raises(SystemExit, match="2"):
        plan_gpu.main()
    assert "--only: no such case: nosuch" in capsys.readouterr().err
