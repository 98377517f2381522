"""Records of the benchmark, as it measures them and as the report reads them back."""

from __future__ import annotations

from model.config import Record


class DecodeRow(Record):
    """benchmark/decode.csv: one model at one context. What is None was not measured: no prompt so long was read.

    Attributes:
        tokens_per_second: decoded, of the whole batch; from the median of the repeats.
        seconds_per_token_spread: half the distance between the fastest and the slowest repeat.
        decode_of_floor: the least time a step can take on this machine (`model.costs`) over what it takes.
        time_to_first_token_seconds: after one prompt of `context` tokens.
        prefill_of_floor: as `decode_of_floor`.
        output_tokens_per_second: of requests that read `context` tokens and write `benchmark.output_tokens`: prompts
            one after another, then the batch decodes at the speed measured.
        cache_mib: of one sequence, in a decoder made for exactly `context` tokens.
        memory_gib: weights and the caches of the batch.
    """

    model: str
    context: int
    batch: int
    tokens_per_second: float
    seconds_per_token_spread: float
    decode_of_floor: float
    time_to_first_token_seconds: float | None
    prefill_tokens_per_second: float | None
    prefill_of_floor: float | None
    output_tokens_per_second: float | None
    cache_mib: float
    memory_gib: float


class DecodeRepeat(Record):
    """benchmark/decode_repeats.csv: repeat by repeat, in each of which every model had its turn."""

    model: str
    context: int
    repeat: int
    seconds_per_token: float
