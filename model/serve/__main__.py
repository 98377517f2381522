"""Models over HTTP, as OpenAI's API has it, for this machine alone, and a page to try one or compare two.

    python -m model.serve --model parent=DIRECTORY --model compressed=DIRECTORY

Each DIRECTORY is a Hub directory: one that `export` wrote, or a Nemotron-H downloaded from the Hub. Ctrl-C ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from model.config import ModelError
from model.costs import sequence_bytes
from model.inference.text import DTYPES, check_directory, check_memory, load_model, read_vocabulary
from model.serve.engine import Engine, Limits
from model.serve.loopback import port_number
from model.serve.server import ServedModel, Server


def load(name: str, directory: Path, limits: Limits, dtype: str, device: torch.device) -> ServedModel:
    """The model of `directory`, ready to serve; a `max_length` of 0 is the length it was trained with.

    Raises:
        ModelError: before weights are read, for a directory that cannot be used or limits that need more memory than
            there is.
    """
    config = check_directory(directory, dtype)
    vocabulary = read_vocabulary(directory, config)
    encode = chat_encoder(directory)
    limits = limits._replace(max_length=limits.max_length or config.sequence_length)
    sequence = sequence_bytes(config, limits.max_length, DTYPES[dtype], torch.float32)
    caches = {"rows": (limits.rows + 1) * sequence, "kept prompts": limits.prefix_bytes}
    check_memory(f"{name}: {limits.rows} texts of {limits.max_length} tokens", caches, config, limits.max_length,
                 dtype, device, "Take fewer --rows, a smaller --max-length or --prefix-cache-mb, or a smaller --dtype.")
    return ServedModel(name, Engine(load_model(directory, config, dtype, device), vocabulary, limits), encode)


def chat_encoder(directory: Path) -> Callable[[list[dict[str, str]]], list[int]] | None:
    """The function from a conversation to token ids, by the tokenizer's chat template; None where it has none."""
    settings = directory / "tokenizer_config.json"
    described = settings.exists() and json.loads(settings.read_text()).get("chat_template")
    if not (described or (directory / "chat_template.jinja").exists()):
        return None
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    # Not `all_special_tokens`: the marks of turns may be none of the named ones (Nemotron's <SPECIAL_11>).
    control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]

    def encode(messages: list[dict[str, str]]) -> list[int]:
        for token in control:
            if any(token in message["content"] for message in messages):
                raise ModelError(f"A message has {token}, which steers the model and is no text.\nLeave it out.")
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ModelError(f"The chat template refuses these messages: {error}.\nWrite them as it says.") from None
        return list(ids)

    return encode


def named(argument: str) -> tuple[str, Path]:
    """NAME=DIRECTORY, or DIRECTORY, whose own name is the model's."""
    name, equals, directory = argument.partition("=")
    path = Path(directory if equals else argument)
    name = name if equals else path.resolve().name
    if not re.fullmatch(r"[\w.:/-]+", name):
        raise argparse.ArgumentTypeError(f"{name!r} is no name of letters, digits and . : / - _")
    return name, path


def number(argument: str, least: int = 0) -> int:
    """A number of `least` or more."""
    if (found := int(argument)) < least:
        raise argparse.ArgumentTypeError(f"{found} is less than {least}")
    return found


def positive(argument: str) -> int:
    """A number of 1 or more."""
    return number(argument, 1)


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 after Ctrl-C, or 1 after two lines of what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m model.serve", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=named, action="append", required=True, metavar="NAME=DIRECTORY",
                        help="a model to serve; again for another")
    parser.add_argument("--port", type=port_number, default=8000,
                        help="of 127.0.0.1 (default: %(default)s); 0: a free one")
    parser.add_argument("--max-length", type=positive, default=0, metavar="TOKENS",
                        help="a text may have, its prompt included (default: what the model was trained with)")
    parser.add_argument("--rows", type=positive, default=16, metavar="TEXTS",
                        help="are decoded together; each has its caches from the start (default: %(default)s)")
    parser.add_argument("--queue", type=positive, default=256, metavar="TEXTS",
                        help="may wait for a row; more are refused with 429 (default: %(default)s)")
    parser.add_argument("--piece-tokens", type=positive, metavar="TOKENS",
                        help="of a long prompt read at once; twice as many, of all prompts, are read between two "
                             "steps at most; where pieces end, prompts are kept (default: 256, on a GPU 2048)")
    parser.add_argument("--prefix-cache-mb", type=number, default=256, metavar="MB",
                        help="of prompts kept, so that one that begins alike is not read again; 0: none "
                             "(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights (default: bfloat16, on a CPU float32)")
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    limits = Limits(options.max_length, options.rows, options.queue, options.piece_tokens or (256 if on_cpu else 2048),
                    options.prefix_cache_mb * 10**6)
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("127.0.0.1", options.port))
        except OSError as error:
            print(f"Port {options.port} cannot be had: {error}.\nChoose another: --port {options.port + 1}",
                  file=sys.stderr)
            return 1
        try:
            if len(dict(options.model)) < len(options.model):
                raise ModelError("--model: two models have one name.\nGive each its own: NAME=DIRECTORY.")
            models = {name: load(name, directory, limits, options.dtype or ("float32" if on_cpu else "bfloat16"),
                                 torch.device(options.device))
                      for name, directory in options.model}
        except ModelError as error:
            print(error, file=sys.stderr)
            return 1
        own.listen()
        port = own.getsockname()[1]
        print(f"http://127.0.0.1:{port}", f"Serves {', '.join(models)}. Ctrl-C ends.", sep="\n", flush=True)
        with contextlib.suppress(KeyboardInterrupt):        # uvicorn raises the signal again when all is closed
            Server(models, port).run([own])
    return 0


if __name__ == "__main__":
    sys.exit(main())
