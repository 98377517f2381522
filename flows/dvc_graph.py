"""The stage graph, through DVC's command line: what there is, what changed, and running one stage as a process.

DVC owns the graph, the cache and the lock file; this module owns processes. It knows nothing of Prefect. The rules it
keeps, each learnt from a wrong result or a hang:

- a stage writes to a log file, so that nothing that watches it can stop it;
- `dvc --wait-for-lock`, or a stage that ends while another is being hashed loses its finished work; DVC waits without a
  word and without end, for a `dvc push` or what Ctrl-Z stopped, so that who has the lock is said here;
- DVC's per-file locks (`.dvc/tmp/rwlock`) never wait: status is taken once before anything starts, every stage is
  called once, in order, and one flow runs at a time;
- to stop, the stage's processes are terminated and DVC is left alive to release its locks; SIGKILL comes last;
- lock entries of dead processes are dropped after a look at the command line: the number may belong to another by now;
- DVC rewrites `dvc.lock` and its rwlock in place: a kill or a full disk in that moment leaves half a file, which ends
  every later command. So a copy of the last whole `dvc.lock` is kept, and put back;
- what DVC did with a stage stands in no word of its own: the stage's shell marks that the command ran, and what DVC
  restored is younger than that mark;
- DVC trusts times, sizes and modes of files: what it restored from its cache is hashed, and made again where it is not
  what was recorded (`stages.frame.outputs`).
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from ruamel.yaml import YAML

import durable
from flows import PREFECT_HOME, SOCKS
from stages.frame import outputs
from stages.frame.common import die_with_parent, gpu_names

DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]
ENVIRONMENT = {
    "DVC_NO_ANALYTICS": "1",
    "PYTHONUNBUFFERED": "1",
    # DVC runs commands with $SHELL, whatever the user's is. Bash becomes the command, where other shells stay between.
    "SHELL": shutil.which("bash") or "/bin/sh",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    **SOCKS,
}
RWLOCK, DVC_LOCK = Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/lock")
LOCK, LOCK_COPY = Path("dvc.lock"), Path(".dvc/tmp/dvc.lock.whole")
FLOW_LOCK = Path(".dvc/tmp/flow.lock")
STAGE_SHELL = Path(__file__).with_name("bash")
LOGS = Path("logs")
RESUMES = "Run the same command again: it resumes."
SECONDS_TO_UNWIND = 4.0           # of a stage that is told to end, before it is killed
SECONDS_TO_UNLOCK = 3.0           # of DVC after that
BYTES_TO_START = 2**22            # that the directories of a run must have room for
STAGES_AHEAD = 2                  # that get ready for a GPU while another computes on it
SECONDS_TO_WATCH = 5.0            # after a stage's end: where Prefect's server does not answer
SECONDS_BETWEEN_LOOKS = 5.0       # at whether a stage is over its time
NVIDIA_SMI = 60                   # seconds until it is given up
SECONDS_TO_GATHER = 0.5           # in which stages that one other held up come to the queue, in any order


class GraphError(RuntimeError):
    """What keeps the graph from running. Its text is two lines: what is wrong, what to do."""


class StageFailed(RuntimeError):
    """A stage that did not finish. Its text is the cause, then where the log is and how to go on."""


@dataclass(frozen=True)
class Node:
    """One stage of the graph.

    Attributes:
        needs: the stages whose outputs it reads.
        exclusive: it measures time; nothing may run beside it (`meta: {exclusive: true}` in dvc.yaml).
        gpus: how many GPUs it computes on, where there are some (`meta: {gpus: 1}`).
        priority: stages on the longest path from here to the end; the highest starts first.
    """

    name: str
    needs: frozenset[str]
    exclusive: bool
    gpus: int
    priority: int

    @property
    def log(self) -> Path:
        return LOGS / f"{self.name}.log"


@dataclass(frozen=True)
class ProgressLine:
    """The line `step 120/2000 loss 3.412 lr 3.0e-04 tok/s 8123 eta 00:03:41`."""

    step: int
    total: int
    text: str

    @classmethod
    def parse(cls, line: str) -> ProgressLine | None:
        match = re.match(r"step (\d+)/(\d+)(?: |$)", line)
        return cls(int(match[1]), max(int(match[2]), 1), line) if match else None


def dvc(*arguments: str) -> str:
    """Standard output of a DVC command. Raises GraphError when it fails."""
    if waits := wait_for_lock():
        print(waits, file=sys.stderr, flush=True)
    done = subprocess.run([*DVC, *arguments], capture_output=True, text=True, env=os.environ | ENVIRONMENT)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if not line.startswith("ERROR: failed to reproduce")] or lines or [
            f"exit status {done.returncode}"]
        raise GraphError(f"dvc {' '.join(arguments)}: {errors[0]}\n" + "\n".join(errors[1:] or ["Run `make doctor`."]))
    return done.stdout


def holder_of(lock: Path) -> str | None:
    """The process that has this lock, as it wrote there; None where nobody has it."""
    with contextlib.suppress(FileNotFoundError), lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "unknown"
    return None


def wait_for_lock(ours: Iterable[subprocess.Popen[bytes]] = ()) -> str | None:
    """The line that says who has DVC's lock, where it is none of `ours`."""
    holder = holder_of(DVC_LOCK)
    if holder is None or holder in {str(process.pid) for process in ours}:
        return None
    return f"Waiting for {DVC_LOCK}, which process {holder} has: let it end, or `kill -9` it."


def _is_whole(lock: bytes) -> bool:
    """Whether the content of a dvc.lock is one that DVC can read and use; its schema takes any name of a hash."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from voluptuous import Invalid

    try:
        content = COMPILED_LOCKFILE_SCHEMA(yaml.load(lock.decode(), yaml.CSafeLoader))
        files = [file for stage in content.get("stages", {}).values()
                 for file in (*stage.get("deps", ()), *stage.get("outs", ()))]
        return "stages" in content and all(             # never left out
            file.get("hash") == "md5" and re.fullmatch(r"[0-9a-f]{32}(\.dir)?", str(file.get("md5"))) for file in files)
    except (ValueError, yaml.YAMLError, Invalid):       # the first, of bytes that are no text and dates that are none
        return False


def keep_lock() -> None:
    """Copy dvc.lock aside, if it is whole: another stage may be writing it."""
    content = LOCK.read_bytes() if LOCK.exists() else b""
    if _is_whole(content):
        durable.write(LOCK_COPY, content)


def mend_lock() -> str | None:
    """Where dvc.lock is cut short and no stage runs, put the copy back, or remove it; a line that says so.

    Stages that ended after the copy run again, or come out of DVC's run cache: nothing false is taken for right.
    """
    if not LOCK.exists() or _is_whole(LOCK.read_bytes()):
        return None
    kept = LOCK_COPY.read_bytes() if LOCK_COPY.exists() else b""
    if not _is_whole(kept):
        LOCK.unlink()
        return "dvc.lock was cut short and no copy is kept: removed, every stage is looked at anew."
    durable.write(LOCK, kept)
    return "dvc.lock was cut short: put back as after the last stage that ended before."


def check_places() -> None:
    """Raise GraphError where no run can be: outside a repository, on a full disk, without the right to write."""
    allow_no_git()
    for directory in (PREFECT_HOME, LOGS, FLOW_LOCK.parent, Path(".scratch")):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as probe:
                os.posix_fallocate(probe.fileno(), 0, BYTES_TO_START)
        except OSError as error:
            cure = ("Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT)
                    else "Make it a directory in which this user may write,")
            raise GraphError(f"{directory}: cannot be written ({os.strerror(error.errno or 0)}).\n"
                             f"{cure} and run the same command again; finished work is kept.") from None


def mend(largest: float) -> list[str]:
    """Put right what a kill, a full or a failing disk left of dvc.lock, of outputs and of DVC's copies of them; what
    was found, in words. No stage may run.

    Args:
        largest: bytes of an output that is hashed (`stages.frame.outputs.verify`), and of all copies that are.
    """
    lock = mend_lock()
    # What dvc.lock lacks, or no longer says, DVC takes out of its run cache, and a damaged copy for what it is.
    if lock or not LOCK.exists() or outputs.bytes_of_copies() <= largest:
        outputs.drop_damaged_copies()
    outputs.drop_damaged_runs()
    damaged = outputs.verify(outputs.recorded(), largest)
    return [*filter(None, [lock]), *(f"{damage} DVC restores it, or its stage runs again." for damage in damaged)]


def allow_no_git() -> None:
    """In a tree that git does not know (an unpacked archive, or a folder that an outer repository ignores), tell DVC
    so, in .dvc/config.local. Raises GraphError elsewhere."""
    if not (Path("dvc.yaml").is_file() and Path(".dvc").is_dir()):
        raise GraphError(f"{Path.cwd()}: no dvc.yaml here.\nRun from the repository's root.")
    config = Path(".dvc/config.local")
    if config.exists():
        return
    with contextlib.suppress(OSError):
        if subprocess.run(["git", "check-ignore", "-q", "dvc.yaml"], capture_output=True).returncode == 1:
            return                              # 0 means ignored, 128 no repository
    config.write_text("[core]\n    no_scm = true\n")


def _stages() -> dict[str, dict[str, Any]]:
    """Those of dvc.yaml; of a `foreach` stage, what each member does."""
    stages = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]
    return {name: stage.get("do", stage) for name, stage in stages.items()}


def look() -> None:
    """Run the stages that always run: they write down what DVC does not see, such as a user's files. Raises GraphError
    where they cannot."""
    if always := [name for name, stage in _stages().items() if stage.get("always_changed")]:
        dvc("repro", "--quiet", *always)


def graph() -> dict[str, Node]:
    """Every stage of dvc.yaml, each after the stages it needs, but for those that always run (`look`)."""
    stages = _stages()
    needs: dict[str, set[str]] = {}
    for line in dvc("dag", "--dot").splitlines():
        names = [name for name in re.findall(r'"([^"]+)"', line)
                 if not stages[name.split("@")[0]].get("always_changed")]
        for name in names:
            needs.setdefault(name, set())
        if len(names) == 2:
            needs[names[1]].add(names[0])
    if not needs:
        raise GraphError(f"{Path.cwd()}: DVC sees no stage here: an outer repository ignores this folder.\n"
                         "`rm .dvc/config.local`, and run the same command again.")
    order: list[str] = []
    while len(order) < len(needs):
        order += [name for name in needs if name not in order and needs[name] <= set(order)]
    priority: dict[str, int] = {}
    for name in reversed(order):
        priority[name] = 1 + max((priority[other] for other in needs if name in needs[other]), default=-1)
    return {name: Node(name, frozenset(needs[name]), bool(meta.get("exclusive")), int(meta.get("gpus", 0)),
                       priority[name])
            for name in order for meta in [stages[name.split("@")[0]].get("meta", {})]}


def visible_gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; that variable may leave some out, or all."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return gpu_names(chosen)
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI)
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        print(f"`nvidia-smi -L` has not answered for {NVIDIA_SMI} seconds: no GPU is used.", file=sys.stderr,
              flush=True)
        return []
    if done.returncode:
        print(f"`nvidia-smi -L` fails, so no GPU is used: {' '.join((done.stdout + done.stderr).split())}",
              file=sys.stderr, flush=True)
    return re.findall(r"^GPU (\d+):", done.stdout, flags=re.MULTILINE)


def select(nodes: dict[str, Node], targets: list[str]) -> dict[str, Node]:
    """The targets and everything they need; `pretrain` stands for all its members. Raises GraphError."""
    wanted: set[str] = set()
    for target in targets:
        found = {name for name in nodes if target in (name, name.split("@")[0])}
        if not found:
            close = difflib.get_close_matches(target, nodes, n=1)
            raise GraphError(
                f"{target}: no such stage.\n"
                + (f"Did you mean {close[0]}?" if close else f"There are: {', '.join(nodes)}.")
            )
        wanted |= found
    for name in reversed(nodes):
        if name in wanted:
            wanted |= nodes[name].needs
    return {name: node for name, node in nodes.items() if name in wanted}


def stale(nodes: dict[str, Node]) -> set[str]:
    """Stages that changed since they last ran, and those downstream of them, which may have."""
    changed = json.loads(dvc("status", "--json") or "{}")
    found: set[str] = set()
    for name, node in nodes.items():
        if name in changed or node.needs & found:
            found.add(name)
    return found


def metrics() -> dict[str, dict[str, float]]:
    """Metrics file -> its values, for every stage that has some."""
    shown = json.loads(dvc("metrics", "show", "--json") or "{}")
    files = shown.get("", {}).get("data", {})
    return {name: file["data"] for name, file in files.items() if "data" in file}


@contextlib.contextmanager
def only_flow() -> Iterator[None]:
    """Hold the repository's flow lock. Raises GraphError when another flow has it."""
    FLOW_LOCK.parent.mkdir(parents=True, exist_ok=True)
    with FLOW_LOCK.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise GraphError(
                f"Another reproduce is running here (process {lock.read().strip() or 'unknown'}).\n"
                "Wait for it, or stop it; work it has finished is kept."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def busy() -> dict[int, str]:
    """Process -> command of the DVC processes that hold files of this repository; entries of dead ones are dropped."""
    try:
        lock = json.loads(RWLOCK.read_bytes())
        write = {path: holder for path, holder in lock.get("write", {}).items() if _is_repro(holder["pid"])}
        read = {path: [one for one in holders if _is_repro(one["pid"])]
                for path, holders in lock.get("read", {}).items()}
        readers = [one for some in read.values() for one in some]
        holders = {one["pid"]: one["cmd"] for one in [*write.values(), *readers]}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, KeyError, TypeError):       # half of it, which DVC would refuse for ever
        living = {one.pid: " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])
                  if _is_repro(one.pid)}
        if not living:
            RWLOCK.unlink(missing_ok=True)
        return living
    live = {"write": write, "read": {path: holders for path, holders in read.items() if holders}}
    live = {kind: entries for kind, entries in live.items() if entries}
    if live != lock:
        durable.write(RWLOCK, json.dumps(live).encode())
    return holders


def _is_repro(pid: int) -> bool:
    """Whether the process is a `dvc repro` of this checkout: a copy of one names the processes of the other."""
    try:
        process = psutil.Process(pid)
        command = process.cmdline()
        if not any("dvc" in word for word in command) or "repro" not in command:
            return False
        with contextlib.suppress(psutil.AccessDenied):              # another user's; it may be here
            return Path(process.cwd()).is_relative_to(Path.cwd())
    except psutil.Error:
        return False
    return True


@dataclass(frozen=True)
class GpuTaken:
    """The line `gpu 0 waited 12.3 s`: a stage has its GPUs, for which it waited so long (`Stage.take_gpus`)."""

    gpus: str
    waited: float

    @classmethod
    def parse(cls, line: str) -> GpuTaken | None:
        match = re.fullmatch(r"gpu (\S+) waited (\d+\.\d) s", line)
        return cls(match[1], float(match[2])) if match else None


class StageRunner:
    """Runs stages, so many at once, the one with the longest way to go first.

    Where there are GPUs, a stage that computes on some has them to itself, and the others see none. While a stage
    computes on a GPU the next ones get ready: they are started, and wait for that GPU when they come to need it.

    Args:
        slots: stages at once.
        timeout_minutes: the longest a stage may take.
        gpus: those there are, as CUDA_VISIBLE_DEVICES names them.
    """

    def __init__(self, slots: int, timeout_minutes: float, gpus: Sequence[str] = ()):
        self.slots = slots
        self.free = slots
        self.queues: dict[str, list[Node]] = {gpu: [] for gpu in gpus}      # who has it, who is to
        self.computing: list[Node] = []                                     # those that have their GPUs, in that order
        self.timeout_minutes = timeout_minutes
        self.waiting: list[Node] = []
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.turn = threading.Condition()
        self.stopped = False

    def run(self, node: Node, on_start: Callable[[], None], on_line: Callable[[str], None]) -> str:
        """Bring one stage up to date, when its turn comes; blocks.

        Args:
            on_start: called when the stage gets its slot.
            on_line: called with every line it prints, from another thread in the caller's context; an exception there
                is dropped, because watching must not harm the work. Lines that it has not come to SECONDS_TO_WATCH
                after the end are in the log alone.
        Returns:
            `ran`, `restored` (from DVC's run cache) or `cached` (nothing to do after all).
        Raises:
            StageFailed: it ended badly, took longer than the limit, or was stopped.
        """
        with self._slot(node) as gpus:
            on_start()
            while (outcome := self._repro(node, gpus, on_line)) == "restored":
                if not (restored := outputs.of_stage(node.name)):
                    raise StageFailed(f"{node.name}: restored, and not in dvc.lock.\nRun the same command again.")
                if not (found := outputs.verify(restored, math.inf)):
                    break
                on_line(f"{found[0]} DVC's copy of it is damaged, and gone: once more.")
            return outcome

    @contextlib.contextmanager
    def _slot(self, node: Node) -> Iterator[list[str]]:
        """Wait for the stage's turn to start. Yields the GPUs that are its own, or will be when another stage ends."""
        with self.turn:
            if self.queues and node.gpus > len(self.queues):
                raise StageFailed(f"{node.name}: needs {node.gpus} GPUs, this machine has {len(self.queues)}.\n"
                                  "Change runtime.launcher in params.yaml, or run it on a larger machine.")
            self.waiting.append(node)
            self.waiting.sort(key=lambda other: -other.priority)
            self.turn.wait_for(lambda: self.stopped, SECONDS_TO_GATHER)
            self.turn.wait_for(lambda: self.stopped or self._next() is node)
            self.waiting.remove(node)
            if self.stopped:
                raise StageFailed(f"{node.name}: not started; the flow was stopped.\nRun the same command again.")
            slots, gpus = self._slots(node), self._gpus(node)
            assert gpus is not None             # else it would not be the next
            self.free -= slots
            for gpu in gpus:
                self.queues[gpu].append(node)
            self.turn.notify_all()
        try:
            yield gpus
        finally:
            with self.turn:
                self.free += slots
                for gpu in gpus:
                    self.queues[gpu].remove(node)
                if node in self.computing:
                    self.computing.remove(node)
                self.turn.notify_all()

    def _slots(self, node: Node) -> int:
        return self.slots if node.exclusive else 1

    def _gpus(self, node: Node) -> list[str] | None:
        """GPUs with the fewest stages, if each is free or one computes on it and few get ready; else None.

        An exclusive stage gets all, when all are free.
        """
        if node.exclusive:
            return None if any(self.queues.values()) else list(self.queues)
        gpus = list(self.queues)
        found = sorted(gpus, key=lambda gpu: (len(self.queues[gpu]), self._since(gpu)))[:node.gpus]
        for queue in (self.queues[gpu] for gpu in found):
            if queue and (queue[0] not in self.computing or len(queue) > STAGES_AHEAD):
                return None
        # In one order, as the stage takes them: two that wait for the same two do not each get one.
        return sorted(found, key=gpus.index)

    def _since(self, gpu: str) -> int:
        """Place of the stage on the GPU among those that compute: the first is likely to end first."""
        queue = self.queues[gpu]
        return self.computing.index(queue[0]) if queue and queue[0] in self.computing else len(self.computing)

    def _computes(self, node: Node) -> None:
        """The stage has its GPUs, maybe before one that was started earlier."""
        with self.turn:
            for queue in self.queues.values():
                if node in queue:
                    queue.remove(node)
                    queue.insert(sum(other in self.computing for other in queue), node)
            self.computing.append(node)
            self.turn.notify_all()

    def _next(self) -> Node | None:
        """The waiting stage that may start: the first that fits. What waits for GPUs holds up others that need some; an
        exclusive stage holds up all."""
        gpus_promised = False
        for node in self.waiting:
            gpus = self._gpus(node)
            if self._slots(node) <= self.free and gpus is not None and not (gpus and gpus_promised):
                return node
            if node.exclusive:
                return None
            gpus_promised = gpus_promised or (node.gpus > 0 and bool(self.queues))
        return None

    def _repro(self, node: Node, gpus: list[str], on_line: Callable[[str], None]) -> str:
        mark = FLOW_LOCK.with_name(f"{node.name}.mark").absolute()
        for directory in (node.log.parent, mark.parent):
            directory.mkdir(parents=True, exist_ok=True)
        environment = os.environ | ENVIRONMENT | {
            "SHELL": str(STAGE_SHELL), "STAGE_MARK": str(mark), "STAGE_FLOW": str(os.getpid())}
        if self.queues:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with self.turn:
            if self.stopped:
                raise StageFailed(f"{node.name}: not started; the flow was stopped.\nRun the same command again.")
            node.log.unlink(missing_ok=True)
            mark.write_bytes(b"")
            with node.log.open("w") as log:
                process = subprocess.Popen(
                    [*DVC, "repro", "--single-item", node.name], env=environment, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die_with_parent,
                )
            self.processes.add(process)
        ended, past = threading.Event(), threading.Event()
        context = contextvars.copy_context()

        def watch(line: str) -> None:
            if past.is_set():
                return
            if GpuTaken.parse(line):
                self._computes(node)
            on_line(line)

        watcher = threading.Thread(target=context.run, args=(_follow, node.log, watch, ended), daemon=True)
        watcher.start()
        deadline = time.monotonic() + self.timeout_minutes * 60
        status = None
        waits: str | None = None
        try:
            while status is None and (left := deadline - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(min(left, SECONDS_BETWEEN_LOOKS))
                before, waits = waits, wait_for_lock(self.processes.copy())
                if waits and waits != before:
                    with contextlib.suppress(Exception):
                        watch(waits)
                with self.turn:
                    if any(queue.index(node) for queue in self.queues.values() if node in queue):
                        deadline = time.monotonic() + self.timeout_minutes * 60      # another stage has its GPU
            if status is None:
                _end(process)
        finally:
            self.processes.discard(process)
            ended.set()
            with contextlib.suppress(ProcessLookupError):       # where DVC was killed, its stage is left
                os.killpg(process.pid, signal.SIGKILL)
        watcher.join(SECONDS_TO_WATCH)
        past.set()
        text = node.log.read_text(errors="replace")
        where = f"Log: {node.log}. {RESUMES}"
        if self.stopped and status != 0:
            raise StageFailed(f"{node.name}: stopped.\n{where}")
        if status is None:
            limit = f"{self.timeout_minutes:g} minutes (runtime.stage_timeout_minutes in params.yaml)"
            raise StageFailed(f"{node.name}: took longer than {limit} and was ended.\n{where}")
        if status:
            raise failure(node, _last_words(text))
        with self.turn:
            keep_lock()
        if mark.stat().st_size:
            return "ran"
        return "restored" if outputs.any_since(node.name, mark.stat().st_mtime_ns) else "cached"

    def stop(self) -> None:
        """End every running stage and start no other."""
        with self.turn:
            self.stopped = True
            self.turn.notify_all()
            processes = list(self.processes)
        enders = [threading.Thread(target=_end, args=(process,)) for process in processes]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join()


def failure(node: Node, cause: str) -> StageFailed:
    """Of a stage that ended by the cause, or by what keeps any run from going on: a log on a full disk does not say
    so."""
    how = f"Log: {node.log}. {RESUMES}"
    try:
        check_places()
    except GraphError as error:
        how = str(error)
    return StageFailed(f"{node.name}: {cause}\n{how}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a DVC process's stage and let DVC release its locks; kill what is left after a grace time."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return
    for child in tree:
        with contextlib.suppress(psutil.Error):
            child.terminate()
    if not tree:                            # between two commands: DVC itself must be told
        process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(tree, SECONDS_TO_UNWIND)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_UNLOCK)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _follow(log: Path, on_line: Callable[[str], None], ended: threading.Event) -> None:
    with log.open(errors="replace") as file:
        part = ""
        while True:
            last_look = ended.is_set()
            part += file.readline()
            if part.endswith("\n"):
                with contextlib.suppress(Exception):
                    on_line(part.rstrip())
                part = ""
            elif last_look:
                return
            else:
                ended.wait(0.2)


def _last_words(log: str) -> str:
    """What a failed stage said at the end, without progress and the frames of a traceback; or the signal that ended it;
    or DVC's own line."""
    if signalled := re.search(r"^ERROR: failed to reproduce .*, exited with -(\d+)$", log, re.MULTILINE):
        number = signal.Signals(int(signalled[1]))
        return f"ended by {number.name}" + (", most likely for want of memory." * (number == signal.SIGKILL) or ".")
    lines = [line for line in log.splitlines() if line.strip() and not ProgressLine.parse(line)]
    said = [line for line in lines if not line.startswith((" ", "Traceback (", "ERROR: failed to reproduce"))]
    return " ".join((said or lines)[-2:]) or "no output"
