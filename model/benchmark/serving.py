"""Throughput as the paper measures it, at the published geometry (Figures 1 and 12): 65,536 tokens in, 1,024 out, the
largest batch that fits, two models in the same engine with random weights.

The prompt of ONE sequence is read and timed, in the caches of the whole batch; the others' are filled with random
numbers. Decoding is timed at the full batch, in steps that end half-way through the output. From these

    output tokens/s = batch x output / (batch x prompt seconds + output x step seconds)

since prompts are read one after another. Floors are operations and bytes (`model.costs`) over measured
ceilings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed import ReduceOp

from model.benchmark.decode import fill_caches, prefill_seconds, step_seconds
from model.benchmark.roofline import measure_ceilings
from model.config import ModelConfig, ModelError
from model.costs import Ceilings, decode_floor, prefill_floor, sequence_bytes, weights_bytes
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder, piece_tokens
from model.inference.random_weights import random_model
from model.presets import PRESETS
from model.processes import ONE_PROCESS, TensorRanks, release_memory
from model.tensor_parallel import part_of

DTYPE, STATE_DTYPE = torch.bfloat16, torch.float32
MARGIN = 2**30                  # bytes left free beside weights, caches and activations
LOGIT_BYTES = 6                 # of a step's logits, and to choose by them


class Pair(NamedTuple):
    """Two presets, the first meant to be faster; `fp8`: the weights of their layers are FP8."""

    models: tuple[str, str]
    fp8: bool


PAIRS = {
    "8b": Pair(("nemotron_h_8b", "nemotron_t_8b"), fp8=False),       # the Transformer has 8 KV heads too
    "47b": Pair(("nemotron_h_47b", "nemotron_h_56b"), fp8=True),     # and the model it is cut from
}


class Size(NamedTuple):
    """What is served, and how often it is timed."""

    context: int                # tokens in
    output: int                 # tokens out
    steps: int                  # timed in a run
    repeats: int
    largest_batch: int


PAPER = Size(context=65_536, output=1024, steps=64, repeats=3, largest_batch=1024)


class Served(NamedTuple):
    """One model; `..._of_floor` is the least time possible over the time taken, `peak_gib` of one GPU."""

    model: str
    weights: str
    batch: int
    context: int
    output: int
    weights_gib: float
    cache_gib_per_sequence: float
    peak_gib: float
    time_to_first_token: float
    prefill_tokens_per_second: float
    prefill_of_floor: float
    step_milliseconds: float
    decode_tokens_per_second: float
    decode_of_floor: float
    output_tokens_per_second: float


def published_pairs(
    names: Sequence[str], device: torch.device, ranks: TensorRanks = ONE_PROCESS
) -> dict[str, Any]:
    """Throughput of the pairs with these names, and its ratios; each of several `ranks` must call this.

    Raises ModelError without a GPU, which they need, and where one sequence does not fit.
    """
    if names and device.type != "cuda":
        raise ModelError(f"benchmark.published: {names[0]} needs a GPU, and none was found.\nSet it to [] on a CPU.")
    figures: dict[str, Any] = {}
    for name in names:
        ceilings = measure_ceilings(device, DTYPE, PAIRS[name].fp8, ranks.tensor_ranks)
        release_memory()
        first, second = serve_pair(name, PAPER, device, ceilings, ranks=ranks)
        for row in (first, second):
            figures |= {f"{row.model}_served_{key}": value for key, value in row._asdict().items() if key != "model"}
        figures[f"output_ratio_{name}"] = first.output_tokens_per_second / second.output_tokens_per_second
        figures[f"served_decode_ratio_{name}"] = first.decode_tokens_per_second / second.decode_tokens_per_second
    return figures


def serve_pair(
    name: str, size: Size, device: torch.device, ceilings: Ceilings, geometries: dict[str, ModelConfig] = PRESETS,
    ranks: TensorRanks = ONE_PROCESS,
) -> Iterator[Served]:
    """Both models of PAIRS[name], one after the other. Raises ModelError where one sequence does not fit."""
    pair = PAIRS[name]
    for model in pair.models:
        yield serve(model, geometries[model], pair.fp8, size, device, ceilings, ranks)
        release_memory()


def serve(
    name: str, config: ModelConfig, fp8: bool, size: Size, device: torch.device, ceilings: Ceilings,
    ranks: TensorRanks = ONE_PROCESS,
) -> Served:
    """One model with random weights at the largest batch that fits. Raises ModelError where one sequence does not."""
    model = random_model(config, DTYPE, device, fp8, ranks=ranks)
    length = size.context + size.output
    batch = size.largest_batch
    if device.type == "cuda":
        activations = prompt_activations(model, min(2 * piece_tokens(device), size.context))
        own = part_of(config, ranks).model_copy(update={"vocab_size": config.vocab_size})       # all have all logits
        batch = min(batch, fitting_batch(name, own, length, torch.cuda.mem_get_info()[0] - activations - MARGIN))
        batch = int(ranks.over_tensor_ranks(torch.tensor(batch, device=device), ReduceOp.MIN))
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, length, batch, STATE_DTYPE)
    prompt = prefill_seconds(decoder, size.context, size.repeats - 1)
    fill_caches(decoder, 0)
    middle = size.context + size.output // 2
    step = step_seconds(decoder, middle, size.steps, size.repeats)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Served(
        model=name, weights="fp8" if fp8 else "bf16", batch=batch, context=size.context, output=size.output,
        weights_gib=weights_bytes(config, DTYPE, fp8) / 2**30,
        cache_gib_per_sequence=sequence_bytes(config, length, DTYPE, STATE_DTYPE) / 2**30,
        peak_gib=peak / 2**30, time_to_first_token=prompt, prefill_tokens_per_second=size.context / prompt,
        prefill_of_floor=prefill_floor(config, size.context, ceilings) / prompt, step_milliseconds=step * 1e3,
        decode_tokens_per_second=batch / step,
        decode_of_floor=decode_floor(config, batch, middle, DTYPE, STATE_DTYPE, fp8, ceilings) / step,
        output_tokens_per_second=batch * size.output / (batch * prompt + size.output * step),
    )


def fitting_batch(name: str, config: ModelConfig, length: int, free: int) -> int:
    """Sequences of `length` tokens whose caches fit into `free` bytes. Raises ModelError for none."""
    needed = sequence_bytes(config, length, DTYPE, STATE_DTYPE) + LOGIT_BYTES * config.vocab_size
    if free < needed:
        raise ModelError(
            f"{name}: {length} tokens need {needed / 2**30:.1f} GiB beside the weights, {free / 2**30:.1f} are free.\n"
            "Take a GPU with more memory, or a shorter context."
        )
    return free // needed


def prompt_activations(model: HybridLM, tokens: int) -> int:
    """Bytes that reading a prompt takes on the GPU beside weights and caches; compiles what it uses."""
    decoder = Decoder(model, tokens, 1, STATE_DTYPE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder.prefill_rows(torch.zeros(1, tokens, dtype=torch.int64, device=decoder.device), slice(0, 1))
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    del decoder
    release_memory()
    return taken
