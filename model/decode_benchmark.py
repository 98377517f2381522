"""How fast models decode, and what their caches take, against the context (paper Figures 1 and 12).

Speed does not depend on the values of weights or caches, so both are random: no prompt of 16,384 tokens is read first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from model.config import ModelConfig, ModelError
from model.hybrid_lm import HybridLM
from model.inference import Decoder


class DecodeSpeed(NamedTuple):
    """One model at one context.

    Attributes:
        tokens_per_second: of the whole batch; from the median of the repeats.
        seconds_per_token_spread: half the distance between the fastest and the slowest repeat.
        cache_bytes: of a decoder made for exactly `context` tokens.
    """

    model: str
    context: int
    tokens_per_second: float
    seconds_per_token_spread: float
    cache_bytes: int


def measure(
    configs: Mapping[str, ModelConfig], contexts: list[int], batch: int, tokens: int, repeats: int, seed: int,
    dtype: torch.dtype, progress: Callable[..., None],
) -> Iterator[DecodeSpeed]:
    """Time the decoding of the last `tokens` tokens of each context.

    Within a repeat every model has its turn, so that noise of the machine meets all alike; one untimed repeat comes
    first. Raises ModelError for a context shorter than `tokens`.
    """
    if min(contexts) < tokens:
        raise ModelError(f"benchmark.contexts: {min(contexts)} is shorter than decode_tokens ({tokens}).\nRaise it.")
    generator = torch.Generator().manual_seed(seed)
    models = {name: _random_model(config, dtype, generator) for name, config in configs.items()}
    total = len(contexts) * (repeats + 1)
    for done, context in enumerate(contexts):
        decoders = {name: Decoder(model, context, batch) for name, model in models.items()}
        for decoder in decoders.values():
            for cache in decoder.caches:
                cache.normal_(generator=generator)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(repeats + 1):
            for name, decoder in decoders.items():
                decoder.position = context - tokens
                elapsed = _decode(decoder, tokens)
                if repeat:
                    seconds[name].append(elapsed / (tokens * batch))
            progress(done * (repeats + 1) + repeat + 1, total, context=context)
        for name, times in seconds.items():
            spread = (max(times) - min(times)) / 2
            yield DecodeSpeed(name, context, 1 / statistics.median(times), spread, decoders[name].cache_bytes)


def _random_model(config: ModelConfig, dtype: torch.dtype, generator: torch.Generator) -> HybridLM:
    """Fresh weights, drawn without touching torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return HybridLM.from_state(config, HybridLM(config).state_dict(), dtype)


def _decode(decoder: Decoder, tokens: int) -> float:
    """Seconds for `tokens` greedy steps from where the decoder stands."""
    ids = torch.zeros(decoder.batch, dtype=torch.int64)
    started = time.perf_counter()
    for _ in range(tokens):
        ids = decoder.decode(ids).argmax(-1)
    return time.perf_counter() - started
