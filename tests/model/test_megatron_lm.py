"""Checkpoints of stock megatron-core (tests/stock_megatron.py): read, computed with and written back."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from stock_megatron import ARGS, logits_of, save, stock_model
from transformers import AutoModelForCausalLM

from model import checkpoint, hub
from model.config import ModelError
from model.hybrid_lm import HybridLM
from model.integrity import write_sums
from model.megatron_lm import open_megatron, read_args, save_megatron
from tests.model.test_checkpoint import Trap

IDS = torch.randint(90, (2, 40), generator=torch.Generator().manual_seed(1))
KINDS = {
    "fused": {},
    "local": {"fused_names": False, "mamba_num_heads": 8, "num_query_groups": 4},
    "tied": {"untie_embeddings_and_output_weights": False, "vocab_size": None},
}
# run_config.yaml as Megatron-Bridge writes it, flat (0.2 to 0.6) and by builders (after).
PROVIDER = {
    "_target_": "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider", "num_layers": 5, "vocab_size": 90,
    "hybrid_layer_pattern": "M-M*-", "should_pad_vocab": True, "seq_length": 64, "position_embedding_type": "none",
    "share_embeddings_and_output_weights": False, "make_vocab_size_divisible_by": 128,
}
TRANSFORMER = {
    "hidden_size": 48, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 24,
    "mamba_state_dim": 16, "mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_num_heads": None,
    "normalization": "RMSNorm", "layernorm_epsilon": 1e-5, "init_method_std": 0.2, "add_bias_linear": False,
    "gated_linear_unit": False, "activation_func": {"_target_": "megatron.core.activations.squared_relu",
                                                    "_call_": False},
    "params_dtype": {"_target_": "torch.bfloat16", "_call_": False}, "attention_backend": {"_name_": "auto"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory a kind, with `logits.pt` of the stock model for IDS in it."""
    directory = tmp_path_factory.mktemp("saved")
    for kind, changes in KINDS.items():
        with stock_model(**changes) as model:
            save(directory / kind, model, **{name: value for name, value in changes.items() if name in ARGS})
            torch.save(logits_of(model, IDS), directory / kind / "logits.pt")
    return directory


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_stock_models_here_and_in_transformers(saved, kind, tmp_path):
    imported = open_megatron(saved / kind)
    rows = KINDS[kind].get("vocab_size", 90) or 128
    assert imported.config.vocab_size == rows and imported.padding_rows == 128 - rows
    assert imported.tied == (kind == "tied") and imported.left_out == 11
    assert imported.origin == f"{kind}/iter_0000012"
    expected = torch.load(saved / kind / "logits.pt")[..., :rows]
    checkpoint.save_weights(tmp_path, imported.config, imported.state, {})
    config, state, _ = checkpoint.open_weights(tmp_path)
    with torch.no_grad():
        assert relative(HybridLM.from_state(config, state)(IDS), expected) < 1e-5
        hub.save(tmp_path / "hub", config, state, {}, "float32")
        theirs, found = AutoModelForCausalLM.from_pretrained(
            tmp_path / "hub", dtype=torch.float32, output_loading_info=True)
        assert not any(found.values())
        assert type(theirs).__name__ == "NemotronHForCausalLM"
        assert relative(theirs.eval()(IDS, use_cache=False).logits, expected) < 1e-5


def test_opening_reads_no_tensor(saved, monkeypatch):
    asked = []
    read = checkpoint.CheckpointReader.read
    monkeypatch.setattr(checkpoint.CheckpointReader, "read", lambda self, name: asked.append(name) or read(self, name))
    state = open_megatron(saved / "local" / "iter_0000012").state
    assert asked == []
    assert state["backbone.layers.1.norm.weight"].shape == (48,)
    assert asked == ["decoder.layers.1.pre_mlp_layernorm.weight"]


@pytest.mark.parametrize("form", ["flat", "by builders"])
def test_megatron_bridges_description_stands_for_args(saved, form, tmp_path):
    shutil.copytree(saved / "fused", tmp_path, dirs_exist_ok=True)
    files = tmp_path / "iter_0000012"
    torch.save({"iteration": 12}, files / "common.pt")
    model = PROVIDER | (TRANSFORMER if form == "flat" else {"transformer": TRANSFORMER})
    write = lambda **changes: YAML(typ="safe", pure=True).dump(       # noqa: E731
        {"model": model | changes, "train": {"train_iters": 3}}, files / "run_config.yaml")
    write()
    imported = open_megatron(tmp_path)
    expected = open_megatron(saved / "fused")
    assert imported.config == expected.config and imported.padding_rows == 38
    assert all(torch.equal(imported.state[name], expected.state[name]) for name in expected.state)
    write(activation_func={"_target_": "torch.nn.functional.silu", "_call_": False}, transformer={})
    with pytest.raises(ModelError, match=r"run_config\.yaml: squared_relu is False"):
        open_megatron(tmp_path)
    (files / "run_config.yaml").write_text("model: !!python/object/apply:os.system [exit]\n")
    with pytest.raises(ModelError, match=r"run_config\.yaml: no `model` of Megatron-Bridge") as error:
        open_megatron(tmp_path)
    assert str(error.value).count("\n") == 1


def test_stock_megatron_reads_what_is_written_back(saved, tmp_path):
    """Into its own model, by its own loader; and what is written is read here again, to the same weights."""
    from megatron.core import dist_checkpointing

    imported = open_megatron(saved / "fused")
    save_megatron(tmp_path, imported.config, imported.state, {"imported_from": imported.origin})
    again = open_megatron(tmp_path)
    assert (again.config, again.padding_rows, again.left_out) == (imported.config, 0, 0)
    assert all(torch.equal(again.state[name], imported.state[name]) for name in imported.state)
    config, state, training = checkpoint.open_weights(tmp_path / "release")      # it is a checkpoint of ours as well
    assert config == imported.config and state.keys() == imported.state.keys() and training["imported_from"]
    args = vars(read_args(tmp_path / "release/common.pt"))
    assert {name: args[name] for name in ARGS if name in args} == {
        name: ARGS[name] for name in ARGS if name in args
    } | {"mamba_num_heads": 6, "padded_vocab_size": 90, "make_vocab_size_divisible_by": 1}
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release"
    with stock_model(padded_vocab_size=90) as model:
        for parameter in model.parameters():
            parameter.data.zero_()
        shards = {name: shard for name, shard in model.sharded_state_dict().items() if "_extra_state" not in name}
        loaded = dist_checkpointing.load({"model": shards}, str(tmp_path / "release"))
        model.load_state_dict(loaded["model"], strict=False)
        assert relative(logits_of(model, IDS), torch.load(saved / "fused/logits.pt")[..., :90]) < 1e-6


def test_what_megatron_has_outside_of_its_args_comes_back(saved, tmp_path, capsys):
    imported = open_megatron(saved / "fused")
    config = imported.config.model_copy(update={"chunk_size": 16})
    save_megatron(tmp_path, config, imported.state, {})
    assert "chunk_size 16: Megatron-LM has" in capsys.readouterr().out
    assert open_megatron(tmp_path).config == config


def test_a_transformer_has_no_megatron_hybrid(tmp_path):
    from tiny_engine import TRANSFORMER as BASELINE

    with pytest.raises(ModelError, match="Convert a hybrid"):
        save_megatron(tmp_path, BASELINE, HybridLM(BASELINE).state_dict(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("changes", "message"), [
    ({"position_embedding_type": "rope"}, "position_embedding_type is 'rope'"),
    ({"swiglu": True}, "swiglu is True"),
    ({"squared_relu": False}, "squared_relu is False"),
    ({"add_bias_linear": True}, "add_bias_linear is True"),
    ({"norm_epsilon": 1e-6}, "norm_epsilon is 1e-06"),
    ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
    ({"hybrid_override_pattern": "M-M-*"}, r"hybrid_override_pattern is M-M-\*; the layers of \.metadata are M-M\*-"),
    ({"hidden_size": None}, "not the sizes of a hybrid"),
    ({"hidden_size": 64}, r"embeddings\.weight is \(128, 48\), expected \(128, 64\)"),
    ({"vocab_size": 200}, r"embeddings\.weight is \(128, 48\), expected \(200, 48\)"),
    ({"seq_length": "long"}, "sequence_length: Input should be a valid integer"),
    ({"num_query_groups": 3}, "must be a multiple"),
    ({"untie_embeddings_and_output_weights": False, "vocab_size": None}, None),
    *(({name: ...}, rf"common\.pt: '?{name}'? is missing")
      for name in ("seq_length", "mamba_state_dim", "hidden_size", "squared_relu")),
])
def test_args_are_held_against_the_model_and_the_weights(saved, changes, message, tmp_path):
    shutil.copytree(saved / "fused/iter_0000012", tmp_path / "iter_0000012")
    args = {name: value for name, value in (ARGS | changes).items() if value is not ...}
    torch.save({"args": Namespace(**args)}, tmp_path / "iter_0000012/common.pt")
    if message is None:                 # a head of its own is what counts
        assert not open_megatron(tmp_path / "iter_0000012").tied
        return
    with pytest.raises(ModelError, match=message) as error:
        open_megatron(tmp_path / "iter_0000012")
    assert str(error.value).count("\n") == 1


def rewritten(directory: Path, out: Path, **changes: torch.Tensor | None) -> Path:
    """The checkpoint of `directory` with tensors put in, or taken out (None), by their names in Megatron."""
    import torch.distributed.checkpoint as distributed_checkpoint

    reader = checkpoint.CheckpointReader(directory)
    state = {name: reader.read(name) for name, entry in reader.index.state_dict_metadata.items()
             if hasattr(entry, "size")}
    shutil.copytree(directory, out, ignore=shutil.ignore_patterns("*.distcp", ".metadata"))
    state = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    distributed_checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(out), no_dist=True)
    return out


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("changes", "message"), [
    ({"output_layer.weight": None}, r"missing output_layer\.weight\."),
    ({"decoder.layers.0.mixer.in_proj.weight.dt": None}, r"missing decoder\.layers\.0\.mixer\.in_proj\.weight\.d"),
    ({"decoder.layers.1.mlp.linear_fc1.bias": torch.zeros(80)}, r"unexpected .*\.layers\.1\.mlp\.linear_fc1\.bias"),
    ({"mtp.layers.0.eh_proj.weight": torch.zeros(2, 2)}, r"unexpected mtp\.layers\.0\.eh_proj\.weight"),
    ({"decoder.layers.3.pre_mlp_layernorm.weight": torch.zeros(48)},
     r"unexpected decoder\.layers\.3\.mlp\.linear_fc1\.layer_norm_weight"),
    ({"decoder.layers.0.norm.weight": torch.zeros(48)}, r"decoder\.layers\.0\..*norm_?\.?weight is there twice"),
    ({"decoder.layers.3.mlp.linear_fc1.weight": torch.zeros(80, 48)}, "layer 3 is of more than one kind"),
    ({"decoder.layers.0.mixer.D": torch.full((6,), float("nan"))}, r"mixer\.D holds values that are not finite"),
])
def test_missing_and_additional_tensors_are_named(saved, changes, message, tmp_path):
    directory = rewritten(saved / "fused/iter_0000012", tmp_path / "iter_0000012", **changes)
    with pytest.raises(ModelError, match=message) as error:
        dict(open_megatron(directory).state)
    assert str(error.value).count("\n") == 1 and str(directory) in str(error.value)


def test_a_gpt_is_another_family(tmp_path):
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from model.megatron.distributed import process_groups

    with process_groups():
        config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True)
        model = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16)
        dist_checkpointing.save({"args": Namespace(**ARGS), "model": model.sharded_state_dict()}, str(tmp_path))
    with pytest.raises(ModelError, match=r"\.metadata: has no Mamba-2 layer .* a GPT, or another family\.\nGive"):
        open_megatron(tmp_path)


def test_what_is_no_checkpoint_is_named(saved, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message) as error:
            open_megatron(tmp_path)
        assert str(error.value).count("\n") == 1

    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    refused(r"metadata\.json: not what Megatron's distributed checkpoints begin with")
    for name in ("13", "", "../../etc", "release"):
        tracker.write_text(name)
        refused(r"latest_checkpointed_iteration\.txt: names '")
    tracker.unlink()
    (tmp_path / "mp_rank_00").mkdir()
    refused("`torch` format, one a process")
    (tmp_path / "mp_rank_00").rmdir()
    shutil.copytree(saved / "fused/iter_0000012", tmp_path, dirs_exist_ok=True)
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    refused("sharded_backend is 'zarr'")
    shutil.copy(saved / "fused/iter_0000012/metadata.json", tmp_path)
    for content in (b"", b"\x80", (saved / "fused/iter_0000012/common.pt").read_bytes()[:-100]):
        (tmp_path / "common.pt").write_bytes(content)
        refused(r"common\.pt: no args of Megatron-LM can be read")
    torch.save({"iteration": 3}, tmp_path / "common.pt")
    refused(r"common\.pt: no args of Megatron-LM can be read \(KeyError")
    torch.save({"args": 3}, tmp_path / "common.pt")
    refused("args is a int")
    (tmp_path / ".metadata").write_bytes(b"\x80")
    refused(r"\.metadata: not the index of a checkpoint")


class Setter:
    """An object whose state goes through `__setstate__` or its dictionary."""

    def __init__(self):
        self.value = Trap()


def test_nothing_in_common_pt_is_executed(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved / "fused/iter_0000012", tmp_path / "iter_0000012")
    poisoned = {"args": Namespace(**ARGS, hook=Trap(), other=Setter()), "rest": [Trap()]}
    torch.save(poisoned, tmp_path / "iter_0000012/common.pt")
    imported = open_megatron(tmp_path / "iter_0000012")
    assert imported.config.pattern == "M-M*-" and not Path("sprung").exists()
    torch.load(tmp_path / "iter_0000012/common.pt", weights_only=False)
    assert Path("sprung").exists(), "the pickle would have run code"


def test_damage_of_ours_is_found_by_megatrons_reader_too(saved, tmp_path):
    imported = open_megatron(saved / "fused")
    save_megatron(tmp_path, imported.config, imported.state, {})
    file = tmp_path / "release/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:5000])
    write_sums(tmp_path / "release")
    with pytest.raises(ModelError, match=r"cannot be read from __0_0\.distcp"):
        dict(open_megatron(tmp_path).state)
