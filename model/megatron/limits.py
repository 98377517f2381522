"""Sizes a model must have for a layout, a number format and a device; what does not fit is an error that says so."""

from __future__ import annotations

import torch

from kernels.ssd import KERNEL_SIZES, LARGEST_STATE
from model.config import ModelConfig, ModelError, PretrainConfig, check_tensor_split
from model.megatron.distributed import Parallelism, device
from model.megatron.precision import Precision

FP8_MULTIPLE = 16               # of every size of an FP8 matrix product (Transformer Engine, cuBLASLt)
KERNEL_TAPS = 4


def check_model(config: ModelConfig, precision: Precision, parallelism: Parallelism) -> None:
    """Raise ModelError where `config` cannot be built for `parallelism` and `precision` on this process's device."""
    check_split(config, parallelism)
    if precision.name == "fp8":
        layers, start, end = len(config.pattern), precision.bf16_layers_at_start, precision.bf16_layers_at_end
        if start + end >= layers:           # a run called FP8 would be a BF16 run
            raise ModelError(
                f"precision fp8: bf16_layers_at_start ({start}) and bf16_layers_at_end ({end}) leave none of {layers} "
                "layers to compute in FP8.\nLower them, or choose a bf16 variant."
            )
        if not precision.emulated:
            check_fp8_sizes(config, precision, parallelism.tensor)
    if device().type == "cuda" and precision.dtype is torch.bfloat16 and "M" in config.pattern:
        check_kernels(config)


def check_micro_batch(config: ModelConfig, precision: Precision, micro_batch_size: int) -> None:
    """Raise ModelError where the tokens of a micro-batch, one size of every product, do not suit FP8."""
    tokens = micro_batch_size * config.sequence_length
    if precision.name == "fp8" and not precision.emulated and tokens % FP8_MULTIPLE:
        raise ModelError(
            f"pretrain.micro_batch_size ({micro_batch_size}) x sequence_length ({config.sequence_length}) = {tokens} "
            f"tokens are not a multiple of {FP8_MULTIPLE}, which FP8 matrix products need.\n"
            f"Make sequence_length a multiple of {FP8_MULTIPLE}, or choose a bf16 variant."
        )


def check_cuda_graph(recipe: PretrainConfig, parallelism: Parallelism) -> None:
    """Raise ModelError where a step cannot be captured."""
    if recipe.cuda_graph and parallelism.pipeline > 1:
        raise ModelError(
            f"pretrain.cuda_graph: the exchanges between {parallelism.pipeline} pipeline stages cannot be captured.\n"
            "Set it to false, or have one stage."
        )


def check_kernels(config: ModelConfig) -> None:
    """Raise ModelError where the CUDA kernels do not take the mixers' sizes."""
    for name, value in (("mamba_head_dim", config.mamba_head_dim), ("mamba_state_dim", config.mamba_state_dim)):
        if value not in KERNEL_SIZES:
            raise ModelError(
                f"model: {name} ({value}) is not a size of the CUDA kernels.\n"
                f"Choose one of {', '.join(map(str, KERNEL_SIZES))}, or train on a CPU."
            )
    head_dim, state_dim = config.mamba_head_dim, config.mamba_state_dim
    if head_dim * state_dim > LARGEST_STATE:
        raise ModelError(
            f"model: mamba_head_dim x mamba_state_dim ({head_dim} x {state_dim}) is more than the CUDA kernels hold.\n"
            f"Choose two with a product of at most {LARGEST_STATE}, or train on a CPU."
        )
    if config.conv_kernel != KERNEL_TAPS:
        raise ModelError(
            f"model: conv_kernel ({config.conv_kernel}) is not what the CUDA kernels compute.\n"
            f"Choose {KERNEL_TAPS}, or train on a CPU."
        )


def check_split(config: ModelConfig, parallelism: Parallelism) -> None:
    """Raise ModelError where heads, groups, widths or vocabulary do not divide among tensor-parallel processes, or
    layers among pipeline stages."""
    check_tensor_split(config, parallelism.tensor, parallelism.sequence)
    if len(config.pattern) % parallelism.pipeline:
        raise ModelError(
            f"model: {len(config.pattern)} layers cannot be split into {parallelism.pipeline} pipeline stages.\n"
            "Choose a number of stages that divides them."
        )


def check_fp8_sizes(config: ModelConfig, precision: Precision, ranks: int) -> None:
    """Raise ModelError where a size of a weight, on one of `ranks` processes, in a layer that computes in FP8, is none
    that FP8 products take."""
    layers = len(config.pattern)
    symbols = {symbol for layer, symbol in enumerate(config.pattern) if precision.quantizes(layer, layers)}
    sizes = [("hidden_size", config.hidden_size, "hidden_size")]
    if "M" in symbols:
        sizes += [("in_proj rows, 2 x inner + 2 x groups x state + heads", config.in_proj_size // ranks,
                   "mamba_num_heads"),
                  ("out_proj columns", config.mamba_inner_size // ranks, "mamba_num_heads x mamba_head_dim")]
    if "*" in symbols:
        sizes += [("query, key and value rows", (config.attention_size + 2 * config.kv_size) // ranks, "head_dim"),
                  ("attention output columns", config.attention_size // ranks, "head_dim")]
    if "-" in symbols:
        sizes += [("ffn_hidden_size", config.ffn_hidden_size // ranks, "ffn_hidden_size")]
    for name, size, field in sizes:
        if size % FP8_MULTIPLE:
            where, ranks_too = "", ""
            if ranks > 1:
                where, ranks_too = f" on each of {ranks} tensor-parallel processes", " or the tensor-parallel size"
            raise ModelError(
                f"model: {name} ({size}{where}) is not a multiple of {FP8_MULTIPLE}, which FP8 matrix products need.\n"
                f"Change {field}{ranks_too} so that it is, choose a bf16 variant, or train on a CPU (emulated FP8)."
            )
