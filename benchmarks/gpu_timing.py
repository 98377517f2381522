"""How the GPU benchmarks measure: times, the machine's ceilings, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.autotuner import Autotuner, Config
from triton.testing import do_bench

_CALLS = 24                             # in a captured graph
_REPLAYS, _MILLISECONDS = (3, 15), 500  # of it: within these bounds, so many that it takes about this time


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of `triton.testing.do_bench`, which empties the second-level cache before each call."""
    return float(do_bench(run, warmup=50, rep=200, return_mode="median"))


def graph_milliseconds(runs: Sequence[Callable[[], Any]]) -> float:
    """A call's time within a CUDA graph that makes `runs` (on different tensors, so that none stays cached) in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in (*runs, *runs):              # compiles
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph, rounds = torch.cuda.CUDAGraph(), _CALLS // len(runs)
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    graph.replay()
    times: list[float] = []
    while len(times) < _REPLAYS[0] or (len(times) < _REPLAYS[1] and sum(times) < _MILLISECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) / (rounds * len(runs))


def eager_milliseconds(run: Callable[[], Any]) -> float:
    """A call's time launched from Python, awaited only after many: of small tensors, what the host takes."""
    times: list[float] = []
    for _ in range(_REPLAYS[1]):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(_CALLS):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times) / _CALLS


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy, operations a second of a BF16 matrix product."""
    source = torch.randn(2**28, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3


def extra_gib(run: Callable[[], Any], kept: int) -> float:
    """Most memory (GiB) that a call takes beyond what was allocated before and the `kept` bytes of its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**30


@contextmanager
def parallel_compilation() -> Iterator[None]:
    """Peers' kernels that choose among launch parameters have all of them compiled at once, not one after another."""
    original = Autotuner.prune_configs

    def prune_and_compile(self: Autotuner, kwargs: dict[str, Any]) -> list[Config]:
        configs = original(self, kwargs)
        options = {name: value for name, value in kwargs.items() if name != "warmup"}
        with ThreadPoolExecutor() as executor, AsyncCompileMode(executor, ignore_errors=True):
            for config in configs:
                self.fn.warmup(*self.nargs.values(), **options, **config.all_kwargs())
        return configs

    Autotuner.prune_configs = prune_and_compile
    try:
        yield
    finally:
        Autotuner.prune_configs = original
