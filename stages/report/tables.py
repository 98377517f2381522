"""The report's tables: rows of words and figures from the records."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar

from ruamel.yaml import YAML

from stages.report.records import DataRecords, Metrics, Records

NONE = "–"
CANDIDATES = 12                 # that are shown
REASONS = 6                     # of a step that are named
PAPER_TOKENS_PER_SECOND = {     # output a GPU, read off Figures 1 and 12
    "nemotron_h_8b": 211, "nemotron_t_8b": 96.8, "nemotron_h_47b": 31.8, "nemotron_h_56b": 25.6,
}


@dataclass(frozen=True)
class Table:
    """Rows under `header`; the first `words` columns are prose, the others figures (set to the right)."""

    kind: ClassVar[str] = "table"
    caption: str
    header: list[str]
    rows: list[list[str]]
    words: int = 1


def number(value: float | None, digits: int = 3) -> str:
    """With a true minus sign; a dash for None."""
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", "−")


def percent(value: float, digits: int = 2) -> str:
    return f"{number(100 * value, digits)} %"


def short(value: float) -> str:
    """1.65 million for 1,652,736."""
    return next((f"{value / size:.3g} {word}" for size, word in (
        (1e12, "trillion"), (1e9, "billion"), (1e6, "million")) if value >= size), f"{value:,.0f}")


# --- Training, evaluation ---------------------------------------------------------------------------------------------


def models(records: Records) -> Table:
    rows = []
    for name, variant in records.params.variants.items():
        metrics = records.metrics("pretrain", name)
        rows.append([name, f"`{records.params.model[variant.architecture].pattern}`", variant.precision.upper(),
                     f"{variant.seed}", f"{metrics['parameters']:,.0f}", f"{metrics['tokens']:,.0f}",
                     number(metrics["final_loss"]), number(metrics["validation_bits_per_byte"]),
                     f"{metrics['tokens_per_second']:,.0f}", f"{metrics['peak_memory_gib']:.2f}"])
    compress = records.metrics("compress")
    rows.append(["compressed", f"`{records.compressed_model['pattern']}`", NONE, NONE,
                 f"{compress['compressed_parameters']:,.0f}", f"{compress['distillation_tokens']:,.0f}", NONE,
                 number(compress["validation_bits_per_byte_compressed"]), NONE, NONE])
    return Table("Models", [
        "Model", "Layers (`M` Mamba-2, `*` attention, `-` FFN)", "Precision", "Seed", "Parameters", "Tokens",
        "Final loss", "Validation bits per byte", "Tokens/s", "Peak memory (GiB)"], rows, 3)


def evaluation(records: Records) -> list[Table]:
    """Bits per byte, the tasks within one training length, and those at multiples of it; what no training reaches."""
    found = {name: records.metrics("evaluate", name) for name in records.params.models}
    first = next(iter(found.values()))
    domains = [f"bits_per_byte_{domain}" for domain in records.data.domains]
    names = [key.removesuffix("_accuracy") for key in first if key.endswith("_accuracy")]
    tables = [_scores("Bits per byte of held-out text ± standard error; lower is better", found,
                      ["bits_per_byte", *domains], ["All", *records.data.domains], {"a compressor": "_compressor"})]
    for caption, tasks in (("Accuracy ± standard error; higher is better", [n for n in names if "_at_" not in n]),
                           ("Accuracy where the answer stands in a context of N training lengths",
                            [name for name in names if "_at_" in name])):
        titles = [f"{task.replace('_at_', ' ').replace('_', ' ')}, {first[f'{task}_items']:,.0f} items"
                  for task in tasks]
        if tasks:
            tables.append(_scores(caption, found, [f"{task}_accuracy" for task in tasks], titles,
                                  {"a compressor": "_control", "a guess": "_chance"}))
    return tables


def _scores(
    caption: str, found: dict[str, Metrics], keys: list[str], titles: list[str], others: dict[str, str]
) -> Table:
    def score(metrics: Metrics, key: str) -> str:
        error = metrics.get(f"{key}_stderr")
        return number(metrics[key]) + (f" ± {number(error)}" if error is not None else "")

    rows = [[name, *(score(metrics, key) for key in keys)] for name, metrics in found.items()]
    first = next(iter(found.values()))
    rows += [[name, *(number(first[key + ending]) for key in keys)] for name, ending in others.items()]
    return Table(caption, ["Model", *titles], rows)


def paper_tasks(records: Records) -> list[Table]:
    """The paper's own tasks; nothing where they were not asked for."""
    models = dict(records.paper_tasks)
    rows = []
    for outcomes in zip(*models.values(), strict=True):
        task = outcomes[0].task
        scores = [number(item.score) + (f" ± {number(item.stderr)}" if item.stderr is not None else "")
                  for item in outcomes]
        rows.append([task.name, f"{task.shots}", task.metric.split(",")[0], *scores, number(task.chance),
                     number(task.published), outcomes[0].left_out])
    return [Table("The paper's tasks in lm-evaluation-harness ± standard error", [
        "Task", "Shots", "Metric", *models, "A guess", "Nemotron-H-8B-Base", "Left out"], rows)] if rows else []


# --- Compression, inference -------------------------------------------------------------------------------------------


def compression(records: Records) -> Table:
    compress, controls = records.metrics("compress"), records.controls
    draws = f" (mean of {len(controls.random)})"
    rows = [[name, *(number(compress[key], 4) if key else NONE for key in keys)] for name, *keys in (
        ("Memory (GiB)", "parent_memory_gib", "compressed_memory_gib", ""),
        ("KL to the parent, distilled", "", "kl_parent_compressed", "kl_parent_random"),
        ("Agreement with the parent, distilled", "", "agreement_compressed", "agreement_random"),
        ("Bits per byte, distilled",
         *(f"validation_bits_per_byte_{name}" for name in ("parent", "compressed", "random"))))]
    rows[:0] = [["Parameters", *(f"{compress[f'{name}_parameters']:,.0f}" for name in ("parent", "compressed")), NONE],
                ["KL to the parent, just cut", NONE, number(controls.importance),
                 number(fmean(controls.random)) + draws]]
    return Table(f"Budget {compress['budget_gib']:.4f} GiB; the least important kept instead: KL "
                 f"{number(controls.reverse)}", ["", "Parent", "Compressed", "Random cut"], rows)


def candidates(records: Records) -> Table:
    """The funnel: what each round found of the best."""
    shown = [item for item in records.candidates if item.agreement is not None][:CANDIDATES]
    rows = [[f"`{item.pattern}`" + (" (chosen)" if item.chosen else ""), f"{item.ffn_hidden_size:,}",
             f"{item.parameters:,}", number(1024 * item.memory_gib, 2), *map(number, (
                 item.decode_milliseconds, item.importance, item.accuracy, item.agreement, item.kl_cut,
                 item.task_accuracy, item.kl_short))] for item in shown]
    return Table(f"The best candidates of {len(records.candidates):,} within the budgets, round after round",
                 ["Layers", "FFN width", "Parameters", "Memory (MiB)", "Decode step (ms)", "Importance kept",
                  "Accuracy", "Agreement", "KL just cut", "Task accuracy", "KL after short distillation"], rows)


def costs(records: Records) -> Table:
    rows = [[f"{model}: {key.replace('_', ' ')}", f"{figures[f'{key}_predicted']:,.6g}", f"{figures[key]:,.6g}",
             percent(figures[f"{key}_predicted"] / figures[key] - 1)]
            for model, figures in records.costs.items() for key in figures if f"{key}_predicted" in figures]
    return Table("Costs predicted and measured, BF16 with FP32 states", ["", "Predicted", "Measured", "Error"], rows)


def decoding(records: Records) -> list[Table]:
    benchmark = records.metrics("benchmark")
    rows, prompts = [], []
    for points in zip(*records.decode.values(), strict=True):
        rows.append([f"{points[0].context:,}", *(
            f"{row.tokens_per_second:,.1f} ± {row.seconds_per_token_spread * row.tokens_per_second ** 2:,.1f}"
            for row in points), *(f"{benchmark[f'{key}_{points[0].context}']:.2f}"
                                  for key in ("decode_ratio", "compressed_decode_ratio"))])
        prompts += [[f"{row.context:,}", row.model, number(row.time_to_first_token_seconds),
                     number(row.prefill_tokens_per_second, 0), number(row.prefill_of_floor, 2),
                     number(row.decode_of_floor, 2), number(row.output_tokens_per_second, 1), number(row.cache_mib, 2),
                     number(row.memory_gib)] for row in points]
    names = [key.removesuffix("_cache_mib_at_65536") for key in benchmark if key.endswith("_cache_mib_at_65536")]
    closed = [[f"`{name}`", f"{benchmark[f'{name}_parameters']:,.0f}", number(benchmark[f"{name}_weights_gib"], 1),
               number(benchmark[f"{name}_cache_mib_at_65536"], 0)] for name in names]
    return [
        Table("Decoding: tokens/s ± spread over repeats",
              ["Context", *records.decode, "hybrid / transformer", "compressed / hybrid"], rows),
        Table(f"Requests that read the context and write {records.params.benchmark.output_tokens:,} tokens",
              ["Context", "Model", "First token (s)", "Prompt (tokens/s)", "of its floor", "Decoding, of its floor",
               "Output tokens/s", "Cache (MiB)", "Memory (GiB)"], prompts, 2),
        *_served(benchmark),
        Table("At the published sizes, in closed form",
              ["Model", "Parameters", "Weights (GiB)", "Cache at 65,536 tokens (MiB)"], closed),
    ]


def _served(benchmark: Metrics) -> list[Table]:
    """The published models at their own geometry, where a GPU measured them, beside the paper's Figure 12."""
    ending = "_served_output_tokens_per_second"
    names = [key.removesuffix(ending) for key in benchmark if key.endswith(ending)]
    columns = {"weights_gib": 1, "batch": 0, "time_to_first_token": 2, "prefill_of_floor": 2,
               "decode_tokens_per_second": 0, "decode_of_floor": 2, "output_tokens_per_second": 0, "peak_gib": 1}
    rows = [[f"`{name}`", *(number(benchmark[f"{name}_served_{key}"], digits) for key, digits in columns.items()),
             f"≈ {PAPER_TOKENS_PER_SECOND[name]:g}"] for name in names]
    return [Table("The published models at their own geometry, the largest batch that fits",
                  ["Model", *(key.replace("_", " ") for key in columns), "Paper's output tokens/s, H100"], rows)
            ] if rows else []


def export(records: Records) -> Table:
    key = "logits_max_relative_difference"
    rows = [[name, f"{records.metrics('export', name)[key]:.1e}"] for name in records.params.models]
    return Table("Hugging Face form against ours on the same text", ["Model", "Largest relative difference of logits"],
                 rows)


# --- Data -------------------------------------------------------------------------------------------------------------


def funnel(records: DataRecords, domain: str) -> Table:
    steps, rows = records.steps(domain), []
    for before, row in zip([steps[0], *steps], steps, strict=False):
        ordered = sorted(row.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        words = [f"{reason}: {count:,}" for reason, count in ordered[:REASONS]]
        words += [f"others: {sum(count for _, count in ordered[REASONS:]):,}"] * (len(ordered) > REASONS)
        change = NONE if row.bytes == before.bytes else percent(row.bytes / before.bytes - 1)
        rows.append([row.step.replace("_", " "), "; ".join(words) or NONE, f"{row.documents:,}",
                     f"{row.bytes / 1e6:,.3f}", change])
    return Table(f"Steps of {domain}", ["Step", "Reasons (documents)", "Documents", "MB", "Change of bytes"], rows, 2)


def tokens(records: DataRecords) -> list[Table]:
    """What training reads; nothing before tokenizing."""
    if records.blend is None:
        return []
    blend, metrics = records.blend, records.metrics["tokenize"]
    rows = []
    for domain in records.domains:
        for label, file in records.files(domain).items():
            times = blend.repeats[f"train/{domain}-{label}"]
            rows.append([domain, label, f"{file.documents:,}", f"{file.tokens:,}", number(file.bytes / file.tokens),
                         number(times), percent(times * file.tokens / blend.tokens)])
    densities = [[domain, *(f"{metrics[f'{key}_{domain}']:,.6g}" for key in (
        "tokens_train", "tokens_validation", "bytes_per_token", "tokens_per_document", "unknown_share",
        "byte_fallback_share"))] for domain in records.domains]
    return [Table("Tokens of each domain", ["Domain", "To train on", "To validate on", "Bytes a token",
                                            "Tokens a document", "Share unknown", "Share of single bytes"], densities),
            Table(f"Training reads {blend.tokens:,} tokens, nothing more than {blend.repeats_at_most:g} times", [
                "Domain", "Label", "Documents", "Tokens", "Bytes a token", "Times read", "Share of training"], rows, 2)]


# --- Provenance -------------------------------------------------------------------------------------------------------


def provenance(runs: dict[str, Any]) -> list[Table]:
    """Of `stages.schema.Provenance` by run."""
    times = [[label, f"`{run.command}`", f"{run.wall_seconds:,.1f}", f"{run.peak_memory_gib:.2f}",
              "yes" if run.resumed else "no"] for label, run in runs.items()]
    codes = _grouped(((commit(run.code.commit), run.code.digest[:16]), label) for label, run in runs.items())
    read = _grouped(((path, digest[:16]), label) for label, run in runs.items() for path, digest in run.inputs.items())
    return [
        Table("Every run", ["Stage", "Command", "Seconds", "Peak memory (GiB)", "Resumed"], times, 2),
        Table("Code", ["Commit", "Digest of the code", "Stages"], [
            [*key, "all" if len(labels) == len(runs) else ", ".join(labels)] for key, labels in codes.items()], 3),
        Table("Inputs and their SHA-256", ["Input", "Digest", "Read by"], [
            [f"`{path}`", f"`{digest}`", ", ".join(labels)] for (path, digest), labels in sorted(read.items())], 3),
    ]


def _grouped(pairs: Iterable[tuple[tuple[str, str], str]]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for key, label in pairs:
        found.setdefault(key, []).append(label)
    return found


def commit(name: str | None) -> str:
    """Its first twelve digits, and whether the tree differed."""
    head, plus, changes = (name or "not in git").partition("+")
    return head[:12] + plus + changes


def parameters(records: Records) -> str:
    """params.yaml as it was used."""
    text = io.StringIO()
    YAML().dump(records.params.model_dump(mode="json"), text)
    return text.getvalue()
