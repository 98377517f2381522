"""What a model costs in parameters, bytes and floating-point operations, in closed form.

Only counts of channels, heads and tokens go in, so a 56B model costs no more to judge than a tiny one. MiniPuzzle's
search (paper section 3) rests on this: it asks for the cost of every combination of layer counts and FFN width.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple, Protocol

from model.config import ModelConfig


class CacheTypes(Protocol):
    """A deployment: context in tokens, sequences at once, bits an element; `MemoryBudget` is one."""

    @property
    def context(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def weight_bits(self) -> float: ...
    @property
    def kv_bits(self) -> float: ...
    @property
    def ssm_bits(self) -> float: ...
    @property
    def conv_bits(self) -> float: ...


class GatedTransformer(NamedTuple):
    """A Transformer of the Llama or Qwen 2.5 family: gated FFN (three matrices), RMSNorm, rotary positions."""

    layers: int                  # blocks of attention and FFN
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False

    @property
    def kv_size(self) -> int:
        return self.num_query_groups * self.head_dim


class Memory(NamedTuple):
    """Bytes a deployed model takes, without the engine's workspace."""

    weights: int
    kv_cache: int
    ssm_state: int
    conv_state: int

    @property
    def cache(self) -> int:
        return self.kv_cache + self.ssm_state + self.conv_state

    @property
    def total(self) -> int:
        return self.weights + self.cache


def layer_parameters(config: ModelConfig, symbol: str) -> int:
    """Parameters of one layer of the pattern, with its pre-norm."""
    hidden = config.hidden_size
    if symbol == "M":
        heads, inner, conv = config.mamba_num_heads, config.mamba_inner_size, config.conv_channels
        projections = hidden * config.in_proj_size + inner * hidden
        convolution = conv * config.conv_kernel + conv                 # weight and bias
        return projections + convolution + 3 * heads + inner + hidden  # A_log, D, dt_bias; gated norm; pre-norm
    if symbol == "*":
        return hidden * (config.attention_size + 2 * config.kv_size) + config.attention_size * hidden + hidden
    return 2 * hidden * config.ffn_hidden_size + hidden                # squared ReLU: no gate


def parameters(model: ModelConfig | GatedTransformer) -> int:
    """All parameters, input and output embedding counted apart unless tied."""
    if isinstance(model, GatedTransformer):
        hidden, attention = model.hidden_size, model.num_attention_heads * model.head_dim
        qkv = attention + 2 * model.kv_size
        block = hidden * qkv + attention * hidden + 3 * hidden * model.ffn_hidden_size + 2 * hidden
        block += qkv if model.qkv_bias else 0
        embeddings = model.vocab_size * hidden * (1 if model.tied_embeddings else 2)
        return model.layers * block + embeddings + hidden
    layers = sum(model.pattern.count(symbol) * layer_parameters(model, symbol) for symbol in "M*-")
    return layers + 2 * model.vocab_size * model.hidden_size + model.hidden_size


def memory(model: ModelConfig | GatedTransformer, budget: CacheTypes) -> Memory:
    """Bytes of weights and caches at `budget`'s context, batch and element sizes.

    The convolution keeps conv_kernel - 1 past tokens a channel; SSM and convolution states do not grow with context.
    Bits may be fractions (4.5 for FP4 with its block scales); each part is rounded up to a byte.
    """
    if isinstance(model, GatedTransformer):
        kv, ssm, conv = model.layers * model.kv_size, 0, 0
    else:
        mamba_layers = model.pattern.count("M")
        kv = model.pattern.count("*") * model.kv_size
        ssm = mamba_layers * model.mamba_inner_size * model.mamba_state_dim
        conv = mamba_layers * model.conv_channels * (model.conv_kernel - 1)
    return Memory(
        weights=_bytes(parameters(model), budget.weight_bits),
        kv_cache=_bytes(2 * budget.batch * budget.context * kv, budget.kv_bits),
        ssm_state=_bytes(budget.batch * ssm, budget.ssm_bits),
        conv_state=_bytes(budget.batch * conv, budget.conv_bits),
    )


def flops_per_token(model: ModelConfig | GatedTransformer, context: int) -> int:
    """Forward floating-point operations of one token that attends to `context` tokens, itself included.

    Matrix products, attention scores and values, the convolution and the SSM recurrence (decay, input, output: three
    multiply-adds a state element); norms and activations are left out. A causal prefill of n tokens costs about
    n * flops_per_token(model, n // 2); training three times as much.
    """
    if isinstance(model, GatedTransformer):
        hidden, attention = model.hidden_size, model.num_attention_heads * model.head_dim
        block = hidden * (attention + 2 * model.kv_size) + attention * hidden + 3 * hidden * model.ffn_hidden_size
        return 2 * (model.layers * (block + 2 * context * attention) + model.vocab_size * hidden)
    hidden = model.hidden_size
    mamba = hidden * (model.in_proj_size + model.mamba_inner_size)
    mamba += model.conv_channels * model.conv_kernel + 3 * model.mamba_inner_size * model.mamba_state_dim
    attention = 2 * hidden * (model.attention_size + model.kv_size) + 2 * context * model.attention_size
    ffn = 2 * hidden * model.ffn_hidden_size
    count = model.pattern.count
    return 2 * (count("M") * mamba + count("*") * attention + count("-") * ffn + model.vocab_size * hidden)


def _bytes(elements: int, bits: float) -> int:
    return math.ceil(elements * Fraction(bits) / 8)
