"""Float32 logits of both models against transformers' NemotronH and a float64 reference that goes token by token."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from model import checkpoint
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.engine_checkpoint import load_model
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from tests.closeness import relative_error

BOUND = 1e-5                    # of the relative error of all logits together


def random_geometry(seed: int) -> tuple[ModelConfig, int]:
    """A hybrid with every kind of layer in any order, and a sequence length that is no multiple of its chunk."""
    draw = random.Random(seed)
    symbols = list("M*-") + draw.choices("MM*--", k=draw.randint(3, 6))
    draw.shuffle(symbols)
    query_groups, mamba_groups, chunk = draw.choice([1, 2]), draw.choice([1, 2, 4]), draw.choice([8, 16, 32])
    config = ModelConfig(
        pattern="".join(symbols), hidden_size=8 * draw.randint(4, 10), ffn_hidden_size=8 * draw.randint(5, 16),
        num_attention_heads=query_groups * draw.randint(1, 3), num_query_groups=query_groups,
        head_dim=draw.choice([8, 16]), mamba_num_heads=mamba_groups * draw.randint(1, 3),
        mamba_head_dim=draw.choice([4, 8, 16]), mamba_state_dim=draw.choice([8, 16, 32]),
        mamba_num_groups=mamba_groups, chunk_size=chunk, sequence_length=128, vocab_size=draw.randint(60, 120),
    )
    return config, chunk * draw.randint(1, 3) + draw.randint(1, chunk - 1)


def perturbed_state(config: ModelConfig) -> dict[str, Tensor]:
    """Weights moved away from their start by as much as makes every part of the model matter to the logits."""
    state = {name: tensor.clone() for name, tensor in HybridLM(config).state_dict().items()}
    for tensor in state.values():
        tensor += torch.randn_like(tensor) * (0.1 if tensor.dim() == 1 else tensor[0].numel() ** -0.5)
    return state


def sequential_logits(config: ModelConfig, state: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The model from its definition in float64: ids (sequence,) -> logits (sequence, vocab), a loop over tokens in
    every mixer."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    mixers = {"M": mamba, "*": attention, "-": feed_forward}
    x = weights["backbone.embeddings.weight"][ids]
    for layer, symbol in enumerate(config.pattern):
        prefix = f"backbone.layers.{layer}."
        own = {name.removeprefix(f"{prefix}mixer."): w for name, w in weights.items() if name.startswith(prefix)}
        x = x + mixers[symbol](config, own, rms_norm(x, weights[f"{prefix}norm.weight"], config.norm_epsilon))
    return rms_norm(x, weights["backbone.norm_f.weight"], config.norm_epsilon) @ weights["lm_head.weight"].T


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def feed_forward(config: ModelConfig, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return (x @ w["up_proj.weight"].T).clamp(min=0) ** 2 @ w["down_proj.weight"].T


def attention(config: ModelConfig, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    q, k, v = ((x @ w[f"{name}_proj.weight"].T).unflatten(-1, (-1, config.head_dim)) for name in "qkv")
    rows = []
    for t in range(len(x)):
        heads = []
        for head in range(config.num_attention_heads):
            group = head * config.num_query_groups // config.num_attention_heads
            share = (k[: t + 1, group] @ q[t, head] / config.head_dim**0.5).softmax(0)
            heads.append(share @ v[: t + 1, group])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["o_proj.weight"].T


def mamba(config: ModelConfig, w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """arXiv 2405.21060, equations 1 and 2 with a scalar decay a head, and the blocks around them."""
    heads, groups, states = config.mamba_num_heads, config.mamba_num_groups, config.mamba_state_dim
    inner = heads * config.mamba_head_dim
    state = torch.zeros(heads, config.mamba_head_dim, states, dtype=torch.float64)
    window = torch.zeros(config.conv_kernel, inner + 2 * groups * states, dtype=torch.float64)
    rows = []
    for projected in x @ w["in_proj.weight"].T:
        gate, convolved, dt = projected.split([inner, window.shape[1], heads])
        window = torch.cat([window[1:], convolved[None]])
        xBC = F.silu((window.T * w["conv1d.weight"][:, 0]).sum(1) + w["conv1d.bias"])
        values, B, C = xBC.split([inner, groups * states, groups * states])
        values = values.view(heads, -1)
        B, C = (m.view(groups, states).repeat_interleave(heads // groups, 0) for m in (B, C))
        step = torch.log1p((dt + w["dt_bias"]).exp())
        decay = (-step * w["A_log"].exp()).exp()
        state = state * decay[:, None, None] + (step[:, None] * values)[..., None] * B[:, None]
        y = ((state * C[:, None]).sum(-1) + w["D"][:, None] * values).flatten() * F.silu(gate)
        rows.append(rms_norm(y.view(groups, -1), torch.ones((), dtype=y.dtype), config.norm_epsilon).flatten())
    return (torch.stack(rows) * w["norm.weight"]) @ w["out_proj.weight"].T


def transformers_logits(config: ModelConfig, state: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    model = NemotronHForCausalLM(NemotronHConfig(
        hybrid_override_pattern=config.pattern, vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups, head_dim=config.head_dim, mamba_num_heads=config.mamba_num_heads,
        mamba_head_dim=config.mamba_head_dim, ssm_state_size=config.mamba_state_dim, n_groups=config.mamba_num_groups,
        chunk_size=config.chunk_size, layer_norm_epsilon=config.norm_epsilon,
        time_step_min=1e-9,                                             # Nemotron-H does not clamp the step
    )).eval()
    model.load_state_dict({name.replace("backbone.", "model."): tensor for name, tensor in state.items()})
    return model(ids).logits


def engine_logits(config: ModelConfig, state: dict[str, Tensor], ids: Tensor, directory: Path) -> Tensor:
    checkpoint.save_weights(directory, config, state, {})
    with process_groups():
        model = build_model(config, Precision("float32"), ONE_COPY, seed=1)
        load_model(directory, model)
        return model(ids, None, None)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_logits_of_random_geometries(seed, tmp_path):
    config, length = random_geometry(seed)
    assert length % config.chunk_size
    torch.manual_seed(seed)
    state = perturbed_state(config)
    ids = torch.randint(0, config.vocab_size, (2, length))
    with torch.no_grad():
        exact = torch.stack([sequential_logits(config, state, row) for row in ids])
        plain = HybridLM.from_state(config, state)(ids)
        engine = engine_logits(config, state, ids, tmp_path)
        theirs = transformers_logits(config, state, ids)
    assert relative_error(plain, exact) < BOUND
    assert relative_error(engine, exact) < BOUND
    assert relative_error(plain, theirs.double()) < BOUND
    assert relative_error(engine, theirs.double()) < BOUND
