"""Work spread over processes, results in the order of the items whatever finishes first.

Processes are spawned, never forked: polars in a forked child waits for ever on a lock its parent held. Any
`concurrent.futures` executor (Dask's `Client.get_executor()`, submitit, Ray) can stand in for the pool.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from data_pipeline.config import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor | None]:
    """A pool of `workers` spawned processes; None for one worker: then work is done in this process."""
    if workers == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise DataError(
            "A worker process was killed, most likely for want of memory.\n"
            "Lower `runtime.workers` in params.yaml and run the same command again; finished shards are kept."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One polars thread, as processes share the cores (polars is imported later); and no life after the parent's."""
    os.environ["POLARS_MAX_THREADS"] = "1"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: it holds the queue's other end open itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def ordered_map(
    pool: Executor | None, function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 4
) -> Iterator[Result]:
    """function(item) for each item, in order, at most `ahead` items started before their turn.

    Stop asking, and what has not started never will.
    """
    if pool is None:
        yield from map(function, items)
        return
    remaining = iter(items)
    started: deque[Future[Result]] = deque(pool.submit(function, item) for item in islice(remaining, ahead))
    try:
        while started:
            result = started.popleft().result()
            started.extend(pool.submit(function, item) for item in islice(remaining, 1))
            yield result
    finally:
        for future in started:
            future.cancel()
