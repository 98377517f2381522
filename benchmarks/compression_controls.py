"""What importance and distillation are worth: controls with several seeds on a small model of Python sources.

    python -m benchmarks.compression_controls [--threads 2] [--steps 2000] [--out FILE.json]

A hybrid of 12 layers learns the bytes of the standard library's sources; every tenth file is held out. Then, all judged
on held-out bytes: FFN cuts by importance, at random and in reverse; Mamba heads by two scores; hidden channels with and
without the norm correction; every way to drop three layers, and where the choice by importance stands among them; and a
MiniPuzzle cut to 60 % of the parameters, distilled beside a random cut, plain cross-entropy and training from scratch,
at equal tokens and more, three seeds each.

The gates (docs/results/minipuzzle.md) were fixed before the first run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import costs
from model.compression.candidates import make_candidate, maximal_cells, share_budget
from model.compression.comparison import Closeness, compare
from model.compression.config import CompressConfig
from model.compression.controls import random_selection, reverse_selection
from model.compression.distill import Objective, distill
from model.compression.importance import layer_importance, mean_ranks
from model.compression.prune import Selection, cut
from model.compression.resume import ResultCache
from model.compression.width_importance import MAMBA_SCORES, WidthImportance, select, width_importance
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from stages.params import load_params

PARENT = ModelConfig(
    pattern="M-M*-M-M*-M-", hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, num_query_groups=2, head_dim=16,
    mamba_num_heads=8, mamba_head_dim=16, mamba_state_dim=16, mamba_num_groups=2, chunk_size=32, sequence_length=128,
    vocab_size=256,
)
BATCH = 4                       # sequences a step
DRAWS = 5                       # of random cuts without distillation
SEEDS = (11, 12, 13)            # of distillation: data order, random cut, fresh weights
DISTILLATION_STEPS = 250
MULTIPLES = (1, 2, 4)        # of these steps, from scratch
DROPPED = 3
Weights = tuple[ModelConfig, dict[str, Tensor]]


def silent(*_: Any, **__: Any) -> None:
    """No lines between those of the report."""


class Text:
    """Bytes of the standard library's sources, every tenth file held out."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        parts: dict[bool, list[bytes]] = {True: [], False: []}
        for number, file in enumerate(files):
            parts[number % 10 == 0].append(file.read_bytes())
        self.held_out, self.training = (torch.frombuffer(bytearray(b"".join(parts[key])), dtype=torch.uint8)
                                        for key in (True, False))

    def sequences(self, count: int, seed: int, held_out: bool = False) -> Tensor:
        """(count, sequence_length + 1) int64 from anywhere."""
        source = self.held_out if held_out else self.training
        length = PARENT.sequence_length + 1
        starts = torch.randint(len(source) - length, (count, 1), generator=torch.Generator().manual_seed(seed))
        return source[starts + torch.arange(length)].long()


def pretrain(text: Text, steps: int) -> dict[str, Tensor]:
    """The parent: AdamW, warm-up and cosine."""
    torch.manual_seed(1)
    model = HybridLM(PARENT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.05,
                                                   cycle_momentum=False)
    for step in range(steps):
        batch = text.sequences(BATCH, 100_000 + step)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Bench:
    """The parent, its scores, and how anything is judged."""

    def __init__(self, text: Text, state: dict[str, Tensor]):
        self.text, self.state = text, state
        self.teacher = HybridLM.from_state(PARENT, state)
        self.calibration = text.sequences(128, 1)[:, :-1]
        self.held_out = text.sequences(64, 2, held_out=True)
        self.widths: WidthImportance = width_importance(self.teacher, self.calibration, BATCH, silent)
        self.layers = layer_importance(self.teacher, self.calibration[:32], BATCH, silent)

    def judge(self, models: Mapping[str, HybridLM], sequences: int = 64) -> dict[str, Closeness]:
        return compare(self.teacher, models, self.held_out[:sequences], 16, silent)

    def cut(self, selection: Selection, correct_norms: bool = True) -> Weights:
        return cut(PARENT, self.state, selection, correct_norms)

    def losses(self, cuts: Mapping[str, Weights]) -> dict[str, float]:
        """Held-out cross-entropy, nats a byte."""
        return {name: value.loss for name, value in
                self.judge({name: HybridLM.from_state(*weights) for name, weights in cuts.items()}).items()}

    def controls(self, shape: ModelConfig) -> dict[str, Weights]:
        """Random draws of a shape."""
        return {f"random {draw}": self.cut(random_selection(PARENT, shape, torch.Generator().manual_seed(draw)))
                for draw in range(DRAWS)}


def mean_of(values: Mapping[str, float], prefix: str = "random") -> tuple[float, float]:
    found = [value for name, value in values.items() if name.startswith(prefix)]
    return fmean(found), stdev(found)


def ffn_cuts(bench: Bench) -> list[dict[str, float]]:
    rows = []
    everything, mse = list(range(len(PARENT.pattern))), bench.layers.mean(1).tolist()
    for width in (192, 128, 96, 64):
        shape = PARENT.model_copy(update={"ffn_hidden_size": width})
        chosen = select(PARENT, shape, everything, bench.widths)
        found = bench.losses({
            "importance": bench.cut(chosen),
            "reverse": bench.cut(reverse_selection(PARENT, shape, mse, bench.widths)), **bench.controls(shape),
        })
        mean, deviation = mean_of(found)
        rows.append({"width": width, "importance": found["importance"], "random": mean,
                     "random_deviation": deviation, "reverse": found["reverse"]})
    return rows


def mamba_heads(bench: Bench) -> dict[str, float]:
    """8 heads to 4 in every Mamba-2 layer."""
    shape = PARENT.model_copy(update={"mamba_num_heads": 4})
    everything = list(range(len(PARENT.pattern)))
    cuts = {kind: bench.cut(select(PARENT, shape, everything, bench.widths, kind)) for kind in MAMBA_SCORES}
    return _with_random(bench.losses(cuts | bench.controls(shape)))


def hidden_channels(bench: Bench) -> dict[str, float]:
    """64 channels to 48."""
    shape = PARENT.model_copy(update={"hidden_size": 48})
    selection = select(PARENT, shape, list(range(len(PARENT.pattern))), bench.widths)
    return _with_random(bench.losses({
        "sliced": bench.cut(selection, correct_norms=False), "corrected": bench.cut(selection),
        **bench.controls(shape),
    }))


def _with_random(found: dict[str, float]) -> dict[str, float]:
    mean, deviation = mean_of(found)
    return {name: value for name, value in found.items() if not name.startswith("random")} | {
        "random": mean, "random_deviation": deviation}


def depth(bench: Bench) -> dict[str, Any]:
    """Every way to drop three of twelve layers, and the place of the choice by errors and by ranks among them."""
    layers = range(len(PARENT.pattern))
    kl: dict[tuple[int, ...], float] = {}
    for some in _batches(itertools.combinations(layers, DROPPED), 44):
        models = {str(subset): HybridLM.from_state(*bench.cut(Selection([i for i in layers if i not in subset])))
                  for subset in some}
        judged = bench.judge(models, 32)
        kl |= {subset: judged[str(subset)].kl for subset in some}
    nearest = sorted(kl, key=lambda subset: kl[subset])
    places = {}
    for name, scores in {"mse": bench.layers.mean(1), "rank": mean_ranks(bench.layers)}.items():
        least = scores.argsort()[:DROPPED].tolist()
        places[name] = nearest.index(tuple(sorted(least))) + 1
    ordered = sorted(kl.values())
    return {"subsets": len(kl), "best": ordered[0], "median": ordered[len(ordered) // 2], "places": places}


def _batches(items: Iterable[tuple[int, ...]], size: int) -> Iterable[list[tuple[int, ...]]]:
    waiting = iter(items)
    return iter(lambda: list(itertools.islice(waiting, size)), [])


def minipuzzle_cut(bench: Bench) -> Selection:
    """The paper's search at 60 % of the parameters: kept importance, then agreement on training text."""
    budget = share_budget("parameters", 0.6, costs.parameters, PARENT, "")
    cells = maximal_cells(PARENT, [96, 128, 160, 192, 224, 256], 1, [budget])
    mse = bench.layers.mean(1).tolist()
    candidates = [make_candidate(PARENT, cell, mse, bench.widths, costs.Deployment.of(1024)) for cell in cells]
    candidates = sorted(candidates, key=lambda candidate: -candidate.importance)[:24]
    models = {str(number): HybridLM.from_state(*bench.cut(candidate.selection))
              for number, candidate in enumerate(candidates)}
    found = compare(bench.teacher, models, bench.text.sequences(32, 4), 16, silent)
    return candidates[int(min(found, key=lambda name: -found[name].agreement))].selection


def distillation(bench: Bench, base: CompressConfig) -> dict[str, Any]:
    """Held-out loss of each arm by seed, before and after; and from scratch with more tokens."""
    chosen = minipuzzle_cut(bench)
    shape, _ = bench.cut(chosen)
    tokens = DISTILLATION_STEPS * BATCH * PARENT.sequence_length
    gentle = base.model_copy(update={"global_batch_size": BATCH, "micro_batch_size": BATCH, "checkpoint_every": 10**9,
                                     "learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_fraction": 0.1})
    fresh = gentle.model_copy(update={"learning_rate": 4e-3, "min_learning_rate": 4e-5})
    after: dict[str, list[float]] = {}

    def train(students: dict[str, Weights], seed: int, config: CompressConfig, objective: Objective, times: int = 1
              ) -> dict[str, float]:
        data = list(bench.text.sequences(times * DISTILLATION_STEPS * BATCH, 1000 + seed))
        with tempfile.TemporaryDirectory() as directory:
            cache = ResultCache(Path(directory))
            done = distill(bench.teacher, students, data, times * tokens, config, cache, "arm", silent, objective)
        return bench.losses({name: (students[name][0], state) for name, state in done.states.items()})

    before: dict[str, list[float]] = {}
    for seed in SEEDS:
        drawn = bench.cut(random_selection(PARENT, shape, torch.Generator().manual_seed(seed)))
        torch.manual_seed(seed)
        scratch = shape, {name: tensor.detach() for name, tensor in HybridLM(shape).state_dict().items()}
        starts = {"importance": bench.cut(chosen), "random": drawn}
        for name, loss in bench.losses(starts).items():
            before.setdefault(name, []).append(loss)
        arms = {f"{name}, KL": loss for name, loss in train(starts, seed, gentle, "kl").items()}
        arms |= {f"{name}, cross-entropy": loss
                 for name, loss in train({"importance": starts["importance"]}, seed, gentle, "cross_entropy").items()}
        arms |= {f"{name}, KL": loss for name, loss in train({"scratch": scratch}, seed, fresh, "kl").items()}
        for times in MULTIPLES if seed == SEEDS[0] else MULTIPLES[:1]:
            loss = train({"scratch": scratch}, seed, fresh, "cross_entropy", times)["scratch"]
            arms[f"scratch, cross-entropy, {times}x"] = loss
        for name, loss in arms.items():
            after.setdefault(name, []).append(loss)
        print(f"seed {seed}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in arms.items()), flush=True)
    parent_loss = bench.judge({"parent": bench.teacher})["parent"].loss
    gaps = {name: [loss - parent_loss for loss in losses] for name, losses in after.items()}
    return {
        "pattern": shape.pattern, "ffn_hidden_size": shape.ffn_hidden_size, "tokens": tokens,
        "parent_parameters": costs.parameters(PARENT), "parameters": costs.parameters(shape),
        "parent_loss": parent_loss, "before": before, "after": after,
        "gap_ratio": fmean(gaps["importance, KL"]) / fmean(gaps["random, KL"]),
        "gap_ratios": [a / b for a, b in zip(gaps["importance, KL"], gaps["random, KL"], strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000, help="of the parent's training, 512 bytes each")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    text = Text()
    bench = Bench(text, pretrain(text, options.steps))
    found: dict[str, Any] = {"parent_loss": bench.judge({"parent": bench.teacher})["parent"].loss,
                             "reliability": bench.widths.reliability}
    print(f"parent {found['parent_loss']:.4f} nats a byte, {time.perf_counter() - started:.0f} s", flush=True)
    base = load_params(Path(__file__).parent.parent / "params.yaml").compress
    for name, part in {"ffn": ffn_cuts, "mamba_heads": mamba_heads, "hidden_channels": hidden_channels,
                       "depth": depth}.items():
        found[name] = part(bench)
        print(f"{name} ({time.perf_counter() - started:.0f} s): {json.dumps(found[name])}", flush=True)
    found["distillation"] = distillation(bench, base)
    found["seconds"] = time.perf_counter() - started
    print(json.dumps(found["distillation"]))
    print(f"gap to the parent, importance over random: {found['distillation']['gap_ratio']:.3f}; "
          f"{found['seconds']:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
