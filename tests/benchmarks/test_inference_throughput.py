"""The throughput benchmark at tiny sizes on a CPU: it runs from end to end, and its figures follow from one another."""

import json
import sys

import pytest

from benchmarks import inference_gpu


def test_tiny(tmp_path, monkeypatch, capsys):
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["inference_gpu", "--tiny", "--out", str(out)])
    monkeypatch.setattr(inference_gpu, "SMOKE", inference_gpu.SMOKE._replace(context=64, output=8))
    inference_gpu.main()
    figures = json.loads(out.read_text())
    assert capsys.readouterr().out.count("asked") == 3
    for name, pair in inference_gpu.PAIRS.items():
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
