"""Does FP8 train like BF16? Many small models in pairs that differ in their number format alone; an interval answers.

    python -m benchmarks.fp8_parity pilot --tokens DIR --out runs.csv [--seconds 480]
    python -m benchmarks.fp8_parity run --setting deep-1e-3 --start 0.5 --tokens DIR --out runs.csv [--seconds 570]
    python -m benchmarks.fp8_parity table --out runs.csv [--setting deep-1e-3] [--record]

A pair has one seed and one order of the text. What an arm changes of the BF16 run beside it:

    fp8        the paper's recipe: current scaling, E4M3 and for gradients E5M2, four BF16 layers at each end
    fp8-2, -0  with two BF16 layers at each end (the paper's four GEMMs), with none
    e4m3       with gradients in E4M3
    unscaled   FP8 without scales: broken, and must be seen to be
    again      BF16 with a weight decay 0.1 % larger, which is nothing: what pairs differ by without FP8

`--start 0.5` branches every arm off the BF16 run at half of its steps (weights, moments, order of the text), `0` trains
it from its first step. Late branches have far less noise and test less: what FP8 does from there on, to a model that
BF16 brought there, under the decaying rate; the paper saw FP8 fall behind in the last quarter.

`pilot` compares the noise of settings and of four ways to read a loss (METRICS); `run` trains as many pairs as the time
allows, of the seeds and in the order given; both append a line for each finished model and skip what is there, start
nothing that they cannot end in time, and print the table. Several models at once share each visible GPU. A model that
does not learn is an error, no data; only of `unscaled` it is an answer. `--record` writes
docs/results/studies/fp8_parity.json. `--tiny` is all of it at toy size, on a CPU in emulated FP8.
"""

from __future__ import annotations

import argparse
import bisect
import csv
import datetime
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from scipy import stats

from model.config import ModelConfig, ModelError, PretrainConfig
from model.presets import hybrid_pattern

MARGIN = 0.1            # % of the loss: the paper's "< 0.1 %"
ALPHA = 0.05            # how often an answer may be wrong, as in the report's rules
POWER = 0.9             # of the number of pairs that would decide
TAIL = 0.2              # last share of the steps that means are over
STARTS = (0.5, 0.75)    # of BF16 runs that keep a state to branch from; both before the tail
ARCHITECTURES = ("transformer", "hybrid")
CONTROL = "unscaled"

# Ways to read the loss (nats a token) of a finished run; the second and third are over the tail.
METRICS = ("validation", "validation_mean", "training_mean", "averaged_weights")
METRIC = "training_mean"


class Arm(NamedTuple):
    """What differs from the BF16 run."""

    precision: Literal["bf16", "fp8"]
    changes: dict[str, Any]


ARMS = {
    "bf16": Arm("bf16", {}),
    "fp8": Arm("fp8", {}),
    "unscaled": Arm("fp8", {"fp8_recipe": "unscaled"}),
    "fp8-0": Arm("fp8", {"bf16_layers_at_start": 0, "bf16_layers_at_end": 0}),
    "fp8-2": Arm("fp8", {"bf16_layers_at_start": 2, "bf16_layers_at_end": 2}),
    "e4m3": Arm("fp8", {"fp8_gradients": "e4m3"}),
    "again": Arm("bf16", {"weight_decay": 0.1001}),
}


class Setting(NamedTuple):
    """Of models and their training; a step is `sequences` of `length` tokens."""

    width: int = 256
    layers: int = 28
    ffn: int = 768
    mamba: tuple[int, int, int, int] = (16, 32, 32, 4)      # heads, their size, state, groups
    head: int = 64
    learning_rate: float = 1e-3
    sequences: int = 64
    length: int = 1024
    steps: int = 300


SETTINGS = {
    "deep-3e-3": Setting(learning_rate=3e-3),
    "deep-1e-3": Setting(),
    "deep-5e-4": Setting(learning_rate=5e-4),
    "deep-batch": Setting(sequences=128, steps=150),
    "wide-1e-3": Setting(width=384, layers=20, ffn=1152, mamba=(16, 64, 64, 4)),
    "tiny": Setting(width=32, layers=12, ffn=64, mamba=(16, 8, 8, 4), head=16, learning_rate=1e-2, sequences=8,
                    length=32, steps=40),
}
# Of the pilot, for every seed: setting, architecture, and where FP8 runs start.
PILOT = (("deep-1e-3", "transformer", (0.5, 0.75, 0.0)), ("deep-1e-3", "hybrid", (0.5, 0.75)),
         ("deep-5e-4", "transformer", (0.5, 0.75)), ("wide-1e-3", "transformer", (0.5, 0.75)))
TINY_PILOT = (("tiny", "transformer", (0.5, 0.75, 0.0)), ("tiny", "hybrid", (0.5,)))


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


# ---------------------------------------------------------------------------------------------------- one model


def model_config(setting: Setting, architecture: str, vocab_size: int) -> ModelConfig:
    """The hybrid by the paper's rules, without positions; the Transformer in as many layers, with rotary ones."""
    heads = setting.width // setting.head
    mamba = dict(zip(("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"), setting.mamba,
                     strict=True))
    hybrid = architecture == "hybrid"
    return ModelConfig(
        pattern=hybrid_pattern(setting.layers) if hybrid else "*-" * (setting.layers // 2), hidden_size=setting.width,
        ffn_hidden_size=setting.ffn, num_attention_heads=heads, num_query_groups=max(1, heads // 2),
        head_dim=setting.head, position_embedding="none" if hybrid else "rope", sequence_length=setting.length,
        chunk_size=min(128, setting.length), vocab_size=vocab_size, **(mamba if hybrid else {}),
    )


def recipe(setting: Setting, arm: Arm, keeps_states: bool, cuda_graph: bool) -> PretrainConfig:
    """The paper's: cosine to 1 % after the warm-up, AdamW; a whole batch is one micro-batch."""
    warmup = 0.05
    states = math.gcd(*(round(start * setting.steps) for start in STARTS))
    values: dict[str, Any] = {
        "tokens": setting.steps * setting.sequences * setting.length,
        "global_batch_size": setting.sequences, "micro_batch_size": setting.sequences,
        "learning_rate": setting.learning_rate, "min_learning_rate": setting.learning_rate / 100,
        "warmup_fraction": warmup, "decay_fraction": 1 - warmup, "decay_style": "cosine", "weight_decay": 0.1,
        "adam_betas": (0.9, 0.95), "clip_grad": 1.0, "bf16_layers_at_start": 4, "bf16_layers_at_end": 4,
        "evaluations": 10, "checkpoint_every": states if keeps_states else setting.steps,
        "checkpoints_kept": setting.steps // states, "cuda_graph": cuda_graph,
    }
    return PretrainConfig(**(values | arm.changes))


def train_one(
    job: Job, setting: Setting, tokens: Path, scratch: Path, keeps_states: bool = False, cuda_graph: bool = False
) -> dict[str, Any]:
    """Train the model of `job`. Returns its losses by metric, the entropy it had to beat, and its trunk's name.

    Raises:
        ModelError: the run cannot be trained, did not learn (unless it is the control), or its trunk left no state.
    """
    import torch

    from model.distributed import ONE_COPY, process_groups
    from model.trainer import Trainer

    class MeanWeightsTrainer(Trainer):
        """Keeps the mean of the weights over the tail."""

        def train_step(self, step: int, observed: bool = False) -> dict[str, Any]:
            row = super().train_step(step, observed)
            if in_tail(step, self.steps):
                weights = [weight.detach().float() for weight in self.model.parameters()]
                self.mean = getattr(self, "mean", [torch.zeros_like(weight) for weight in weights])
                self.counted = getattr(self, "counted", 0) + 1
                torch._foreach_lerp_(self.mean, weights, 1 / self.counted)
            return row

        @torch.no_grad()
        def loss_of_mean(self) -> float:
            for weight, mean in zip(self.model.parameters(), self.mean, strict=True):
                weight.copy_(mean)
            return overall(self.validate(self.steps))[0]

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    arm, family = ARMS[job.arm], scratch / f"{job.setting}-{job.architecture}-{job.seed}"
    own = family / f"{job.arm}@{job.start:g}"
    if job.start:
        branch(family / "bf16@0", own, round(job.start * setting.steps))
    elif job.arm != "bf16":
        shutil.rmtree(own, ignore_errors=True)
    is_trunk = job == job.trunk and keeps_states
    config = model_config(setting, job.architecture, json.loads((tokens / "tokens.json").read_text())["vocab_size"])
    with process_groups():
        trainer = MeanWeightsTrainer(
            config, recipe(setting, arm, is_trunk, cuda_graph), arm.precision, job.seed, tokens, own, ONE_COPY
        )
        with closing(trainer):
            entropy = unigram_entropy(torch.cat([data.sequences[:, 1:].flatten()
                                                 for data in trainer.validation_sets.values()]))
            try:
                run = trainer.run(lambda *_, **__: None)
                found = metrics(run.training, run.validation, trainer.steps)
                found["averaged_weights"] = trainer.loss_of_mean()
            except ModelError:
                if job.arm != CONTROL:
                    raise
                found = dict.fromkeys(METRICS, math.inf)        # loss or gradients not finite: it is seen to be broken
            parameters = sum(weight.numel() for weight in trainer.model.parameters())
    if not found["validation"] < entropy and job.arm != CONTROL:
        raise ModelError(
            f"{job}: the validation loss ends at {found['validation']:.4f} nats, the entropy of single tokens is "
            f"{entropy:.4f}: it did not learn.\nThat is no measurement: look for a fault in the kernels of its sizes."
        )
    if is_trunk:
        (own / "trunk").write_text(uuid.uuid4().hex[:12])
    else:
        shutil.rmtree(own)
    name = family / "bf16@0" / "trunk"
    return found | {"entropy": entropy, "parameters": parameters,
                    "trunk": name.read_text() if (job.start or is_trunk) else ""}


def branch(trunk: Path, own: Path, step: int) -> None:
    """Make `own` the scratch directory of a run that goes on from the trunk's state after `step`."""
    state = trunk / "resume" / f"step-{step:08d}"
    if not (state.exists() and (trunk / "trunk").exists()):
        raise ModelError(
            f"{state}: not found, or of an unfinished run.\nTrain the BF16 run again with its states kept."
        )
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(state, own / "resume" / state.name)
    (own / "resume" / "latest").write_text(state.name + "\n")
    shutil.copytree(trunk / "index", own / "index")
    for log in trunk.glob("*.csv"):
        shutil.copy(log, own)


def in_tail(step: int, steps: int) -> bool:
    return step > steps - round(TAIL * steps)


def metrics(training: list[dict[str, Any]], validation: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """The first three of METRICS from a run's rows."""
    overall_rows = [row for row in validation if row["domain"] == "all" and in_tail(row["step"], steps)]
    losses = [row["loss"] for row in training if in_tail(row["step"], steps)]
    return {"validation": overall_rows[-1]["loss"],
            "validation_mean": statistics.fmean(row["loss"] for row in overall_rows),
            "training_mean": statistics.fmean(losses)}


def overall(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows if row["domain"] == "all"]


def unigram_entropy(ids: Any) -> float:
    """Nats a token of the text itself, its tokens drawn alone."""
    counts = ids.bincount().double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def machine() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return ""

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    return {"machine": name, "python": platform.python_version(), "torch": torch.__version__,
            "megatron": of("megatron-core"),
            "transformer_engine": of("transformer-engine") or of("transformer_engine")}


# ---------------------------------------------------------------------------------------------------- many models

COLUMNS = ("setting", "architecture", "seed", "arm", "start", "trunk", *METRICS, "entropy", "parameters", "tokens",
           "seconds", "at_once", "gpus", "date", "commit", "machine", "python", "torch", "megatron",
           "transformer_engine")
NUMBERS = ("seed", "start", *METRICS, "entropy", "parameters", "tokens", "seconds", "at_once", "gpus")
Row = dict[str, Any]


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


# ---------------------------------------------------------------------------------------------------- the answer


class Answer(NamedTuple):
    """On the gaps of one arm, in % of the BF16 run's loss; above 0 the arm is worse.

    Attributes:
        low, high: 95 % interval of the mean.
        sd: of a pair's gap.
        holds: `holds`, `does not hold` or `cannot be told`: whether the mean lies within the margin.
        pairs: that would decide, if there were no gap, with a power of POWER.
        broken: runs of the arm whose loss was not finite; they are not among the `n`.
    """

    n: int
    mean: float
    low: float
    high: float
    sd: float
    holds: str
    pairs: int
    broken: int = 0


def answer(gaps: Sequence[float], margin: float = MARGIN) -> Answer:
    """Two one-sided t-tests at ALPHA each: `holds` where the 90 % interval lies within the margin, `does not hold`
    where the 95 % interval lies outside of it, or a loss was not finite."""
    finite = [gap for gap in gaps if math.isfinite(gap)]
    n, broken = len(finite), len(gaps) - len(finite)
    if n < 2:
        undecided = "does not hold" if broken else "cannot be told"
        return Answer(n, finite[0] if n else math.nan, math.nan, math.nan, math.nan, undecided, 0, broken)
    mean, sd = statistics.fmean(finite), statistics.stdev(finite)
    inner, half = (float(stats.t.ppf(1 - alpha, n - 1)) * sd / math.sqrt(n) for alpha in (ALPHA, ALPHA / 2))
    if broken or mean - half > margin or mean + half < -margin:
        verdict = "does not hold"
    else:
        verdict = "holds" if -margin < mean - inner and mean + inner < margin else "cannot be told"
    return Answer(n, mean, mean - half, mean + half, sd, verdict, pairs_needed(sd, margin), broken)


def pairs_needed(sd: float, margin: float = MARGIN) -> int:
    """Pairs that say `holds` with a probability of POWER where the true gap is 0 (the usual formula of two one-sided
    tests, by t)."""
    def enough(n: int) -> bool:
        quantiles = stats.t.ppf(1 - ALPHA, n - 1) + stats.t.ppf((1 + POWER) / 2, n - 1)
        return bool(quantiles * sd / math.sqrt(n) <= margin)

    most = 2
    while not enough(most):
        most *= 2
    return 2 + bisect.bisect_left(range(2, most), True, key=enough)


def gaps(rows: Sequence[Row], metric: str) -> dict[tuple[str, str, str, float], dict[int, float]]:
    """(setting, architecture, arm, start) -> seed -> gap in %. A branch is compared with the run it came from.

    Raises SystemExit where an FP8 run equals its BF16 run to the last digit: it was not computed in FP8."""
    trunks = {job_of(row): row for row in rows if row["arm"] == "bf16"}
    found: dict[tuple[str, str, str, float], dict[int, float]] = defaultdict(dict)
    for row in rows:
        job = job_of(row)
        trunk = trunks.get(job.trunk)
        if row["arm"] == "bf16" or trunk is None or (job.start and row["trunk"] != trunk["trunk"]):
            continue
        if row[metric] == trunk[metric] and ARMS[job.arm].precision == "fp8":
            raise SystemExit(f"{job}: the same loss as in BF16, to the last digit.\nNothing was computed in FP8.")
        found[job.setting, job.architecture, job.arm, job.start][job.seed] = 100 * (row[metric] / trunk[metric] - 1)
    return dict(found)


def gpu_hours(rows: Sequence[Row], setting: str, architecture: str, arm: str, start: float) -> float:
    """Of a pair, a GPU's time shared evenly among the processes on it."""
    def mean(arm: str, start: float) -> float:
        return statistics.fmean(row["seconds"] / row["at_once"] for row in rows if job_of(row)[:2] + job_of(row)[3:] ==
                                (setting, architecture, arm, start))

    return (mean("bf16", 0.0) + mean(arm, start)) / 3600


def print_noise(rows: Sequence[Row]) -> None:
    """For each setting and start the standard deviation of a pair's gap by every metric, and what 0.1 % would take."""
    print(f"\n{'setting':12} {'architecture':12} {'start':>5} {'pairs':>5}   " +
          "".join(f"{name:>28}" for name in METRICS) + "\n" + " " * 40 + f"{'gap %   sd %  pairs':>28}" * len(METRICS))
    by_metric = {metric: gaps(rows, metric) for metric in METRICS}
    for kind in sorted(by_metric[METRIC], key=lambda kind: (kind[2] != "fp8", kind)):
        setting, architecture, arm, start = kind
        line = f"{setting:12} {architecture:12} {start:5g} {len(by_metric[METRIC][kind]):5}   "
        for metric in METRICS:
            found = answer(list(by_metric[metric][kind].values()))
            line += f"{found.mean:+14.3f} {found.sd:6.3f} {found.pairs:6}"
        print(f"{line}   {arm}")
    for setting, architecture in sorted({(row["setting"], row["architecture"]) for row in rows}):
        runs = [row for row in rows if (row["setting"], row["architecture"], row["arm"]) ==
                (setting, architecture, "bf16")]
        if len(runs) > 1:
            losses = [[row[metric] for row in runs] for metric in METRICS]
            spread = [100 * statistics.stdev(values) / statistics.fmean(values) for values in losses]
            print(f"{setting:12} {architecture:12} BF16 seeds, sd % by metric: " +
                  ", ".join(f"{value:.2f}" for value in spread) +
                  f"; {statistics.fmean(row['validation'] for row in runs):.3f} nats where single tokens have "
                  f"{runs[0]['entropy']:.3f}; {runs[0]['parameters'] / 1e6:.1f} million parameters")


def print_table(rows: Sequence[Row], metric: str) -> None:
    """The answer for each architecture and arm."""
    print(f"\nGap of {metric} to BF16, %; 95 % interval by t over pairs; within {MARGIN} %?")
    print(f"{'setting':12} {'architecture':12} {'arm':10} {'start':>5} {'n':>3} {'mean':>8} {'interval':>19} "
          f"{'sd':>7}  {'answer':15} {'pairs, GPU-hours to decide':>26}")
    found = gaps(rows, metric)
    for kind in sorted(found, key=lambda kind: (kind[0], kind[1], kind[3], list(ARMS).index(kind[2]))):
        setting, architecture, arm, start = kind
        one = answer(list(found[kind].values()))
        hours = one.pairs * gpu_hours(rows, *kind)
        print(f"{setting:12} {architecture:12} {arm:10} {start:5g} {one.n:3} {one.mean:+8.3f} "
              f"[{one.low:+8.3f}, {one.high:+7.3f}] {one.sd:7.3f}  {one.holds:15} {one.pairs:12} {hours:10.2f}" +
              (f"   {one.broken} more not finite" if one.broken else ""))
    for setting, architecture, arm, start in sorted(found):
        seen = answer(list(found[setting, architecture, arm, start].values())).holds
        if arm == CONTROL and seen != "does not hold":
            print(f"The broken arm of {setting} {architecture}@{start:g} is not seen to be broken: no answer of its "
                  "setting counts.")


def write_record(rows: Sequence[Row], setting: str, start: float, metric: str, folder: Path | None = None) -> Path:
    """Losses of every pair of `setting`, and what is compared, for the report (`stages.report.studies`)."""
    from stages.report.studies import FOLDER, Comparison, Measurement, Study

    found = gaps(rows, metric)
    losses = {job_of(row): row[metric] for row in rows}
    words = {"fp8": "FP8, the paper's recipe", "unscaled": "FP8 without scales", "fp8-0": "FP8, no BF16 layers",
             "fp8-2": "FP8, two BF16 layers at each end", "e4m3": "FP8, gradients in E4M3",
             "again": "BF16, weight decay 0.1 % larger"}
    measurements, comparisons = [], []
    for architecture in ARCHITECTURES:
        kinds = {arm: found.get((setting, architecture, arm, start), {}) for arm in ARMS}
        control = {seed for seed, gap in kinds[CONTROL].items() if math.isfinite(gap)}
        for arm, pairs in kinds.items():
            seeds = sorted(pairs, key=lambda seed: (seed not in control, seed))         # the control's come first
            seeds = [seed for seed in seeds if math.isfinite(pairs[seed])]
            if len(seeds) < 2:
                continue
            names = (f"{architecture}, {words[arm]}", f"{architecture}, BF16 beside {words[arm]}")
            for name, one in zip(names, (arm, "bf16"), strict=True):
                jobs = [Job(setting, architecture, seed, one, start if one == arm else 0.0) for seed in seeds]
                measurements.append(Measurement(name=name, values=[losses[job] for job in jobs], unit="nats a token",
                                                better="lower"))
            broken = f"{architecture}, {words[CONTROL]}"
            if arm == CONTROL:
                continue
            if arm != "again":
                comparisons.append(Comparison(
                    claim="fp8_parity" if arm == "fp8" else "fp8_recipe", candidate=names[0], reference=names[1],
                    question="equal", margin=MARGIN / 100, relative=True,
                    control=broken if control and control <= set(seeds) else None))
    first, geometry = rows[0], SETTINGS[setting]
    study = Study(
        study="fp8_parity",
        command=f"python -m benchmarks.fp8_parity run --setting {setting} --start {start:g} --tokens DIR --out FILE",
        machine=f"{first['machine']}, {first['gpus']:.0f} of them", date=max(row["date"] for row in rows),
        commit=first["commit"] or "unknown",
        versions={name: first[name] for name in ("python", "torch", "megatron", "transformer_engine") if first[name]},
        note=f"{geometry.steps} steps of {geometry.sequences} x {geometry.length} tokens, width {geometry.width}, "
             f"{geometry.layers} layers, peak rate {geometry.learning_rate:g}, cosine to 1 %; {metric}, the last "
             f"{TAIL:.0%} of the steps; arms branch off the BF16 run at {start:.0%} of its steps. The paper warns that "
             "FP8 results of small scales do not transfer.",
        measurements=measurements, comparisons=comparisons,
    )
    return study.save(folder or FOLDER)


# ---------------------------------------------------------------------------------------------------- command line


def pilot_jobs(kinds: Iterable[tuple[str, str, tuple[float, ...]]], seeds: Sequence[int]) -> list[Job]:
    """Seed by seed, so that whatever the time allows compares all settings."""
    return [Job(setting, architecture, seed, arm, start) for seed in seeds for setting, architecture, starts in kinds
            for arm, start in (("bf16", 0.0), *(("fp8", start) for start in starts))]


def run_jobs(setting: str, architectures: Sequence[str], seeds: Sequence[int], arms: Sequence[str], start: float
             ) -> list[Job]:
    """Seed by seed, so that a BF16 run is soon followed by all that branch from it."""
    return [Job(setting, architecture, seed, arm, 0.0 if arm == "bf16" else start)
            for seed in seeds for architecture in architectures for arm in ("bf16", *arms)]


def tiny_tokens(directory: Path) -> Path:
    """A tokens directory of random text in which every token has two successors."""
    import numpy as np

    from data_pipeline.indexed_dataset import IndexedDatasetWriter

    vocabulary, draw, files = 64, np.random.default_rng(0), {}
    successors = draw.integers(1, vocabulary, (vocabulary, 2))
    for name, documents in {"train/text-high": 400, "validation/text": 40}.items():
        tokens = 0
        with IndexedDatasetWriter(directory / name, vocabulary) as writer:
            for _ in range(documents):
                document = [int(draw.integers(1, vocabulary))]
                for _ in range(100):
                    document.append(int(successors[document[-1], draw.integers(2)]))
                writer.add([*document, 0])
                tokens += len(document) + 1
        files[name] = {"documents": documents, "tokens": tokens, "bytes": 3 * tokens}
    (directory / "tokens.json").write_text(json.dumps({
        "vocab_size": vocabulary, "eod_id": 0, "dtype": "uint16", "tokenizer_digest": "tiny", "corpus_digest": "tiny",
        "files": files}))
    (directory / "blend.json").write_text(json.dumps({"phases": [{"until": 1.0, "weights": {"train/text-high": 1}}]}))
    return directory


def commit() -> str:
    """The checked-out commit; empty where there is no git."""
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = top.add_subparsers(dest="phase", required=True)
    for name, words in {"pilot": "how noisy is a pair, by setting", "run": "as many pairs as the time allows",
                        "table": "the answers so far", "one": "train one model (the others start it)"}.items():
        phase = phases.add_parser(name, help=words)
        phase.add_argument("--out", type=Path, required=name != "one", help="CSV file, a line for each finished model")
        phase.add_argument("--metric", choices=METRICS, default=METRIC, help="(default: %(default)s)")
        if name in ("pilot", "run"):
            phase.add_argument("--seconds", type=float, help="start nothing that would not end within them")
            phase.add_argument("--at-once", type=int, default=6, help="models on a GPU (default: %(default)s)")
            phase.add_argument("--tiny", action="store_true", help="toy sizes, to see whether all works")
            phase.add_argument("--commit", help="for the rows, where there is no git")
        if name != "table":
            phase.add_argument("--tokens", type=Path, help="tokens directory of a profile")
            phase.add_argument("--scratch", type=Path, default=Path(".scratch/fp8-parity"), help="(%(default)s)")
            phase.add_argument("--graph", action="store_true", help="each step as a CUDA graph")
        if name == "pilot":
            phase.add_argument("--seeds", type=int, default=4, help="seeds 1 to this (default: %(default)s)")
        if name == "run":
            phase.add_argument("--setting", choices=list(SETTINGS))
            phase.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
            phase.add_argument("--arms", nargs="+", choices=list(ARMS)[1:], default=list(ARMS)[1:])
            phase.add_argument("--seeds", type=int, default=16, help="seeds 101 to 100 + this (default: %(default)s)")
        if name in ("run", "table"):
            phase.add_argument("--start", type=float, choices=(0.0, *STARTS), default=STARTS[0],
                               help="share of the steps after which arms leave the BF16 run (default: %(default)s)")
        if name == "table":
            phase.add_argument("--setting", choices=list(SETTINGS), help="this one only")
            phase.add_argument("--record", action="store_true", help="write docs/results/studies/fp8_parity.json")
        if name == "one":
            phase.add_argument("--job", type=json.loads, required=True)
            phase.add_argument("--keep-states", action="store_true")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.phase == "one":
        return one(options)
    if options.phase == "table":
        rows = [row for row in read_rows(options.out) if options.setting in (None, row["setting"])]
        if not rows:
            raise SystemExit(f"{options.out}: no finished model of that setting.\nTrain some: `run`.")
        print_noise(rows)
        print_table(rows, options.metric)
        if options.record:
            if not options.setting:
                raise SystemExit("--record without --setting: the record is of one.\nName it.")
            mine = [row for row in rows if row["start"] in (0.0, options.start) and row["seed"] > 100]
            print(f"\n{write_record(mine, options.setting, options.start, options.metric)} written")
        return 0
    if options.tiny:
        options.tokens, options.setting = options.tokens or tiny_tokens(options.scratch / "tokens"), "tiny"
    if options.tokens is None or (options.phase == "run" and options.setting is None):
        raise SystemExit("--tokens or --setting is missing.\nName the tokens directory and, of `run`, the setting.")
    if not (options.tokens / "tokens.json").exists():
        raise SystemExit(f"{options.tokens}: no tokens.json.\nName a tokens directory that stage `tokenize` wrote.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # its models end with it
    if options.phase == "pilot":
        jobs = pilot_jobs(TINY_PILOT if options.tiny else PILOT, range(1, options.seeds + 1))
    else:
        jobs = run_jobs(options.setting, options.architectures, range(101, 101 + options.seeds), options.arms,
                        options.start)
    return schedule(jobs, options)


def schedule(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Train `jobs` and print the table. Returns 1 where one failed, or none was there to compare."""
    def command(job: Job) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.fp8_parity", "one", "--job", json.dumps(job), "--tokens",
                 str(options.tokens), "--scratch", str(options.scratch)]
        return words + ["--graph"] * options.graph + ["--keep-states"] * any(other.start for other in jobs)

    def ready(job: Job) -> bool:
        trunk = options.scratch / f"{job.setting}-{job.architecture}-{job.seed}" / "bf16@0"
        return (trunk / "trunk").exists()

    slots = slots_of(options.at_once)
    extra = {"at_once": options.at_once, "gpus": len({slot.get("CUDA_VISIBLE_DEVICES") for slot in slots}),
             "commit": options.commit or commit()}
    scheduler = Scheduler(command, slots, options.out, options.seconds, extra, ready, options.scratch / "logs")
    print(f"{len(jobs)} models, {len(scheduler.slots)} at once: {shlex.join(sys.argv[1:])}", flush=True)
    scheduler.run(jobs)
    mine = set(jobs)
    rows = [row for row in read_rows(options.out) if job_of(row) in mine]
    if rows:
        print_noise(rows)
        print_table(rows, options.metric)
    print(f"\n{len(rows)} of {len(jobs)} models are there; {len(scheduler.left)} not started, "
          f"{len(scheduler.failed)} failed" + "".join(f"\n  {job}: {why}" for job, why in scheduler.failed.items()))
    return int(bool(scheduler.failed) or not rows)


def one(options: argparse.Namespace) -> int:
    """The process of one model: its row as the last line."""
    job = Job(*options.job)
    setting = SETTINGS[job.setting]
    try:
        result = train_one(job, setting, options.tokens, options.scratch, options.keep_states, options.graph)
    except ModelError as error:
        print(error, flush=True)
        return 1
    tokens = (1 - job.start) * setting.steps * setting.sequences * setting.length
    print(json.dumps(result | {"tokens": round(tokens)} | machine()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
