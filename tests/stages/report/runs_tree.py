"""A synthetic runs/ tree of a profile, built from the classes that write it: plausible figures, the same every time."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.schema import (
    Blend,
    BlendPhase,
    Dropped,
    Example,
    FunnelStep,
    Histogram,
    PassedOverCount,
    Refused,
    TokenFile,
)
from model.benchmark.schema import DecodeRepeat, DecodeRow
from model.compression.schema import CandidateRecord, Controls, Costs, FfnImportance, Importance, LayerImportance
from model.evaluation.schema import ChoiceSample, PaperScore, PaperTask, TextSample
from stages.frame.common import Stage
from stages.frame.params import Params, load_params
from stages.frame.schema import (
    Code,
    DistillationRow,
    MachineRecord,
    Provenance,
    TrainingRow,
    ValidationRow,
    csv_text,
)

ROOT = Path(__file__).resolve().parents[3]
STEP_TOKENS = 8 * 256
LABELS = ("high", "medium-high", "medium", "medium-low", "low")
MMLU = PaperTask("MMLU", "mmlu", 5, "acc,none", "choice", 0.25, 0.7277, gold={"doc_to_target": 0})
PIQA = PaperTask("PIQA", "piqa", 0, "acc_norm,none", "choice", 0.5, None)
GSM8K = PaperTask("GSM8K", "gsm8k_cot", 8, "exact_match,flexible-extract", "text", 0.0, 0.8711, requests="GSM8K")
RACE = PaperTask("RACE", "race", 0, "acc,none", "absent", 0.25, None)
DOMAINS = ("code", "docs", "reference")
FACTORS = dict(zip((*DOMAINS, "all"), (0.9, 1.05, 1.1, 1.0), strict=True))
TASKS = {"syntax_pairs": (0.90, 0.5), "next_word": (0.56, 0.25), "recall": (0.14, 0.125)} | {
    f"{task}_at_{multiple}x": (0.3, 0.1) for task in ("copy", "recall", "needle") for multiple in (1, 2, 4)}


def final(name: str) -> float:
    """Bits per byte at the end."""
    return 2.14 + 0.03 * ("transformer" in name) + 0.01 * ("seed2" in name) + 0.005 * ("fp8" in name) + 0.03 * (
        "compressed" in name) + 0.04 * ("random" in name)


def report_stage(params: Params | None = None) -> Stage:
    """The report's Stage in the current directory."""
    return Stage("report", params or load_params(ROOT / "params.yaml"), None, None, ("profile",))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, default=lambda model: model.model_dump()))


def edit_json(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text()) | values)


def paper(draw: random.Random, items: int = 40) -> list[dict[str, Any]]:
    """Two tasks of options, at and above a guess; one of answers, at which nothing is written; one that is absent."""
    found = []
    for task, share in ((MMLU, 0.25), (PIQA, 0.9)):
        right = [int(draw.random() < share) for _ in range(items)]
        cut = items if task is MMLU else 0
        found.append(PaperScore(task, sum(right) / items, 0.07, right, items, 2.345, 0.123, cut))
    found.append(PaperScore(GSM8K, items=items, bits_per_byte=1.789, bits_per_byte_stderr=0.05, cut=items,
                            left_out="the right answer only; `evaluate.generation` has it written"))
    found.append(PaperScore(RACE, left_out="its data is in no package"))
    return [asdict(score) for score in found]


class Tree:
    """Writes runs/PROFILE under `root`."""

    def __init__(self, root: Path, params: Params):
        self.runs, self.params = root / "runs" / params.profile, params
        self.clock = 0

    def record(self, stage: str, member: str | None, metrics: dict[str, Any], **files: Any) -> None:
        """A stage's metrics and provenance, and its files (`name_json`, `name_csv`)."""
        folder = self.runs / stage / (member or "")
        self.clock += 1
        files |= {"metrics_json": metrics, "provenance_json": Provenance(
            stage=stage, variant=member, command=f"python -m stages.{stage}" + f" --variant {member}" * bool(member),
            started=f"2026-11-29T10:{self.clock:02d}:00Z", wall_seconds=40 + 7.5 * self.clock, resumed=False,
            peak_memory_gib=1.234, parameters={"profile": "cpu"}, inputs={f"data/cpu/{stage}": "a3" * 32},
            code=Code(commit="0d51f3a" + "0" * 33, digest="5c" * 32), versions={"python": "3.11.2", "torch": "2.13.0"},
            machine=MachineRecord(processor="Some CPU <2> & more", cores=2, memory_gib=24.0))}
        for name, content in files.items():
            stem, _, kind = name.rpartition("_")
            if kind == "json":
                write_json(folder / f"{stem}.json", content)
            else:
                (folder / f"{stem}.csv").parent.mkdir(parents=True, exist_ok=True)
                (folder / f"{stem}.csv").write_text(csv_text(content))

    def data(self) -> None:
        self.record(
            "annotate", None, {"documents": 5810, "shards": 4},
            refused_json={DOMAINS[0]: {"empty": Refused(documents=3, where=["a.jsonl, byte 7"])}},
            passed_over_json={"files": {".png": PassedOverCount(count=1234, where=["<b>.png", "b.png", "c.png"])}})
        reasons = {"heuristics": {"digits > 0.2": 12, "stop_words < 2": 40}, "language": {"share of en < 0.3": 3},
                   "decontaminate": {"shares 13 words in a row with HumanEval": 4,
                                     "shares 13 words in a row with held-out text": 15}}
        funnel = [FunnelStep(domain=domain, step=step, documents=int(2000 * share), bytes=int(9e6 * share),
                             reasons=reasons.get(step, {}))
                  for step, share in zip(("read", "language", "heuristics", "decontaminate", "held_out"),
                                         (1, 0.95, 0.8, 0.79, 0.6), strict=True)
                  for domain in DOMAINS]
        tail = [900, 400, 200, 90, 40, 20, 9, 4, 2, 1]
        measured = {"digits": ([0.03 * n for n in range(11)], tail, None, 0.2, {}),
                    "stop_words": (list(range(11)), tail[::-1], 2, None, {}),
                    "characters": ([10 * 3 ** n for n in range(11)], tail, 200, 400_000, {}),
                    "fluency": (list(range(-10, 1)), tail, None, None, {
                        "high": -2.5, "medium-high": -3.5, "medium": -5.25, "medium-low": -7.0})}
        example = Example(source="package", path="a/b.py", value="stop_words 1 < 2 (Gopher)",
                          excerpt="BEL \x07 <b>` ``` \u202eend")
        self.record(
            "curate", None, {"documents_train": 3486}, funnel_json=funnel, histograms_json={
                name: {domain: Histogram(edges=edges, counts=counts, low=low, high=high, source="Gopher", labels=labels)
                       for domain in DOMAINS}
                for name, (edges, counts, low, high, labels) in measured.items()},
            dropped_json={domain: {
                "not permissive": Dropped(documents=1, examples=[]),
                "digits > 0.2": Dropped(documents=12, examples=[example]),
                "stop_words < 2": Dropped(documents=40, examples=[example] * 6),
                "substring": Dropped(documents=55, examples=[example])} for domain in DOMAINS})
        self.record("tokenizer", None, {"vocab_size": 4096, "digest": "7b" * 32})
        files = {f"train/{domain}-{label}": TokenFile(documents=40 * n, tokens=30_000 * n, bytes=97_531 * n)
                 for domain in DOMAINS for n, label in enumerate(LABELS, start=1)}
        densities = {"tokens_train": 450_000, "tokens_validation": 9000, "bytes_per_token": 3.21,
                     "tokens_per_document": 1021.5, "unknown_share": 0.0, "byte_fallback_share": 0.00094}
        self.record(
            "tokenize", None, {f"{key}_{domain}": value for key, value in densities.items() for domain in DOMAINS},
            blend_json=Blend(
                tokens=800_000, repeats_at_most=8, files=files, repeats=dict.fromkeys(files, 0.37),
                phases=[BlendPhase(until=1.0, weights=dict.fromkeys(files, 1 / len(files)))]))

    def pretrain(self, name: str, number: int) -> None:
        noise, steps = random.Random(number), 60
        training = [TrainingRow(
            step=step, tokens=step * STEP_TOKENS, loss=3.1 + 5.2 * math.exp(-step / 9) + noise.gauss(0, 0.05),
            grad_norm=0.4, learning_rate=3e-3, skipped=0, spike=0) for step in range(1, steps + 1)]
        validation = []
        for tenth in range(11):
            level = final(name) + 2.4 * math.exp(-tenth / 1.7) - 2.4 * math.exp(-10 / 1.7)
            validation += [ValidationRow(step=6 * tenth, tokens=6 * tenth * STEP_TOKENS, domain=domain,
                                         loss=1.9 * level * factor, bits_per_byte=level * factor)
                           for domain, factor in FACTORS.items()]
        self.record("pretrain", name, {
            "parameters": 1_652_736 if "hybrid" in name else 1_650_944, "tokens": steps * STEP_TOKENS, "steps": steps,
            "final_loss": training[-1].loss, "validation_bits_per_byte": final(name), "tokens_per_second": 8120.5,
            "train_seconds": 96.5, "peak_memory_gib": 1.1, **({"fp8_emulated": 1} if "fp8" in name else {}),
        }, training_csv=training, validation_csv=validation)

    def compress(self) -> None:
        pattern = self.params.model["hybrid"].pattern
        layers = [LayerImportance(index=index, symbol=symbol, standard_error=0.0004, importance=(
            0.012 + 0.2 * abs(2 * index / len(pattern) - 1) ** 5)) for index, symbol in enumerate(pattern)]
        candidates = [CandidateRecord(
            index=n, pattern="M-M-M*-M-M-M-M-", ffn_hidden_size=384 - 32 * (n % 4),
            parameters=1_390_000 - 900 * n,
            memory_gib=0.0842 - 0.0001 * (7 * n % 23), decode_milliseconds=1.75, importance=0.5 - 0.01 * n,
            accuracy=0.42 - 0.004 * n if n < 12 else None, agreement=0.71 - 0.012 * n if n < 12 else None,
            kl_cut=0.29 + 0.02 * n if n < 12 else None, task_accuracy=0.66 if n < 4 else None,
            kl_short=0.141 + 0.01 * n if n < 2 else None, rank=n + 1, chosen=n == 0) for n in range(34)]
        costs = {name: {"parameters_predicted": count, "parameters": count, "cache_bytes_predicted": 5_000_000,
                        "cache_bytes": 5_000_000, "decode_seconds_predicted": seconds, "decode_seconds": 1.03 * seconds}
                 for name, count, seconds in (("parent", 1_652_736, 0.0021), ("compressed", 1_390_000, 0.0018))}
        costs["parent"] |= {"nothing_predicted": 0, "nothing": 0}
        self.record("compress", None, {
            "parent_parameters": 1_652_736, "compressed_parameters": 1_390_000, "parent_memory_gib": 0.1003,
            "compressed_memory_gib": 0.0842, "budget_gib": 0.08425, "candidates": 34, "kl_parent_cut": 0.293,
            "kl_parent_compressed": 0.0831, "kl_parent_random_cut": 0.751, "kl_parent_random_cut_mean": 0.7287,
            "kl_parent_reverse_cut": 1.71, "kl_parent_random": 0.1312, "agreement_compressed": 0.842,
            "agreement_random": 0.801, "distillation_tokens": 204_800, "importance_split_half_correlation": 0.981,
            **{f"validation_bits_per_byte_{name}": value for name, value in {
                "parent": 2.142, "compressed": 2.168, "random": 2.206, "compressed_cut": 2.31,
                "random_cut": 2.52}.items()},
        }, model_json={"pattern": "M-M-M-M*-M-M-M-", "ffn_hidden_size": 384, "hidden_size": 128},
            importance_json=Importance(
                samples={"layers": 64}, layers=layers, mamba_heads={},
                ffn=[FfnImportance(index=1, kept_share_of_importance={384: 1.0, 256: 0.8})],
                reliability={"neurons": 0.99}),
            candidates_json=candidates,
            controls_json=Controls(importance=0.293, random=[0.751, 0.702, 0.733], seeds=[1, 2, 3], reverse=1.71),
            costs_json=Costs(models=costs, metrics={}, budgets={}, latency=None),
            distillation_csv=[
                DistillationRow(model=model, step=step, tokens=step * STEP_TOKENS,
                                kl=floor + height * math.exp(-step / 14))
                for model, floor, height in (("compressed", 0.083, 0.21), ("random", 0.131, 0.62))
                for step in range(0, 101, 20)])

    def evaluate(self, name: str, number: int) -> None:
        bits, draw = final(name) + 0.02, random.Random(number)
        metrics: dict[str, Any] = {"bits_per_byte": bits, "bits_per_byte_compressor": 2.91, "items_digest": "9f" * 32}
        scores: dict[str, Any] = {}
        for domain in DOMAINS:
            metrics |= {f"bits_per_byte_{domain}": bits * FACTORS[domain], f"bits_per_byte_{domain}_stderr": 0.031,
                        f"bits_per_byte_{domain}_compressor": 2.91 * FACTORS[domain]}
            scores[f"bits_per_byte_{domain}"] = [[-0.7 * bits * (300 + place), 300 + place] for place in range(12)]
        for task, (accuracy, control) in TASKS.items():
            scores[task] = [int(draw.random() < accuracy) for _ in range(200)]
            value = sum(scores[task]) / 200
            metrics |= {f"{task}_accuracy": value, f"{task}_accuracy_control": control, f"{task}_items": 200,
                        f"{task}_accuracy_chance": control,
                        f"{task}_accuracy_stderr": math.sqrt(value * (1 - value) / 200)}
        self.record("evaluate", name, metrics, scores_json=scores, paper_tasks_json=paper(draw), samples_json={
            "bits_per_byte_docs": [TextSample(id="a", text="def f(x):", bits_per_byte=2.1)],
            "next_word": [ChoiceSample(id="b", context="return", choices=["x", "y"], log_likelihoods=[-1.0, -2.0],
                                       answer=1, chosen=0)]})

    def benchmark(self) -> None:
        rows, metrics = [], {}
        contexts = self.params.benchmark.contexts
        speed = {"hybrid": [410, 404, 398, 392], "transformer": [395, 360, 268, 131],
                 "compressed": [486, 481, 470, 452]}
        for place, context in enumerate(contexts):
            for model, rates in speed.items():
                first = context / 9000 if context <= 4096 else None
                rows.append(DecodeRow(
                    model=model, context=context, batch=1, tokens_per_second=rates[place],
                    seconds_per_token_spread=0.01 / rates[place], decode_of_floor=0.37,
                    time_to_first_token_seconds=first, prefill_tokens_per_second=first and 9000.0,
                    prefill_of_floor=first and 0.41,
                    output_tokens_per_second=first and 320.5, memory_gib=0.0123,
                    cache_mib=context / (512 if model == "transformer" else 4096)))
            metrics |= {f"decode_ratio_{context}": speed["hybrid"][place] / speed["transformer"][place],
                        f"compressed_decode_ratio_{context}": speed["compressed"][place] / speed["hybrid"][place]}
        for name, parameters, cache in (
            ("nemotron_h_8b", 8_100_852_736, 1121.06), ("nemotron_h_56b", 56_324_350_464, 3427.2),
            ("nemotron_h_47b", 46_791_554_816, 1986.4), ("nemotron_t_8b", 8_052_015_104, 8192.0),
        ):
            metrics |= {f"{name}_parameters": parameters, f"{name}_weights_gib": parameters * 2 / 2**30,
                        f"{name}_cache_mib_at_65536": cache}
        repeats = [DecodeRepeat(model=row.model, context=row.context, repeat=repeat,
                                seconds_per_token=(1 + 0.002 * repeat) / row.tokens_per_second)
                   for row in rows for repeat in range(self.params.benchmark.repeats)]
        self.record("benchmark", None, metrics, decode_csv=rows, decode_repeats_csv=repeats)


def write_runs(root: Path, params: Params | None = None) -> Path:
    """Write the whole tree under root/runs/PROFILE and return that directory."""
    params = params or load_params(ROOT / "params.yaml")
    tree = Tree(root, params)
    tree.data()
    for number, name in enumerate(params.variants):
        tree.pretrain(name, number)
    tree.compress()
    tree.record("items", None, {"items_refused": 3, "items_digest": "9f" * 32, "next_word_items": 200})
    for number, name in enumerate(params.models):
        tree.record("export", name, {"logits_max_relative_difference": 2.1e-7 * (1 + number), "parameters": 1_652_736})
        tree.evaluate(name, number)
    tree.record("reference", None, {
        "bits_per_byte": 1.06487, **{f"bits_per_byte_{domain}": 1.1 for domain in DOMAINS},
        **{f"{task}_accuracy": 0.987 for task in TASKS}}, paper_tasks_json=paper(random.Random(99), 6))
    tree.benchmark()
    return tree.runs
