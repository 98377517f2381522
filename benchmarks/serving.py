"""`python -m model.serve` under load, beside `transformers serve`: the same export, the same requests, in one run.

    pip install openai                                          # `transformers serve` asks for it
    python -m benchmarks.serving --out serving.json             # three minutes on two cores
    python -m benchmarks.serving --device cuda                  # four minutes

Clients stream greedy texts of 32 tokens after prompts of `--prompts` tokens, one request after another: tokens/s of all
clients together, time to the first token, time between two tokens. Before that half of eight clients hang up after five
tokens: the others' texts must be those they get without, but for what BF16 rounds otherwise in another batch. Weights
are random; speed does not depend on them. On a CPU the model is small and in float32, on a GPU it has 222 million
parameters in BF16. What `--seconds` leave no time for is left out and named. The table comes last.
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
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import httpx
import torch
from tokenizers import Tokenizer, decoders, models

from benchmarks.inference_gpu import SMALL
from model import hub
from model.config import ModelConfig
from model.inference.random_weights import random_model
from stages.frame.common import out_file

CONFIGS = {
    "cpu": ModelConfig(
        pattern="M-M*-M-", hidden_size=256, ffn_hidden_size=768, num_attention_heads=4, num_query_groups=2,
        head_dim=64, mamba_num_heads=8, mamba_head_dim=64, mamba_state_dim=64, mamba_num_groups=2, chunk_size=128,
        sequence_length=512, vocab_size=8192, init_method_std=0.06,
    ),
    "cuda": SMALL,
}
DTYPES: dict[str, Literal["float32", "bfloat16"]] = {"cpu": "float32", "cuda": "bfloat16"}
SECONDS = {"cpu": 900, "cuda": 240}
NAMES = ("ours", "transformers serve", "transformers serve --continuous-batching")
FIRST, DRAWN = 0x4E00, 8192                 # every token is a character of its own, so that every token is an event
TOKENS = 32
LOADS = {1: 4, 8: 2, 64: 1}             # requests a client
HANG_UP_AFTER = 5
PATIENCE = 120                          # seconds, to start and to end what is not timed


class Served(NamedTuple):
    """What a client saw: seconds to the first token, between tokens, and the text."""

    first: float
    gaps: list[float]
    text: str


class Load(NamedTuple):
    clients: int
    requests: int           # a client
    prompts: tuple[int, int]


Runs = dict[str, dict[int, list[dict[str, float]]]]


def export(directory: Path, device: str) -> None:
    """The model, whose texts have no end but the limit."""
    config, none = CONFIGS[device], {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    state = random_model(config, getattr(torch, DTYPES[device])).state_dict()
    hub.save(directory, config, state, {}, DTYPES[device], special_tokens=none)
    tokens = {chr(FIRST + token): token for token in range(config.vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


class Server:
    """A process that serves the model of `directory` at `url`, or tries to; what it says goes to `log`."""

    def __init__(self, name: str, directory: Path, device: str, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.model, self.url, self.log = str(directory), f"http://127.0.0.1:{port}", log
        if name == "ours":
            command = ["-m", "model.serve", "--model", f"{directory}={directory}", "--rows", "64"]
        else:
            command = ["-m", "transformers.cli.transformers", *name.split()[1:], str(directory),
                       "--dtype", DTYPES[device]]
        with log.open("w") as stream:
            self.process = subprocess.Popen([sys.executable, *command, "--device", device, "--port", port],
                                            stdout=stream, stderr=stream)

    def wait(self, deadline: float) -> None:
        """Until it answers. Raises RuntimeError where it ends, or does not start by `deadline`."""
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.2)
        raise RuntimeError("did not start")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


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
    server: Server, deadline: float, asked: Load, repeat: int = 0, hang_up: bool = False
) -> tuple[float, list[Served]]:
    """Seconds until all is answered, and what each request got; prompts are other ones each `repeat`, or they would be
    found read. Raises TimeoutError at `deadline`."""
    draw = random.Random(1000 * repeat + asked.clients)
    prompts = [["".join(chr(FIRST + draw.randrange(DRAWN)) for _ in range(draw.randint(*asked.prompts)))
                for _ in range(asked.requests)] for _ in range(asked.clients)]

    async def one(number: int) -> list[Served]:
        return [await ask(client, server.model, prompt, hang_up and number % 2 == 1) for prompt in prompts[number]]

    limits = httpx.Limits(max_connections=None)
    async with (asyncio.timeout(deadline - time.monotonic()),
                httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client):
        started = time.perf_counter()
        served = await asyncio.gather(*(one(number) for number in range(asked.clients)))
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


def measure(
    servers: dict[str, Server], deadline: float, repeats: int, loads: list[Load]
) -> tuple[Runs, dict[str, str]]:
    """Figures of every server and number of clients, as many as there is time for; and what is to be said.

    Not timed: one, two and eight requests of each, and of ours `loads`, since it compiles for groups of several sizes.
    """
    runs: Runs = {}
    said: dict[str, str] = {}
    for name, server in servers.items():
        try:
            server.wait(min(deadline, time.monotonic() + PATIENCE))
            for asked in [Load(clients, 1, loads[0].prompts) for clients in (1, 2, 8)] + loads * (name == "ours"):
                asyncio.run(load(server, min(deadline, time.monotonic() + PATIENCE), asked))
            if name == "ours":
                said["hang up"] = asyncio.run(hang_up(server, deadline, Load(8, 1, loads[0].prompts)))
            runs[name] = {asked.clients: [] for asked in loads}
        except Exception as error:
            said[name] = f"{error!r}: {' '.join(server.log.read_text().split())[-600:]}"
    took: dict[tuple[str, Load], float] = {}
    for repeat, (name, own), asked in itertools.product(range(1, repeats + 1), runs.items(), loads):
        cell, found = f"{name}, {asked.clients} clients", own[asked.clients]
        if time.monotonic() + took.get((name, asked), 0) > deadline:
            said[cell] = f"no time for more than {len(found)} repeats"
            continue
        try:
            took[name, asked], served = asyncio.run(load(servers[name], deadline, asked, repeat))
            found.append(figures(took[name, asked], served))
            print(f"{cell}: {found[-1]}", file=sys.stderr, flush=True)
        except (RuntimeError, httpx.HTTPError, TimeoutError) as error:
            said[cell] = repr(error)
    return runs, said


async def hang_up(server: Server, deadline: float, asked: Load) -> str:
    _, whole = await load(server, deadline, asked)
    _, some = await load(server, deadline, asked, hang_up=True)
    kept = sum(a.text == b.text for a, b in zip(whole[::2], some[::2], strict=True))
    return f"4 of 8 clients hung up; of the other 4 texts {kept} are as without"


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="figures as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs=2, default=(16, 256), metavar=("FROM", "TO"), help="their tokens")
    parser.add_argument("--device", choices=list(CONFIGS), default="cpu")
    parser.add_argument("--seconds", type=float, help=f"for all (default: {SECONDS})")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        directory = Path(scratch) / "model"
        export(directory, options.device)
        servers = {name: stack.enter_context(contextlib.closing(
            Server(name, directory, options.device, Path(scratch) / f"{number}.log")))
            for number, name in enumerate(NAMES)}
        loads = [Load(clients, requests, tuple(options.prompts)) for clients, requests in LOADS.items()]
        runs, said = measure(servers, started + (options.seconds or SECONDS[options.device]), options.repeats, loads)
    if options.out:
        options.out.write_text(json.dumps({"runs": runs, "said": said}, indent=2) + "\n")
    for name, words in said.items():
        print(f"{name}: {words}\n")
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {version('torch')}, transformers {version('transformers')}, {machine}; median (lowest to highest) of "
          f"{options.repeats} repeats at most\n\n| | clients | tokens/s | first token ms | its p95 | between tokens ms "
          "| its p95 |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, own in runs.items():
        for clients, found in own.items():
            if found:
                cells = [spread([run[key] for run in found]) for key in found[0]]
                print(f"| {name} | {clients} | {' | '.join(cells)} |")
    if failed := [name for name in servers if not any(runs.get(name, {}).values())]:
        raise SystemExit(f"{', '.join(failed)}: no figures; why is said above.")


if __name__ == "__main__":
    main()
