"""The benchmark of checkpoints on disk at a tiny size: every step runs, and an import gives the bytes of the parent."""

from benchmarks import shards
from model import costs
from model.checkpoint import open_weights
from model.presets import PRESETS
from tests.model.test_hub import HYBRID


def test_tiny(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", HYBRID)
    for name in ("parent", "cut", "imported"):
        (tmp_path / name).mkdir()
    assert shards.measure(shards.write, tmp_path, "tiny", None)["parameters"] == costs.parameters(HYBRID)
    figures = shards.measure(shards.cut, tmp_path)
    config, state, _ = open_weights(tmp_path / "cut")
    assert (config.pattern.count("M"), config.ffn_hidden_size) == (3, 105)
    assert figures["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert figures["seconds"] > 0 and figures["peak_gib"] > 0.05
    assert shards.export(tmp_path) == {"files": 1}
    found = shards.check(tmp_path, 20)
    assert found["logits_max_relative_difference"] < 1e-5 and found["models_compared"] == "layer by layer"
    assert shards.import_(tmp_path) == {"same_bytes": True}
