"""Run a stage's job on its GPUs: in this process, or in many by torchrun or Slurm, and wait for it.

The stage stays one process that reads parameters and writes outputs; the processes it starts run
`stages.frame.worker` on a job file, and leave their result beside it. Every node must see the repository, the data
and `.scratch` under the same paths.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from pydantic import Field, model_validator

from model.config import ModelError, Section
from stages.frame import worker
from stages.frame.common import Progress, die_with_parent

RENDEZVOUS_PORT = 29_400
SECONDS_BETWEEN_LOOKS = 2.0
ANSWER = 60                 # seconds that a program of Slurm's has to answer
SILENT = 900.0              # seconds that accounting may have nothing to say, as while its database restarts
# How a Slurm job may end through no fault of its own: it is submitted again and goes on from its resume state.
RESUBMITTED = ("TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL")


class SlurmJob(Section):
    """What sbatch is told, besides nodes and GPUs."""

    minutes: int = Field(default=240, ge=1)                     # a job's limit; the run may take several jobs
    partition: str | None = None
    account: str | None = None
    directives: list[str] = Field(default_factory=list)         # more of them, as in `--exclusive`
    setup: list[str] = Field(default_factory=list)              # shell lines before srun: modules, containers


class LauncherConfig(Section):
    """Processes of pretraining, compression, evaluation and the benchmark: one GPU each, on one or several nodes.

    Attributes:
        kind: `here` is this process alone; `torchrun` starts them from here; `slurm` submits a job that does.
        rendezvous: `host:port` at which the nodes of a torchrun of several meet; the same command runs on each.
    """

    kind: Literal["here", "torchrun", "slurm"] = "here"
    nodes: int = Field(default=1, ge=1)
    processes_per_node: int = Field(default=1, ge=1)
    rendezvous: str | None = None
    slurm: SlurmJob = SlurmJob()

    @model_validator(mode="after")
    def here_is_one_process(self) -> LauncherConfig:
        """Raise ValueError for more processes than `kind` starts."""
        if self.kind == "here" and self.nodes * self.processes_per_node > 1:
            raise ValueError(f"kind `here` is one process, not {self.nodes} x {self.processes_per_node}\n"
                             "Set kind to torchrun or slurm, or nodes and processes_per_node to 1.")
        return self

    @model_validator(mode="after")
    def rendezvous_has_an_effect(self) -> LauncherConfig:
        """Raise ValueError for a place to meet of nodes that do not meet there."""
        if self.rendezvous and (self.kind != "torchrun" or self.nodes == 1):
            raise ValueError(f"rendezvous ({self.rendezvous}) is for torchrun of several nodes, not for kind "
                             f"`{self.kind}` of {self.nodes}\nLeave it out, or set kind to torchrun and nodes.")
        return self

    @property
    def processes(self) -> int:
        """Processes of one job, over all nodes."""
        return 1 if self.kind == "here" else self.nodes * self.processes_per_node

    @property
    def gpus_here(self) -> int:
        """GPUs of this machine that a job takes; a Slurm job has its own."""
        return {"here": 1, "torchrun": self.processes_per_node, "slurm": 0}[self.kind]


def launch(launcher: LauncherConfig, job: dict[str, Any], directory: Path, name: str) -> dict[str, Any]:
    """Run `stages.frame.worker` on `job`, here or in all the launcher's processes; blocks.

    Args:
        launcher: how many processes, where.
        job: arguments of the worker, as JSON.
        directory: of the job file, its result and Slurm's log; the stage's scratch.
        name: of the job, for Slurm's queue.
    Returns:
        What the worker wrote as its result.
    Raises:
        ModelError: the processes ended without a result, with what they said.
    """
    if launcher.kind == "here":
        return worker.run(job, Progress())
    file, result, error = (directory.absolute() / f"job{end}" for end in (".json", "-result.json", "-error.txt"))
    for old in (result, error):
        old.unlink(missing_ok=True)
    file.write_text(json.dumps(job, indent=1) + "\n")
    run = _by_slurm if launcher.kind == "slurm" else _by_torchrun
    said = run(launcher, file, name)
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    if error.exists():
        raise ModelError(error.read_text())
    raise ModelError(f"{name} on {launcher.processes} processes ended without a result: {said}\n"
                     "The log above says more. The same command goes on from the last resume state.")


def torchrun_command(launcher: LauncherConfig, job: Path, rendezvous: str | None, identity: str) -> list[str]:
    """The command of one node, in which torchrun starts that node's processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={launcher.nodes}",
               f"--nproc-per-node={launcher.processes_per_node}"]
    if rendezvous:
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", f"--rdzv-id={identity}"]
    else:
        command += ["--standalone"]
    return [*command, "-m", "stages.frame.worker", str(job)]


def _by_torchrun(launcher: LauncherConfig, job: Path, name: str) -> str:
    if launcher.nodes > 1 and not launcher.rendezvous:
        raise ModelError(f"runtime.launcher: torchrun on {launcher.nodes} nodes needs `rendezvous`, where they meet.\n"
                         "Name it as host:port, or let Slurm start them (kind: slurm).")
    command = torchrun_command(launcher, job, launcher.rendezvous if launcher.nodes > 1 else None, name)
    if launcher.nodes > 1:
        print(f"Waiting for the other {launcher.nodes - 1} nodes. Run this on each: {shlex.join(command)}", flush=True)
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)     # ended as one group

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        os.killpg(process.pid, signal.SIGTERM)
        sys.exit(128 + number)

    with _on_stop(stop), process:       # waited for last: `stop` runs within a `wait`, and a second one would never end
        status = process.wait()
    return f"torchrun ended with status {status}."


def slurm_script(launcher: LauncherConfig, job: Path, name: str) -> str:
    """The batch script: one torchrun a node, which meet at the first."""
    slurm = launcher.slurm
    directives = [
        f"--job-name={name}", f"--nodes={launcher.nodes}", "--ntasks-per-node=1",
        f"--gpus-per-node={launcher.processes_per_node}", f"--time={slurm.minutes}",
        f"--output={job.parent}/slurm-%j.log", f"--chdir={Path.cwd()}",
    ]
    directives += [f"--partition={slurm.partition}"] if slurm.partition else []
    directives += [f"--account={slurm.account}"] if slurm.account else []
    command = shlex.join(torchrun_command(launcher, job, "FIRST", "JOB"))
    command = command.replace("endpoint=FIRST", f'endpoint="$first":{RENDEZVOUS_PORT}')
    command = command.replace("id=JOB", 'id="$SLURM_JOB_ID"')
    return "\n".join([
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in (*directives, *slurm.directives)),
        "set -euo pipefail",
        f"export PYTHONPATH={shlex.quote(os.environ.get('PYTHONPATH', str(Path(__file__).resolve().parents[2])))}",
        *slurm.setup,
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "first=${nodes%%$'\\n'*}",
        f"srun --kill-on-bad-exit=1 {command}",
        "",
    ])


def _by_slurm(launcher: LauncherConfig, job: Path, name: str) -> str:
    if missing := [program for program in ("sbatch", "sacct", "scancel") if not shutil.which(program)]:
        raise ModelError(f"runtime.launcher is slurm, and {', '.join(missing)} cannot be found here.\n"
                         "Run the stage on a login node, or choose another launcher.")
    script = job.with_suffix(".sbatch")
    script.write_text(slurm_script(launcher, job, name))
    under_way = job.with_suffix(".slurm")           # the number of its job
    if under_way.exists():
        left = under_way.read_text()
        print(f"Cancelling Slurm job {left}, which a stage that was killed left.", flush=True)
        if _cancel(left):
            _follow(left, Path(os.devnull))
        else:
            print(f"scancel did not take Slurm job {left}: it is gone, or runs beside the next (`squeue -j {left}`).",
                  flush=True)
    kept: set[Path] | None = None
    while True:
        number = _submit(script)
        under_way.write_text(number)
        print(f"Waiting for Slurm job {number} (`squeue -j {number}`); its log: {job.parent}/slurm-{number}.log",
              flush=True)

        def stop(signum: int, frame: FrameType | None, number: str = number) -> NoReturn:
            if _cancel(number):
                under_way.unlink()
            sys.exit(128 + signum)

        with _on_stop(stop):
            state = _follow(number, job.parent / f"slurm-{number}.log")
        under_way.unlink()
        if state not in RESUBMITTED:
            return f"Slurm job {number} ended as {state}."
        before, kept = kept, {path for end in ("step-*", "*.pt", "*.json") for path in job.parent.rglob(end)}
        if state == "TIMEOUT" and kept == before:
            raise ModelError(f"Slurm job {number} and the one before it ran out of {launcher.slurm.minutes} minutes "
                             "with nothing new to go on from.\nRaise runtime.launcher.slurm.minutes, or lower "
                             "checkpoint_every.")
        print(f"Slurm job {number} ended as {state}: going on in another.", flush=True)


def _submit(script: Path) -> str:
    """The number of the job that sbatch makes of `script`."""
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    if done.returncode or not (found := re.match(r"\d+", done.stdout)):
        said = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
        raise ModelError(f"sbatch refused {script}: {said}\nCorrect runtime.launcher in params.yaml.")
    return found[0]


def _cancel(number: str) -> bool:
    """Whether Slurm knows the job, which it is told to end. Who stops a stage may soon kill it and all that it started:
    not this."""
    with suppress(subprocess.TimeoutExpired):
        return not subprocess.run(["scancel", number], timeout=ANSWER, start_new_session=True).returncode
    return False


def _follow(number: str, log: Path) -> str:
    """Print the job's log as it grows until sacct calls the job ended. Returns its state.

    Raises:
        ModelError: sacct fails at first, or, for a quarter of an hour, fails again or knows no such job.
    """
    position, answered, told, words = 0, -math.inf, 0.0, list[str]()
    while True:
        said = "it knows none of that number"
        try:
            asked = subprocess.run(["sacct", "-j", number, "-X", "-n", "-P", "-o", "State"], capture_output=True,
                                   text=True, timeout=ANSWER, check=True)
            words = asked.stdout.split()            # `CANCELLED by 1000` is one state; none yet means not recorded
            if words or answered == -math.inf:
                answered = time.monotonic()
        except subprocess.SubprocessError as error:
            said = " ".join(str(getattr(error, "stderr", "") or error).split())
            if told != answered != -math.inf:
                print(f"sacct does not answer, the job is waited for all the same: {said}", file=sys.stderr, flush=True)
            told = answered
        if time.monotonic() - answered > SILENT:
            raise ModelError(f"sacct does not say what became of Slurm job {number}: {said}\nThe job goes on; the "
                             "stage needs Slurm's accounting to wait for it.")
        if log.exists():
            with log.open(errors="replace") as stream:
                stream.seek(position)
                print(stream.read(), end="", flush=True)
                position = stream.tell()
        if words and words[0] not in ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED"):
            return words[0]
        time.sleep(SECONDS_BETWEEN_LOOKS)


@contextmanager
def _on_stop(handler: Callable[[int, FrameType | None], NoReturn]) -> Iterator[None]:
    """While it lasts, SIGTERM and SIGINT call `handler`: what was started elsewhere must not outlive the stage."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
