"""`python -m model.serve` under load, beside `transformers serve`: the same export, the same requests, in one run.

    pip install openai                                          # `transformers serve` asks for it
    python -m benchmarks.serving --out serving.json             # three minutes on two cores

Clients stream greedy texts of 32 tokens after prompts of 16 to 256, one request after another: tokens/s of all clients
together, time to the first token, time between two tokens. Then half of eight clients hang up after five tokens: the
others' texts must be those they get without. Weights are random; speed does not depend on them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import httpx
import torch
from tokenizers import Tokenizer, decoders, models

from model import hub
from model.config import ModelConfig
from model.inference.random_weights import random_model

CONFIG = ModelConfig(
    pattern="M-M*-M-", hidden_size=256, ffn_hidden_size=768, num_attention_heads=4, num_query_groups=2,
    head_dim=64, mamba_num_heads=8, mamba_head_dim=64, mamba_state_dim=64, mamba_num_groups=2, chunk_size=128,
    sequence_length=512, vocab_size=8192, init_method_std=0.06,
)
FIRST = 0x4E00              # every token is a character of its own, so that every token is an event
TOKENS = 32
LOADS = {1: 4, 8: 2, 64: 1}             # requests a client
HANG_UP_AFTER = 5
SECONDS_TO_START = 180


class Served(NamedTuple):
    """What a client saw: seconds to the first token, between tokens, and the text."""

    first: float
    gaps: list[float]
    text: str


def export(directory: Path) -> None:
    """The model, whose texts have no end but the limit."""
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    hub.save(directory, CONFIG, random_model(CONFIG, torch.float32).state_dict(), {}, "float32", special_tokens=none)
    tokens = {chr(FIRST + token): token for token in range(CONFIG.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@contextlib.contextmanager
def serve(name: str, directory: Path, log: Path) -> Iterator[str | None]:
    """A server's URL, or None where it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    if name == "ours":
        command = ["-m", "model.serve", "--model", f"{directory}={directory}", "--rows", "64", "--device", "cpu"]
    else:
        command = ["-m", "transformers.cli.transformers", *name.split()[1:], str(directory), "--device", "cpu",
                   "--dtype", "float32"]
    with log.open("w") as stream:
        process = subprocess.Popen([sys.executable, *command, "--port", port], stdout=stream, stderr=stream)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
    try:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield url if process.poll() is None else None
    finally:
        process.kill()
        process.wait()


async def ask(client: httpx.AsyncClient, model: str, prompt: str, hang_up: bool = False) -> Served:
    started, times, text = time.perf_counter(), [], ""
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError((await answer.aread()).decode()[:500])
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"])[:500])
            if event["choices"] and event["choices"][0]["text"]:
                text += event["choices"][0]["text"]
                times.append(time.perf_counter())
            if hang_up and len(times) == HANG_UP_AFTER:
                break
    if len(text) != TOKENS and not hang_up:
        raise RuntimeError(f"{len(text)} tokens came of {TOKENS}.")
    return Served(times[0] - started, [b - a for a, b in itertools.pairwise(times)], text)


async def load(
    url: str, model: str, clients: int, requests: int, repeat: int = 0, hang_up: bool = False
) -> tuple[float, list[Served]]:
    """Seconds until all is answered, and what each request got; prompts are other ones each `repeat`, or they would be
    found read."""
    draw = random.Random(1000 * repeat + clients)
    prompts = [["".join(chr(FIRST + draw.randrange(CONFIG.vocab_size)) for _ in range(draw.randint(16, 256)))
                for _ in range(requests)] for _ in range(clients)]

    async def one(number: int) -> list[Served]:
        return [await ask(client, model, prompt, hang_up and number % 2 == 1) for prompt in prompts[number]]

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        started = time.perf_counter()
        served = await asyncio.gather(*(one(number) for number in range(clients)))
        return time.perf_counter() - started, [each for client_served in served for each in client_served]


def figures(seconds: float, served: list[Served]) -> dict[str, float]:
    firsts, gaps = [each.first for each in served], [gap for each in served for gap in each.gaps]

    def p95(values: list[float]) -> float:
        return sorted(values)[math.ceil(0.95 * (len(values) - 1))]

    return {"tokens_per_second": TOKENS * len(served) / seconds,
            "first_ms": 1e3 * statistics.median(firsts), "first_p95_ms": 1e3 * p95(firsts),
            "between_ms": 1e3 * statistics.median(gaps), "between_p95_ms": 1e3 * p95(gaps)}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="figures as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs: dict[str, dict[int, list[dict[str, float]]]] = {}
    said: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        directory = Path(scratch) / "model"
        export(directory)
        names = ("ours", "transformers serve", "transformers serve --continuous-batching")
        logs = {name: Path(scratch) / f"{number}.log" for number, name in enumerate(names)}
        urls = {name: stack.enter_context(serve(name, directory, logs[name])) for name in names}
        for name, url in urls.items():
            try:
                if url is None:
                    raise RuntimeError("did not start")
                asyncio.run(asyncio.wait_for(load(url, str(directory), 2, 1), 60))        # not timed
                runs[name] = {clients: [] for clients in LOADS}
            except Exception as error:
                said[name] = f"{error!r}: {' '.join(logs[name].read_text().split())[-600:]}"
        for repeat in range(1, options.repeats + 1):
            for name, own in runs.items():
                for clients in own:
                    try:
                        answered = asyncio.run(load(urls[name] or "", str(directory), clients, LOADS[clients],
                                                    repeat))
                        own[clients].append(figures(*answered))
                        print(f"{name}, {clients} clients: {own[clients][-1]}", file=sys.stderr, flush=True)
                    except (RuntimeError, httpx.HTTPError) as error:
                        said[f"{name}, {clients} clients"] = repr(error)
        if "ours" in runs:
            _, whole = asyncio.run(load(urls["ours"] or "", str(directory), 8, 1))
            _, some = asyncio.run(load(urls["ours"] or "", str(directory), 8, 1, hang_up=True))
            kept = sum(a.text == b.text for a, b in zip(whole[::2], some[::2], strict=True))
            said["hang up"] = f"4 of 8 clients hung up; of the other 4 texts {kept} are as without"
    print(f"torch {version('torch')}, transformers {version('transformers')}, {torch.get_num_threads()} threads; "
          f"{options.repeats} repeats, median (lowest to highest)\n\n| | clients | tokens/s | first token ms | its p95 "
          "| between tokens ms | its p95 |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, own in runs.items():
        for clients, found in own.items():
            if found:
                cells = [spread([run[key] for run in found]) for key in found[0]]
                print(f"| {name} | {clients} | {' | '.join(cells)} |")
    for name, words in said.items():
        print(f"\n{name}: {words}")
    if options.out:
        options.out.write_text(json.dumps({"runs": runs, "said": said}, indent=2) + "\n")


if __name__ == "__main__":
    main()
