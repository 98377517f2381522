"""The export stage, from a checkpoint and a tokenizer to a directory that transformers runs."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_corpus import MODULES, contents, write_params
from transformers import AutoModelForCausalLM, AutoTokenizer

import stages.export
from data_pipeline.tokenize import fast_tokenizer, tokenizer
from model import checkpoint, hub
from model.config import ModelError
from model.hybrid_lm import HybridLM
from stages.export import check_logits, convert, export
from stages.frame.common import Stage, StageError
from stages.frame.params import load_params
from tests.forked import run

NAMES = ("hybrid-bf16", "transformer-bf16")
# What a GPU machine has installed, where transformers takes it for a model on the CPU as well.
CAUSAL_CONV1D = """
def causal_conv1d_fn(x, weight, bias=None, activation=None):
    raise RuntimeError("Expected x.is_cuda() to be true, but got false.")
"""


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
    (directory / "causal_conv1d.py").write_text(CAUSAL_CONV1D)
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
    assert metrics["tokens_compared"] > 64 and metrics["models_compared"] == "whole"
    assert metrics["megabytes"] == pytest.approx(metrics["parameters"] * 4 / 1e6, rel=0.02)
    _, exported = hub.load(done / f"data/tiny/hub/{name}")
    assert all(torch.equal(exported[key], state[key]) for key in state)


@pytest.mark.parametrize("name", NAMES)
def test_transformers_generates_from_the_directory_alone(done, name):
    directory = done / f"data/tiny/hub/{name}"
    exported = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert ("transformers>=5.15" in (directory / "README.md").read_text()) == ("hybrid" in name)
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


@pytest.mark.parametrize("name", NAMES)
def test_layer_by_layer_gives_the_same_difference(done, monkeypatch, name):
    directory, ids = done / f"data/tiny/hub/{name}", list(range(4, 200))
    whole = check_logits(directory, ids)
    monkeypatch.setattr(stages.export, "WHOLE_BYTES", 1e12)
    assert (*whole[:2], "layer by layer") == check_logits(directory, ids)


@pytest.mark.parametrize("bytes_needed", [10, 1e12])
def test_a_difference_is_an_error(done, tmp_path, monkeypatch, bytes_needed):
    """A floor for dt that transformers reads and we do not must be noticed."""
    monkeypatch.setattr(stages.export, "WHOLE_BYTES", bytes_needed)
    for path in (done / f"data/tiny/hub/{NAMES[0]}").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"time_step_min": 0.5}))
    with pytest.raises(ModelError, match="logits differ from ours"):
        check_logits(tmp_path, list(range(4, 200)))


def test_weights_in_other_places_are_an_error(done, monkeypatch, tmp_path):
    """Both readings of the directory would have them, and the same logits."""
    derive = hub.derive

    def swapped(state, recipes):
        one, other = (f"backbone.layers.{layer}.mixer.up_proj.weight" for layer in (1, 5))
        return derive(state, recipes | {one: recipes[other], other: recipes[one]})

    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "derive", swapped)
    with pytest.raises(ModelError, match=r"layers\.1\.mixer\.up_proj\.weight is not the checkpoint's"):
        export(stage_of(NAMES[0]))


def test_another_vocabulary_is_an_error(done, tmp_path, monkeypatch):
    write_params(tmp_path)
    other = tokenizer.train_on([path.read_text() for path in MODULES], 512)
    for name, content in contents(done / "data").items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(other if path.name == "tokenizer.model" else content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer\.model: a tokenizer of 512 ids, the model has 1,024"):
        export(stage_of(NAMES[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_export_import_export_gives_the_same_bytes(done, tmp_path, name, dtype):
    """The way back says no dtype."""
    convert(["--from-checkpoint", str(done / f"data/tiny/checkpoints/{name}"), "--out", str(tmp_path / "a"),
             "--tokenizer", str(done / "data/tiny/tokenizer/tokenizer.model"), "--dtype", dtype])
    convert(["--from-hub", str(tmp_path / "a"), "--out", str(tmp_path / "checkpoint")])
    convert(["--from-checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "b")])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert json.loads((tmp_path / "a/config.json").read_text())["torch_dtype"] == dtype
    assert not (tmp_path / "a/chat_template.jinja").exists(), "a base model is not trained for one"
    config, state, training = checkpoint.load_weights(tmp_path / "checkpoint")
    assert training == {"precision": "bf16", "tokens": 12}
    _, exported = hub.load(tmp_path / "a")
    assert config == load_params(done / "params.yaml").model_of(name)
    assert all(torch.equal(state[key], exported[key]) for key in exported)


def test_an_imported_model_keeps_its_tokenizer(done, tmp_path, monkeypatch):
    """Special ids, chat template and origin of a model from elsewhere; as a stage's checkpoint too."""
    source = tmp_path / "models--owner--some-model/snapshots/0123abcd"      # in the Hub's cache
    shutil.copytree(done / f"data/tiny/hub/{NAMES[0]}", source)
    (source / "training.json").unlink()
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 11], "pad_token_id": 0}')
    shutil.copytree(done, tmp_path / "run", ignore=shutil.ignore_patterns("runs"))
    shutil.rmtree(there := tmp_path / f"run/data/tiny/checkpoints/{NAMES[0]}")
    convert(["--from-hub", str(source), "--out", str(there)])
    monkeypatch.chdir(tmp_path / "run")
    export(stage_of(NAMES[0]))
    again = tmp_path / f"run/data/tiny/hub/{NAMES[0]}"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (source / name).read_bytes()
    values = json.loads((again / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, [2, 11], 0)
    assert json.loads((again / "training.json").read_text()) == {"imported_from": "owner/some-model"}
    assert "The weights of `owner/some-model`" in (again / "README.md").read_text()


def test_a_given_hub_tokenizer_brings_its_special_ids(done, tmp_path):
    """Those that only config.json names too, without which no text would end; ids of no token are refused."""
    source = tmp_path / "source"
    shutil.copytree(done / f"data/tiny/hub/{NAMES[0]}", source)
    generation = source / "generation_config.json"
    generation.write_text('{"eos_token_id": 1024}')
    arguments = ["--from-checkpoint", str(done / f"data/tiny/checkpoints/{NAMES[0]}"), "--tokenizer", str(source)]
    with pytest.raises(StageError, match=r"generation_config\.json: eos_token_id holds 1024, and the model has ids"):
        convert([*arguments, "--out", str(tmp_path / "refused")])
    generation.write_text('{"do_sample": true}')
    convert([*arguments, "--out", str(tmp_path / "a")])
    generation.unlink()
    convert([*arguments, "--out", str(tmp_path / "b")])
    for out, own in (("a", {"do_sample": True}), ("b", {})):
        assert json.loads((tmp_path / out / "generation_config.json").read_text()) == own | hub.SPECIAL_TOKENS
        assert json.loads((tmp_path / out / "config.json").read_text()).items() >= hub.SPECIAL_TOKENS.items()


@pytest.mark.parametrize(("place", "said", "name"), [
    ("models--owner--some-model/snapshots/0123abcd", "elsewhere/other", "owner/some-model"),
    ("some-model", None, "some-model"), ("some-model", "owner/model-8B", "owner/model-8B"),
    ("some-model", "/lustre/users/me/iter_100", "some-model"), ("some-model", "./checkpoints", "some-model"),
    ("some-model/snapshots/0123456789abcdef0123456789abcdef01234567", None, "some-model"),
    ("some-model/0123abcdef", "0123abcdef", "some-model"),
])
def test_no_commit_and_no_path_is_a_models_name(done, tmp_path, place, said, name):
    source = tmp_path / place
    shutil.copytree(done / f"data/tiny/hub/{NAMES[0]}", source)
    (source / "training.json").unlink()
    damage(source, _name_or_path=said)
    link = tmp_path / "link"
    link.symlink_to(source)
    convert(["--from-hub", str(source), "--out", str(tmp_path / "out")])
    assert checkpoint.read_description(tmp_path / "out")[1] == {"imported_from": name}
    with contextlib.chdir(source):
        assert stages.export._name_of(Path()) == name
    assert stages.export._name_of(link) == (name if "/" in name else "link")


def test_what_cannot_be_converted_is_named_before_any_work(done, tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(done / f"data/tiny/hub/{NAMES[0]}", source)
    monkeypatch.setattr(hub, "open_weights", lambda *_: pytest.fail("tensors were read"))
    out = ["--out", str(tmp_path / "out")]
    other = fast_tokenizer.build(read_model_of(tmp_path, 512))
    (source / "tokenizer.json").write_text('{"version":"1.0"')
    with pytest.raises(StageError, match=r"tokenizer\.json: not a tokenizer"):
        convert(["--from-hub", str(source), *out])
    other.save(str(source / "tokenizer.json"))
    with pytest.raises(StageError, match=r"tokenizer\.json: a tokenizer of 512 ids, the model has 10,240\.\nGive"):
        damage(source, vocab_size=10_240)
        rename(source, "backbone.embeddings.weight", torch.zeros(10_240, 128))
        rename(source, "lm_head.weight", torch.zeros(10_240, 128))
        convert(["--from-hub", str(source), *out])
    rename(source, "lm_head.weight", None)
    rename(source, "mtp.weight", torch.zeros(1))
    with pytest.raises(StageError, match=r"missing lm_head\.weight; unexpected mtp\.weight"):
        convert(["--from-hub", str(source), *out])
    with pytest.raises(StageError, match=r"missing: not found|config\.json: not found"):
        convert(["--from-hub", str(tmp_path / "missing"), *out])
    with pytest.raises(StageError, match=r"tokenizer: not found\.\nGive the tokenizer"):
        convert(["--from-checkpoint", str(done / f"data/tiny/checkpoints/{NAMES[0]}"), *out])
    with pytest.raises(StageError, match=r"missing/model\.json: not found"):
        convert(["--from-checkpoint", str(tmp_path / "missing"), *out])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(StageError, match="out: exists"):
        convert(["--from-hub", str(source), *out])


def read_model_of(directory: Path, vocab_size: int):
    """The SentencePiece model of another tokenizer."""
    (directory / "other.model").write_bytes(tokenizer.train_on([path.read_text() for path in MODULES], vocab_size))
    return tokenizer.read_model(directory / "other.model")


def damage(directory: Path, **changes: object) -> None:
    values = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(values))


def rename(directory: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put `tensor` under `name` into the weights, or take it out."""
    state = load_file(directory / "model.safetensors")
    state.pop(name, None)
    save_file(state | ({name: tensor} if tensor is not None else {}), directory / "model.safetensors",
              metadata={"format": "pt"})


@pytest.mark.parametrize("options", [
    ["--from-hub", "hub", "--to", "megatron"], ["--from-hub", "hub", "--dtype", "float32"],
    ["--from-hub", "hub", "--tokenizer", "other"], ["--from-megatron", "saved", "--dtype", "bfloat16"],
    ["--from-checkpoint", "saved", "--to", "megatron", "--dtype", "float32"],
], ids=" ".join)
def test_an_option_that_a_conversion_has_no_use_for_is_refused(options: list[str], tmp_path: Path) -> None:
    """What was asked for was not what was written."""
    with pytest.raises(StageError, match=rf"^{options[-2]} {options[-1]}: would have no effect .*\nLeave it out"):
        convert([*options, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
