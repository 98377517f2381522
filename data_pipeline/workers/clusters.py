"""Backends of `data_pipeline.workers.executor` that hand calls to a cluster's scheduler: Dask, Ray, Slurm.

None retries by itself: what happens after a worker's death is decided in one place, `Workers.map`.
"""

from __future__ import annotations

import os
import queue
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.config import DataError, ExecutorConfig
from data_pipeline.workers.executor import ONE_THREAD, Backend, CallResult, Function, call

SECONDS_BETWEEN_LOOKS = 0.2     # at Slurm jobs and Dask's workers
# Seconds a Dask worker is left alone at first: killed before its nanny heard that it runs, it has no successor.
NEW_WORKER = 0.5
WITHOUT_WORKERS = 300           # seconds


class Dask(Backend):
    """A Dask scheduler's workers, or as many processes here.

    A worker has no more calls than threads. The scheduler itself gives out all it has, while a dead worker's successor
    starts to the one that is left, and a death there takes those along that only waited.
    """

    def __init__(self, config: ExecutorConfig):
        import dask
        from distributed import Client, LocalCluster

        self.slots = config.workers
        self.done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.waiting: list[tuple[int, Function, Any]] = []
        self.futures: dict[int, tuple[str, Any]] = {}           # the worker's address beside it
        self.looked = time.monotonic()                          # and there was a worker
        # A cluster gives a worker up that is not back when this is over, even one that is starting again.
        dask.config.set({"distributed.scheduler.allowed-failures": 0,
                         "distributed.deploy.lost-worker-timeout": "1 day"})
        self.cluster = None
        if config.dask.scheduler is None:
            self.cluster = LocalCluster(n_workers=config.workers, threads_per_worker=1, processes=True,
                                        dashboard_address=None, memory_limit=0, env=ONE_THREAD)
        try:
            self.client = Client(self.cluster or config.dask.scheduler)
        except (OSError, ValueError) as error:
            raise DataError(
                f"runtime.dask.scheduler: {config.dask.scheduler} does not answer ({error}).\n"
                "Start the scheduler or correct its address in params.yaml."
            ) from None
        self.since = dict.fromkeys(self.client.nthreads(), 0.0)         # workers were first seen

    def start(self, calls: list[tuple[int, Function, Any]]) -> None:
        self.waiting += calls

    def finished(self, seconds: float) -> list[tuple[int, CallResult]]:
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            self._place()
            with suppress(queue.Empty):
                number = self.done.get(timeout=SECONDS_BETWEEN_LOOKS)
                return [(number, _answer_of(self.futures.pop(number)[1]))]
        return []

    def _place(self) -> None:
        """Hand waiting calls to workers that have a thread for them.

        Raises:
            DataError: there has been no worker for a while. Calls of one that left in order wait for the next one.
        """
        now, threads = time.monotonic(), self.client.nthreads()
        if threads:
            self.looked = now
        elif now - self.looked > WITHOUT_WORKERS:
            raise DataError(
                f"runtime.dask: the scheduler has had no worker for {WITHOUT_WORKERS} seconds.\n"
                "Start workers and run the same command again; finished shards are kept."
            )
        self.since = {address: self.since.get(address, now) for address in threads}
        busy = Counter(address for address, _ in self.futures.values())
        free = [address for address, number in threads.items() if now - self.since[address] >= NEW_WORKER
                for _ in range(number - busy[address])]
        for address, (number, function, item) in zip(free, self.waiting, strict=False):
            future = self.client.submit(call, function, item, pure=False, workers=[address], allow_other_workers=True)
            self.futures[number] = address, future
            future.add_done_callback(lambda _, number=number: self.done.put(number))
        del self.waiting[:len(free)]

    def close(self) -> None:
        self.client.close()
        if self.cluster:
            self.cluster.close()


class Ray(Backend):
    """A Ray cluster's workers, or as many processes here."""

    look = "`ray status` says which nodes there are, and what waits for one."

    def __init__(self, config: ExecutorConfig):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self.slots = config.workers
        self.done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.futures: dict[int, Any] = {}
        options: dict[str, Any] = {"log_to_driver": False, "runtime_env": {"env_vars": ONE_THREAD}}
        if config.ray.address is None:
            options |= {"num_cpus": config.workers, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        try:
            ray.init(address=config.ray.address, **options)
        except (OSError, ValueError) as error:
            raise DataError(
                f"runtime.ray.address: no cluster at {config.ray.address} ({error}).\n"
                "Start it (`ray start --head`) or correct the address in params.yaml."
            ) from None
        self.shutdown = ray.shutdown
        self.call = ray.remote(max_retries=0, num_cpus=1)(call)

    def start(self, calls: list[tuple[int, Function, Any]]) -> None:
        for number, function, item in calls:
            self.futures[number] = self.call.remote(function, item).future()
            self.futures[number].add_done_callback(lambda _, number=number: self.done.put(number))

    def finished(self, seconds: float) -> list[tuple[int, CallResult]]:
        with suppress(queue.Empty):
            number = self.done.get(timeout=seconds)
            return [(number, _answer_of(self.futures.pop(number)))]
        return []

    def close(self) -> None:
        self.shutdown()


class Slurm(Backend):
    """A job a call, submitted as arrays; `workers` of them run at a time."""

    look = "`squeue --me` says which of the jobs run, and why others wait."

    def __init__(self, config: ExecutorConfig):
        import submitit

        slurm = config.slurm
        self.slots = config.workers
        self.jobs: dict[int, Any] = {}
        try:
            self.executor = submitit.AutoExecutor(folder=Path(slurm.folder).absolute(), cluster=slurm.cluster)
        except RuntimeError as error:
            raise DataError(
                f"runtime.slurm.cluster: {slurm.cluster} cannot be used here ({' '.join(str(error).split())}).\n"
                "Run on a machine with `sbatch`, or choose another runtime.executor in params.yaml."
            ) from None
        self.executor.update_parameters(
            timeout_min=slurm.timeout_minutes, mem_gb=slurm.memory_gigabytes, cpus_per_task=1, name="nemotron-h-data",
            **({"slurm_partition": slurm.partition} if slurm.partition else {}),
        )

    def start(self, calls: list[tuple[int, Function, Any]]) -> None:
        with self.executor.batch():
            jobs = [self.executor.submit(call, function, item) for _, function, item in calls]
        self.jobs |= {number: job for (number, _, _), job in zip(calls, jobs, strict=True)}

    def finished(self, seconds: float) -> list[tuple[int, CallResult]]:
        started = time.monotonic()
        while not (done := [number for number, job in self.jobs.items() if job.done()]):
            if time.monotonic() - started > seconds:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return [(number, self._answer(self.jobs.pop(number))) for number in done]

    def _answer(self, job: Any) -> CallResult:
        error = job.exception()
        return _lost(error) if error else job.result()

    def close(self) -> None:
        for job in self.jobs.values():
            job.cancel()


def _answer_of(future: Any) -> CallResult:
    """What a call that has ended gave; the worker that holds it may still die before it is fetched."""
    try:
        answer: CallResult = future.result()
    except Exception as error:
        return _lost(error)
    return answer


def _lost(error: BaseException) -> CallResult:
    """`call` raises nothing: what a scheduler reports is a worker's death, or a worker that cannot import the code."""
    if type(error).__name__ in ("KilledWorker", "WorkerCrashedError", "OutOfMemoryError", "UncompletedJobError",
                                "NodeDiedError", "ActorDiedError"):
        return CallResult(killed=True)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return CallResult(error=f"{said[:400]}\nInstall this project at the same path on every worker, or use `local`.")
