"""The compress stage run as a user runs it."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_corpus import write_params

from model import costs
from model.checkpoint import load_weights, save_weights
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from stages.compress import shortfalls
from tests.forked import run
from tests.model.compression.markov import CONFIG, write_tokens

SMALL = {
    "importance_samples": 4, "ffn_importance_samples": 8, "ffn_widths": [32, 48], "validation_samples": 8,
    "ranking_samples": 4, "ranked_by_agreement": 3, "ranked_by_task": 2, "task_items": 8, "finalists": 2,
    "short_distillation_tokens": 128,
    "distillation_tokens": 12 * 128, "global_batch_size": 4, "micro_batch_size": 4, "checkpoint_every": 4,
}
METRICS = {
    "parent_parameters", "compressed_parameters", "parent_memory_gib", "compressed_memory_gib", "budget_gib",
    "candidates", "kl_parent_cut", "kl_parent_compressed", "kl_parent_random_cut", "kl_parent_random",
    "agreement_compressed", "agreement_random", "validation_bits_per_byte_parent",
    "validation_bits_per_byte_compressed", "validation_bits_per_byte_random", "distillation_tokens",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A working directory in which an untrained parent was compressed."""
    directory = tmp_path_factory.mktemp("compress")
    changes = {f"compress.{key}": value for key, value in SMALL.items()}
    memory = {"context": 64, "batch": 1, "weight_bits": 16, "kv_bits": 16, "ssm_bits": 32, "conv_bits": 16}
    write_params(directory, **changes, **{"compress.memory": memory | {"budget_fraction": 0.8}})
    write_tokens(directory / "data/tiny/tokens")
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"vocab_size": 64, "init_method_std": 0.2})
    checkpoint = directory / "data/tiny/checkpoints/hybrid-fp8"
    checkpoint.mkdir(parents=True)
    state = {name: tensor.detach() for name, tensor in HybridLM(config).state_dict().items()}
    save_weights(checkpoint, config, state, {"architecture": "hybrid", "precision": "fp8"})
    run(directory, "-m", "stages.compress")
    return directory


def read(directory: Path, name: str):
    return json.loads((directory / "runs/tiny/compress" / name).read_text())


def test_outputs_and_records(done):
    metrics = read(done, "metrics.json")
    assert metrics.keys() >= METRICS and metrics["distillation_tokens"] == 12 * 128
    config = ModelConfig(**read(done, "model.json"))
    assert costs.parameters(config) == metrics["compressed_parameters"] < metrics["parent_parameters"]
    for name in ("compressed", "compressed-random"):
        stored, state, training = load_weights(done / "data/tiny/checkpoints" / name)
        assert sum(tensor.numel() for tensor in state.values()) == metrics["compressed_parameters"]
        assert training["validation_bits_per_byte_parent"] == pytest.approx(
            metrics["validation_bits_per_byte_parent"], rel=1e-5)
        assert training["parent"] == "hybrid-fp8" and training["parent_training"]["precision"] == "fp8"
        assert len(training["layers_kept"]) == len(stored.pattern) == len(config.pattern)
        if name == "compressed":
            assert stored == config
    candidates = read(done, "candidates.json")
    assert [candidate["pattern"] for candidate in candidates if candidate["chosen"]] == [config.pattern]
    assert all(candidate["memory_gib"] <= metrics["budget_gib"] for candidate in candidates)
    assert len(read(done, "importance.json")["layers"]) == 7
    rows = list(csv.DictReader((done / "runs/tiny/compress/distillation.csv").open()))
    assert list(rows[0]) == ["model", "step", "tokens", "kl"] and len(rows) == 24
    assert metrics["kl_parent_compressed"] < metrics["kl_parent_cut"]
    assert not list((done / ".scratch").glob("compress-*/"))


def test_a_distillation_that_does_harm_and_a_budget_that_is_missed_are_said():
    costs = {"budgets": {"memory (bytes)": 9}, "models": {"compressed": {}}}
    good = {"kl_parent_cut": 0.0132, "kl_parent_random_cut": 0.0049, "kl_parent_compressed": 0.0026,
            "kl_parent_random": 0.0013}
    assert not shortfalls(good, costs)
    [line] = shortfalls(good | {"kl_parent_compressed": 2.4}, costs)
    assert line.startswith("checkpoints/compressed: KL to the parent is 2.4 nats after distillation, 0.0132 just cut")
    assert len(shortfalls(good | dict.fromkeys(("kl_parent_compressed", "kl_parent_random"), math.nan), costs)) == 2
    costs = {"budgets": {"decode step (seconds)": 1e-3}, "models": {"compressed": {"decode_seconds": 1.1e-3}}}
    [line] = shortfalls(good, costs)
    assert line.startswith("checkpoints/compressed: a decode step takes 1.1 ms, the budget is 1: ")
    costs["models"]["compressed"]["decode_seconds"] = 1e-3
    assert not shortfalls(good, costs)
