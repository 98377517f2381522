"""The jobs of `benchmarks.fp8_parity`: what each trains, its line of the CSV file, and the scheduler that runs them."""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

METRICS = {"training_mean": "training loss", "validation": "validation loss"}  # nats; the tail's mean, the last one
COLUMNS = ("setting", "architecture", "seed", "arm", "start", "trunk", *METRICS, "unigram_loss", "parameters", "tokens",
           "seconds", "at_once", "gpus", "date", "commit", "machine", "python", "torch", "megatron",
           "transformer_engine")
NUMBERS = ("seed", "start", *METRICS, "unigram_loss", "parameters", "tokens", "seconds", "at_once", "gpus")
Row = dict[str, Any]


class Job(NamedTuple):
    """One model to train."""

    setting: str
    architecture: str
    seed: int
    arm: str = "bf16"
    start: float = 0.0

    @property
    def trunk(self) -> Job:
        """The BF16 run beside it."""
        return self._replace(arm="bf16", start=0.0)

    def __str__(self) -> str:
        return f"{self.setting} {self.architecture} seed {self.seed} {self.arm}@{self.start:g}"


def read_rows(path: Path) -> list[Row]:
    """Finished models; of one trained twice the later.

    Raises SystemExit where the file is not of these columns."""
    if not path.exists():
        return []
    found: dict[Job, Row] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise SystemExit(f"{path}: its columns are not those of this study.\nGive another --out, or remove it.")
        for row in reader:
            if None in row.values():            # the last line of a killed process
                continue
            row |= {name: float(row[name]) for name in NUMBERS}
            row["seed"] = int(row["seed"])
            found[job_of(row)] = row
    return list(found.values())


def job_of(row: Row) -> Job:
    return Job(row["setting"], row["architecture"], row["seed"], row["arm"], row["start"])


def append_row(path: Path, row: Row) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


class Scheduler:
    """Runs jobs as processes, some at once, within a time; keeps what each finished.

    Args:
        command: a job's, which prints its result as a last line of JSON.
        slots: the environment of each process that may run at once.
        out: the CSV file that results are appended to.
        seconds: within which everything must end; None for no limit.
        extra: further columns of every row.
        ready: whether the state that a job branches from is there; else its trunk is trained first, and all that
            branched from an earlier one again: no pair is of two BF16 runs.
        logs: directory for what the processes print.
    """

    POLL = 0.2

    def __init__(
        self, command: Callable[[Job], Sequence[str]], slots: Sequence[dict[str, str]], out: Path,
        seconds: float | None, extra: Row | None = None, ready: Callable[[Job], bool] = lambda _: True,
        logs: Path = Path(".scratch/fp8-parity/logs"),
    ):
        self.command, self.slots, self.out, self.extra, self.ready = command, list(slots), out, extra or {}, ready
        self.end = math.inf if seconds is None else time.monotonic() + seconds
        self.logs = logs
        self.failed: dict[Job, str] = {}
        self.left: list[Job] = []               # not started, for want of time or of a trunk

    def run(self, jobs: Iterable[Job]) -> None:
        """Returns once all that fits has ended."""
        rows = {job_of(row): row["seconds"] for row in read_rows(self.out)}
        wanted = list(dict.fromkeys(jobs))
        lost = {job.trunk for job in wanted if job.start and job not in rows and not self.ready(job)}
        waiting = [job for job in dict.fromkeys(each for job in wanted for each in (job.trunk, job))
                   if job in lost or (job in wanted and (job not in rows or (job.start and job.trunk in lost)))]
        pending = set(waiting)
        running: dict[Job, tuple[subprocess.Popen[str], dict[str, str], float]] = {}
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            while True:
                for job in [job for job, (process, *_) in running.items() if process.poll() is not None]:
                    process, slot, started = running.pop(job)
                    self.slots.append(slot)
                    pending.discard(job)
                    self._finish(job, process, started, rows)
                startable = [job for job in waiting if self._fits(job, waiting, rows) and job.trunk not in self.failed
                             and (job.trunk == job or job.trunk not in pending)]
                while self.slots and startable:
                    job = startable.pop(0)
                    waiting.remove(job)
                    running[job] = self._start(job, self.slots.pop(0))
                if not running and not startable:
                    break
                if time.monotonic() > self.end:
                    break
                time.sleep(self.POLL)
        finally:
            for job, (process, *_) in running.items():
                process.kill()
                process.wait()
                self.failed[job] = "stopped at the time limit; what its kind takes is known less well than it should"
            self.left = waiting

    def _start(self, job: Job, slot: dict[str, str]) -> tuple[subprocess.Popen[str], dict[str, str], float]:
        with self._log(job).open("w") as log:
            process = subprocess.Popen(self.command(job), stdout=log, stderr=subprocess.STDOUT, text=True,
                                       env=os.environ | slot)
        return process, slot, time.monotonic()

    def _finish(self, job: Job, process: subprocess.Popen[str], started: float, rows: dict[Job, float]) -> None:
        seconds, lines = time.monotonic() - started, self._log(job).read_text().splitlines()
        if process.returncode:
            self.failed[job] = "\n    ".join(line for line in lines[-2:])
            print(f"{job}: FAILED ({process.returncode}), {self._log(job)}\n    {self.failed[job]}", flush=True)
            return
        result = json.loads(lines[-1])
        rows[job] = seconds
        append_row(self.out, job._asdict() | self.extra | result | {
            "seconds": round(seconds, 1), "date": datetime.datetime.now(datetime.UTC).date().isoformat()})
        print(f"{job}: {seconds:.0f} s, " + ", ".join(f"{name} {result[name]:.4f}" for name in METRICS), flush=True)

    def _fits(self, job: Job, waiting: Sequence[Job], rows: dict[Job, float]) -> bool:
        """Whether `job` would end in time, and where others wait for it the shortest of them too."""
        if self.end == math.inf:
            return True
        after = [self._expected(other, rows) for other in waiting if other.trunk == job != other]
        return time.monotonic() + self._expected(job, rows) + min(after, default=0.0) < self.end

    def _expected(self, job: Job, rows: dict[Job, float]) -> float:
        """Seconds of the longest job of its kind so far; else by its share of the steps of what its setting, or any
        other, took longest; nothing where nothing is known."""
        kinds = [[seconds for other, seconds in rows.items() if other._replace(seed=job.seed) == job],
                 *([seconds / (1 - other.start) * (1 - job.start) for other, seconds in rows.items() if same(other)]
                   for same in (lambda other: other.setting == job.setting, lambda _: True))]
        return 1.1 * next((max(kind) for kind in kinds if kind), 0.0)

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job}.log".replace(" ", "-")


def slots_of(at_once: int) -> list[dict[str, str]]:
    """`at_once` processes for every visible GPU, one thread each; a GPU's processes are not neighbours, so that the
    first few start on different GPUs."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        return [threads] * at_once
    return [threads | {"CUDA_VISIBLE_DEVICES": gpu} for _ in range(at_once) for gpu in gpus]
