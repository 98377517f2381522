"""Referee: transformers' own NemotronH and Arcee, loading what we write and writing what we load."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_pipeline import tokenizer
from model import hub
from model.config import ModelConfig, ModelError
from model.hybrid_lm import HybridLM

HYBRID = ModelConfig(
    pattern="M-M*-M-", hidden_size=48, ffn_hidden_size=112, num_attention_heads=4, num_query_groups=2, head_dim=24,
    mamba_num_heads=6, mamba_head_dim=16, mamba_state_dim=24, mamba_num_groups=2, chunk_size=16, conv_kernel=3,
    norm_epsilon=2e-5, sequence_length=96, vocab_size=320)
TRANSFORMER = ModelConfig(
    pattern="*-*-*-", hidden_size=48, ffn_hidden_size=112, num_attention_heads=4, num_query_groups=2, head_dim=24,
    position_embedding="rope", rope_theta=777.0, norm_epsilon=2e-5, sequence_length=96, vocab_size=320)
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


def test_save_and_load_return_the_same(config, exported):
    loaded, state = hub.load(exported)
    expected = random_state(config)
    assert loaded == config
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_what_transformers_saves_again_keeps_the_weights(config, exported, tmp_path):
    transformers_model(exported).save_pretrained(tmp_path / "again")
    loaded, state = hub.load(tmp_path / "again")
    expected = random_state(config)
    assert loaded == config
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_bfloat16_keeps_the_decays_precise(tmp_path):
    expected = random_state(HYBRID)
    hub.save(tmp_path, HYBRID, expected, {}, "bfloat16")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = hub._read_tensors(tmp_path)
    for name, tensor in stored.items():
        precise = name.endswith(("A_log", ".D", "dt_bias"))
        assert tensor.dtype == (torch.float32 if precise else torch.bfloat16), name
        assert torch.equal(tensor, expected[name] if precise else expected[name].bfloat16()), name
    assert transformers_model(tmp_path).dtype == torch.float32


def test_same_input_same_bytes(tmp_path):
    for name in ("a", "b"):
        hub.save(tmp_path / name, HYBRID, random_state(HYBRID), TRAINING, "float32")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_config_suits_the_other_loaders(tmp_path):
    hub.save(tmp_path, HYBRID, random_state(HYBRID), {}, "float32")
    values = json.loads((tmp_path / "config.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["hybrid_override_pattern"] == "M-M*-M-" and values["num_hidden_layers"] == 7
    assert "layers_block_type" not in values and not [key for key in values if "expert" in key or "moe" in key]
    assert values["n_groups"] == values["mamba_n_groups"] == 2
    assert values["head_dim"] == values["attention_head_dim"] == 24
    assert values["layer_norm_epsilon"] == values["rms_norm_eps"] == 2e-5
    assert "time_step_limit" not in values and 0 < values["time_step_min"] <= 1e-8


def test_token_ids_are_the_tokenizers():
    assert (hub.EOD_ID, hub.PAD_ID) == (tokenizer.EOD_ID, tokenizer.PAD_ID)


def test_model_card_has_front_matter_and_the_facts(tmp_path):
    import yaml

    hub.save(tmp_path, HYBRID, random_state(HYBRID), TRAINING, "float32")
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    parameters = sum(tensor.numel() for tensor in random_state(HYBRID).values())
    for fact in (f"{parameters:,}", "`M-M*-M-`", "fp8", "800,000", "2.346", "AutoModelForCausalLM"):
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


@pytest.mark.parametrize("change", [{"pattern": "*--*"}, {"pattern": "M-*-"}])
def test_geometries_without_a_hub_form_are_refused(change, tmp_path):
    config = HYBRID.model_copy(update={"position_embedding": "rope", **change})
    with pytest.raises(ModelError, match="no Hub architecture"):
        hub.save(tmp_path, config, random_state(config), {}, "float32")


def damage_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_unusable_directories_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        hub.load(tmp_path)
    save = lambda: hub.save(tmp_path, HYBRID, random_state(HYBRID), {}, "float32")      # noqa: E731
    for changes, message in (
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"ssm_state_size": None}, "'ssm_state_size' is missing"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"intermediate_size": 113}, r"up_proj\.weight is \(112, 48\), expected \(113, 48\)"),
        ({"hybrid_override_pattern": "M-M*-M"}, r"unexpected backbone\.layers\.6"),
    ):
        save()
        damage_config(tmp_path, **changes)
        with pytest.raises(ModelError, match=message):
            hub.load(tmp_path)
    save()
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        hub.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        hub.load(tmp_path)
