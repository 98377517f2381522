"""The least time inference can take on a machine: bytes over its bandwidth, operations over its rate, both measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from model.config import ModelConfig
from model.costs import flops_per_token, layer_parameters, memory

_CALLS, _ROUNDS = 5, 3


class Ceilings(NamedTuple):
    """What a machine does at best.

    Attributes:
        bytes_per_second: read and written by a copy.
        flops_per_second: of a matrix product in the inference dtype.
        layer_flops_per_second: of one in the layers' weights' type, where that is FP8.
    """

    bytes_per_second: float
    flops_per_second: float
    layer_flops_per_second: float


class Deployment(NamedTuple):
    """Satisfies `costs.CacheTypes`: how a model is held in memory."""

    context: int
    batch: int
    weight_bits: float = 16
    kv_bits: float = 16
    ssm_bits: float = 32
    conv_bits: float = 16


def weights_bytes(config: ModelConfig, dtype: torch.dtype, fp8: bool) -> int:
    """All weights in `dtype`; with `fp8` the layers' take a byte a parameter (their vectors are less than 0.1%)."""
    layers = sum(layer_parameters(config, symbol) for symbol in config.pattern)
    return layers * (1 if fp8 else dtype.itemsize) + 2 * config.vocab_size * config.hidden_size * dtype.itemsize


def sequence_bytes(config: ModelConfig, context: int, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
    """Caches of one sequence of `context` tokens."""
    return memory(config, _deployment(context, 1, dtype, state_dtype)).cache


def _deployment(context: int, batch: int, dtype: torch.dtype, state_dtype: torch.dtype) -> Deployment:
    bits, state_bits = 8 * dtype.itemsize, 8 * state_dtype.itemsize
    return Deployment(context, batch, bits, bits, state_bits, bits)


def decode_floor(
    config: ModelConfig, batch: int, context: int, dtype: torch.dtype, state_dtype: torch.dtype, fp8: bool,
    ceilings: Ceilings,
) -> float:
    """Seconds of one decoding step at least: every weight but the input embedding read once, keys and values read, the
    states read and written; or its operations, where they take longer."""
    held = memory(config, _deployment(context, batch, dtype, state_dtype))
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


def measure_ceilings(device: torch.device, dtype: torch.dtype, fp8: bool = False) -> Ceilings:
    """Fastest of a few copies and square matrix products, large for the device."""
    on_gpu = device.type == "cuda"
    source = torch.ones((2**30 if on_gpu else 2**24) // dtype.itemsize, device=device, dtype=dtype)
    copy = 2 * source.nbytes / fastest(partial(torch.empty_like(source).copy_, source), device)
    size = 8192 if on_gpu else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rate = 2 * size**3 / fastest(lambda: a @ b, device)
    layer_rate = rate
    if fp8 and on_gpu:
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        layer_rate = 2 * size**3 / fastest(lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one,
                                                                    out_dtype=torch.bfloat16), device)
    return Ceilings(copy, rate, layer_rate)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of a call, the device's work included."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds a call takes in the fastest of some rounds of calls, after one that is not counted."""
    def round_of_calls() -> None:
        for _ in range(_CALLS):
            run()

    return min([seconds(round_of_calls, device) for _ in range(_ROUNDS + 1)][1:]) / _CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
