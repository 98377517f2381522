"""Referee: transformers' own NemotronH and Arcee, loading what we write and writing what we load."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data_pipeline.tokenize import tokenizer
from model import hub, lazy_state
from model.checkpoint import open_weights, save_weights
from model.config import PADDING, ModelConfig, ModelError
from model.hybrid_lm import HybridLM
from model.integrity import write_sums

HYBRID = ModelConfig(
    pattern="M-M*-M-", hidden_size=48, ffn_hidden_size=112, num_attention_heads=4, num_query_groups=2, head_dim=24,
    mamba_num_heads=6, mamba_head_dim=16, mamba_state_dim=24, mamba_num_groups=2, chunk_size=16, conv_kernel=3,
    norm_epsilon=2e-5, init_method_std=0.03, sequence_length=96, vocab_size=320)
TRANSFORMER = ModelConfig(
    pattern="*-*-*-", hidden_size=48, ffn_hidden_size=112, num_attention_heads=4, num_query_groups=2, head_dim=24,
    position_embedding="rope", rope_theta=777.0, norm_epsilon=2e-5, sequence_length=80, vocab_size=320)
ATTENTION_ONLY = HYBRID.model_copy(update={"pattern": "*-*-"})
CONFIGS = {"hybrid": HYBRID, "transformer": TRANSFORMER, "attention-only": ATTENTION_ONLY}
TRAINING = {"architecture": "hybrid", "precision": "fp8", "tokens": 800_000, "validation_bits_per_byte": 2.345678}


def random_state(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights at which every term counts: dt from 1e-4 to 1, norms away from one, logits of order one."""
    generator = torch.Generator().manual_seed(5)
    state = HybridLM(config).state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("dt_bias"):
            state[name] = torch.linspace(-9, 0.5, len(tensor))
        elif name.endswith("A_log"):
            state[name] = noise.abs()
        elif name.endswith(("norm.weight", "norm_f.weight", ".D", "conv1d.bias")):
            state[name] = 1 + 0.3 * noise
        else:
            state[name] = noise / tensor.shape[-1] ** 0.5
    return state


@pytest.fixture(params=CONFIGS)
def config(request) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture
def exported(config, tmp_path) -> Path:
    hub.save(tmp_path / "hub", config, random_state(config), TRAINING, "float32")
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def hybrid_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("hub") / "hybrid"
    hub.save(directory, HYBRID, random_state(HYBRID), TRAINING, "float32")
    return directory


@pytest.fixture
def saved(hybrid_directory, tmp_path) -> Path:
    """A hybrid's directory, to be changed."""
    return Path(shutil.copytree(hybrid_directory, tmp_path / "hybrid"))


def transformers_model(directory: Path):
    model, found = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def test_transformers_computes_our_logits(config, exported):
    ids = torch.randint(0, config.vocab_size, (2, 53), generator=torch.Generator().manual_seed(1))
    ours = HybridLM.from_state(*hub.load(exported)).double().eval()(ids)
    theirs = transformers_model(exported)(ids, use_cache=False).logits
    assert ((ours - theirs).abs().max() / ours.abs().max()).item() < 1e-5
    assert ours.std() > 0.1


def test_transformers_decodes_with_its_cache_as_it_reads(config, exported):
    """The dt floor that transformers puts on prompts alone is out of the way."""
    model = transformers_model(exported)
    ids = torch.randint(0, config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(2))
    whole = model(ids, use_cache=False).logits[:, -1]
    cache = model(ids[:, :-4], use_cache=True).past_key_values
    for position in range(20, 24):
        step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(step.logits[:, -1], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_save_and_load_return_the_same(config, exported, tmp_path, again):
    """Also what transformers saves again."""
    if again:
        transformers_model(exported).save_pretrained(tmp_path / "again")
    loaded, state = hub.load(tmp_path / "again" if again else exported)
    expected = random_state(config)
    assert loaded == config
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(exported, value):
    file = exported / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite") as caught:
        hub.load(exported)
    assert name in str(caught.value)


def test_bfloat16_keeps_the_decays_precise(tmp_path):
    expected = random_state(HYBRID)
    hub.save(tmp_path, HYBRID, expected, {}, "bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _, stored = hub.load(tmp_path, dtype=None)
    for name, tensor in stored.items():
        precise = name.endswith(("A_log", ".D", "dt_bias"))
        assert tensor.dtype == (torch.float32 if precise else torch.bfloat16), name
        assert torch.equal(tensor, expected[name] if precise else expected[name].bfloat16()), name
    assert {tensor.dtype for tensor in hub.load(tmp_path)[1].values()} == {torch.float32}
    assert "| stored as | bfloat16 (Mamba-2's A_log, D and dt_bias float32) |" in (tmp_path / "README.md").read_text()
    assert transformers_model(tmp_path).dtype == torch.float32


# Keys of config.json that a loader reads and that must stand there, and what it must find; from their sources:
# vLLM 0.33 (transformers' class): github.com/vllm-project/vllm/blob/main/vllm/model_executor/models/nemotron_h.py
# SGLang 0.5.23 (its own): github.com/sgl-project/sglang/blob/main/python/sglang/srt/configs/nemotron_h.py
# mlx-lm 0.32: github.com/ml-explore/mlx-lm/blob/main/mlx_lm/models/nemotron_h.py
READ_BY = {
    "vllm": ("hybrid_override_pattern", "layer_norm_epsilon", "head_dim", "n_groups", "mamba_num_heads",
             "mamba_head_dim", "ssm_state_size", "conv_kernel", "use_conv_bias", "use_bias", "attention_bias",
             "mlp_bias", "chunk_size", "num_key_value_heads", "tie_word_embeddings"),
    "sglang": ("hybrid_override_pattern", "num_hidden_layers", "layer_norm_epsilon", "head_dim", "mamba_n_groups",
               "n_groups", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "chunk_size", "conv_kernel",
               "mlp_hidden_act", "mamba_hidden_act", "sliding_window", "mlp_bias", "use_bias", "attention_bias"),
    "mlx": ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "max_position_embeddings", "num_attention_heads", "num_key_value_heads", "attention_bias",
            "mamba_num_heads", "mamba_head_dim", "mamba_proj_bias", "ssm_state_size", "conv_kernel", "n_groups",
            "mlp_bias", "layer_norm_epsilon", "use_bias", "use_conv_bias", "hybrid_override_pattern", "head_dim"),
}


@pytest.mark.parametrize("loader", READ_BY)
def test_config_has_what_a_loader_reads(loader, saved):
    values = json.loads((saved / "config.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert not [key for key in READ_BY[loader] if key not in values]
    assert values["hybrid_override_pattern"] == "M-M*-M-" and values["num_hidden_layers"] == 7
    assert "layers_block_type" not in values and not [key for key in values if "expert" in key or "moe" in key]
    assert values["n_groups"] == values["mamba_n_groups"] == 2
    assert values["head_dim"] == values["attention_head_dim"] == 24
    assert values["layer_norm_epsilon"] == values["rms_norm_eps"] == 2e-5
    assert "time_step_limit" not in values and 0 < values["time_step_min"] <= 1e-8
    assert values["use_cache"] is True and values["mamba_ssm_cache_dtype"] == "float32"


def test_token_ids_are_the_tokenizers():
    assert (hub.EOD_ID, hub.PAD_ID) == (tokenizer.EOD_ID, tokenizer.PAD_ID)


def test_model_card_has_front_matter_and_the_facts(tmp_path):
    import yaml

    hub.save(tmp_path, HYBRID, random_state(HYBRID), TRAINING, "float32")
    assert json.loads((tmp_path / "training.json").read_text()) == TRAINING
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    parameters = sum(tensor.numel() for tensor in random_state(HYBRID).values())
    for fact in (f"| parameters | {parameters:,} |", "`M-M*-M-`", "fp8", "800,000", "2.346", "AutoModelForCausalLM",
                 "| stored as | float32 |"):
        assert fact in text, fact


def test_wrong_states_are_named(tmp_path):
    state = random_state(HYBRID)
    state["lm_head.bias"] = state.pop("lm_head.weight")
    state["backbone.layers.0.mixer.D"] = torch.zeros(7)
    with pytest.raises(ModelError) as error:
        hub.save(tmp_path, HYBRID, state, {}, "float32")
    for part in ("missing lm_head.weight", "unexpected lm_head.bias", r"mixer.D is (7,), expected (6,)", "\n"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("change", "message"), [
    ({"pattern": "*--*"}, "no Hub architecture"), ({"pattern": "M-*-"}, "no Hub architecture"),
    ({"pattern": "*-*-", "num_attention_heads": 10}, "48 is not a multiple of num_attention_heads 10"),
])
def test_geometries_without_a_hub_form_are_refused(change, message, tmp_path):
    config = HYBRID.model_copy(update={"position_embedding": "rope", **change})
    with pytest.raises(ModelError, match=message):
        hub.save(tmp_path, config, random_state(config), {}, "float32")


def damage_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_layers_of_different_widths_are_refused(tmp_path):
    """What a per-layer search makes: no config.json can say it."""
    state = random_state(HYBRID)
    state["backbone.layers.6.mixer.up_proj.weight"] = torch.zeros(80, 48)
    state["backbone.layers.6.mixer.down_proj.weight"] = torch.zeros(48, 80)
    with pytest.raises(ModelError, match=r"feed-forward layers of this model have 2 widths \(80, 112\)"):
        hub.save(tmp_path, HYBRID, state, {}, "float32")
    assert list(tmp_path.iterdir()) == []


def test_large_weights_are_several_files(tmp_path):
    """Also of tensors that share memory, or lie in it otherwise than in the file."""
    expected = random_state(HYBRID)
    expected["backbone.layers.0.mixer.D"] = expected["backbone.layers.0.mixer.dt_bias"]
    expected["lm_head.weight"] = expected["lm_head.weight"].t().contiguous().t()
    hub.save(tmp_path, HYBRID, expected, {}, "float32", shard_gigabytes=1e-4)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in expected.values())
    _, state = hub.load(tmp_path)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    transformers_model(tmp_path)
    (tmp_path / shards[0]).rename(tmp_path / shards[1])
    with pytest.raises(ModelError, match=rf"{shards[0]}: cannot be read"):
        hub.load(tmp_path)
    (tmp_path / shards[0]).write_bytes((tmp_path / shards[1]).read_bytes())
    with pytest.raises(ModelError, match=rf"{shards[1]}: holds .*, which .*index\.json places elsewhere"):
        hub.load(tmp_path)


def test_weights_in_one_file_and_in_several_are_refused(tmp_path):
    hub.save(tmp_path / "one", HYBRID, random_state(HYBRID), {}, "float32")
    hub.save(tmp_path / "several", HYBRID, random_state(HYBRID), {}, "float32", shard_gigabytes=1e-4)
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "several")
    with pytest.raises(ModelError, match=r"model\.safetensors: stands beside model\.safetensors\.index\.json"):
        hub.load(tmp_path / "several")


@pytest.mark.parametrize("gigabytes", [5.0, 1e-4, 3e-5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_are_those_of_huggingfaces_writer(config, tmp_path, dtype, gigabytes):
    """Which wants all tensors in memory; from a checkpoint the same come one file's at a time."""
    state = random_state(config)
    (tmp_path / "checkpoint").mkdir()
    save_weights(tmp_path / "checkpoint", config, state, {})
    lazy = open_weights(tmp_path / "checkpoint")[1]
    hub.save(tmp_path / "hub", config, lazy, {}, dtype, shard_gigabytes=gigabytes)
    names = hub._arcee_names(config) if config is TRANSFORMER else {name: name for name in state}
    stored = {names[name]: tensor if name.endswith(("A_log", ".D", "dt_bias")) else tensor.to(getattr(torch, dtype))
              for name, tensor in lazy.items()}
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict(
        stored, tmp_path / "theirs", metadata={"format": "pt"}, max_shard_size=int(gigabytes * 1e9))
    ours = {path.name: path.read_bytes() for path in (tmp_path / "hub").glob("model*")}
    assert ours == {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    assert (len(ours) > 1) == (gigabytes < 1)
    again = shutil.copytree(tmp_path / "hub", tmp_path / "again")
    others = {"adapter_model.safetensors", "model-extra.safetensors", "model.safetensors.bak"}
    for name in others:
        (tmp_path / "hub" / name).touch()
    hub.save(tmp_path / "hub", config, hub.open_weights(again)[1], {}, dtype)
    assert {path.name for path in (tmp_path / "hub").glob("*model*")} == others | {"model.safetensors"}, "old ones go"


def test_a_file_that_goes_after_opening_is_named(tmp_path):
    hub.save(tmp_path, HYBRID, random_state(HYBRID), {}, "float32", shard_gigabytes=1e-4)
    _, state = hub.open_weights(tmp_path)
    assert state["lm_head.weight"].shape == (320, 48)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model-.*\.safetensors: lm_head\.weight cannot be read") as error:
        state["lm_head.weight"]
    assert str(error.value).count("\n") == 1


def published(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    """A Nemotron-H as NVIDIA publishes one: its config.json keys, bfloat16 throughout, other special tokens."""
    expected = {name: tensor.bfloat16() for name, tensor in random_state(HYBRID).items()}
    directory.mkdir()
    save_file({name.replace("backbone.", prefix): tensor for name, tensor in expected.items()},
              directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({
        "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attention_head_dim": 24, "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
        "bos_token_id": 1, "chunk_size": 16, "conv_kernel": 3, "eos_token_id": 2, "expand": 2, "hidden_dropout": 0.0,
        "hidden_size": 48, "hybrid_override_pattern": "M-M*-M-", "initializer_range": 0.03, "intermediate_size": 112,
        "layer_norm_epsilon": 2e-5, "mamba_head_dim": 16, "mamba_hidden_act": "silu", "mamba_num_heads": 6,
        "mamba_proj_bias": False, "max_position_embeddings": 96, "mlp_bias": False, "mlp_hidden_act": "relu2",
        "model_type": "nemotron_h", "n_groups": 2, "num_attention_heads": 4, "num_hidden_layers": 7,
        "num_key_value_heads": 2, "num_logits_to_keep": 1, "pad_token_id": 0, "rescale_prenorm_residual": True,
        "residual_in_fp32": False, "rms_norm_eps": 2e-5, "sliding_window": None, "ssm_state_size": 24,
        "tie_word_embeddings": False, "time_step_floor": 1e-4, "time_step_limit": [0.0, float("inf")],
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "torch_dtype": "bfloat16",
        "use_bias": False, "use_cache": True, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 320}))
    return expected


@pytest.mark.parametrize("prefix", ["backbone.", "model."])
def test_published_models_are_read(tmp_path, prefix):
    expected = published(tmp_path / "there", prefix)
    config, state = hub.load(tmp_path / "there", dtype=None)
    assert config == HYBRID
    assert state.keys() == expected.keys()
    assert all(state[name].dtype == torch.bfloat16 and torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("names", [("mamba", "attention"), ("linear_attention", "full_attention")])
def test_layers_have_the_names_of_any_transformers(saved, names):
    kinds = dict(zip("M*-", (*names, "mlp"), strict=True))
    damage_config(saved, hybrid_override_pattern=None, layers_block_type=[kinds[symbol] for symbol in HYBRID.pattern],
                  n_groups=None, rms_norm_eps=0.5)      # the second is not read
    assert hub.read_config(saved) == HYBRID


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(saved, dtype):
    """Their scales may stand elsewhere: as numbers they are another model."""
    state = load_file(saved / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"].mul(100).to(dtype)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ModelError, match=rf"lm_head\.weight is {dtype}, a quantized weight.*\n"):
        hub.load(saved)


@pytest.mark.parametrize(("scale", "message"), [
    (torch.tensor(0.01), r"unexpected lm_head\.scale"),
    (torch.zeros(8, 8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), r"model\.safetensors: cannot be read: "),
], ids=["scalar", "FP4"])
def test_what_stands_beside_quantized_weights_is_named(saved, scale, message):
    save_file(load_file(saved / "model.safetensors") | {"lm_head.scale": scale}, saved / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        hub.load(saved)


def test_no_type_is_chosen_that_rounds(saved):
    weights = lazy_state.skeleton(hub.load(saved, dtype=None)[1])

    def chosen(dtypes):
        cast = {name: tensor.to(dtypes.get(name, dtypes[""])) for name, tensor in weights.items()}
        return hub.dtype_of(lazy_state.LazyState(cast, cast.__getitem__))

    assert [chosen({"": dtype}) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [
        "bfloat16", "float32", "float32"]
    for wide, dtype in {"lm_head.weight": "float32", "backbone.layers.0.mixer.A_log": "bfloat16"}.items():
        assert chosen({"": torch.bfloat16, wide: torch.float32}) == dtype
    with pytest.raises(ModelError, match=r"A_log is float64, which an export rounds\.\nSay to what: --dtype"):
        chosen({"": torch.bfloat16, "backbone.layers.0.mixer.A_log": torch.float64})


def test_a_tensor_under_two_names_is_refused(tmp_path):
    published(tmp_path / "there", "backbone.")
    file = tmp_path / "there" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"model.norm_f.weight": state["backbone.norm_f.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"safetensors: \w+\.norm_f\.weight is there twice"):
        hub.load(tmp_path / "there")


def test_a_sealed_directory_is_as_it_was_written(saved):
    write_sums(saved, files="*.safetensors")
    (saved / "README.md").write_text("A better card.")
    (saved / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    hub.load(saved)
    for name in ("model.safetensors", "SHA256SUMS"):
        whole = (saved / name).read_bytes()
        for content in (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], b"" if name == "SHA256SUMS" else whole):
            (saved / name).write_bytes(content)
            if content != whole:
                with pytest.raises(ModelError) as error:
                    hub.load(saved)
                assert str(error.value).count("\n") == 1
        (saved / name).write_bytes(whole)
    hub.load(saved)


def test_card_of_imported_weights_names_their_origin(tmp_path):
    hub.save(tmp_path, HYBRID, random_state(HYBRID), {"parent_training": {"imported_from": "nvidia/X"}}, "bfloat16")
    card = (tmp_path / "README.md").read_text()
    assert "license: other" in card and "The weights of `nvidia/X`, compressed" in card
    assert "It is no NVIDIA model" not in card


@pytest.mark.parametrize(("name", "content"), [
    ("config.json", "[]"), ("config.json", '"x"'), ("config.json", '{"a'), ("config.json", b"\xff\xfe"),
    ("model.safetensors.index.json", "{}"), ("model.safetensors.index.json", "[]"),
    ("model.safetensors.index.json", '{"weight_map": ["a"]}'), ("model.safetensors.index.json", '{"weight_map": {}}'),
    ("model.safetensors.index.json", "[" * 100_000),
    ("config.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
])
def test_json_of_another_form_is_two_lines(saved, name, content):
    (saved / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=re.escape(str(saved / name))) as error:
        hub.load(saved)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize("place", [3, None, ["a"], "../other.safetensors", "/etc/passwd", ".", "model.bin"])
def test_an_index_names_files_beside_it(tmp_path, place):
    hub.save(tmp_path, HYBRID, random_state(HYBRID), {}, "float32", shard_gigabytes=1e-4)
    index = json.loads((tmp_path / hub.INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = place
    (tmp_path / hub.INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json: weight_map places lm_head\.weight in .*beside it\.\n") as error:
        hub.load(tmp_path)
    assert repr(place) in str(error.value) and str(error.value).count("\n") == 1


def test_what_an_index_places_must_be_there(tmp_path):
    hub.save(tmp_path, HYBRID, random_state(HYBRID), {}, "float32", shard_gigabytes=1e-4)
    index = json.loads((tmp_path / hub.INDEX).read_text())
    file = index["weight_map"]["mtp.weight"] = index["weight_map"]["lm_head.weight"]
    (tmp_path / hub.INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"index\.json: places mtp\.weight in {file}, which does not hold it"):
        hub.load(tmp_path)
    file = index["weight_map"].pop("backbone.layers.0.mixer.D")         # transformers would draw it
    (tmp_path / hub.INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=rf"{file}: holds backbone\.layers\.0\.mixer\.D, which .*places elsewhere"):
        hub.load(tmp_path)


def test_a_pointer_of_git_lfs_is_called_one(saved):
    for name in ("model.safetensors", "tokenizer.json"):
        (saved / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read: it is a pointer of Git LFS"):
        hub.load(saved)
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer \(it is a pointer of Git LFS"):
        hub.read_tokenizer(saved)


@pytest.mark.parametrize(("ids", "ends"), [(2, [2]), ([2, 11], [2, 11]), (None, []), ([], [])])
def test_ends_of_text_are_one_id_or_several(saved, ids, ends):
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": ids, "temperature": 0.6}))
    assert hub.end_ids(saved, 320) == ends
    assert hub.special_tokens(saved, 320) == hub.SPECIAL_TOKENS | {"eos_token_id": ids, "temperature": 0.6}
    (saved / "generation_config.json").unlink()
    assert hub.end_ids(saved, 320) == [2] and hub.special_tokens(saved, 320) == hub.SPECIAL_TOKENS


def test_special_ids_that_generation_config_does_not_name_are_those_of_config(tmp_path):
    hub.save(tmp_path, HYBRID, random_state(HYBRID), {}, "float32",
             special_tokens={"bos_token_id": 1, "temperature": 0.9})
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "temperature": 0.9}
    assert "temperature" not in json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 11]}')
    assert hub.special_tokens(tmp_path, 320) == {
        "temperature": 0.6, "eos_token_id": [2, 11], "bos_token_id": 1, "pad_token_id": None}
    (tmp_path / "config.json").unlink()         # a tokenizer's own directory
    assert hub.special_tokens(tmp_path, 320)["bos_token_id"] is None
    (tmp_path / "generation_config.json").write_text('{"pad_token_id": -1}')
    assert hub.special_tokens(tmp_path, 320)["pad_token_id"] == -1
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        hub.special_tokens(tmp_path, 320)


@pytest.mark.parametrize("ids", ["</s>", [[2]], [2, None], 2.0, True, [2, "11"]])
def test_what_is_no_id_does_not_end_texts(saved, ids):
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    for read in (hub.end_ids, hub.special_tokens):
        with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id holds .* no id\.\nWrite"):
            read(saved, 320)
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 320]}))
    for read in (hub.end_ids, hub.special_tokens):
        with pytest.raises(ModelError, match=r"eos_token_id holds 320, and the model has ids below 320\.\n"):
            read(saved, 320)
    (saved / "generation_config.json").write_text("{}")
    for begin, message in (([1, 2], r"\[1, 2\], which is no id"), (320, "320, and the model has"), (-1, "-1, and the")):
        damage_config(saved, bos_token_id=begin)
        for read in (hub.begin_id, hub.special_tokens):
            with pytest.raises(ModelError, match=rf"config\.json: bos_token_id holds {message}"):
                read(saved, 320)


@pytest.mark.parametrize(("name", "content"), [
    ("tokenizer.json", '{"version":"1.0"'), ("tokenizer.json", "[]"), ("tokenizer.json", b"\xff\xfe{"),
    ("tokenizer_config.json", "[]"), ("tokenizer_config.json", '{"a'), ("special_tokens_map.json", b"\xff"),
    ("added_tokens.json", "3"), ("chat_template.jinja", b"\xff\xfe"),
    ("tokenizer.model", hub.POINTER),
])
def test_a_damaged_tokenizer_is_named(tmp_path, name, content):
    words = tokenizers.models.WordLevel({f"w{number}": number for number in range(300)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    assert hub.check_vocabulary(tmp_path, 320).get_vocab_size() == 300          # the others are padding
    for vocab_size in (299, 300 + PADDING):
        with pytest.raises(ModelError, match=rf"tokenizer\.json: a tokenizer of 300 ids, the model has {vocab_size:,}"):
            hub.check_vocabulary(tmp_path, vocab_size)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"w": 0, "far": 400}, unk_token="w")).save(
        str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"a tokenizer of 401 ids, the model has 320"):
        hub.check_vocabulary(tmp_path, 320)
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=re.escape(f"{tmp_path / name}: no")) as error:
        hub.check_vocabulary(tmp_path, 320)
    assert str(error.value).count("\n") == 1


def test_a_tokenizer_cuts_and_fills_no_text(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for words in (2, 5):
        assert hub.check_vocabulary(tmp_path, 2).encode("b " * words).ids == [1] * words


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"model_type": ["nemotron_h"]}, "holds a value of another kind"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
    ({"time_step_limit": [0.001, 0.1]}, "time_step_limit is"),
    ({"mamba_dt_limit": [0.001, 0.1]}, "mamba_dt_limit is"),
    *(({name: True}, f"{name} is True") for name in ("mlp_bias", "use_bias", "mamba_proj_bias")),
    *(({name: False}, f"{name} is False") for name in ("mamba_conv_bias", "use_conv_bias", "is_causal")),
    ({"mamba_hidden_act": "relu"}, "mamba_hidden_act is 'relu'"),
    ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ({"sliding_window": 4096}, "sliding_window is 4096"),
    ({"hybrid_override_pattern": "MEM*-M-"}, "layer 1 of the pattern is 'E'"),
    ({"hybrid_override_pattern": "M-M*|M-"}, r"pattern: layer 4 of the pattern is '\|', which is no kind of layer\.\n"),
    ({"hybrid_override_pattern": "M-M*-M"}, r"unexpected backbone\.layers\.6"),
    ({"layers_block_type": [1, None], "hybrid_override_pattern": None}, "holds a value of another kind"),
    ({"vocab_size": 10**30}, "vocab_size: Input should be less"),
    ({"hidden_size": 2**40}, "hidden_size: Input should be less"),
    ({"layer_norm_epsilon": float("inf")}, "norm_epsilon: Input should be a finite number"),
    ({"num_key_value_heads": 3}, "geometry: num_attention_heads .*must be a multiple"),
    ({"ssm_state_size": None}, "'ssm_state_size' is missing"),
    ({"intermediate_size": 113}, r"up_proj\.weight is \(112, 48\), expected \(113, 48\)"),
])
def test_configs_that_cannot_be_used_are_named(saved, changes, message):
    damage_config(saved, **changes)
    with pytest.raises(ModelError, match=message) as error:
        hub.load(saved)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 777.0, "factor": 20.0}}, "rope_type is 'yarn'"),
    ({"rope_parameters": {"type": "linear", "rope_theta": 777.0, "factor": 4.0}}, "rope_type is 'linear'"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling is {'type': 'linear'"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta: Input should be a finite number"),
])
def test_rotary_positions_of_another_kind_are_refused(tmp_path, changes, message):
    hub.save(tmp_path, TRANSFORMER, random_state(TRANSFORMER), {}, "float32")
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 777.0        # for older loaders
    damage_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        hub.load(tmp_path)


def test_files_that_are_missing_or_damaged_are_named(saved):
    (saved / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        hub.load(saved)
    for name, message in (("model.safetensors", "cannot be read"), ("config.json", "not found")):
        (saved / name).unlink()
        with pytest.raises(ModelError, match=rf"{name}: {message}"):
            hub.load(saved)
