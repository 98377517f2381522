"""Does FP8 train like BF16? Many small models in pairs that differ in their number format alone; an interval answers.

    python -m benchmarks.fp8_parity run --tokens DIR --out FILE [--arms fp8] [--seconds 270]
    python -m benchmarks.fp8_parity table --out FILE [--record MACHINE]

A pair has one seed and one order of the text. What an arm changes of the BF16 run beside it:

    fp8        the paper's recipe: current scaling, E4M3 and for gradients E5M2, four BF16 layers at each end
    fp8-2, -0  with two BF16 layers at each end (the paper's four GEMMs), with none
    e4m3       with gradients in E4M3
    unscaled   FP8 without scales: broken, and must be seen to be
    again      BF16 with a weight decay 0.1 % larger, which is nothing: what pairs differ by without FP8

`--start 0.5` branches every arm off the BF16 run at half of its steps (weights, moments, order of the text), `0` trains
it from its first step. Late branches have far less noise and test less: what FP8 does from there on, to a model that
BF16 brought there, under the decaying rate; the paper saw FP8 fall behind in the last quarter.

`run` trains as many pairs as the time allows, of the seeds and in the order given, appends a line for each finished
model and skips what is there, starts nothing that it cannot end in time, and prints the table. Several models at once
share each visible GPU. A model that does not learn is an error, no data; only of `unscaled` it is an answer. `--record`
writes docs/results/studies/fp8_parity.json and the figure beside docs/results/fp8-parity.md; MACHINE is what stands in
it. `run --setting tiny` runs on a CPU, in emulated FP8.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import signal
import statistics
import sys
import uuid
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.fp8_jobs import METRICS, Job, Row, Scheduler, job_of, read_rows, slots_of
from model.config import ModelConfig, ModelError, PretrainConfig
from model.presets import hybrid_pattern
from stages.frame.common import _commit, _machine, _versions
from stages.report.statistics import ALPHA, Answer, Estimate, equivalence, mean
from stages.report.study_schema import Comparison, Measurement, Study

MARGIN = 0.001          # of the loss: the paper's "< 0.1 %"
TAIL = 0.2              # last share of the steps that the training loss is averaged over
STARTS = (0.5, 0.75)    # of BF16 runs that keep a state to branch from; both before the tail
ARCHITECTURES = ("transformer", "hybrid")
CONTROL = "unscaled"

METRIC = "training_mean"
FIGURE = Path("docs/results/fp8-parity.svg")
Question = Literal["better", "equal", "not worse"]


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
    "deep-1e-3": Setting(),
    "tiny": Setting(width=32, layers=12, ffn=64, mamba=(16, 8, 8, 4), head=16, learning_rate=1e-2, sequences=8,
                    length=32, steps=40),
}


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


def recipe(setting: Setting, arm: Arm, keeps_states: bool) -> PretrainConfig:
    """The paper's: cosine to 1 % after the warm-up, AdamW; a whole batch is one micro-batch."""
    states = math.gcd(*(round(start * setting.steps) for start in STARTS))
    values: dict[str, Any] = {
        "tokens": setting.steps * setting.sequences * setting.length,
        "global_batch_size": setting.sequences, "micro_batch_size": setting.sequences,
        "learning_rate": setting.learning_rate, "min_learning_rate": setting.learning_rate / 100,
        "warmup_fraction": 0.05, "decay_style": "cosine", "weight_decay": 0.1,
        "adam_betas": (0.9, 0.95), "clip_grad": 1.0, "bf16_layers_at_start": 4, "bf16_layers_at_end": 4,
        "evaluations": 10, "checkpoint_every": states if keeps_states else setting.steps,
        "checkpoints_kept": setting.steps // states,
    }
    return PretrainConfig(**(values | arm.changes))


def train_one(job: Job, setting: Setting, tokens: Path, scratch: Path, keeps_states: bool = False) -> dict[str, Any]:
    """Train the model of `job`. Returns its losses by metric, the unigram loss it had to beat, and its trunk's name.

    Raises:
        ModelError: the run cannot be trained, did not learn (unless it is the control), or its trunk left no state.
    """
    import torch

    from model.megatron.distributed import ONE_COPY, process_groups
    from model.training.trainer import Trainer

    class PairTrainer(Trainer):
        """Goes on from a trunk's state; only the control need not learn."""

        def _check_identity(self, of_state: dict[str, Any]) -> None:
            """A branch differs from its trunk in what its arm changes, and in nothing else."""
            changed = {name: self.identity[name] for name in ("precision", *arm.changes)} if job.start else {}
            super()._check_identity(of_state | changed)

        def check_learned(self, untrained: float, trained: float) -> None:
            """However few its tokens, a model must beat single tokens; but the control may do as it does."""
            if job.arm == CONTROL:
                return
            super().check_learned(untrained, trained)
            if not trained < self.unigram_loss:
                raise ModelError(
                    f"{job}: the validation loss ends at {trained:.4f} nats, not below the unigram loss "
                    f"({self.unigram_loss:.4f}): it did not learn.\n"
                    "That is no measurement: look for a fault in the kernels of its sizes."
                )

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
        trainer = PairTrainer(config, recipe(setting, arm, is_trunk), arm.precision, job.seed, tokens, own, ONE_COPY)
        with closing(trainer):
            try:
                run = trainer.run(lambda *_, **__: None)
                found = metrics(run.training, run.validation, trainer.steps)
            except ModelError:
                if job.arm != CONTROL:
                    raise
                found = dict.fromkeys(METRICS, math.inf)        # loss or gradients not finite: it is seen to be broken
            found |= {"unigram_loss": trainer.unigram_loss,
                      "parameters": sum(weight.numel() for weight in trainer.model.parameters())}
    if is_trunk:
        (own / "trunk").write_text(uuid.uuid4().hex[:12])
    else:
        shutil.rmtree(own)
    name = family / "bf16@0" / "trunk"
    return found | {"trunk": name.read_text() if job.start or is_trunk else ""}


def branch(trunk: Path, own: Path, step: int) -> None:
    """Make `own` the scratch directory of a run that goes on from the trunk's state after `step`."""
    state = trunk / "resume" / f"step-{step:08d}"
    if not (state.exists() and (trunk / "trunk").exists()):
        raise ModelError(
            f"{state}: not found, or of an unfinished run.\nTrain the BF16 run again with its states kept."
        )
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(state, own / "resume" / state.name)
    shutil.copytree(trunk / "index", own / "index")


def metrics(training: list[dict[str, Any]], validation: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """METRICS from a run's rows."""
    tail = steps - round(TAIL * steps)
    return {"training_mean": statistics.fmean(row["loss"] for row in training if row["step"] > tail),
            "validation": [row["loss"] for row in validation if row["domain"] == "all"][-1]}


def machine() -> dict[str, str]:
    found, versions = _machine(), _versions()
    return {"machine": found.get("accelerator") or found["processor"], "python": versions["python"],
            "torch": versions["torch"], "megatron": versions.get("megatron-core", ""),
            "transformer_engine": versions.get("transformer-engine", "")}


# ---------------------------------------------------------------------------------------------------- the answer


def judge(gaps: Sequence[float]) -> tuple[Answer, Estimate]:
    """Whether the mean lies within the margin, by the report's two one-sided tests; a loss that is not finite does not.
    The estimate is over the finite ones, not a number where there is none."""
    finite = [gap for gap in gaps if math.isfinite(gap)]
    estimate = mean(finite or [math.nan], "pair")
    answer = equivalence(estimate, math.log1p(MARGIN)).answer
    return Answer.FAILS if len(finite) < len(gaps) else answer, estimate


def gaps(rows: Sequence[Row], metric: str) -> dict[tuple[str, str, str, float], dict[int, float]]:
    """(setting, architecture, arm, start) -> seed -> log ratio of the losses, the arm's to BF16's. A branch
    is compared with the run it came from.

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
        found[job.setting, job.architecture, job.arm, job.start][job.seed] = math.log(row[metric] / trunk[metric])
    return dict(found)


def print_table(rows: Sequence[Row]) -> None:
    """Each arm's gap by both metrics, the standard deviation of a pair, the answer; then how BF16 seeds differ."""
    for metric, words in METRICS.items():
        print(f"\nGap of the {words} to BF16, %, with its 95 % interval; within {100 * MARGIN:g} %?\n"
              f"{'setting':10} {'architecture':12} {'arm':10} {'start':>5} {'n':>3} {'mean':>8} {'interval':>20} "
              f"{'sd':>6}  answer")
        found, broken = gaps(rows, metric), set[tuple[str, str, float]]()
        for kind in sorted(found, key=lambda kind: (kind[0], kind[1], kind[3], list(ARMS).index(kind[2]))):
            setting, architecture, arm, start = kind
            values = list(found[kind].values())
            answer, estimate = judge(values)
            middle, low, high = (100 * math.expm1(value) for value in (estimate.value, *estimate.interval(ALPHA)))
            sd = 100 * estimate.error * math.sqrt(len(values))
            print(f"{setting:10} {architecture:12} {arm:10} {start:5g} {len(values):3} {middle:+8.4f} "
                  f"[{low:+8.4f}, {high:+8.4f}] {sd:6.4f}  {answer}")
            if arm == CONTROL and answer is Answer.FAILS:
                broken.add((setting, architecture, start))
        for setting, architecture, start in sorted({(of[0], of[1], of[3]) for of in found} - broken):
            print(f"{setting:10} {architecture:12} {start:g}: no answer counts, {CONTROL} is not seen to be broken")
    print()
    for setting, architecture in sorted({(row["setting"], row["architecture"]) for row in rows}):
        runs = [row for row in rows if (row["setting"], row["architecture"], row["arm"]) ==
                (setting, architecture, "bf16")]
        if len(runs) > 1:
            spread = (f"{words} {statistics.fmean(row[metric] for row in runs):.3f} nats, sd "
                      f"{100 * statistics.stdev(math.log(row[metric]) for row in runs):.2f} %"
                      for metric, words in METRICS.items())
            print(f"{setting:10} {architecture:12} {len(runs)} BF16 seeds, {runs[0]['parameters'] / 1e6:.1f} million "
                  f"parameters: {', '.join(spread)}; unigrams {runs[0]['unigram_loss']:.3f}")


WORDS = {"bf16": "BF16", "again": "BF16, weight decay 0.1 % larger", "fp8": "FP8", "e4m3": "FP8, gradients in E4M3",
         "fp8-2": "FP8, two BF16 layers at each end", "fp8-0": "FP8, no BF16 layers", "unscaled": "FP8 without scales"}


def study_of(rows: Sequence[Row], setting: str, start: float, machine: str) -> Study:
    """Losses paired by seed and what is compared, for the report. FP8 and BF16 stand in it with all their seeds, those
    of every arm first, and a second time with these alone. Seeds of which a loss is not finite are left out.

    Raises SystemExit where fewer than two seeds have every arm."""
    losses = {(job_of(row), metric): row[metric] for row in rows for metric in METRICS}
    measurements: list[Measurement] = []
    comparisons: list[Comparison] = []
    counts: list[str] = []

    def measured(metric: str, architecture: str, arm: str, seeds: Sequence[int], note: str = "") -> str:
        name = f"{architecture}, {WORDS[arm]}, {METRICS[metric]}{note}"
        jobs = [Job(setting, architecture, seed, arm, 0.0 if arm == "bf16" else start) for seed in seeds]
        measurements.append(Measurement(name=name, values=[losses[job, metric] for job in jobs], unit="nats a token",
                                        better="lower"))
        return name

    def compare(claim: str, candidate: str, reference: str, question: Question, control: str | None) -> None:
        comparisons.append(Comparison(claim=claim, candidate=candidate, reference=reference, question=question,
                                      relative=True, control=control, margin=MARGIN if control else 0.0))

    for architecture in ARCHITECTURES:
        for metric in METRICS:
            found = gaps(rows, metric)
            pairs = {arm: {seed for seed, gap in found.get((setting, architecture, arm, start), {}).items()
                           if math.isfinite(gap)} for arm in ARMS if arm != "bf16"}
            few = sorted(set.intersection(*pairs.values()))
            if len(few) < 2:
                raise SystemExit(f"{architecture}: {len(few)} seeds have every arm; 2 are the least.\nTrain more.")
            seeds = [*few, *sorted(pairs["fp8"] - set(few))]
            fp8, bf16 = (measured(metric, architecture, arm, seeds) for arm in ("fp8", "bf16"))
            control = measured(metric, architecture, CONTROL, few)
            compare("fp8_parity", fp8, bf16, "equal", control)
            if metric == METRIC:
                alone = {row["seed"] for row in rows if (row["setting"], row["architecture"], row["arm"]) == (
                    setting, architecture, "bf16")} - pairs["fp8"]
                counts.append(f"{architecture} {len(seeds)}, of each other arm {len(few)}" + (
                    f" (of {len(alone)} more seeds there is no FP8 run that ended)" if alone else ""))
                ours, _ = (measured(metric, architecture, arm, few, f" ({len(few)} seeds)") for arm in ("fp8", "bf16"))
                arms = {arm: measured(metric, architecture, arm, few) for arm in ("fp8-2", "fp8-0", "e4m3", "again")}
                compare("fp8_recipe", ours, arms["fp8-2"], "better", None)
                compare("fp8_recipe", ours, arms["fp8-0"], "better", None)
                compare("fp8_recipe", arms["e4m3"], ours, "not worse", control)
    geometry = SETTINGS[setting]
    made_with = {name: ", ".join(dict.fromkeys(row[name] for row in rows if row[name]))
                 for name in ("commit", "python", "torch", "megatron", "transformer_engine")}
    return Study(
        study="fp8_parity",
        command=f"python -m benchmarks.fp8_parity run --setting {setting} --start {start:g} --tokens DIR --out FILE",
        machine=machine, date=max(row["date"] for row in rows), commit=made_with.pop("commit") or "unknown",
        versions={name: versions for name, versions in made_with.items() if versions},
        note=f"{geometry.steps} steps of {geometry.sequences} x {geometry.length:,} tokens, width {geometry.width}, "
             f"{geometry.layers} layers, peak rate {geometry.learning_rate:g}, cosine to 1 %; the training loss is the "
             f"mean over the last {100 * TAIL:g} % of the steps; arms branch off the BF16 run at {100 * start:g} %. "
             f"Pairs: {'; '.join(counts)}. Comparisons of FP8 arms with each other were chosen after the run of "
             "2026-11-29. The paper warns that FP8 results of small scales do not transfer.",
        measurements=measurements, comparisons=comparisons,
    )


def figure(rows: Sequence[Row], setting: str, start: float) -> str:
    """SVG: each arm's gap and its 95 % interval; linear up to the paper's bound, logarithmic beyond."""
    from stages.report.figures import MUTED, PALETTE, Series, labelled, lines

    found, arms, bound = gaps(rows, METRIC), list(WORDS)[1:], 100 * MARGIN
    names = ("BF16\nagain", "FP8", "E4M3\ngradients", "2 BF16\nlayers", "0 BF16\nlayers", "without\nscales")
    series = []
    for architecture, colour, shift in zip(ARCHITECTURES, PALETTE, (-0.1, 0.1), strict=False):
        of = [judge(list(found[setting, architecture, arm, start].values()))[1] for arm in arms]
        series.append(Series(architecture, [shift + place for place in range(len(arms))],
                             [100 * math.expm1(one.value) for one in of], colour, "o",
                             [100 * one.half_width(ALPHA) for one in of]))

    def adjust(axes: Any) -> None:
        axes.set_yscale("symlog", linthresh=bound, linscale=3)
        axes.set_ylim(-0.01, 20)
        ticks = (0, 0.02, 0.04, 0.06, 0.08, bound, 1, 10)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks(range(len(arms)), names, fontsize=7.5)
        axes.axhline(bound, color=MUTED, linestyle="--", linewidth=1)
        axes.annotate("the paper's bound", (-0.3, bound), xytext=(0, 3), textcoords="offset points", fontsize=8.5)

    words = f"Gap of the {METRICS[METRIC]} to BF16 in per cent, by arm, with 95 % intervals, for two architectures."
    return labelled(lines(series, " ", "Gap to BF16, %", adjust), "fp8-parity", words) + "\n"


# ---------------------------------------------------------------------------------------------------- command line


def run_jobs(setting: str, architectures: Sequence[str], seeds: Sequence[int], arms: Sequence[str], start: float
             ) -> list[Job]:
    """Seed by seed, so that a BF16 run is soon followed by all that branch from it."""
    return [Job(setting, architecture, seed, arm, 0.0 if arm == "bf16" else start)
            for seed in seeds for architecture in architectures for arm in ("bf16", *arms)]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    phases = top.add_subparsers(dest="phase", required=True)
    for name, words in {"run": "as many pairs as the time allows", "table": "the answers so far",
                        "one": "train one model (`run` starts it)"}.items():
        phase = phases.add_parser(name, help=words)
        if name != "one":
            phase.add_argument("--out", type=Path, required=True, help="CSV file, a line for each finished model")
        if name != "table":
            phase.add_argument("--tokens", type=Path, required=True, help="tokens directory of a profile")
            phase.add_argument("--scratch", type=Path, default=Path(".scratch/fp8-parity"), help="(%(default)s)")
        if name == "run":
            phase.add_argument("--seconds", type=float, help="start nothing that would not end within them")
            phase.add_argument("--at-once", type=int, default=8, help="models on a GPU (default: %(default)s)")
            phase.add_argument("--commit", help="for the rows, where there is no git")
            phase.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
            phase.add_argument("--arms", nargs="+", choices=list(ARMS)[1:], default=list(ARMS)[1:])
            phase.add_argument("--seeds", type=int, default=16, help="seeds 101 to 100 + this (default: %(default)s)")
        if name in ("run", "table"):
            phase.add_argument("--setting", choices=list(SETTINGS), default="deep-1e-3", help="(default: %(default)s)")
            phase.add_argument("--start", type=float, choices=(0.0, *STARTS), default=STARTS[0],
                               help="share of the steps after which arms leave the BF16 run (default: %(default)s)")
        if name == "table":
            phase.add_argument("--record", metavar="MACHINE", help="write the record and the figure of --setting")
        if name == "one":
            phase.add_argument("--job", type=json.loads, required=True)
            phase.add_argument("--keep-states", action="store_true")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.phase == "one":
        return one(options)
    if options.phase == "table":
        rows = read_rows(options.out)
        if not rows:
            raise SystemExit(f"{options.out}: no finished model.\nTrain some: `run`.")
        print_table(rows)
        if options.record:
            mine = [row for row in rows if row["setting"] == options.setting]
            FIGURE.write_text(figure(mine, options.setting, options.start))
            print(f"\n{study_of(mine, options.setting, options.start, options.record).save()} and {FIGURE} written")
        return 0
    if not (options.tokens / "tokens.json").exists():
        raise SystemExit(f"{options.tokens}: no tokens.json.\nName a tokens directory that stage `tokenize` wrote.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # its models end with it
    jobs = run_jobs(options.setting, options.architectures, range(101, 101 + options.seeds), options.arms,
                    options.start)
    return schedule(jobs, options)


def schedule(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Train `jobs` and print the table. Returns 1 where one failed, or none was there to compare."""
    def command(job: Job) -> list[str]:
        words = [sys.executable, "-m", "benchmarks.fp8_parity", "one", "--job", json.dumps(job), "--tokens",
                 str(options.tokens), "--scratch", str(options.scratch)]
        return words + ["--keep-states"] * any(other.start for other in jobs)

    def ready(job: Job) -> bool:
        trunk = options.scratch / f"{job.setting}-{job.architecture}-{job.seed}" / "bf16@0"
        return (trunk / "trunk").exists()

    slots = slots_of(options.at_once)
    extra = {"at_once": options.at_once, "gpus": len({slot.get("CUDA_VISIBLE_DEVICES") for slot in slots}),
             "commit": options.commit or _commit() or ""}
    scheduler = Scheduler(command, slots, options.out, options.seconds, extra, ready, options.scratch / "logs")
    print(f"{len(jobs)} models, {len(scheduler.slots)} at once: {shlex.join(sys.argv[1:])}", flush=True)
    scheduler.run(jobs)
    mine = set(jobs)
    rows = [row for row in read_rows(options.out) if job_of(row) in mine]
    if rows:
        print_table(rows)
    print(f"\n{len(rows)} of {len(jobs)} models are there; {len(scheduler.left)} not started, "
          f"{len(scheduler.failed)} failed" + "".join(f"\n  {job}: {why}" for job, why in scheduler.failed.items()))
    return int(bool(scheduler.failed) or not rows)


def one(options: argparse.Namespace) -> int:
    """The process of one model: its row as the last line."""
    job = Job(*options.job)
    setting = SETTINGS[job.setting]
    try:
        result = train_one(job, setting, options.tokens, options.scratch, options.keep_states)
    except ModelError as error:
        print(error, flush=True)
        return 1
    tokens = (1 - job.start) * setting.steps * setting.sequences * setting.length
    print(json.dumps(result | {"tokens": round(tokens)} | machine()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
