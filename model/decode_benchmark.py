"""How fast models read prompts and decode, and what memory they take, against the context (paper Figures 1 and 12).

Speed does not depend on the values of weights or caches, so both are random: a batch's caches are filled, not read in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from model.config import ModelConfig, ModelError
from model.inference import PREFILL_TOKENS, Decoder
from model.random_weights import random_model
from model.roofline import seconds


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
    models = {name: random_model(config, dtype, seed=seed) for name, config in configs.items()}
    total = len(contexts) * (repeats + 1)
    for done, context in enumerate(contexts):
        decoders = {name: Decoder(model, context, batch) for name, model in models.items()}
        for decoder in decoders.values():
            fill_caches(decoder, seed)
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(repeats + 1):
            for name, decoder in decoders.items():
                elapsed = decode_tokens(decoder, context - tokens, tokens)
                if repeat:
                    times[name].append(elapsed / (tokens * batch))
            progress(done * (repeats + 1) + repeat + 1, total, context=context)
        for name, found in times.items():
            spread = (max(found) - min(found)) / 2
            yield DecodeSpeed(name, context, 1 / statistics.median(found), spread, decoders[name].cache_bytes)


def decode_seconds(
    config: ModelConfig, batch: int, context: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda",
    float8: bool = False, state_dtype: torch.dtype = torch.float32, steps: int = 32, repeats: int = 5, seed: int = 0,
) -> float:
    """Seconds of one decoding step of `batch` sequences at `context` tokens, with random weights and caches: the median
    of `repeats` runs of `steps` steps that end there. On a GPU a step is a CUDA graph."""
    decoder = Decoder(random_model(config, dtype, device, float8, seed), context, batch, state_dtype)
    fill_caches(decoder, seed)
    return step_seconds(decoder, context, steps, repeats)


def step_seconds(decoder: Decoder, context: int, steps: int, repeats: int) -> float:
    """Seconds of a step of `decoder`, its caches filled: the median of runs of `steps` steps that end at `context`
    tokens, after one that is not counted."""
    runs = [decode_tokens(decoder, context - steps, steps) for _ in range(repeats + 1)]
    return statistics.median(runs[1:]) / steps


def prefill_seconds(decoder: Decoder, tokens: int, repeats: int) -> float:
    """Seconds until the first token of one prompt of `tokens` tokens: the fastest of `repeats`, after the reading of
    what compiles every kernel, two pieces, or all of a prompt that is shorter."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=decoder.device)
    decoder.prefill_rows(ids[:, : 2 * PREFILL_TOKENS], slice(0, 1))
    return min(seconds(lambda: decoder.prefill_rows(ids, slice(0, 1)).argmax(-1), decoder.device)
               for _ in range(repeats))


def fill_caches(decoder: Decoder, seed: int) -> None:
    """Random keys, values and states of the size that trained ones have."""
    generator = torch.Generator(decoder.device).manual_seed(seed)
    for cache in decoder.caches:
        cache.normal_(generator=generator)


def decode_tokens(decoder: Decoder, position: int, tokens: int) -> float:
    """Seconds for `tokens` greedy steps from `position` on."""
    decoder.position = position
    ids = torch.zeros(decoder.batch, dtype=torch.int64, device=decoder.device)

    def run() -> None:
        chosen = ids
        for _ in range(tokens):
            chosen = decoder.decode(chosen).argmax(-1)

    return seconds(run, decoder.device)
