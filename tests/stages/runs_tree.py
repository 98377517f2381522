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
LABELS = ("high", "medium-high", "medium", "medium-low", "low")
DOMAINS = ("code", "docs", "reference")
# Validation bits per byte at the end of training, and what is kept of it after the cut and distillation.
FINAL = {"hybrid-fp8": 2.142, "hybrid-bf16": 2.137, "transformer-bf16": 2.171, "hybrid-bf16-seed2": 2.149,
         "hybrid-fp8-seed2": 2.153, "compressed": 2.168, "compressed-random": 2.206}
TASKS = {"syntax_pairs": (0.90, 0.5), "cloze": (0.56, 0.25), "signature": (0.4, 0.25),
         "recall": (0.14, 0.125)}
CONTEXT_TASKS = {f"{task}_at_{multiple}x": (0.3, 0.1) for task in ("copy", "recall", "needle")
                 for multiple in (1, 2, 4)}


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


def funnel() -> list[dict[str, Any]]:
    sizes = {"code": (2900, 16.0), "docs": (2300, 10.0), "reference": (610, 4.0)}
    shares = [("read", 1.0), ("license", 0.99), ("language", 0.95), ("copies", 0.93), ("near_duplicates", 0.9),
              ("heuristics", 0.8), ("perplexity", 0.78), ("decontaminate", 0.77), ("substring", 0.7),
              ("held_out", 0.6)]
    reasons = {"heuristics": {f"duplicate_{n}grams > 0.1": n for n in range(1, 8)}
               | {"digits > 0.2": 12, "stop_words < 2": 40},
               "language": {"language de": 7, "share of en < 0.3": 3}, "perplexity": {"perplexity": 21}}
    return [{"domain": domain, "step": step, "documents": int(documents * share),
             "bytes": int(megabytes * 1e6 * share), "reasons": reasons.get(step, {})}
            for step, share in shares for domain, (documents, megabytes) in sizes.items()]


def histograms() -> dict[str, Any]:
    """A feature cut above, one cut below, one on a logarithmic scale cut on both sides, one no document reaches."""
    tail = [900, 400, 200, 90, 40, 20, 9, 4, 2, 1]
    measured = {
        "digits": ([0.03 * number for number in range(11)], tail, None, 0.2, "Nemotron-CC"),
        "stop_words": (list(range(11)), tail[::-1], 2, None, "Gopher, section A.1.1"),
        "characters": ([10 * 3 ** number for number in range(11)], tail, 200, 400_000, "this project"),
        "encoded_run": ([5 * number for number in range(11)], tail, None, 255, "this project"),
        "language_share": ([0.1 * number for number in range(11)], tail[::-1], 0.3, None, "configuration"),
        "perplexity": ([100 * 2 ** number for number in range(11)], tail, None, 9000.5, "the largest 5% of the bytes"),
    }
    found: dict[str, Any] = {
        name: {domain: {"edges": edges, "counts": counts, "low": low, "high": high, "source": source, "labels": {}}
               for domain in DOMAINS}
        for name, (edges, counts, low, high, source) in measured.items()}
    labels = {"high": -2.5, "medium-high": -3.5, "medium": -5.25, "medium-low": -7.0}
    found["fluency"] = {domain: {"edges": list(range(-10, 1)), "counts": tail, "low": None, "high": None,
                                 "source": "quality score", "labels": labels} for domain in DOMAINS}
    return found


def dropped() -> dict[str, Any]:
    def entry(documents: int, value: str, text: str) -> dict[str, Any]:
        return {"documents": documents, "examples": [
            {"source": f"package-{number}", "path": f"a/b_{number}.py", "value": value, "excerpt": text}
            for number in range(6)]}

    return {domain: {
        "not permissive": {"documents": 1, "examples": []},
        "too large for the sample": {"documents": 3, "examples": [
            {"source": "torch", "path": "", "value": "too large for the sample", "excerpt": ""}]},
        "digits > 0.2": entry(12, "digits 0.31 > 0.2 (Nemotron-CC)", "1 < 2\n\t| 3 | 4"),
        "stop_words < 2": entry(40, "stop_words 1 < 2 (Gopher)", "BEL \x07 <b>` ``` \u202eend"),
        "substring": entry(55, "strings taken out: 2", "Licensed under the Apache License"),
    } for domain in DOMAINS}


def token_files() -> dict[str, dict[str, int]]:
    return {f"train/{domain}-{label}": {"documents": 40 * place, "tokens": 30_000 * place, "bytes": 97_531 * place}
            for domain in DOMAINS for place, label in enumerate(sorted(LABELS), start=1)}


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
        self.record("annotate", None, 41.2, {"documents": 5810, "shards": 4})
        self.barrier()
        self.record("curate", None, 7.4, {"documents_train": 3486, "duplicate_share": 0.031})
        for name, content in (("funnel", funnel()), ("histograms", histograms()), ("dropped", dropped())):
            write_json(self.runs / "curate" / f"{name}.json", content)
        self.barrier()
        self.record("tokenizer", None, 18.2, {"vocab_size": 4096, "digest": "7b" * 32, "bytes_per_token": 3.41})
        self.barrier()
        files = token_files()
        metrics: dict[str, Any] = {}
        for domain in (*DOMAINS, ""):
            tokens = sum(file["tokens"] for name, file in files.items() if name.startswith(f"train/{domain}"))
            end = f"_{domain}" if domain else ""
            metrics |= {f"tokens_train{end}": tokens, f"tokens_validation{end}": tokens // 50,
                        f"bytes_per_token{end}": 3.21, f"tokens_per_document{end}": 1021.5,
                        f"unknown_share{end}": 0.0, f"byte_fallback_share{end}": 0.00094}
        self.record("tokenize", None, 22.9, metrics)
        write_json(self.runs / "tokenize" / "blend.json", {
            "tokens": 800_000, "repeats_at_most": 8, "files": files | {"validation/code": files["train/code-low"]},
            "phases": [
                {"until": 0.6, "weights": {f"train/{domain}-{label}": weight * share for domain, weight in
                                           zip(DOMAINS, (0.45, 0.45, 0.1), strict=True)
                                           for label, share in zip(LABELS, (0.1, 0.1, 0.5, 0.2, 0.1), strict=True)}},
                {"until": 1.0, "weights": {f"train/{domain}-high": weight for domain, weight in
                                           zip(DOMAINS, (0.45, 0.3, 0.25), strict=True)}},
            ],
            "repeats": {name: 0.1 + 0.37 * number for number, name in enumerate(files)},
        })
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
            "validation_bits_per_byte_first": float(first[4]), "validation_first_tokens": first[1],
            "validation_unigram_loss": 2.5 * FINAL[name],
            "tokens_per_second": 8120.5 - 700 * number, "train_seconds": 96.5, "peak_memory_gib": 1.1,
            **({"fp8_emulated": 1} if "fp8" in name else {}),
        })

    def compress(self) -> None:
        folder, pattern = self.runs / "compress", self.params.model["hybrid"].pattern
        middle = len(pattern) / 2
        layers = [{"index": index, "symbol": symbol,
                   "standard_error": 0.0004, "influence": 0.1 + 0.001 * index,
                   "importance": round(0.012 + 0.2 * (abs(index - middle) / middle) ** 5
                                       + 0.01 * self.random.random() + (0.02 if symbol == "*" else 0), 6)}
                  for index, symbol in enumerate(pattern)]
        widths = self.params.compress.ffn_widths
        neurons = [{"index": index, "kept_share_of_importance": {
            str(width): round((width / 384) ** (0.35 + 0.02 * index), 5) for width in widths}}
            for index, symbol in enumerate(pattern) if symbol == "-"]
        write_json(folder / "importance.json", {"layers": layers, "ffn": neurons,
                                                "reliability": {"neurons": 0.992, "mamba output": 0.981}})
        write_json(folder / "controls.json", {"importance": 0.293, "random": [0.751, 0.702, 0.733],
                                              "seeds": [1234, 1235, 1236], "reverse": 1.71})
        write_json(folder / "costs.json", {"models": {name: {
            "parameters_predicted": count, "parameters": count, "weight_bytes_predicted": 2 * count,
            "weight_bytes": 2 * count + 800, "cache_bytes_predicted": 5_000_000, "cache_bytes": 5_000_000,
            "decode_seconds_predicted": seconds, "decode_seconds": 1.03 * seconds,
        } for name, count, seconds in (("parent", 1_652_736, 0.0021), ("compressed", 1_390_000, 0.0018))}})
        candidates = []
        for number in range(34):
            scored, final = number < 12, number < 2
            candidates.append({
                "pattern": "M-M-M*-M-M-M-M-" if number % 2 else "M-M-M-M*-M-M-M-", "rank": number + 1,
                "ffn_hidden_size": 384 - 32 * (number % 4), "parameters": 1_390_000 - 900 * number,
                "memory_gib": round(0.0842 - 0.0001 * (7 * number % 23), 5), "importance": 0.5 - 0.01 * number,
                "decode_milliseconds": round(1.75 + 0.02 * (number % 7), 4),
                "accuracy": round(0.42 - 0.004 * number, 4) if scored else None,
                "kl_cut": round(0.29 + 0.02 * number, 4) if scored else None,
                "task_accuracy": round(0.66 - 0.01 * number, 4) if number < 4 else None,
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
            "kl_parent_compressed": 0.0831, "kl_parent_random_cut": 0.751, "kl_parent_random_cut_mean": 0.7287,
            "kl_parent_reverse_cut": 1.71, "validation_bits_per_byte_compressed_cut": 2.31,
            "validation_bits_per_byte_random_cut": 2.52,
 "kl_parent_random": 0.1312,
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
        scores: dict[str, Any] = {
            f"bits_per_byte_{domain}": [[-0.7 * bits * (300 + place), 300 + place] for place in range(12)]
            for domain in DOMAINS}
        draw = random.Random(number)
        for task, (accuracy, control) in (TASKS | CONTEXT_TASKS).items():
            scores[task] = [int(draw.random() < accuracy) for _ in range(200)]
            value = round(accuracy + 0.01 * ((number * 7) % 4 - 1.5), 4)
            metrics |= {f"{task}_accuracy": value, f"{task}_accuracy_control": control, f"{task}_items": 200,
                        f"{task}_accuracy_chance": control,
                        f"{task}_accuracy_stderr": round(math.sqrt(value * (1 - value) / 200), 5)}
        write_json(self.runs / "evaluate" / name / "scores.json", scores)
        write_json(self.runs / "evaluate" / name / "paper_tasks.json", [])
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
                prompt = ["", "", ""] if context > 4096 else [round(context / 9000, 4), 0.41, 320.5]
                rows.append((model, context, round(speed[model][index], 3), round(0.01 / speed[model][index], 7), 0.37,
                             *prompt, round(cache, 4), 0.0123))
            metrics[f"decode_ratio_{context}"] = round(speed["hybrid"][index] / speed["transformer"][index], 5)
            metrics[f"compressed_decode_ratio_{context}"] = round(speed["compressed"][index] / speed["hybrid"][index],
                                                                  5)
        write_csv(self.runs / "benchmark" / "decode.csv",
                  "model,context,tokens_per_second,seconds_per_token_spread,decode_of_floor,"
                  "time_to_first_token_seconds,prefill_of_floor,output_tokens_per_second,cache_mib,memory_gib", rows)
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
    tree.record("items", None, 9.5, {"items_refused": 3, "items_digest": "9f" * 32, "cloze_items": 200})
    for number, name in enumerate(params.models):
        tree.record("export", name, 8.4, {"logits_max_relative_difference": 2.1e-7 * (1 + number),
                                          "parameters": 1_652_736})
        tree.evaluate(name, number)
    tree.barrier()
    tree.benchmark()
    return tree.runs
