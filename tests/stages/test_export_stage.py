"""The export stage, from a checkpoint and a tokenizer to a directory that transformers runs."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from tiny_corpus import MODULES, contents, run, write_params
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_pipeline import tokenizer
from model import checkpoint, hub
from model.config import ModelError
from model.hybrid_lm import HybridLM
from stages.common import Stage
from stages.export import check_logits, export
from stages.params import load_params

NAMES = ("hybrid-bf16", "transformer-bf16")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    write_params(directory)
    model_file = directory / "data/tiny/tokenizer/tokenizer.model"
    model_file.parent.mkdir(parents=True)
    model_file.write_bytes(tokenizer.train_on([path.read_text() for path in MODULES], 1024))
    params = load_params(directory / "params.yaml")
    torch.manual_seed(3)
    for name in NAMES:
        config = params.model_of(name)
        weights = directory / "data/tiny/checkpoints" / name
        weights.mkdir(parents=True)
        checkpoint.save_weights(weights, config, HybridLM(config).state_dict(), {"precision": "bf16", "tokens": 12})
    run(directory, "-m", "stages.export", "--variant", NAMES[0])
    with contextlib.chdir(directory):
        stage = stage_of(NAMES[1])
        stage.write_record("metrics.json", export(stage))
    return directory


def stage_of(name: str) -> Stage:
    """The stage in the current directory."""
    return Stage("export", load_params("params.yaml"), name, None, ("export",))


@pytest.mark.parametrize("name", NAMES)
def test_metrics_and_weights(done, name):
    metrics = json.loads((done / f"runs/tiny/export/{name}/metrics.json").read_text())
    _, state, _ = checkpoint.load_weights(done / f"data/tiny/checkpoints/{name}")
    assert metrics["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert 0 < metrics["logits_max_relative_difference"] < 1e-5
    assert metrics["tokens_compared"] > 64
    assert metrics["megabytes"] == pytest.approx(metrics["parameters"] * 4 / 1e6, rel=0.02)
    _, exported = hub.load(done / f"data/tiny/hub/{name}")
    assert all(torch.equal(exported[key], state[key]) for key in state)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_generates_from_the_directory_alone(done, name):
    directory = done / f"data/tiny/hub/{name}"
    exported = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    inputs = exported("</s>def add(a, b):", return_tensors="pt", split_special_tokens=False)
    assert inputs["input_ids"][0, 0] == model.generation_config.eos_token_id == 2
    longer = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = inputs["input_ids"]
    ours = HybridLM.from_state(*hub.load(directory))
    for _ in range(longer.shape[1] - expected.shape[1]):
        expected = torch.cat([expected, ours(expected)[:, -1:].argmax(-1)], 1)
    assert longer.tolist() == expected.tolist()


def test_a_second_run_writes_the_same_bytes(done, monkeypatch):
    before = contents(done / "data/tiny/hub")
    monkeypatch.chdir(done)
    export(stage_of(NAMES[0]))
    assert contents(done / "data/tiny/hub") == before


def test_a_difference_is_an_error(done, tmp_path):
    """A floor for dt that transformers reads and we do not must be noticed."""
    for path in (done / f"data/tiny/hub/{NAMES[0]}").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"time_step_min": 0.5}))
    with pytest.raises(ModelError, match="logits differ from ours"):
        check_logits(tmp_path, list(range(4, 200)))


def test_another_vocabulary_is_an_error(done, tmp_path, monkeypatch):
    write_params(tmp_path)
    other = tokenizer.train_on([path.read_text() for path in MODULES], 512)
    for name, content in contents(done / "data").items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(other if path.name == "tokenizer.model" else content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="the tokenizer has 512 ids"):
        export(stage_of(NAMES[0]))
