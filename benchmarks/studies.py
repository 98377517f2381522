"""Studies behind the paper's claims that no stage measures: small models trained or cut, arm beside arm.

    python -m benchmarks.studies STUDY ... [--tokens DIR] [--seeds 3] [--jobs 2] [--seconds N] [--out DIR] [--tiny]

writes DIR/STUDY.json, a record for the report (`stages.report.study_schema`). Those that train

    position         hybrid and Transformer, each without positions and with rotary ones; read at 1, 2 and 4 times
                     the training length too
    phased_blend     all text in one constant mix, or each domain from its lowest label to its highest, over three
                     phases that end at 60, 80 and 100 %; judged on held-out text of the high label too
    quality_labels   the same domains' text of the two highest labels, or of the two lowest
    schedule         cosine, or WSD (a stable rate, then 1 - sqrt over the last fifth)
    attention_share  recall and copying (`benchmarks.recall_study`), attention in 0, 8, 25 and 100 % of the mixers
    long_context     the same tasks at 1, 2 and 4 times the length trained at, then after 100 steps at up to 4 times
                     it, or as many at the old length
    fp8_parity       FP8 against BF16, and what its recipe sets (`benchmarks.fp8_study`)

take tokens that `dvc repro tokenize` made; those that cut a trained hybrid

    neuron_score     FFN neurons by their activations, magnitude or at random
    mamba_heads      Mamba heads, their channels, or FFN neurons of as many parameters
    distillation     after MiniPuzzle's first cut: KL to the parent, cross-entropy, or the same shape from scratch
    funnel_order     eight candidates just cut and after a short distillation

train one parent a seed first, or take `--parents`, a checkpoint a seed. On a GPU models have about 10 million
parameters and read 10 million tokens, on a CPU they are the profile's. Arms of one seed see the same tokens in the same
order. Finished runs are kept in .scratch, by what they depend on: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks import fp8_study, recall_study
from data_pipeline.config import Phase, TokenizeConfig
from data_pipeline.tokenize.blend import blend
from data_pipeline.tokenize.indexed_dataset import IndexedDatasetWriter
from durable import new_directory, sha256
from model import costs
from model.checkpoint import load_weights, read_description, save_weights
from model.compression.candidates import random_selection
from model.compression.comparison import Closeness, compare
from model.compression.config import CompressConfig
from model.compression.data import read_data
from model.compression.distill import Objective
from model.compression.funnel import Funnel
from model.compression.layerwise import Kept
from model.compression.prune import Selection
from model.compression.resume import ResultCache
from model.compression.width_importance import NeuronScore, select, top, width_importance
from model.config import ModelConfig, PretrainConfig
from model.hybrid_lm import HybridLM
from model.integrity import SUMS
from model.megatron.distributed import device, process_groups
from model.training import token_data
from stages.frame.common import _commit, _machine, _versions, code_digest, out_directory, write
from stages.frame.params import Params, load_params
from stages.report.study_schema import FOLDER, Comparison, Measurement, Study

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDataset

NATS, ACCURACY, CORRELATION, SHARE = "nats per token", "accuracy", "rank correlation", "share"
BETTER: dict[str, Any] = {NATS: "lower", ACCURACY: "higher", CORRELATION: "higher", SHARE: "higher"}
MULTIPLES = (1, 2, 4)                                       # of the length trained at
LABELS = ("low", "medium-low", "medium", "medium-high", "high")
TOP, BOTTOM = ["high", "medium-high"], ["medium-low", "low"]
PHASE_ENDS = (0.6, 0.8, 1.0)
HELD_OUT_EVERY = 10                                         # documents of the high label
CANDIDATES = 8
RANDOM_DRAWS = 5
EXTENSION_STEPS = 100
TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 32_768}              # in an evaluation

Figures = dict[str, tuple[float, str]]                      # measurement -> value, unit
Blend = list[dict[str, Any]]                                # the phases of blend.json


class Scale(NamedTuple):
    """Sizes and recipes of everything that is trained."""

    hybrid: ModelConfig
    transformer: ModelConfig
    recipe: PretrainConfig
    compress: CompressConfig
    recall: recall_study.Sizes
    formats: fp8_study.Sizes


class Training(NamedTuple):
    """A model to be trained on text, and where it is read."""

    config: ModelConfig
    recipe: PretrainConfig
    tokens: Path
    multiples: tuple[int, ...] = (1,)


class Task(NamedTuple):
    """One arm with one seed, or all arms where they share a parent. `work` is the arm's, as its design made it."""

    study: str
    arm: str
    seed: int
    work: Any
    scale: Scale
    tokens: Path
    scratch: Path
    until: float                # seconds since 1970 after which it is not begun

    @property
    def parent(self) -> Path:
        return self.scratch / f"parent-{self.seed}"

    @property
    def result(self) -> Path:
        return self.scratch / f"{self.study}-{self.arm or 'all'}-{self.seed}.json".replace(" ", "_").replace("%", "")


class Design(NamedTuple):
    """A study before it runs.

    Attributes:
        arms: what each arm is, by name, from the scale, the tokens directory and a directory to prepare others in.
        run: one task's figures, under names that tell arms apart.
        comparisons: what decides the claim.
        cuts: whether it takes a trained parent.
    """

    note: str
    arms: Callable[[Scale, Path, Path], Mapping[str, Any]]
    run: Callable[[Task], Figures]
    comparisons: Sequence[Comparison] = ()
    cuts: bool = False


def silent(*_: Any, **__: Any) -> None:
    """No lines between those of the studies."""


# --- Sizes ------------------------------------------------------------------------------------------------------------


def scale_of(params: Params, vocab_size: int, on_gpu: bool, tiny: bool) -> Scale:
    """The profile's on a CPU; larger on a GPU; `tiny` to see whether all works."""
    hybrid, transformer = (
        ModelConfig.model_validate({**params.model[name].model_dump(), "vocab_size": vocab_size})
        for name in ("hybrid", "transformer")
    )
    recipe = params.pretrain.model_copy(update={"evaluations": 1, "checkpoint_every": 10**9})
    compress = params.compress.model_copy(update={"checkpoint_every": 10**9})
    recall = recall_study.CPU._replace(tokens=max(MULTIPLES) * recall_study.CPU.pairs)      # keys of the longest
    if tiny:
        narrow = {"hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 1, "head_dim": 16,
                  "sequence_length": 16}
        hybrid = hybrid.model_copy(update=narrow | {
            "pattern": "M-M*-M-", "ffn_hidden_size": 64, "mamba_num_heads": 4, "mamba_head_dim": 16,
            "mamba_state_dim": 16, "mamba_num_groups": 2, "chunk_size": 16})
        transformer = transformer.model_copy(update=narrow | {"pattern": "*-*-*-", "ffn_hidden_size": 96})
        recipe = recipe.model_copy(update={"tokens": 2048, "global_batch_size": 4, "micro_batch_size": 4,
                                           "learning_rate": 2e-2})
        compress = compress.model_copy(update={
            "importance_samples": 4, "ffn_importance_samples": 8, "ffn_widths": [32, 48, 64],
            "global_batch_size": 4, "micro_batch_size": 4,
            "validation_samples": 16, "short_distillation_tokens": 256, "distillation_tokens": 512,
            "memory": compress.memory.model_copy(update={"context": 16})})
        return Scale(hybrid, transformer, recipe, compress, recall_study.TINY._replace(tokens=16), fp8_study.CPU)
    if on_gpu:
        wide = {"hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 64,
                "sequence_length": 1024}
        hybrid = hybrid.model_copy(update=wide | {
            "ffn_hidden_size": 768, "mamba_num_heads": 8, "mamba_head_dim": 64, "mamba_state_dim": 32,
            "mamba_num_groups": 2, "chunk_size": 128})
        transformer = transformer.model_copy(update=wide | {"pattern": "*-" * 13, "ffn_hidden_size": 752})
        recipe = recipe.model_copy(update={"tokens": 10 * 2**20, "global_batch_size": 32, "micro_batch_size": 32,
                                           "learning_rate": 1e-3, "min_learning_rate": 1e-5})
        compress = compress.model_copy(update={
            "importance_samples": 64, "ffn_importance_samples": 256, "ffn_widths": [512, 576, 640, 704, 768],
            "global_batch_size": 16, "micro_batch_size": 16, "validation_samples": 192,
            "short_distillation_tokens": 2**19, "distillation_tokens": 2**21,
            "learning_rate": 3e-4, "min_learning_rate": 3e-5})
    return Scale(hybrid, transformer, recipe, compress, recall, fp8_study.GPU if on_gpu else fp8_study.CPU)


# --- Training ---------------------------------------------------------------------------------------------------------


def trained(task: Task, work: Training, out: Path) -> HybridLM:
    """Train in BF16; the weights stay in `out`."""
    from model.training.trainer import train

    with TemporaryDirectory() as scratch:
        train(work.config, work.recipe, task.arm or task.study, "bf16", task.seed, work.tokens, out, Path(scratch),
              silent)
    return loaded(out)


def loaded(checkpoint: Path) -> HybridLM:
    config, state, _ = load_weights(checkpoint)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    return HybridLM.from_state(config, state, dtype).to(device()).requires_grad_(False)


@torch.no_grad()
def losses(model: HybridLM, tokens: Path, multiples: Sequence[int]) -> dict[str, dict[int, tuple[float, int]]]:
    """Of each validation domain, by multiple of the length trained at: summed nats and the tokens they are over.

    Every length predicts the same tokens.
    """
    found: dict[str, dict[int, tuple[float, int]]] = {}
    length = model.config.sequence_length
    for domain in token_data.domains(tokens):
        text = token_data.validation(tokens, domain, max(multiples) * length).sequences
        for multiple in multiples:
            found.setdefault(domain, {})[multiple] = _nats(model, pieces(text, multiple * length))
    return found


def pieces(text: Tensor, length: int) -> Tensor:
    """Sequences (n, length' + 1), each beginning with the last token of the one before, as (m, length + 1)."""
    return text.unfold(1, length + 1, length).flatten(0, 1)


def _nats(model: HybridLM, sequences: Tensor) -> tuple[float, int]:
    here = device()
    total = torch.zeros((), dtype=torch.float64, device=here)
    for batch in sequences.split(max(1, TOKENS_AT_ONCE[here.type] // sequences.shape[1])):
        logits = model(batch[:, :-1].to(here)).flatten(0, 1).float()
        total += torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten().to(here), reduction="sum").double()
    return total.item(), sequences[:, 1:].numel()


def train_and_read(task: Task) -> Figures:
    with TemporaryDirectory() as directory:
        return held_out_losses(task, trained(task, task.work, Path(directory) / "weights"))


def held_out_losses(task: Task, model: HybridLM) -> Figures:
    """Its losses on all held-out text but that of the high label, by length, and on that of the high label."""
    work: Training = task.work
    found = losses(model, work.tokens, work.multiples)

    def mean(domains: Iterable[str], multiple: int) -> tuple[float, str]:
        parts = [found[domain][multiple] for domain in domains]
        return sum(nats for nats, _ in parts) / sum(count for _, count in parts), NATS

    high = [domain for domain in found if domain.endswith("-high")]
    rest = [domain for domain in found if domain not in high]
    figures = {_named(task.arm, multiple): mean(rest, multiple) for multiple in work.multiples}
    return figures | ({f"{task.arm}, high label": mean(high, 1)} if high else {})


def _named(arm: str, multiple: int) -> str:
    return arm if multiple == 1 else f"{arm}, at {multiple} times the length"


def parents(scale: Scale, tokens: Path, scratch: Path) -> dict[str, Training]:
    return {"": Training(scale.hybrid, scale.recipe, tokens)}


def train_parent(task: Task) -> Figures:
    with new_directory(task.parent) as partial:
        return held_out_losses(task, trained(task, task.work, partial))


def positions(scale: Scale, tokens: Path, scratch: Path) -> dict[str, Training]:
    """Of hybrid and Transformer, without positions (NoPE) and with rotary ones."""
    names = {"none": "NoPE", "rope": "RoPE"}
    return {
        f"{kind} {name}": Training(config.model_copy(update={"position_embedding": embedding}), scale.recipe, tokens,
                                   MULTIPLES)
        for kind, config in (("hybrid", scale.hybrid), ("Transformer", scale.transformer))
        for embedding, name in names.items()
    }


def schedules(scale: Scale, tokens: Path, scratch: Path) -> dict[str, Training]:
    """Each at two peak rates: a stable rate does as much in as many steps at a lower peak."""
    peak, least = scale.recipe.learning_rate, scale.recipe.min_learning_rate
    shapes: dict[str, dict[str, Any]] = {"cosine": {"decay_style": "cosine", "decay_fraction": None},
                                         "WSD": {"decay_style": "minus_sqrt", "decay_fraction": 0.2}}
    return {
        f"{name}{rate}": Training(scale.hybrid, scale.recipe.model_copy(update=shape | {
            "learning_rate": times * peak, "min_learning_rate": times * least}), tokens)
        for rate, times in (("", 1), (", 3 times the rate", 3)) for name, shape in shapes.items()
    }


def labels(scale: Scale, tokens: Path, scratch: Path) -> dict[str, Training]:
    """Equal tokens of each domain, from the two highest labels or the two lowest."""
    shorter = scale.recipe.model_copy(update={"tokens": scale.recipe.tokens // 4})      # of which there is enough
    blends = label_blends(load_params().tokenize, training_tokens(tokens), shorter.tokens)
    return _blended(blends, scale._replace(recipe=shorter), tokens, scratch / "labels")


def label_blends(config: TokenizeConfig, tokens: Mapping[str, int], budget: int) -> dict[str, Blend]:
    """Of the two arms: one phase with the profile's mean weight of each domain; `tokens` of each training file."""
    domains = {domain: 0.0 for phase in config.phases for domain in phase.weights}
    for name, weight in mean_weights(blend(config.phases, tokens, budget, config.repeats)["phases"]).items():
        domain = name.removeprefix("train/").partition("-")[0]
        domains[domain] += weight
    arms = {}
    for name, labels in (("top labels", TOP), ("bottom labels", BOTTOM)):
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


def phases(scale: Scale, tokens: Path, scratch: Path) -> dict[str, Training]:
    """All text equally often, in one mix or by quality."""
    source = scratch / "high-held-out"
    if not (source / "tokens.json").exists():
        hold_out_high(tokens, source)
    counts = training_tokens(source)
    weights = {name: count / sum(counts.values()) for name, count in counts.items()}
    blends = {"constant": [{"until": 1.0, "weights": weights}], "phased": by_quality(weights)}
    return _blended(blends, scale, source, scratch / "phases")


def training_tokens(tokens: Path) -> dict[str, int]:
    """Tokens of each training file that has any."""
    files = json.loads((tokens / "tokens.json").read_text())["files"]
    return {name: entry["tokens"] for name, entry in files.items() if name.startswith("train/") and entry["tokens"]}


def _blended(blends: Mapping[str, Blend], scale: Scale, tokens: Path, scratch: Path) -> dict[str, Training]:
    """An arm a blend, in a tokens directory of its own: the files of `tokens`, another blend.json."""
    arms = {}
    for name, phases in blends.items():
        directory = scratch / name.replace(" ", "-")
        directory.mkdir(parents=True, exist_ok=True)
        for part in ("train", "validation", "tokens.json", "token_bytes.npy"):
            if not (directory / part).exists():
                (directory / part).symlink_to((tokens / part).resolve())
        write(directory / "blend.json", {"phases": phases})
        arms[name] = Training(scale.hybrid, scale.recipe, directory)
    return arms


def by_quality(weights: Mapping[str, float], ends: Sequence[float] = PHASE_ENDS) -> Blend:
    """Phases that read each domain's files from the lowest label to the highest; `weights` is their mean.

    Args:
        weights: of the files, summing to 1.
        ends: share of training at which each phase ends.
    """
    of_domain: dict[str, float] = {}
    places: dict[str, tuple[float, float]] = {}             # the stretch of its domain's text that a file is
    for name in sorted(weights, key=lambda name: LABELS.index(name.partition("-")[2])):
        domain = name.partition("-")[0]
        places[name] = of_domain.get(domain, 0.0), of_domain.get(domain, 0.0) + weights[name]
        of_domain[domain] = places[name][1]
    found: Blend = []
    for start, end in pairwise([0.0, *ends]):
        read = {}
        for name, (begins, stops) in places.items():
            total = of_domain[name.partition("-")[0]]
            if (overlap := min(stops, end * total) - max(begins, start * total)) > 1e-12:
                read[name] = overlap / (end - start)
        found.append({"until": end, "weights": read})
    return found


def hold_out_high(tokens: Path, directory: Path) -> None:
    """`directory` becomes `tokens` with every tenth document of the high label held out as validation/DOMAIN-high."""
    contents = json.loads((tokens / "tokens.json").read_text())
    table = np.load(tokens / "token_bytes.npy").astype(np.int64)
    files: dict[str, Any] = {}
    for name, entry in contents["files"].items():
        split, _, rest = name.partition("/")
        domain, _, label = rest.partition("-")
        (directory / split).mkdir(parents=True, exist_ok=True)
        if split != "train" or label != "high":
            files[name] = entry
            for suffix in ("bin", "idx"):
                if not (link := directory / f"{name}.{suffix}").exists():
                    link.symlink_to((tokens / f"{name}.{suffix}").resolve())
            continue
        documents = IndexedDataset(str(tokens / name))
        for target, held_out in ((name, False), (f"validation/{domain}-high", True)):
            count = read = size = 0
            with IndexedDatasetWriter(directory / target, contents["vocab_size"]) as writer:
                for number in range(len(documents)):
                    if (number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) is held_out:
                        ids = documents[number]
                        writer.add(ids)
                        count, read, size = count + 1, read + len(ids), size + int(table[ids].sum())
            files[target] = {"documents": count, "tokens": read, "bytes": size}
    np.save(directory / "token_bytes.npy", table.astype(np.uint16))
    write(directory / "tokens.json", contents | {"files": files})


def architectures(scale: Scale, tokens: Path, scratch: Path) -> dict[str, Training]:
    sizes, vocabulary = scale.formats, scale.hybrid.vocab_size
    return {name: Training(fp8_study.model_config(sizes, name, vocabulary), fp8_study.recipe(sizes), tokens)
            for name in fp8_study.ARCHITECTURES}


def number_formats(task: Task) -> Figures:
    """Of one architecture, all of `fp8_study.ARMS`: they share the BF16 run that they leave."""
    work: Training = task.work
    with TemporaryDirectory() as scratch:
        found = fp8_study.losses(work.config, work.recipe, task.seed, work.tokens, Path(scratch))
    return {f"{task.arm}, {name}": (value, NATS) for name, value in found.items()}


def formats_compared() -> Iterator[Comparison]:
    """FP8 against BF16 by both losses; by training's, more precise than needed, what its recipe sets."""
    for architecture in fp8_study.ARCHITECTURES:
        for metric in ("training loss", "validation loss"):
            ours, reference, control, two, none, e4m3 = (f"{architecture}, {arm}, {metric}" for arm in (
                "FP8", "BF16", fp8_study.CONTROL, "FP8, two BF16 layers at each end", "FP8, no BF16 layers",
                "FP8, gradients in E4M3"))
            yield Comparison(claim="fp8_parity", candidate=ours, reference=reference, question="equal", relative=True,
                             margin=fp8_study.MARGIN, control=control)
            if metric == "training loss":
                yield from (better("fp8_recipe", ours, other) for other in (two, none))
                yield Comparison(claim="fp8_recipe", candidate=e4m3, reference=ours, question="not worse",
                                 relative=True, margin=fp8_study.MARGIN, control=control)


# --- Recall and length ------------------------------------------------------------------------------------------------


def shares(scale: Scale, tokens: Path, scratch: Path) -> dict[str, tuple[str, str]]:
    return {f"{task}, attention {share} %": (task, share)
            for task in recall_study.TASKS for share in recall_study.patterns(scale.recall.layers)}


def chance(task: str, sizes: recall_study.Sizes) -> float:
    return 1 / (sizes.tokens if task == "recall" else 2 * sizes.tokens)


def recall_and_copy(task: Task) -> Figures:
    kind, share = task.work
    pattern = recall_study.patterns(task.scale.recall.layers)[share]
    return {task.arm: (recall_study.train_and_test(kind, pattern, task.scale.recall, task.seed, device()), ACCURACY)}


def long_arms(scale: Scale, tokens: Path, scratch: Path) -> dict[str, tuple[str, str]]:
    return {f"{task}, {name}": (task, share) for task in recall_study.TASKS
            for name, share in (("hybrid", "8"), ("Transformer", "100"))}


def longer(task: Task) -> Figures:
    """Accuracy by length of a model trained at one, then after further steps at up to 4 times it, or at the old one."""
    kind, share = task.work
    sizes, here = task.scale.recall, device()
    state: dict[str, Tensor] = {}
    figures: Figures = {}
    config = recall_study.model_config(recall_study.patterns(sizes.layers)[share], sizes)
    longest = recall_study.lengths(kind, sizes)[-1]
    old = [max(1, longest // 4), max(1, longest // 2), longest]
    extension = min(EXTENSION_STEPS, sizes.steps)
    plans = (("", old, sizes.steps, 1.0), (", then trained longer", [longest * m for m in MULTIPLES], extension, 0.5),
             (", then trained as before", old, extension, 0.5))
    for stage, shape, steps, rate in plans:
        torch.manual_seed(task.seed)
        model = HybridLM(config) if not stage else HybridLM.from_state(config, state)
        draw = torch.Generator().manual_seed(task.seed + (1_000 if stage else 0))
        recall_study.fit(model.to(here), kind, sizes, shape, steps, rate * recall_study.LEARNING_RATE, draw, here)
        if not stage:
            state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for multiple in MULTIPLES:
            value = recall_study.accuracy(model, kind, sizes, multiple * longest, task.seed, here)
            figures[_named(task.arm + stage, multiple)] = value, ACCURACY
    return figures


# --- Cutting ----------------------------------------------------------------------------------------------------------


def one_arm(scale: Scale, tokens: Path, scratch: Path) -> dict[str, None]:
    """All arms in one task: they share the parent."""
    return {"": None}


@contextmanager
def compression(task: Task) -> Iterator[Funnel]:
    """The parent, its importance and its text, as the compress stage has them."""
    config, _ = read_description(task.parent)
    with TemporaryDirectory() as directory, process_groups():
        scratch, settings = Path(directory), task.scale.compress
        data = read_data(task.tokens, config.sequence_length, settings, task.seed, scratch / "index")
        yield Funnel(task.parent, task.tokens, data, settings, task.scale.recipe, task.seed, ResultCache(scratch),
                     silent)


def closeness(run: Funnel, models: Mapping[str, Kept | Path]) -> dict[str, Closeness]:
    """Of masked parents and of checkpoints, one of them loaded at a time."""
    found = {}
    for name, model in models.items():
        loaded = {name: run.load(model) if isinstance(model, Path) else model}
        found |= compare(run.teacher, loaded, run.data.validation, run.config.micro_batch_size, silent)
    return found


def distilled(
    run: Funnel, start: Path, tokens: int, objective: Objective = "kl", behind: bool = False, **changes: float
) -> Path:
    """The student that begins as `start` after `tokens` tokens: the first of the text, or those `behind` them."""
    name = "-".join([start.parent.name, objective, *["behind"] * behind, *map(str, changes.values())])
    school = copy.copy(run.school)
    school.config = run.config.model_copy(update=changes)
    if behind:
        count = tokens // run.config_of_parent.sequence_length
        school.samples = [run.school.samples[number] for number in range(count, 2 * count)]
    return school.distil(start, tokens, name, objective).directory


def neuron_scores(task: Task) -> Figures:
    """KL of the parent cut to 94 and 75 % of its neurons: by each score, and the mean of random draws."""
    figures: Figures = {}
    with compression(task) as run:
        parent = run.config_of_parent
        everything = list(range(len(parent.pattern)))
        ffn = [layer for layer in everything if parent.pattern[layer] == "-"]
        names = {layer: f"backbone.layers.{layer}.mixer" for layer in ffn}
        _, state, _ = load_weights(run.parent)
        magnitude = {layer: state[f"{name}.up_proj.weight"].norm(dim=1) * state[f"{name}.down_proj.weight"].norm(dim=0)
                     for layer, name in names.items()}
        samples = run.data.calibration[: run.config.ffn_importance_samples]
        scores = {order: width_importance(run.teacher, samples, run.config.micro_batch_size, silent, order)
                  for order in get_args(NeuronScore)}
        for percent in (6, 25):
            shape = parent.model_copy(update={"ffn_hidden_size": round(parent.ffn_hidden_size * (1 - percent / 100))})
            cuts = {
                **{order.replace("_", " ").replace("l2", "L2"): select(parent, shape, everything, widths)
                   for order, widths in scores.items()},
                "magnitude": Selection(everything, {layer: top(magnitude[layer], shape.ffn_hidden_size)
                                                    for layer in ffn}),
            }
            cuts |= {f"random {draw}": random_selection(parent, shape,
                                                        torch.Generator().manual_seed(100 * task.seed + draw))
                     for draw in range(RANDOM_DRAWS)}
            found = closeness(run, {name: run.mask(selection) for name, selection in cuts.items()})
            drawn = [value.kl for name, value in found.items() if name.startswith("random")]
            values = {name: value.kl for name, value in found.items() if not name.startswith("random")}
            for name, value in (values | {"random": fmean(drawn)}).items():
                figures[f"{name}, {percent} % cut"] = value, NATS
    return figures


def mamba_heads(task: Task) -> Figures:
    """KL of three cuts of nearly as many parameters, at once and after a short distillation."""
    with compression(task) as run:
        parent = run.config_of_parent
        shapes = {
            "Mamba heads": parent.model_copy(update={"mamba_num_heads": parent.mamba_num_heads // 2}),
            "Mamba head channels": parent.model_copy(update={"mamba_head_dim": parent.mamba_head_dim // 2}),
        }
        shapes["FFN neurons"] = equal_ffn_cut(parent, costs.parameters(shapes["Mamba heads"]))
        everything = list(range(len(parent.pattern)))
        starts = {name: run.cut(select(parent, shape, everything, run.widths), name) for name, shape in shapes.items()}
        ends = {name: distilled(run, start, run.config.short_distillation_tokens) for name, start in starts.items()}
        cut, after = closeness(run, starts), closeness(run, ends)
        sizes = {name: costs.parameters(read_description(start)[0]) for name, start in starts.items()}
    figures: Figures = {f"{name}, just cut": (value.kl, NATS) for name, value in cut.items()}
    figures |= {f"{name}, distilled": (value.kl, NATS) for name, value in after.items()}
    return figures | {f"{name}, parameters": (float(size), "parameters") for name, size in sizes.items()}


def equal_ffn_cut(parent: ModelConfig, parameters: int) -> ModelConfig:
    """The parent with fewer FFN neurons, a multiple of 8, so that it has nearly `parameters`."""
    a_neuron = 2 * parent.hidden_size * parent.pattern.count("-")
    cut = round((costs.parameters(parent) - parameters) / a_neuron / 8) * 8
    return parent.model_copy(update={"ffn_hidden_size": parent.ffn_hidden_size - cut})


def distillation(task: Task) -> Figures:
    """Held-out loss and KL of MiniPuzzle's first candidate after equal tokens of each objective, and from scratch."""
    with compression(task) as run:
        best = max(run.candidates(), key=lambda candidate: candidate.importance)
        start = run.cut(best.selection, "best")
        torch.manual_seed(task.seed)
        fresh = run.cache.directory / "fresh" / "start"
        fresh.mkdir(parents=True)
        save_weights(fresh, best.config, dict(HybridLM(best.config).requires_grad_(False).state_dict()), {})
        tokens = run.config.distillation_tokens
        recipe = task.scale.recipe
        models = {"parent": run.parent, "just cut": start}
        models["cut, KL"] = distilled(run, start, tokens)
        models["cut, cross-entropy"] = distilled(run, start, tokens, "cross_entropy")
        models["from scratch, cross-entropy"] = distilled(
            run, fresh, tokens, "cross_entropy", learning_rate=recipe.learning_rate,
            min_learning_rate=recipe.min_learning_rate)
        found = closeness(run, models)
    figures: Figures = {f"loss, {name}": (value.loss, NATS) for name, value in found.items()}
    gap = found["just cut"].loss - found["parent"].loss
    for name, value in found.items():
        if name not in ("parent", "just cut"):
            figures[f"share of the loss gap closed, {name}"] = (found["just cut"].loss - value.loss) / gap, SHARE
        if name != "parent":
            figures[f"KL to the parent, {name}"] = value.kl, NATS
    return figures


def funnel_order(task: Task) -> Figures:
    """How the order of candidates just cut agrees with that after a short distillation, and what is left to choose.

    Two distillations, on other text each, give the candidates two orders as well: by so much the order changes without
    anything being found.
    """
    with compression(task) as run:
        candidates = sorted(run.candidates(), key=lambda candidate: -candidate.importance)
        count = min(CANDIDATES, len(candidates))
        chosen = [candidates[round(place)] for place in np.linspace(0, len(candidates) - 1, count)]
        cut = closeness(run, {str(number): run.mask(candidate.selection) for number, candidate in enumerate(chosen)})
        starts = {str(number): run.cut(candidate.selection, str(number)) for number, candidate in enumerate(chosen)}
        tokens = run.config.short_distillation_tokens
        after, again = (closeness(run, {number: distilled(run, start, tokens, behind=behind)
                                        for number, start in starts.items()}) for behind in (False, True))
    before, then, other = ([value.kl for value in found.values()] for found in (cut, after, again))
    agreement, kept = [-value.agreement for value in cut.values()], [-one.importance for one in chosen]
    return {
        "KL distilled, best just cut": (then[before.index(min(before))], NATS),
        "KL distilled, best of all": (min(then), NATS),
        "KL distilled, mean candidate": (fmean(then), NATS),
        "pairs whose order changes": (changed_pairs(before, then), SHARE),
        "pairs of which two distillations differ": (changed_pairs(then, other), SHARE),
        "KL just cut and distilled": (float(spearmanr(before, then).statistic), CORRELATION),
        "agreement just cut and KL distilled": (float(spearmanr(agreement, then).statistic), CORRELATION),
        "importance kept and KL distilled": (float(spearmanr(kept, then).statistic), CORRELATION),
        "KL from best to worst, just cut": (max(before) - min(before), NATS),
        "KL from best to worst, distilled": (max(then) - min(then), NATS),
        "candidates": (float(count), "candidates"),
    }


def changed_pairs(one: Sequence[float], other: Sequence[float]) -> float:
    """Share of all pairs that the two put in opposite orders."""
    pairs = list(combinations(zip(one, other, strict=True), 2))
    return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs) / len(pairs)


# --- The studies ------------------------------------------------------------------------------------------------------


def better(claim: str, candidate: str, reference: str | float, relative: bool = True) -> Comparison:
    return Comparison(claim=claim, candidate=candidate, reference=reference, question="better", relative=relative)


LONG = ", at 4 times the length"
STUDIES: dict[str, Design] = {
    "position": Design(
        "Hybrid and Transformer of one size, without positions (NoPE) and with rotary ones (RoPE); held-out loss, over "
        "the same tokens at every length. The margin of 1 % is ours.",
        positions, train_and_read, [
            Comparison(claim="position", candidate="hybrid NoPE", reference="hybrid RoPE", question="not worse",
                       margin=0.01, relative=True, control="Transformer NoPE"),
            better("position", "Transformer RoPE", "Transformer NoPE")]),      # where a lack of positions can be seen
    "phased_blend": Design(
        "All text in one mix, or each domain from its lowest label to its highest in phases that end at 60, 80 and "
        "100 %: the same samples in another order. Judged on every tenth document of the high label, held out, and on "
        "held-out distributions.",
        phases, train_and_read, [better("phased_blend", "phased, high label", "constant, high label")]),
    "quality_labels": Design(
        "Equal tokens of each domain from its two highest labels or its two lowest; loss on held-out distributions.",
        labels, train_and_read, [better("quality_labels", "top labels", "bottom labels")]),
    "schedule": Design(
        "The rate falls by a cosine, or is stable and falls as 1 - sqrt over the last fifth, both to 1 % of the peak.",
        schedules, train_and_read),
    "attention_share": Design(
        "Trained on the task itself, attention in 0, 8, 25 and 100 % of the mixers; asked where Mamba-2's state is too "
        "small to hold everything. The margin of 5 points is ours.",
        shares, recall_and_copy, [
            better("attention_share", "recall, attention 8 %", "recall, attention 0 %", False),
            Comparison(claim="attention_share", candidate="recall, attention 8 %", reference="recall, attention 25 %",
                       question="not worse", margin=0.05, control="recall, attention 0 %")]),
    "long_context": Design(
        "Trained on the task itself, asked at 1, 2 and 4 times the length; then after 100 steps at up to 4 times it, "
        "or as many at the old length.",
        long_arms, longer, [better("long_context", f"recall, hybrid, then trained longer{LONG}",
                                   f"recall, hybrid, then trained as before{LONG}", False)]),
    "fp8_parity": Design(
        "A BF16 run, and arms that leave it at half of its steps, each with another number format; the training loss "
        "is the mean over the last fifth of the steps. The paper warns that FP8 results of small scales do not "
        "transfer.",
        architectures, number_formats, list(formats_compared())),
    "neuron_score": Design(
        "FFN neurons cut by their activations (mean over the batch, then L2 over the sequence, as the paper's words "
        "stand; or L2 over the batch of means over the sequence), by the product of their weights' norms, or at random "
        "(mean of five draws); KL to the parent on held-out text, nothing trained after.",
        one_arm, neuron_scores, [better("neuron_score", "mean then L2, 6 % cut", f"{other}, 6 % cut")
                                 for other in ("random", "magnitude")], True),
    "mamba_heads": Design(
        "Half of the Mamba heads, half of each head's channels, or FFN neurons of as many parameters cut; KL to the "
        "parent on held-out text, at once and after a short distillation.",
        one_arm, mamba_heads, [better("mamba_heads", "FFN neurons, distilled", f"{other}, distilled")
                               for other in ("Mamba heads", "Mamba head channels")], True),
    "distillation": Design(
        "The candidate that keeps most importance within the budget, trained on as many tokens by KL to the parent or "
        "by cross-entropy, and its shape from fresh weights at the pretraining rate. The margin of 1 % is ours.",
        one_arm, distillation, [
            better("distillation", "loss, cut, KL", "loss, from scratch, cross-entropy"),
            Comparison(claim="distillation", candidate="loss, cut, KL", reference="loss, parent", question="not worse",
                       margin=0.01, relative=True, control="loss, from scratch, cross-entropy"),
        ], True),
    "funnel_order": Design(
        "Eight candidates spread evenly over the order of kept importance, compared with the parent just cut and after "
        "a short distillation on the same text, and after one on other text.",
        one_arm, funnel_order, [
            better("funnel_order", "KL distilled, best just cut", "KL distilled, mean candidate"),
            better("funnel_order", "pairs whose order changes", "pairs of which two distillations differ", False),
        ], True),
}
PARENT = Design("", parents, train_parent)


# --- Running ----------------------------------------------------------------------------------------------------------


def perform(task: Task, threads: int) -> Figures | None:
    """The task's figures, kept when they are whole; None where the time is over. In a process of its own."""
    if time.time() > task.until:
        return None
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    design = STUDIES.get(task.study, PARENT)
    figures = design.run(task)
    write(task.result, figures)
    return figures


def read(task: Task) -> Figures | None:
    """What `perform` kept."""
    if not task.result.exists():
        return None
    return {name: (value, unit) for name, (value, unit) in json.loads(task.result.read_text()).items()}


def run_all(tasks: Sequence[Task], jobs: int, threads: int) -> list[str]:
    """Perform what is not done yet, `jobs` processes at a time. Returns the failures, which do not stop the others."""
    started, failures = time.monotonic(), []
    waiting = [task for task in tasks if read(task) is None]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(perform, task, threads): task for task in waiting}
        for future in as_completed(futures):
            task = futures[future]
            name = f"{task.study}, {task.arm or 'all'}, seed {task.seed}"
            try:
                figures = future.result()
            except Exception:
                traceback.print_exc()
                failures.append(name)
                continue
            shown = "not begun: the time is over" if figures is None else ", ".join(
                f"{key} {value:.5g}" for key, (value, _) in figures.items())
            print(f"{time.monotonic() - started:4.0f} s  {name}: {shown}", flush=True)
    return failures


def measurements(tasks: Sequence[Task]) -> tuple[list[Measurement], list[int]]:
    """One a name, a value each of the seeds that are done in all arms, and these seeds."""
    by_seed: dict[int, Figures | None] = {}
    for task in tasks:
        before, figures = by_seed.get(task.seed, {}), read(task)
        by_seed[task.seed] = None if before is None or figures is None else before | figures
    done = {seed: figures for seed, figures in sorted(by_seed.items()) if figures is not None}
    names = next(iter(done.values()), {})
    chances = {f"{kind}, ": chance(kind, tasks[0].scale.recall) for kind in recall_study.TASKS}
    return [
        Measurement(
            name=name, values=[figures[name][0] for figures in done.values()], unit=unit, better=BETTER.get(unit),
            chance=next((value for start, value in chances.items() if name.startswith(start)), None)
            if unit == ACCURACY else None,
        )
        for name, (_, unit) in names.items()
    ], list(done)


def record(study: str, tasks: Sequence[Task], command: str, commit: str) -> Study | None:
    """What the report reads, of the seeds that are done; None where none is."""
    found, seeds = measurements(tasks)
    if not found:
        return None
    asked = len({task.seed for task in tasks})
    note = STUDIES[study].note + ("" if len(seeds) == asked else f" Of {asked} seeds {len(seeds)} were done.")
    return Study(version=1, study=study, command=command, machine=machine(), date=datetime.date.today(), commit=commit,
                 versions=_versions(), note=f"{note} {describe(tasks[0])}", measurements=found,
                 comparisons=list(STUDIES[study].comparisons))


def describe(task: Task) -> str:
    """Sizes of the models, in a sentence."""
    if isinstance(task.work, tuple) and not isinstance(task.work, Training):
        sizes = task.scale.recall
        return (f"Width {sizes.hidden}, state {sizes.state}, {sizes.pairs} pairs, {sizes.copied} copied tokens, "
                f"{sizes.steps} steps of {sizes.batch} sequences.")
    if STUDIES[task.study].cuts:
        parent, settings = json.loads((task.parent / "model.json").read_text()), task.scale.compress
        return (f"Parents of {costs.parameters(ModelConfig(**parent['model'])):,} parameters, "
                f"{parent['training']['precision']}, that read {parent['training']['tokens']:,} tokens; "
                f"distillation of {settings.distillation_tokens:,}, short of {settings.short_distillation_tokens:,}.")
    config, recipe = task.work.config, task.work.recipe
    return (f"{costs.parameters(config):,} parameters, {recipe.tokens:,} tokens in sequences of "
            f"{config.sequence_length}, BF16, peak rate {recipe.learning_rate:g}.")


def machine() -> str:
    found = _machine()
    return found.get("accelerator") or f"{found['cores']} cores of {found['processor']}"


def identity(scale: Scale, tokens: Path, parents: Sequence[Path]) -> str:
    own = (__file__, recall_study.__file__, fp8_study.__file__)         # of no package that code_digest reads
    parts = [*token_data.text_digests(tokens).values(), str(scale), code_digest(),
             *(Path(file).read_text() for file in own), *(sha256(parent / SUMS) for parent in parents)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def adopt(parents: Sequence[Path], scratch: Path) -> None:
    """`parents` become those of seeds 1, 2, ..."""
    for seed, parent in enumerate(parents, start=1):
        link = scratch / f"parent-{seed}"
        link.unlink(missing_ok=True)
        link.symlink_to(parent.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=list(STUDIES), metavar="STUDY")
    parser.add_argument("--tokens", type=Path, help="tokens directory (default: data/PROFILE/tokens)")
    parser.add_argument("--parents", type=Path, nargs="+", help="checkpoints to cut, one a seed, instead of own ones")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a run (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--out", type=out_directory, default=FOLDER, help="(default: %(default)s)")
    parser.add_argument("--commit", help="of the code, where this is no git checkout")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see whether all works")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if not (commit := options.commit or _commit()):
        parser.error("not a git checkout, and a record names its commit\nGive --commit.")
    until = time.time() + options.seconds

    params = load_params()
    tokens = (options.tokens or Path("data") / params.profile / "tokens").resolve()
    vocab_size = json.loads((tokens / "tokens.json").read_text())["vocab_size"]
    scale = scale_of(params, vocab_size, torch.cuda.is_available(), options.tiny)
    scratch = Path(".scratch") / f"studies-{identity(scale, tokens, options.parents or [])}"
    scratch.mkdir(parents=True, exist_ok=True)
    seeds = len(options.parents) if options.parents else options.seeds

    def tasks_of(name: str, design: Design) -> list[Task]:
        arms = design.arms(scale, tokens, scratch.resolve())
        return [Task(name, arm, seed, work, scale, tokens, scratch.resolve(), until)
                for seed in range(1, seeds + 1) for arm, work in arms.items()]

    failures: list[str] = []
    if any(STUDIES[name].cuts for name in options.studies):
        if options.parents:
            adopt(options.parents, scratch)
        else:
            failures += run_all(tasks_of("parent", PARENT), options.jobs, options.threads)
    tasks = {name: tasks_of(name, STUDIES[name]) for name in options.studies}
    ordered = sorted((task for some in tasks.values() for task in some), key=lambda task: task.seed)
    failures += run_all(ordered, options.jobs, options.threads)
    for name, some in tasks.items():
        command = f"python -m benchmarks.studies {name} " + (
            f"--parents {' '.join(path.name for path in options.parents)}" if options.parents else f"--seeds {seeds}")
        command += " --tiny" if options.tiny else ""
        if found := record(name, some, command, commit):
            print(f"wrote {found.save(options.out)}: {', '.join(str(item.name) for item in found.measurements)}")
        else:
            print(f"{name}: no seed is done in all arms, nothing written")
    if failures:
        sys.exit(f"failed: {'; '.join(failures)}\nTheir errors are above; the same command runs only what is missing.")


if __name__ == "__main__":
    main()
