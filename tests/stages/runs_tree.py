"""A synthetic runs/ tree of the default profile: the contract's records with plausible figures, the same every time."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

from stages.common import Stage
from stages.params import Params, load_params

ROOT = Path(__file__).resolve().parents[2]
STEP_TOKENS = 8 * 256
DOMAINS = ("code", "docs", "reference")
# Validation bits per byte at the end of training, and what is kept of it after the cut and distillation.
FINAL = {"hybrid-fp8": 2.142, "hybrid-bf16": 2.137, "transformer-bf16": 2.171, "hybrid-bf16-seed2": 2.149,
         "compressed": 2.168, "compressed-random": 2.206}
TASKS = {"syntax_pairs": (0.90, 0.5), "cloze": (0.56, 0.25), "recall": (0.14, 0.125)}


def report_stage(params: Params | None = None) -> Stage:
    """The report's Stage in the current directory."""
    return Stage("report", params or load_params(ROOT / "params.yaml"), None, None, ("profile",))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def write_csv(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def edit_json(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


class Tree:
    """Writes runs/PROFILE under `root`; `clock` moves on with every stage, two at a time."""

    def __init__(self, root: Path, params: Params):
        self.runs = root / "runs" / params.profile
        self.params = params
        self.random = random.Random(0)
        self.slots = [1_795_000_000.0, 1_795_000_000.0]

    def record(self, stage: str, member: str | None, seconds: float, metrics: dict[str, Any]) -> None:
        folder = self.runs / stage / (member or "")
        slot = self.slots.index(min(self.slots))
        started = self.slots[slot]
        self.slots[slot] += seconds + 1.5
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "provenance.json", {
            "stage": stage, "variant": member,
            "command": f"python -m stages.{stage}" + (f" --variant {member}" if member else ""),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)), "wall_seconds": seconds,
            "resumed": member == "hybrid-bf16", "peak_memory_gib": 1.234, "parameters": {"profile": "cpu"},
            "inputs": {f"data/cpu/{stage}": "a3" * 32}, "code": {"commit": "0d51f3a" + "0" * 33, "digest": "5c" * 32},
            "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "megatron-core": "0.16.1"},
            "machine": {"processor": "Some CPU <2> & more", "cores": 2, "memory_gib": 24.0},
        })

    def barrier(self) -> None:
        self.slots = [max(self.slots)] * 2

    def data(self) -> None:
        self.record("curate", None, 71.4, {"documents": 5012, "workers": 2})
        self.barrier()
        rows = []
        sizes = {"code": (2900, 16.0), "docs": (2300, 10.0), "reference": (610, 4.0)}
        shares = [("read", 1.0), ("normalise", 0.99), ("language", 0.95), ("heuristics", 0.86), ("pii", 0.86),
                  ("exact_dedup", 0.78), ("minhash", 0.66), ("substring", 0.61), ("decontaminate", 0.6)]
        for domain, (documents, megabytes) in sizes.items():
            for step, share in shares:
                reasons = {"boilerplate": 40, "too short": 12} if step == "heuristics" else {}
                rows.append({"domain": domain, "step": step, "documents": int(documents * share),
                             "bytes": int(megabytes * 1e6 * share), "reasons": reasons})
        write_json(self.runs / "curate" / "funnel.json", rows)
        self.record("tokenizer", None, 18.2, {"vocab_size": 4096, "digest": "7b" * 32, "bytes_per_token": 3.41})
        self.barrier()
        self.record("tokenize", None, 22.9, {"tokens_train": 5_120_334, "tokens_validation": 140_221})
        self.barrier()

    def pretrain(self, name: str, number: int) -> None:
        folder, steps = self.runs / "pretrain" / name, 390
        noise = random.Random(number)
        loss = [3.1 + 5.2 * math.exp(-step / 45) + 0.9 * math.exp(-step / 300) + 0.3 * FINAL[name]
                + noise.gauss(0, 0.05) for step in range(1, steps + 1)]
        write_csv(folder / "training.csv", "step,tokens,loss,grad_norm,learning_rate",
                  [(step, step * STEP_TOKENS, f"{value:.5f}",
                    round(0.4 + 2 / step ** 0.5 + abs(noise.gauss(0, 0.05)), 4), 3e-3)
                   for step, value in enumerate(loss, start=1)])
        rows: list[tuple[Any, ...]] = []
        for tenth in range(11):
            level = FINAL[name] + 2.4 * math.exp(-tenth / 1.7) - 2.4 * math.exp(-10 / 1.7)
            wobble = 1 + (0.002 if "seed2" in name else 0.0006) * math.sin(3 * tenth + number) if tenth % 10 else 1
            for domain, factor in (*zip(DOMAINS, (0.9, 1.05, 1.1), strict=True), ("all", 1.0)):
                rows.append((39 * tenth, 39 * tenth * STEP_TOKENS, domain, f"{1.9 * level * factor * wobble:.5f}",
                             f"{level * factor * wobble:.5f}"))
        write_csv(folder / "validation.csv", "step,tokens,domain,loss,bits_per_byte", rows)
        first = [row for row in rows if row[2] == "all"][1]
        self.record("pretrain", name, 96.5 + 14 * number, {
            "parameters": 1_652_736 if "hybrid" in name else 1_650_944, "tokens": steps * STEP_TOKENS, "steps": steps,
            "final_loss": round(loss[-1], 5), "validation_bits_per_byte": FINAL[name],
            **{f"validation_bits_per_byte_{domain}": round(FINAL[name] * factor, 4)
               for domain, factor in zip(DOMAINS, (0.9, 1.05, 1.1), strict=True)},
            "validation_bits_per_byte_first_tenth": float(first[4]),
            "tokens_per_second": 8120.5 - 700 * number, "train_seconds": 96.5, "peak_memory_gib": 1.1,
            **({"fp8_emulated": 1} if "fp8" in name else {}),
        })

    def compress(self) -> None:
        folder, pattern = self.runs / "compress", self.params.model["hybrid"].pattern
        middle = len(pattern) / 2
        layers = [{"index": index, "symbol": symbol,
                   "importance": round(0.012 + 0.2 * (abs(index - middle) / middle) ** 5
                                       + 0.01 * self.random.random() + (0.02 if symbol == "*" else 0), 6)}
                  for index, symbol in enumerate(pattern)]
        widths = self.params.compress.ffn_widths
        neurons = [{"index": index, "kept_share_of_importance": {
            str(width): round((width / 384) ** (0.35 + 0.02 * index), 5) for width in widths}}
            for index, symbol in enumerate(pattern) if symbol == "-"]
        write_json(folder / "importance.json", {"layers": layers, "ffn": neurons})
        candidates = []
        for number in range(34):
            scored, final = number < 12, number < 2
            candidates.append({
                "pattern": "M-M-M*-M-M-M-M-" if number % 2 else "M-M-M-M*-M-M-M-", "rank": number + 1,
                "ffn_hidden_size": 384 - 32 * (number % 4), "parameters": 1_390_000 - 900 * number,
                "memory_gib": round(0.0842 - 0.0001 * (7 * number % 23), 5), "importance": 0.5 - 0.01 * number,
                "agreement": round(0.71 - 0.012 * number - 0.01 * self.random.random(), 4) if scored else None,
                "kl_short": (0.141, 0.152)[number] if final else None, "chosen": number == 0})
        write_json(folder / "candidates.json", candidates)
        write_json(folder / "model.json", {"pattern": "M-M-M-M*-M-M-M-", "ffn_hidden_size": 384, "hidden_size": 128})
        write_csv(folder / "distillation.csv", "model,step,tokens,kl", [
            (model, step, step * STEP_TOKENS, f"{floor + height * math.exp(-step / 14):.5f}")
            for model, floor, height in (("compressed", 0.083, 0.21), ("random", 0.131, 0.62))
            for step in range(0, 101, 4)])
        self.record("compress", None, 118.0, {
            "parent_parameters": 1_652_736, "compressed_parameters": 1_390_000, "parent_memory_gib": 0.1003,
            "compressed_memory_gib": 0.0842, "budget_gib": 0.08425, "candidates": 34, "kl_parent_cut": 0.293,
            "kl_parent_compressed": 0.0831, "kl_parent_random_cut": 0.751, "kl_parent_random": 0.1312,
            "agreement_compressed": 0.842, "agreement_random": 0.801, "validation_bits_per_byte_parent": 2.142,
            "validation_bits_per_byte_compressed": 2.168, "validation_bits_per_byte_random": 2.206,
            "distillation_tokens": 204_800, "importance_split_half_correlation": 0.981})
        self.barrier()

    def evaluate(self, name: str, number: int) -> None:
        bits = FINAL[name] + 0.02
        metrics: dict[str, Any] = {"bits_per_byte": bits, "bits_per_byte_compressor": 2.91,
                                   "items_refused": 3, "items_digest": "9f" * 32}
        for domain, factor in zip(DOMAINS, (0.9, 1.05, 1.1), strict=True):
            metrics |= {f"bits_per_byte_{domain}": round(bits * factor, 4), f"bits_per_byte_{domain}_stderr": 0.031,
                        f"bits_per_byte_{domain}_compressor": round(2.91 * factor, 4)}
        for task, (accuracy, control) in TASKS.items():
            value = round(accuracy + 0.01 * ((number * 7) % 4 - 1.5), 4)
            metrics |= {f"{task}_accuracy": value, f"{task}_accuracy_control": control, f"{task}_items": 200,
                        f"{task}_accuracy_chance": control,
                        f"{task}_accuracy_stderr": round(math.sqrt(value * (1 - value) / 200), 5)}
        self.record("evaluate", name, 15.1 + number, metrics)

    def benchmark(self) -> None:
        rows: list[tuple[Any, ...]] = []
        metrics: dict[str, Any] = {}
        contexts = self.params.benchmark.contexts
        speed = {"hybrid": [410 * 0.985 ** i for i in range(len(contexts))],
                 "transformer": [395, 360, 268, 131], "compressed": [486, 481, 470, 452]}
        for index, context in enumerate(contexts):
            for model in speed:
                cache = {"hybrid": 0.19 + context / 4096, "transformer": context / 512,
                         "compressed": 0.15 + context / 4096}[model]
                rows.append((model, context, round(speed[model][index], 3),
                             round(0.01 / speed[model][index], 7), round(cache, 4)))
            metrics[f"decode_ratio_{context}"] = round(speed["hybrid"][index] / speed["transformer"][index], 5)
            metrics[f"compressed_decode_ratio_{context}"] = round(speed["compressed"][index] / speed["hybrid"][index],
                                                                  5)
        write_csv(self.runs / "benchmark" / "decode.csv",
                  "model,context,tokens_per_second,seconds_per_token_spread,cache_mib", rows)
        for name, parameters, cache in (
            ("nemotron_h_8b", 8_100_852_736, 1121.06), ("nemotron_h_56b", 56_324_350_464, 3427.2),
            ("nemotron_h_47b", 46_791_554_816, 1986.4), ("nemotron_t_8b", 8_052_015_104, 8192.0),
            ("llama_3_1_70b", 70_553_706_496, 20480.0),
        ):
            metrics |= {f"{name}_parameters": parameters, f"{name}_weights_gib": round(parameters * 2 / 2**30, 4),
                        f"{name}_cache_mib_at_65536": cache}
        self.record("benchmark", None, 41.0, metrics)


def write_runs(root: Path, params: Params | None = None) -> Path:
    """Write the whole tree under root/runs/PROFILE and return that directory."""
    params = params or load_params(ROOT / "params.yaml")
    tree = Tree(root, params)
    tree.data()
    for number, name in enumerate(params.variants):
        tree.pretrain(name, number)
    tree.barrier()
    tree.compress()
    for number, name in enumerate(params.models):
        tree.record("export", name, 8.4, {"logits_max_relative_difference": 2.1e-6 * (1 + number),
                                          "parameters": 1_652_736})
        tree.evaluate(name, number)
    tree.barrier()
    tree.benchmark()
    return tree.runs
