"""Do quality labels and phases help? Small models trained on different blends of the same corpus, beside each other.

    OMP_NUM_THREADS=1 python -m benchmarks.data_quality [--tokens 245760] [--seeds 3] [--out FILE.json]

Needs data/PROFILE/tokens (`dvc repro tokenize`). Two comparisons, each run with several seeds (of the initial weights
and the order of the text), the same for both sides:

    labels   documents labelled high or medium-high, against medium-low or low: the same weights of the domains
    order    the profile's phases, against the same documents in random order: one phase of the mean weights

Every run trains the profile's hybrid on the same number of tokens with its recipe; the measure is bits per byte on all
of the validation text, by domain. Finished runs are kept in .scratch, by what they depend on: the command goes on where
it was interrupted. Twelve runs of 245,760 tokens take about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from data_pipeline.config import Phase, TokenizeConfig
from data_pipeline.tokenize.blend import blend
from model.config import ModelConfig, PretrainConfig
from stages.common import code_digest, write
from stages.params import Params, load_params

COMPARISONS = {"labels": ("top", "bottom"), "order": ("phased", "random")}      # the first should have fewer bits
TOP, BOTTOM = ["high", "medium-high"], ["medium-low", "low"]
VALIDATION_BATCH = 16           # sequences

Blend = list[dict[str, Any]]    # the phases of blend.json


class Job(NamedTuple):
    """One training run: `directory` holds its arm's token files, and gets its results."""

    arm: str
    seed: int
    directory: Path
    model: ModelConfig
    recipe: PretrainConfig

    @property
    def result(self) -> Path:
        return self.directory / f"seed-{self.seed}.json"


def blends(config: TokenizeConfig, tokens: Mapping[str, int], budget: int) -> dict[str, Blend]:
    """The blend of each arm, from the profile's phases and the tokens of each training file."""
    phased = blend(config.phases, tokens, budget, config.repeats)["phases"]
    random = mean_weights(phased)
    domains: dict[str, float] = {}
    for name, weight in random.items():
        domain = name.removeprefix("train/").partition("-")[0]
        domains[domain] = domains.get(domain, 0.0) + weight
    arms = {"phased": phased, "random": [{"until": 1.0, "weights": random}]}
    for name, labels in (("top", TOP), ("bottom", BOTTOM)):
        phase = Phase.model_validate({"until": 1.0, "weights": domains, "labels": labels})
        arms[name] = blend([phase], tokens, budget, config.repeats)["phases"]
    return arms


def mean_weights(phases: Blend) -> dict[str, float]:
    """The weight of each file over the whole of training."""
    starts = [0.0, *(phase["until"] for phase in phases)]
    weights: dict[str, float] = {}
    for (start, end), phase in zip(pairwise(starts), phases, strict=True):
        for name, weight in phase["weights"].items():
            weights[name] = weights.get(name, 0.0) + (end - start) * weight
    return weights


def most_repeats(phases: Blend, tokens: Mapping[str, int], drawn: int) -> float:
    """How often the most repeated file is read when `drawn` tokens are."""
    return max(weight * drawn / tokens[name] for name, weight in mean_weights(phases).items())


def prepare(directory: Path, tokens: Path, phases: Blend) -> None:
    """`directory` becomes a tokens directory: the files of `tokens`, another blend."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "tokens.json", "token_bytes.npy"):
        if not (directory / name).exists():
            (directory / name).symlink_to((tokens / name).resolve())
    write(directory / "blend.json", {"phases": phases})


def run(job: Job) -> Job:
    """Train and evaluate; the result is written when it is whole. In a process of its own."""
    import torch

    from model import checkpoint
    from model.hybrid_lm import HybridLM
    from model.training import token_data
    from model.training.trainer import train

    torch.set_num_threads(1)
    scratch, out = (job.directory / f"seed-{job.seed}.{name}" for name in ("scratch", "weights"))
    train(job.model, job.recipe, "hybrid", "bf16", job.seed, job.directory, out, scratch, lambda *_, **__: None)
    config, state, _ = checkpoint.load_weights(out)
    model = HybridLM.from_state(config, state).eval()
    measured = {}
    for domain in token_data.domains(job.directory):
        data = token_data.validation(job.directory, domain, config.sequence_length)
        nats = 0.0
        with torch.inference_mode():
            for batch in data.sequences.split(VALIDATION_BATCH):
                logits = model(batch[:, :-1]).float().flatten(0, 1)
                nats += torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
        measured[domain] = {"bits": nats / math.log(2), "bytes": data.bytes}
    write(job.result, measured)
    for directory in (scratch, out):
        shutil.rmtree(directory)
    return job


def jobs(params: Params, tokens: Path, arms: Mapping[str, Blend], drawn: int, seeds: int) -> list[Job]:
    """Every run, in a directory named after all it depends on, the runs to be compared beside each other."""
    recipe = params.pretrain.model_copy(update={"tokens": drawn, "evaluations": 1})
    model = params.model_of("hybrid-bf16")
    contents = (tokens / "tokens.json").read_text()
    identity = [contents, model.model_dump_json(), recipe.model_dump_json(), code_digest()]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:12]
    result = []
    for seed in range(1, seeds + 1):
        for name, phases in arms.items():
            of_blend = hashlib.sha256(json.dumps(phases).encode()).hexdigest()[:8]
            directory = Path(".scratch") / f"data-quality-{digest}" / f"{name}-{of_blend}"
            prepare(directory, tokens, phases)
            result.append(Job(name, seed, directory, model, recipe))
    return result


def bits_per_byte(job: Job) -> dict[str, float]:
    """By domain, and `all`: all bits over all bytes."""
    domains = json.loads(job.result.read_text())
    values = {name: entry["bits"] / entry["bytes"] for name, entry in domains.items()}
    values["all"] = sum(e["bits"] for e in domains.values()) / sum(e["bytes"] for e in domains.values())
    return values


def summary(done: Sequence[Job]) -> dict[str, Any]:
    """bits per byte of each arm by domain, a value a seed; and the differences of the arms compared, seed by seed."""
    arms: dict[str, dict[str, list[float]]] = {}
    for job in done:
        for domain, value in bits_per_byte(job).items():
            arms.setdefault(job.arm, {}).setdefault(domain, []).append(round(value, 5))
    differences = {
        name: {
            domain: [round(a - b, 5) for a, b in zip(values, arms[worse][domain], strict=True)]
            for domain, values in arms[better].items()
        }
        for name, (better, worse) in COMPARISONS.items()
    }
    return {"bits_per_byte": arms, "differences": differences}


def show(figures: Mapping[str, Any]) -> None:
    """The table, mean and standard deviation over seeds, of the arms and of their differences seed by seed."""
    rows = dict(figures["bits_per_byte"])
    for name, (better, worse) in COMPARISONS.items():
        rows[f"{better} - {worse} ({name})"] = figures["differences"][name]
    domains = list(rows["top"])
    print(f"| bits per byte | {' | '.join(domains)} |\n| :-- | {' | '.join('--:' for _ in domains)} |")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(cell(values[domain]) for domain in domains)} |")
    for name, (better, worse) in COMPARISONS.items():
        found = figures["differences"][name]["all"]
        relative = fmean(found) / fmean(figures["bits_per_byte"][worse]["all"])
        print(f"{name}: {better} has fewer bits than {worse} with {sum(value < 0 for value in found)} of {len(found)} "
              f"seeds, {relative:+.2%} on average")


def cell(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):.4f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=245_760, help="that each run is trained on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--data", type=Path, help="tokens directory (data/PROFILE/tokens)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    params = load_params()
    tokens = options.data or Path("data") / params.profile / "tokens"
    contents = json.loads((tokens / "tokens.json").read_text())
    counts = {name: entry["tokens"] for name, entry in contents["files"].items() if name.startswith("train/")}
    arms = blends(params.tokenize, counts, options.tokens)
    every = jobs(params, tokens, arms, options.tokens, options.seeds)
    waiting = [job for job in every if not job.result.exists()]
    print(f"{len(every)} runs of {options.tokens:,} tokens, {len(every) - len(waiting)} done before", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(run, job) for job in waiting]):
            job = future.result()
            print(f"{job.arm}, seed {job.seed}: {bits_per_byte(job)['all']:.4f} bits per byte", flush=True)

    figures = {
        "profile": params.profile,
        "corpus_digest": contents["corpus_digest"],
        "tokens_per_run": options.tokens,
        "seeds": options.seeds,
        "most_repeats": {
            name: round(most_repeats(phases, counts, options.tokens), 3) for name, phases in arms.items()
        },
        **summary(every),
    }
    show(figures)
    if options.out:
        write(options.out, figures)


if __name__ == "__main__":
    main()
