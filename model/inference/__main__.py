"""Text from a Hub directory. Whatever can be wrong with it is found before the weights are read.

    python -m model.inference --checkpoint DIRECTORY --prompt TEXT
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tokenizers import Tokenizer

from model import hub
from model.config import ModelConfig, ModelError
from model.costs import sequence_bytes, weights_bytes
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder, piece_tokens
from model.inference.fp8_weights import LEAST_WIDTH, quantize_weights
from model.inference.sampling import Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.bfloat16}     # fp8: weights alone
GIB = 2**30
LONGEST_CHARACTER = 4           # bytes, and so tokens at most


class Vocabulary(NamedTuple):
    """A tokenizer, and the ids that stand before and after a text."""

    tokenizer: Tokenizer
    start_id: int | None        # before every text
    end_ids: list[int]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, the start's before them."""
        start = [] if self.start_id is None else [self.start_id]
        return start + list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def generate_text(
    directory: Path, prompt: str, tokens: int, sampling: Sampling, seed: int, dtype: str, device: torch.device
) -> Iterator[str]:
    """Pieces of the text that the model in `directory` writes after `prompt`, as they come.

    Args:
        tokens: at most; the model's end of text ends it earlier.
        dtype: one of DTYPES, of the weights; "fp8" rounds those of the layers.

    Raises:
        ModelError: before anything is computed, for a directory whose weights, configuration and tokenizer do not fit
            together, a prompt that does not fit the device's memory, or FP8 weights of a model they only slow down.
    """
    sampling.check()
    if tokens < 1:
        raise ModelError(f"max_new_tokens is {tokens}.\nAsk for one token or more.")
    if not 0 <= seed < 2**63:
        raise ModelError(f"seed is {seed}.\nMake it 0 or more, and less than 2^63.")
    config = hub.read_config(directory)
    if dtype == "fp8" and config.hidden_size < LEAST_WIDTH:
        raise ModelError(f"dtype: FP8 weights are known to be faster than BF16 from width {LEAST_WIDTH} on, this model "
                         f"is {config.hidden_size} wide.\nTake --dtype bfloat16.")
    hub.check_files(directory, config)
    vocabulary = read_vocabulary(directory, config)
    ids = vocabulary.encode(prompt)
    if not ids:
        raise ModelError("prompt: it is empty, and this model has no token to start from.\nGive a text to go on from.")
    check_memory(config, len(ids), tokens, dtype, device)
    model = HybridLM.from_state(config, hub.load(directory, dtype=None)[1], DTYPES[dtype]).requires_grad_(False)
    model.to(device)
    if dtype == "fp8":
        quantize_weights(model.backbone.layers)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = Decoder(model, len(ids) + tokens)
    stream = decoder.stream(torch.tensor([ids], device=device), tokens, sampling, generator)
    return pieces(vocabulary, (int(chosen) for chosen in stream))


def pieces(vocabulary: Vocabulary, ids: Iterable[int]) -> Iterator[str]:
    """Text of the tokens up to the end of text, as soon as they make whole characters."""
    waiting: list[int] = []
    for token in ids:
        if token in vocabulary.end_ids:
            break
        waiting.append(token)
        text = vocabulary.tokenizer.decode(waiting, skip_special_tokens=False)
        if not text.endswith("\ufffd") or len(waiting) >= LONGEST_CHARACTER:
            yield text
            waiting = []
    if waiting:
        yield vocabulary.tokenizer.decode(waiting, skip_special_tokens=False)


def read_vocabulary(directory: Path, config: ModelConfig) -> Vocabulary:
    """The tokenizer of `directory`. Raises ModelError unless every id it gives is one of the model's."""
    tokenizer = hub.check_vocabulary(directory, config.vocab_size)
    tokenizer.encode_special_tokens = True          # text that spells a control token stays text
    return Vocabulary(tokenizer, hub.begin_id(directory), hub.end_ids(directory))


def check_memory(config: ModelConfig, prompt: int, tokens: int, dtype: str, device: torch.device) -> None:
    """Raise ModelError when weights, caches and activations of one sequence are more than the device has free."""
    element = DTYPES[dtype]
    needed = {
        "weights": weights_bytes(config, element, dtype == "fp8"),
        "caches": sequence_bytes(config, prompt + tokens, element, torch.float32),
        "activations": activation_bytes(config, prompt, element, device),
    }
    free = free_bytes(device)
    if sum(needed.values()) > free:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in needed.items())
        raise ModelError(
            f"prompt: {prompt} tokens and {tokens} new ones need {sum(needed.values()) / GIB:.2f} GiB ({parts}), "
            f"{device.type} has {free / GIB:.2f} free.\n"
            "Shorten the prompt, ask for fewer tokens, or take a smaller --dtype."
        )


def activation_bytes(config: ModelConfig, prompt: int, dtype: torch.dtype, device: torch.device) -> int:
    """About what reading a prompt takes beside weights and caches: a piece of it in the widest layer, the logits."""
    piece = min(prompt, piece_tokens(device))
    widths = [4 * config.ffn_hidden_size]
    if "M" in config.pattern:
        scan = config.mamba_inner_size * (config.mamba_state_dim // min(config.chunk_size, piece) + 1)
        decay = config.mamba_num_heads * min(config.chunk_size, piece)
        widths.append(2 * config.in_proj_size + 2 * scan + (0 if device.type == "cuda" else 4 * decay))
    if "*" in config.pattern:
        mask = 0 if device.type == "cuda" else prompt
        widths.append(3 * config.attention_size + mask)
    return (piece * (max(widths) + 4 * config.hidden_size) + 4 * config.vocab_size) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on `device`, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def read_prompt(argument: str) -> str:
    """`argument`, or standard input where that is `-`. Raises ModelError for what is not UTF-8."""
    content = sys.stdin.buffer.read() if argument == "-" else os.fsencode(argument)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"prompt: byte {error.start} is not UTF-8.\nGive the text in UTF-8.") from None


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, or 1 after two lines of what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m model.inference", description="Text that a model writes.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a Hub directory, such as `export` writes")
    parser.add_argument("--prompt", required=True, help="the text to go on from; - reads it from standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (the default)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: from all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest that have this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: bfloat16, on a CPU float32)")
    options = parser.parse_args(arguments)
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    try:
        text = generate_text(options.checkpoint, read_prompt(options.prompt), options.max_new_tokens, sampling,
                             options.seed, dtype, torch.device(options.device))
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    started = time.perf_counter()
    first = None
    for piece in text:
        first = first or time.perf_counter() - started
        print(piece, end="", flush=True)
    print()
    if first:
        print(f"first piece after {first:.2f} s, {time.perf_counter() - started:.2f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
