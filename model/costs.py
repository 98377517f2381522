"""What a model costs in parameters, bytes and floating-point operations, in closed form; and the least time they take.

Only counts of channels, heads and tokens go in, so a 56B model costs no more to judge than a tiny one. MiniPuzzle's
search (paper section 3) rests on this: it asks for the cost of every combination of layer counts and FFN width.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from model.config import ModelConfig, ModelError, Section, check_tensor_split

if TYPE_CHECKING:       # counting needs no torch, and the report, which draws on this, starts without it
    import torch

# Dense BF16 products a second of NVIDIA's data sheets, by a part of the device's name.
_BF16_PEAK = {"H200": 989.4e12, "H100 PCIe": 756.0e12, "H100 NVL": 835.0e12, "H100": 989.4e12, "A100": 312.0e12}


class Deployment(Section):
    """How a model is held in memory: context in tokens, sequences at once, bits an element of each kind.

    Bits may be a fraction, as scales that several values share count in: 4.5 for NVFP4, a scale of 8 bits for 16 values
    of 4. With it the 56B model's weights take 29.5 GiB, as the paper says (section 3).
    """

    context: int = Field(ge=1)
    batch: int = Field(ge=1)
    weight_bits: float = Field(gt=0)
    kv_bits: float = Field(gt=0)
    ssm_bits: float = Field(gt=0)
    conv_bits: float = Field(gt=0)

    @classmethod
    def of(cls, context: int, batch: int = 1, bits: int = 16, state_bits: int = 32) -> Deployment:
        """All in one type but the SSM states: by default as this engine runs, BF16 and FP32."""
        return cls(context=context, batch=batch, weight_bits=bits, kv_bits=bits, ssm_bits=state_bits, conv_bits=bits)


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
        """Channels of the keys, and of the values."""
        return self.num_query_groups * self.head_dim


class Memory(NamedTuple):
    """Bytes a deployed model takes, without the engine's workspace."""

    weights: int
    kv_cache: int
    ssm_state: int
    conv_state: int

    @property
    def cache(self) -> int:
        """Bytes of all caches."""
        return self.kv_cache + self.ssm_state + self.conv_state

    @property
    def total(self) -> int:
        """Bytes of weights and caches."""
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


def memory(model: ModelConfig | GatedTransformer, deployment: Deployment) -> Memory:
    """Bytes of weights and caches at `deployment`'s context, batch and element sizes.

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
        weights=_bytes(parameters(model), deployment.weight_bits),
        kv_cache=_bytes(2 * deployment.batch * deployment.context * kv, deployment.kv_bits),
        ssm_state=_bytes(deployment.batch * ssm, deployment.ssm_bits),
        conv_state=_bytes(deployment.batch * conv, deployment.conv_bits),
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


def training_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward operations of a token in a full sequence; recomputation does not count."""
    return 3 * flops_per_token(config, (config.sequence_length + 1) // 2)


def flops_utilization(config: ModelConfig, tokens_per_second: float, devices: int, device_name: str) -> float | None:
    """Model FLOP utilization: operations of the model a second over those `devices` devices could do in BF16, by their
    data sheet; None where it is not known, as for a CPU, an H200 NVL or a part of a GPU (MIG).

    An FP8 run is measured against the BF16 peak too, so that the two compare.
    """
    is_other = r"\d| NVL|.* MIG "           # behind the part of the name
    peak = next((peak for part, peak in _BF16_PEAK.items() if re.search(f"{part}(?!{is_other})", device_name)), None)
    return training_flops_per_token(config) * tokens_per_second / (devices * peak) if peak else None


# --- The least time inference can take --------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What a machine does at best (`model.benchmark.roofline` measures it).

    Attributes:
        bytes_per_second: read and written by a copy.
        flops_per_second: of a matrix product in the inference dtype.
        layer_flops_per_second: of one in the layers' weights' type, where that is FP8.
    """

    bytes_per_second: float
    flops_per_second: float
    layer_flops_per_second: float


def weights_bytes(config: ModelConfig, dtype: torch.dtype, fp8: bool) -> int:
    """All weights in `dtype`; with `fp8` the layers' take a byte a parameter (their vectors are less than 0.1%)."""
    layers = sum(layer_parameters(config, symbol) for symbol in config.pattern)
    return layers * (1 if fp8 else dtype.itemsize) + 2 * config.vocab_size * config.hidden_size * dtype.itemsize


def sequence_bytes(config: ModelConfig, context: int, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
    """Bytes of the caches of one sequence of `context` tokens; keys, values and convolution states in `dtype`."""
    return memory(config, Deployment.of(context, 1, 8 * dtype.itemsize, 8 * state_dtype.itemsize)).cache


def decode_floor(
    config: ModelConfig, batch: int, context: int, dtype: torch.dtype, state_dtype: torch.dtype, fp8: bool,
    ceilings: Ceilings,
) -> float:
    """Seconds of one decoding step at least: every weight but the input embedding read once, keys and values read, the
    states read and written; or its operations, where they take longer."""
    held = memory(config, Deployment.of(context, batch, 8 * dtype.itemsize, 8 * state_dtype.itemsize))
    weights = weights_bytes(config, dtype, fp8) - config.vocab_size * config.hidden_size * dtype.itemsize
    moved = weights + held.kv_cache + 2 * (held.ssm_state + held.conv_state)
    operations = batch * flops_per_token(config, context)
    return max(moved / ceilings.bytes_per_second, operations / ceilings.layer_flops_per_second)


def prefill_floor(config: ModelConfig, tokens: int, ceilings: Ceilings) -> float:
    """Seconds to read one prompt at least: its operations, those of the head for the last token alone."""
    attention = tokens * (flops_per_token(config, tokens // 2) - flops_per_token(config, 0))
    head = 2 * config.vocab_size * config.hidden_size
    layers = tokens * (flops_per_token(config, 0) - head)
    return layers / ceilings.layer_flops_per_second + (attention + head) / ceilings.flops_per_second


# --- Evaluation on a GPU (`model.evaluation.harness`) -----------------------------------------------------------------

EVALUATION_TOKENS = 32_768      # that pass through the layers together
EVALUATION_LOGITS = 8192        # of them, with logits at one time
TENSOR_SIZES = (1, 2, 4, 8)     # GPUs that a layer may be split over, of one node
GIB = 2**30


def evaluation_bytes(config: ModelConfig, context: int, tensor: int = 1) -> float:
    """Bytes of each of the `tensor` GPUs that evaluate a model together, in BF16, at most.

    Weights; what CUDA and, between GPUs, NCCL take for themselves; and of a full batch, or of the longest request, of
    `context` tokens, if that is more, either the largest layer's
    tensors beside the residual stream, its norm and what is added to it, or the hidden states of all tokens in BF16 and
    FP32, the head's weights in FP32, and logits and their logarithms in FP32.
    """
    hidden, states = config.hidden_size, config.mamba_inner_size * config.mamba_state_dim // config.chunk_size
    widths = {"M": config.in_proj_size + config.conv_channels + 2 * config.mamba_inner_size + states,
              "*": 2 * (config.attention_size + config.kv_size), "-": 2 * config.ffn_hidden_size}
    widest = max(widths[symbol] for symbol in config.pattern) / tensor
    tokens = max(EVALUATION_TOKENS, context)
    layers = 2 * tokens * (3 * hidden + widest)
    head = 6 * tokens * hidden + 4 * config.vocab_size / tensor * (hidden + 2 * EVALUATION_LOGITS)
    return 2 * parameters(config) / tensor + max(layers, head) + (GIB if tensor == 1 else 2 * GIB)


def evaluation_refusal(
    name: str, config: ModelConfig, context: int, tensor: int, memory: float, machine: str
) -> str | None:
    """None where the evaluation of a model over `tensor` GPUs, in `context` tokens, fits into `memory` bytes of each;
    else, in two lines, by how much it does not, and the nearest tensor-parallel size with which it does."""
    needed = evaluation_bytes(config, context, tensor)
    if needed <= memory:
        return None
    fitting = [size for size in TENSOR_SIZES
               if _splits(config, size) and evaluation_bytes(config, context, size) <= memory]
    cure = (f"Nearest that fits: tensor {fitting[0]} (runtime.parallel, with runtime.launcher)." if fitting
            else "No tensor-parallel size fits: take a larger GPU, or leave the model out of `models`.")
    return (f"evaluation of {name} does not fit: {needed / GIB:.1f} GiB with tensor {tensor}, a {machine} has "
            f"{memory / GIB:.1f}.\n{cure}")


def _splits(config: ModelConfig, tensor: int) -> bool:
    try:
        check_tensor_split(config, tensor)
    except ModelError:
        return False
    return True


def _bytes(elements: int, bits: float) -> int:
    return math.ceil(elements * Fraction(bits) / 8)
