"""Text from a Hub directory. Whatever can be wrong with it is found before the weights are read.

    python -m model.inference --checkpoint DIRECTORY --prompt TEXT
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from model.config import ModelError
from model.costs import sequence_bytes
from model.inference.decoder import Decoder
from model.inference.sampling import Sampling
from model.inference.text import DTYPES, check_directory, check_memory, load_model, pieces, read_vocabulary


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
    config = check_directory(directory, dtype)
    vocabulary = read_vocabulary(directory, config)
    ids = vocabulary.encode(prompt)
    if not ids:
        raise ModelError("prompt: it is empty, and this model has no token to start from.\nGive a text to go on from.")
    caches = {"caches": sequence_bytes(config, len(ids) + tokens, DTYPES[dtype], torch.float32)}
    check_memory(f"prompt: {len(ids)} tokens and {tokens} new ones", caches, config, len(ids), dtype, device,
                 "Shorten the prompt, ask for fewer tokens, or take a smaller --dtype.")
    model = load_model(directory, config, dtype, device)
    generator = torch.Generator(device).manual_seed(seed)
    decoder = Decoder(model, len(ids) + tokens)
    stream = decoder.stream(torch.tensor([ids], device=device), tokens, sampling, generator)
    return pieces(vocabulary, (int(chosen) for chosen in stream), ids)


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
        sampling.check()
        if not sampling.temperature and sampling != Sampling():
            raise ModelError("--top-k and --top-p: nothing is drawn at temperature 0.\nGive --temperature as well.")
        text = generate_text(options.checkpoint, read_prompt(options.prompt), options.max_new_tokens, sampling,
                             options.seed, dtype, torch.device(options.device))
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    started = time.perf_counter()
    first = None
    try:
        for piece in text:
            first = first or time.perf_counter() - started
            print(piece, end="", flush=True)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    print()
    if first:
        print(f"first piece after {first:.2f} s, {time.perf_counter() - started:.2f} s in all", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
