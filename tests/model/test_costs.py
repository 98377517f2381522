"""The cost formulas against transformers' own models and the published sizes."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM, Qwen2Config
from transformers.models.qwen2 import Qwen2ForCausalLM

from model import costs
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder
from model.presets import PEERS, PRESETS

# A million tokens in the paper's unit, 4.5 bits a weight; keys and values of 4 bits and FP32 states are inferred.
FP4_MILLION = costs.Deployment(
    context=1_000_000, batch=1, weight_bits=4.5, kv_bits=4, ssm_bits=32, conv_bits=16
)
GIB = 2**30


BASE = ModelConfig(
    pattern="M-M*-M", hidden_size=24, ffn_hidden_size=40, num_attention_heads=4, num_query_groups=2, head_dim=8,
    mamba_num_heads=6, mamba_head_dim=4, mamba_state_dim=5, mamba_num_groups=3, conv_kernel=3, chunk_size=8,
    sequence_length=32, vocab_size=51,
)


def tiny(**changes) -> ModelConfig:
    return BASE.model_copy(update=changes)


def upstream(config: ModelConfig) -> NemotronHForCausalLM:
    """The same geometry in transformers, without storage."""
    symbols = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    with torch.device("meta"):
        return NemotronHForCausalLM(NemotronHConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
            layers_block_type=[symbols[symbol] for symbol in config.pattern],
            num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_query_groups,
            head_dim=config.head_dim, mamba_num_heads=config.mamba_num_heads, mamba_head_dim=config.mamba_head_dim,
            ssm_state_size=config.mamba_state_dim, n_groups=config.mamba_num_groups, conv_kernel=config.conv_kernel,
        ))


def elements(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("config", [
    BASE, tiny(pattern="-*M", mamba_num_groups=1, conv_kernel=4), tiny(pattern="MMM"), tiny(pattern="*-", head_dim=12),
    PRESETS["nemotron_h_8b"],
])
def test_parameters_equal_transformers_and_ours(config):
    with torch.device("meta"):
        ours = elements(HybridLM(config))
    assert costs.parameters(config) == ours == elements(upstream(config))


# Nemotron Nano 2 (arXiv 2508.14444), from the published configurations of the 12B model and what it was compressed to.
NANO_12B = PRESETS["nemotron_h_8b"].model_copy(update={
    "pattern": "M-M-M-M*-" + "M-M-M-M*-" * 5 + "M-M-M-M-", "hidden_size": 5120, "ffn_hidden_size": 20_480,
    "num_attention_heads": 40, "mamba_head_dim": 80,
})
NANO_9B = NANO_12B.model_copy(update={
    "pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", "hidden_size": 4480,
    "ffn_hidden_size": 15_680,
})


@pytest.mark.parametrize(("config", "parameters"), [(NANO_12B, 12_310_001_152), (NANO_9B, 8_888_227_328)])
def test_parameters_of_nano(config, parameters):
    assert costs.parameters(config) == parameters


@pytest.mark.parametrize("name", PEERS)
def test_peer_parameters_equal_transformers(name):
    peer = PEERS[name]
    family = (Qwen2Config, Qwen2ForCausalLM) if peer.qkv_bias else (LlamaConfig, LlamaForCausalLM)
    config = family[0](
        vocab_size=peer.vocab_size, hidden_size=peer.hidden_size, intermediate_size=peer.ffn_hidden_size,
        num_hidden_layers=peer.layers, num_attention_heads=peer.num_attention_heads,
        num_key_value_heads=peer.num_query_groups, head_dim=peer.head_dim, tie_word_embeddings=peer.tied_embeddings,
    )
    with torch.device("meta"):
        assert costs.parameters(peer) == elements(family[1](config))


def test_cache_bytes_equal_what_transformers_allocates():
    config = tiny(pattern="M-*M*")
    model = upstream(config).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        cache = model(torch.zeros(3, 17, dtype=torch.int64), use_cache=True).past_key_values
    ours = costs.memory(config, costs.Deployment.of(17, 3, bits=32))
    layers = dict(zip(range(5), config.pattern, strict=True))
    attention = [cache.layers[i] for i, symbol in layers.items() if symbol == "*"]
    mamba = [cache.layers[i] for i, symbol in layers.items() if symbol == "M"]
    assert ours.kv_cache == sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in attention)
    assert ours.ssm_state == sum(4 * layer.recurrent_states[0].numel() for layer in mamba)
    # transformers keeps conv_kernel slots, of which the oldest is never read again: one more than is needed.
    taps = config.conv_kernel
    assert ours.conv_state * taps == sum(4 * layer.conv_states[0].numel() for layer in mamba) * (taps - 1)
    assert ours.weights == 4 * elements(model)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_decoding_step_reads_weights_and_caches_and_writes_states(fp8):
    model = HybridLM.skeleton(BASE, torch.bfloat16)
    decoder = Decoder(model, 17, 3)
    states, growing = (3 * sum(cache.nbytes for cache in caches)
                       for caches in (decoder.states(0), decoder.keys_values(0, 0, 17)))
    layers, head = elements(model.backbone.layers), model.lm_head.weight.numel()
    moved = layers * (1 if fp8 else 2) + 2 * head + growing + 2 * states

    def floor(*ceilings: float) -> float:
        return costs.decode_floor(BASE, 3, 17, torch.bfloat16, torch.float32, fp8, costs.Ceilings(*ceilings))

    assert floor(1.0, math.inf, math.inf) == moved
    assert floor(math.inf, 1.0, 2.0) == 3 * costs.flops_per_token(BASE, 17) / 2
    assert 3 * costs.sequence_bytes(BASE, 17, torch.bfloat16, torch.float32) == states + growing == decoder.cache_bytes


def test_an_evaluation_that_does_not_fit_names_the_least_size_that_does():
    config = PRESETS["nemotron_h_8b"]
    needed = {size: costs.evaluation_bytes(config, 8192, size) for size in costs.TENSOR_SIZES}

    def refusal(memory: float, **changes) -> str | None:
        return costs.evaluation_refusal("8b", config.model_copy(update=changes), 8192, 1, memory, "GPU")

    assert refusal(needed[1]) is None
    assert str(refusal(needed[4])).endswith("\nNearest that fits: tensor 4 (runtime.parallel, with runtime.launcher).")
    assert "\nNo tensor-parallel size fits" in str(refusal(needed[4], num_query_groups=2))     # 4 does not divide them
    assert "\nNo tensor-parallel size fits" in str(refusal(needed[8] - 1))


def test_a_prompt_takes_its_layers_attention_and_one_tokens_head():
    config, tokens = tiny(pattern="*-*-", position_embedding="rope"), 16
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        HybridLM(config).backbone(torch.zeros(1, tokens, dtype=torch.int64))
    pairs = 2 * 2 * 2 * config.attention_size * tokens**2       # of two layers, scores and values, all of the square
    head = 2 * config.vocab_size * config.hidden_size
    layers, others = (costs.prefill_floor(config, tokens, costs.Ceilings(math.inf, *rates))
                      for rates in ((math.inf, 1.0), (1.0, math.inf)))
    assert layers == counter.get_total_flops() - pairs
    assert others == pairs / 2 + head                               # a token sees half of them


def test_56b_takes_the_papers_29_and_a_half_gib_and_47b_alone_fits_with_a_million_tokens():
    """Section 3: FP4 weights of 29.5 GiB; a budget of 31.7 GiB."""
    small, large = (costs.memory(PRESETS[f"nemotron_h_{size}"], FP4_MILLION) for size in ("47b", "56b"))
    assert large.weights == math.ceil(56_324_350_464 * 4.5 / 8)
    assert large.weights / GIB == pytest.approx(29.507, abs=5e-4)
    assert [part / GIB for part in (large.kv_cache, large.weights + large.kv_cache)] == pytest.approx([9.54, 39.04],
                                                                                                      abs=0.01)
    # 0.7 GiB of states: 46.79 billion parameters are the released model's
    assert [part / GIB for part in small] == pytest.approx([24.51, 4.77, 0.70, 0.005], abs=0.02)
    assert small.total / GIB == pytest.approx(30.0, abs=0.02)
    assert small.total / GIB < 31.7 < large.total / GIB


def test_bytes_are_exact_for_fractional_elements_and_round_up():
    config = tiny(vocab_size=50)
    count = costs.parameters(config)
    budget = FP4_MILLION
    assert costs.memory(config, budget).weights == math.ceil(count * 9 / 16)


def test_flops_equal_the_matrix_products_torch_counts():
    config = tiny(pattern="*-*-", position_embedding="rope")
    tokens = 16
    model = HybridLM(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, tokens, dtype=torch.int64))
    # Full attention is what a counter sees: each token against all `tokens` positions.
    assert counter.get_total_flops() == tokens * costs.flops_per_token(config, tokens)


@pytest.mark.parametrize(("slow", "fast", "ratio"), [
    ("nemotron_t_8b", "nemotron_h_8b", 1.85), ("qwen_2_5_7b", "nemotron_h_8b", 1.57),
    ("nemotron_h_56b", "nemotron_h_47b", 1.25),
])
def test_prefill_flops_explain_the_papers_throughput_ratios(slow, fast, ratio):
    models = {**PRESETS, **PEERS}
    per_token = [costs.flops_per_token(models[name], 65_536 // 2) for name in (slow, fast)]
    assert per_token[0] / per_token[1] == pytest.approx(ratio, abs=0.005)


def test_utilization_is_of_the_data_sheets_bf16_rate():
    speed = 4 * 989.4e12 / costs.training_flops_per_token(BASE)          # what four could do at most
    assert costs.flops_utilization(BASE, speed / 2, 4, "NVIDIA H200") == pytest.approx(0.5)
    assert costs.flops_utilization(BASE, speed, 4, "NVIDIA H100 PCIe") == pytest.approx(989.4 / 756)
    assert costs.flops_utilization(BASE, speed, 4, "NVIDIA H100 NVL") == pytest.approx(989.4 / 835)
    for other in ("Some GPU", "NVIDIA RTX A1000 Laptop GPU", "NVIDIA H20", "NVIDIA H200 NVL",
                  "NVIDIA H100 80GB HBM3 MIG 3g.40gb"):
        assert costs.flops_utilization(BASE, speed, 4, other) is None
    assert costs.flops_utilization(BASE, speed, 4, "CPU") is None


def test_training_takes_about_six_operations_a_weight_and_token():
    model = PRESETS["nemotron_h_8b"]
    weights = costs.parameters(model) - model.vocab_size * model.hidden_size     # looking an embedding up is no product
    assert 6 * weights < costs.training_flops_per_token(model) < 6.6 * weights
