"""Work on shards, spread over processes here, Dask, Ray or Slurm, by one setting (`runtime.executor`).

A function is called once for each item, in a worker that shares nothing with this process but the file system; what it
gives back is small. A worker that dies takes one item with it, which is tried again; an item that fails does not stop
the others. Processes are spawned, never forked: polars in a forked child waits for ever on a lock its parent held.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar

from data_pipeline.config import DataError, ExecutorConfig

Item = TypeVar("Item")
Result = TypeVar("Result")
Function = Callable[[Any], Any]

ATTEMPTS = 3                # of an item whose worker dies
SECONDS_BETWEEN_WORDS = 600.0       # while no item ends
AHEAD = 4                   # times the slots: items done before their turn, at most
ONE_THREAD = dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


class CallResult(NamedTuple):
    """What became of a call: `killed`, or `error` (with the traceback where it is nobody's mistake), or the result."""

    result: Any = None
    error: str | None = None
    traceback: str = ""
    killed: bool = False


class Outcome(NamedTuple, Generic[Item, Result]):
    """What came of one call."""

    item: Item
    result: Result          # None where `error` is not
    error: str | None       # two lines


def call(function: Function, item: Any) -> CallResult:
    """function(item) in a worker; an exception becomes text, so that it need not be pickled."""
    try:
        return CallResult(function(item))
    except DataError as error:
        return CallResult(error=str(error))
    except OSError as error:
        return CallResult(error=f"{error}\nMend that and run the same command again; finished shards are kept.")
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return CallResult(error=f"{said}\nFinished shards are kept; the traceback is above.",
                      traceback=traceback.format_exc())


class Backend(ABC):
    """Where calls are made. `start` hands some over; `finished` waits until at least one has ended."""

    slots: int              # calls worth having under way at once

    @property
    def look(self) -> str:
        """Where to look, for who waits long."""
        return ""

    @abstractmethod
    def start(self, calls: list[tuple[int, Function, Any]]) -> None:
        """Hand over calls: number, function, item."""

    @abstractmethod
    def finished(self, seconds: float) -> list[tuple[int, CallResult]]:
        """The numbers and answers of calls that have ended, as soon as there are some; none after `seconds`."""

    @abstractmethod
    def close(self) -> None:
        """End the workers, whatever they are at."""


class Workers:
    """Calls a function on items, whatever the backend."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.numbers = itertools.count()        # of calls
        self.under_way: set[int] = set()        # perhaps for a map that nobody asks for more

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], name: Callable[[Item], str]
    ) -> Iterator[Outcome[Item, Result]]:
        """The outcome of function(item) for each item, in order.

        Items are taken one at a time as workers become free, so that `items` may stop when earlier results say so.

        Args:
            name: what an item is called in messages.
        """
        waiting = iter(items)
        started: dict[int, Item] = {}           # and not yet given back
        attempts: Counter[int] = Counter()
        answers: dict[int, CallResult] = {}
        again: list[int] = []                   # killed, to be started anew
        while True:
            free = min(self.backend.slots - len(self.under_way) - len(again), AHEAD * self.backend.slots - len(started))
            new = dict(zip(itertools.islice(self.numbers, max(0, free)), waiting, strict=False))
            started |= new
            if not started and not self.under_way:
                return
            if ready := [*again, *new]:
                attempts.update(ready)
                self.under_way.update(ready)
                self.backend.start([(number, function, started[number]) for number in ready])
            again = []
            while not (done := self.backend.finished(SECONDS_BETWEEN_WORDS)):
                print(f"Waiting for workers: none of {len(self.under_way)} items under way has ended for "
                      f"{SECONDS_BETWEEN_WORDS:.0f} seconds. {self.backend.look}", file=sys.stderr, flush=True)
            for number, answer in done:
                self.under_way.discard(number)
                if number not in started:
                    continue
                answer = _final(answer, name(started[number]), attempts[number])
                if answer.killed:
                    again.append(number)
                else:
                    answers[number] = answer
            while started and (turn := next(iter(started))) in answers:
                answer = answers.pop(turn)
                yield Outcome(started.pop(turn), answer.result, answer.error)

    def all(
        self, function: Callable[[Item], Result], items: Iterable[Item], name: Callable[[Item], str]
    ) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, in order. Where some fail the others are done first; DataError then names one."""
        failures = []
        for outcome in self.map(function, items, name):
            if outcome.error is None:
                yield outcome.item, outcome.result
            else:
                failures.append((name(outcome.item), outcome.error))
        refuse(failures)


def refuse(failures: list[tuple[str, str]]) -> None:
    """Raise DataError for the first of these (name, two lines), if there is one; the rest are printed."""
    for name, error in failures[1:]:
        print(DataError(f"{name}: {error}"), file=sys.stderr, flush=True)
    if failures:
        name, error = failures[0]
        raise DataError(f"{name}: {error}")


def _final(answer: CallResult, name: str, attempt: int) -> CallResult:
    """`answer`, or what is made of the last of several deaths; says what a person watching should know."""
    if answer.traceback:
        print(answer.traceback, file=sys.stderr, flush=True)
    if not answer.killed:
        return answer
    if attempt < ATTEMPTS:
        print(f"{name}: its worker was killed; trying again ({attempt + 1} of {ATTEMPTS}).", file=sys.stderr,
              flush=True)
        return answer
    return CallResult(error=f"its worker was killed {ATTEMPTS} times, most likely for want of memory.\n"
                        "Lower annotate.shard_megabytes or runtime.workers in params.yaml and run the same command "
                        "again.")


@contextmanager
def workers(config: ExecutorConfig) -> Iterator[Workers]:
    """Workers as configured; ended with the block. Raises DataError for a cluster that cannot be had."""
    backend = _backend(config)
    try:
        yield Workers(backend)
    finally:
        backend.close()


def _backend(config: ExecutorConfig) -> Backend:
    if config.executor == "local":
        return InProcess() if config.workers == 1 else Processes(config.workers)
    from data_pipeline.workers import clusters

    kinds: dict[str, Callable[[ExecutorConfig], Backend]] = {
        "dask": clusters.Dask, "ray": clusters.Ray, "slurm": clusters.Slurm
    }
    return kinds[config.executor](config)


class InProcess(Backend):
    """One worker, the calling process."""

    slots = 1

    def __init__(self) -> None:
        self.answers: list[tuple[int, CallResult]] = []

    def start(self, calls: list[tuple[int, Function, Any]]) -> None:
        self.answers += [(number, call(function, item)) for number, function, item in calls]

    def finished(self, seconds: float) -> list[tuple[int, CallResult]]:
        done, self.answers = self.answers, []
        return done

    def close(self) -> None:
        pass


class Processes(Backend):
    """Spawned processes with a pipe each: when one dies, it is known what it worked on."""

    def __init__(self, count: int):
        self.slots = count
        self.context = multiprocessing.get_context("spawn")
        self.idle: list[tuple[Any, Connection]] = []
        self.busy: dict[Connection, tuple[int, Any]] = {}

    def start(self, calls: list[tuple[int, Function, Any]]) -> None:
        for number, function, item in calls:
            process, pipe = self.idle.pop() if self.idle else self._spawn()
            with suppress(OSError):         # it died while idle: `finished` hears of it from the pipe
                pipe.send((function, item))
            self.busy[pipe] = number, process

    def _spawn(self) -> tuple[Any, Connection]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    @property
    def look(self) -> str:
        pids = ", ".join(str(process.pid) for _, process in self.busy.values())
        return f"They are with processes {pids}: `kill -9` one that hangs, and its item is tried again."

    def finished(self, seconds: float) -> list[tuple[int, CallResult]]:
        done = []
        for pipe in wait(list(self.busy), seconds):
            assert isinstance(pipe, Connection)
            number, process = self.busy.pop(pipe)
            try:
                done.append((number, pipe.recv()))
                self.idle.append((process, pipe))
            except (EOFError, OSError):
                process.join()
                done.append((number, CallResult(killed=True)))
        return done

    def close(self) -> None:
        for process in [process for process, _ in self.idle] + [process for _, process in self.busy.values()]:
            process.kill()
            process.join()


def _serve(pipe: Connection) -> None:
    """A worker's life: calls until the pipe is closed. One thread of each kind, as processes share the cores."""
    os.environ |= ONE_THREAD
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is the parent's to handle: it ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with suppress(EOFError):
        while True:
            pipe.send(call(*pipe.recv()))


def _exit_with_parent() -> None:
    """A worker does not outlive a parent that was killed, even in the middle of a call."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
