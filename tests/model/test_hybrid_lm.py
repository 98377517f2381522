"""HybridLM against transformers' Arcee with the same weights; against NemotronH: test_exactness."""

import subprocess
import sys

import pytest
import torch
from transformers import ArceeConfig, ArceeForCausalLM

from model.config import ModelConfig, ModelError
from model.hybrid_lm import HybridLM
from tests.closeness import relative_error
from tests.tiny_engine import random_model

HYBRID = ModelConfig(
    pattern="M-M*-M-", hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, head_dim=16,
    mamba_num_heads=6, mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=2, chunk_size=16, sequence_length=64,
    vocab_size=97,
)
TRANSFORMER = ModelConfig(
    pattern="*-*-", hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, head_dim=16,
    position_embedding="rope", rope_theta=5000.0, sequence_length=64, vocab_size=97,
)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (2, 45), generator=torch.Generator().manual_seed(5))


def test_rotary_transformer_equals_arcee(ids):
    """Arcee is Llama with the ungated squared-ReLU feed-forward; one of its blocks is the pair `*-`."""
    config = TRANSFORMER
    ours = random_model(config)
    theirs = ArceeForCausalLM(ArceeConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=2, num_attention_heads=config.num_attention_heads, head_dim=config.head_dim,
        num_key_value_heads=config.num_query_groups, rms_norm_eps=config.norm_epsilon, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, hidden_act="relu2",
    )).eval()
    names = {"model.embed_tokens.weight": "backbone.embeddings.weight", "model.norm.weight": "backbone.norm_f.weight",
             "lm_head.weight": "lm_head.weight"}
    for block in range(2):
        attention, ffn = f"backbone.layers.{2 * block}", f"backbone.layers.{2 * block + 1}"
        theirs_block = f"model.layers.{block}"
        names |= {f"{theirs_block}.self_attn.{p}_proj.weight": f"{attention}.mixer.{p}_proj.weight" for p in "qkvo"}
        names |= {f"{theirs_block}.mlp.{p}_proj.weight": f"{ffn}.mixer.{p}_proj.weight" for p in ("up", "down")}
        names |= {f"{theirs_block}.input_layernorm.weight": f"{attention}.norm.weight",
                  f"{theirs_block}.post_attention_layernorm.weight": f"{ffn}.norm.weight"}
    state = ours.state_dict()
    theirs.load_state_dict({theirs_name: state[name] for theirs_name, name in names.items()})
    with torch.no_grad():
        assert relative_error(ours(ids), theirs(ids).logits) < 1e-5


@pytest.mark.parametrize("config", [HYBRID, TRANSFORMER])
def test_bfloat16_is_close_and_keeps_the_decay_precise(config, ids):
    model = random_model(config)
    small = HybridLM.from_state(config, model.state_dict(), torch.bfloat16)
    with torch.no_grad():
        logits = small(ids)
        assert logits.dtype == torch.bfloat16
        assert relative_error(logits.float(), model(ids)) < 3e-2
    precise = {name.rsplit(".", 1)[1] for name, p in small.named_parameters() if p.dtype == torch.float32}
    assert precise == ({"A_log", "D", "dt_bias"} if "M" in config.pattern else set())


def test_from_state_copies(ids):
    model = random_model(HYBRID)
    copy = HybridLM.from_state(HYBRID, model.state_dict())
    with torch.no_grad():
        before = model(ids)
        for parameter in copy.parameters():
            parameter.zero_()
        assert torch.equal(model(ids), before)
    assert all(parameter.requires_grad for parameter in copy.parameters())


def test_a_skeleton_has_the_model_s_shapes_and_needs_no_compiler():
    expected = {name: tensor.shape for name, tensor in HybridLM(HYBRID).state_dict().items()}
    found = HybridLM.skeleton(HYBRID).state_dict()
    assert {name: tensor.shape for name, tensor in found.items()} == expected
    assert all(tensor.is_meta for tensor in found.values())
    code = (
        "import sys; from model.config import ModelConfig; from model.hybrid_lm import HybridLM;"
        f"HybridLM.skeleton(ModelConfig(**{HYBRID.model_dump()!r})); print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_weights_of_another_shape_are_refused():
    state = HybridLM(HYBRID).state_dict()
    wider = HYBRID.model_copy(update={"ffn_hidden_size": 96})
    with pytest.raises(ModelError, match=r"layers\.1\.mixer\.down_proj\.weight is \(48, 80\).*\(48, 96\)"):
        HybridLM.from_state(wider, state)
    del state["lm_head.weight"]
    with pytest.raises(ModelError, match=r"missing lm_head\.weight"):
        HybridLM.from_state(HYBRID, state)
