"""How fast models read prompts and decode, and what memory they take, against the context (paper Figures 1 and 12).

Speed does not depend on the values of weights or caches, so both are random: a batch's caches are filled, not read in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping

import torch

from model.benchmark.roofline import measure_ceilings, seconds
from model.benchmark.schema import DecodeRow
from model.config import ModelConfig, ModelError
from model.costs import decode_floor, prefill_floor, weights_bytes
from model.inference.decoder import Decoder
from model.inference.random_weights import random_model
from model.processes import ONE_PROCESS, TensorRanks


def measure(
    configs: Mapping[str, ModelConfig], contexts: list[int], batch: int, tokens: int, repeats: int, longest_prompt: int,
    output_tokens: int, seed: int, dtype: torch.dtype, device: torch.device, progress: Callable[..., None],
    ranks: TensorRanks = ONE_PROCESS,
) -> Iterator[tuple[DecodeRow, list[float]]]:
    """Rows with the seconds a token of each repeat; all models' repeats have one order.

    Time the reading of a prompt of each context up to `longest_prompt`, after some of it was read untimed, and the
    decoding of the last `tokens` tokens of each context. A GPU reads it three times, the fastest counts: kernels for
    the lengths that only a long prompt comes to may have to be made ready.

    Within a repeat every model has its turn, so that noise of the machine meets all alike; one untimed repeat comes
    first. Of models split over several `ranks`, each of which must call this, bytes and floors are those of all
    together. Raises ModelError for a context shorter than `tokens`, or a model that they cannot split.
    """
    if min(contexts) < tokens:
        raise ModelError(f"benchmark.contexts: {min(contexts)} is shorter than decode_tokens ({tokens}).\nRaise it.")
    ceilings = measure_ceilings(device, dtype, devices=ranks.tensor_ranks)
    models = {name: random_model(config, dtype, device, seed=seed, ranks=ranks) for name, config in configs.items()}
    total = len(contexts) * (repeats + 1)
    readings = 3 if device.type == "cuda" else 1
    for done, context in enumerate(contexts):
        decoders = {name: Decoder(model, context, batch) for name, model in models.items()}
        prompts = {name: prefill_seconds(decoder, context, readings) if context <= longest_prompt else None
                   for name, decoder in decoders.items()}
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
            config, caches = configs[name], decoders[name].cache_bytes * ranks.tensor_ranks
            rate, first = 1 / statistics.median(found), prompts[name]
            step_floor = decode_floor(config, batch, context, dtype, torch.float32, False, ceilings)
            yield DecodeRow(
                model=name, context=context, batch=batch, tokens_per_second=rate,
                seconds_per_token_spread=(max(found) - min(found)) / 2, decode_of_floor=step_floor * rate / batch,
                time_to_first_token_seconds=first, prefill_tokens_per_second=first and context / first,
                prefill_of_floor=first and prefill_floor(config, context, ceilings) / first,
                output_tokens_per_second=first and 1 / (first / output_tokens + 1 / rate),
                cache_mib=caches / batch / 2**20, memory_gib=(weights_bytes(config, dtype, False) + caches) / 2**30,
            ), found


def decode_seconds(
    config: ModelConfig, batch: int, context: int, device: str, steps: int, repeats: int, seed: int
) -> float:
    """Seconds of one decoding step of `batch` sequences at `context` tokens, with random weights, in BF16, and caches:
    `step_seconds`. On a GPU a step is a CUDA graph."""
    decoder = Decoder(random_model(config, torch.bfloat16, device, seed=seed), context, batch)
    fill_caches(decoder, seed)
    return step_seconds(decoder, context, steps, repeats)


def step_seconds(decoder: Decoder, context: int, steps: int, repeats: int) -> float:
    """Seconds of a step of `decoder`, its caches filled: the fastest of `repeats` runs of `steps` steps that end at
    `context` tokens, after one that is not counted. What else the device does only adds to it."""
    runs = [decode_tokens(decoder, context - steps, steps) for _ in range(repeats + 1)]
    return min(runs[1:]) / steps


def prefill_seconds(decoder: Decoder, tokens: int, repeats: int) -> float:
    """Seconds until the first token of one prompt of `tokens` tokens: the fastest of `repeats`, after the reading of
    what compiles every kernel, two pieces, or all of a prompt that is shorter."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=decoder.device)
    decoder.prefill_rows(ids[:, : 2 * decoder.prefill_tokens], slice(0, 1))
    return min(seconds(lambda: decoder.prefill_rows(ids, slice(0, 1)).argmax(-1), decoder.device)
               for _ in range(repeats))


def fill_caches(decoder: Decoder, seed: int) -> None:
    """Random keys, values and states of the size that trained ones have."""
    generator = torch.Generator(decoder.device).manual_seed(seed)
    for cache in decoder.caches:
        cache.normal_(generator=generator)


def decode_tokens(decoder: Decoder, position: int, tokens: int) -> float:
    """Seconds for `tokens` greedy steps from `position` on."""
    decoder.claim(position)
    ids = torch.zeros(decoder.batch, dtype=torch.int64, device=decoder.device)

    def run() -> None:
        chosen = ids
        for _ in range(tokens):
            chosen = decoder.decode(chosen).argmax(-1)

    return seconds(run, decoder.device)
