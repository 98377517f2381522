"""What the report says about compression: how the funnel narrowed, what came of it, what the controls did."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean, stdev

from stages.records import Candidate, Records
from stages.report_page import Block, Listing, Table
from stages.verdicts import number, percent

NONE = "–"


def blocks(records: Records) -> list[Block]:
    return [_outcome(records), _funnel(records), _candidates(records), _controls(records), _costs(records),
            _reliability(records), _layers(records)]


def _outcome(records: Records) -> Table:
    compress = records.metrics("compress")
    rows = [
        ["Parameters", f"{compress['parent_parameters']:,.0f}", f"{compress['compressed_parameters']:,.0f}", NONE],
        ["Memory (GiB)", f"{compress['parent_memory_gib']:.4f}", f"{compress['compressed_memory_gib']:.4f}", NONE],
        ["KL to the parent, just cut", NONE, number(compress["kl_parent_cut"]),
         number(compress["kl_parent_random_cut"])],
        ["KL to the parent, distilled", NONE, number(compress["kl_parent_compressed"]),
         number(compress["kl_parent_random"])],
        ["Agreement with the parent, distilled", NONE, number(compress["agreement_compressed"]),
         number(compress["agreement_random"])],
        ["Validation bits per byte, just cut", NONE, number(compress["validation_bits_per_byte_compressed_cut"]),
         number(compress["validation_bits_per_byte_random_cut"])],
        ["Validation bits per byte, distilled",
         *(number(compress[f"validation_bits_per_byte_{name}"]) for name in ("parent", "compressed", "random"))],
    ]
    return Table(f"Parent, compressed and random cut; budget {compress['budget_gib']:.4f} GiB",
                 ["", "Parent", "Compressed", "Random cut"], rows)


def _funnel(records: Records) -> Table:
    """A row a round: how many models entered, by what they were judged, the best and the worst of them."""
    rounds: list[tuple[str, str, Callable[[Candidate], float | None], bool]] = [
        ("within the budgets", "share of importance kept", lambda item: item.importance, True),
        ("compared with the parent", "agreement on the next token", lambda item: item.agreement, True),
        ("", "accuracy of the next token", lambda item: item.accuracy, True),
        ("asked the task", "accuracy, a quarter is chance", lambda item: item.task_accuracy, True),
        ("distilled briefly", "KL to the parent", lambda item: item.kl_short, False),
    ]
    rows = []
    for name, measure, read, high in rounds:
        values = [value for item in records.candidates if (value := read(item)) is not None]
        best, worst = (max(values), min(values)) if high else (min(values), max(values))
        chosen = next(read(item) for item in records.candidates if item.chosen)
        rows.append([name, str(len(values)), measure, number(best), number(worst), number(chosen or 0.0)])
    return Table("The funnel", ["Round", "Candidates", "Judged by", "Best", "Worst", "The chosen one"], rows)


def _candidates(records: Records) -> Table:
    scored = [item for item in records.candidates if item.agreement is not None]
    timed = any(item.decode_milliseconds is not None for item in scored)
    rows = [[f"`{item.pattern}`" + (" (chosen)" if item.chosen else ""), str(item.ffn_hidden_size),
             f"{item.parameters:,}", f"{1024 * item.memory_gib:.2f}",
             *([_or_none(item.decode_milliseconds)] if timed else []),
             *map(_or_none, (item.accuracy, item.agreement, item.kl_cut, item.task_accuracy, item.kl_short))]
            for item in scored]
    return Table(
        f"Candidates compared, of {len(records.candidates):,} within the budgets, best first",
        ["Layers", "FFN width", "Parameters", "Memory (MiB)", *(["Decode step, predicted (ms)"] if timed else []),
         "Accuracy", "Agreement", "KL just cut", "Task accuracy", "KL after short distillation"], rows)


def _controls(records: Records) -> Table:
    controls = records.controls
    seeds = ", ".join(map(str, controls.seeds))
    spread = f" ± {number(stdev(controls.random))}" if len(controls.random) > 1 else ""
    rows = [["by importance", number(controls.importance), NONE],
            ["at random", f"{number(fmean(controls.random))}{spread}", f"seeds {seeds}"],
            ["least important kept", number(controls.reverse), NONE]]
    return Table("KL to the parent of cuts to the chosen shape, before any distillation (± standard deviation)",
                 ["Cut", "KL", "Draws"], rows)


def _costs(records: Records) -> Table:
    names = {"parameters": "Parameters", "weight_bytes": "Weights (bytes)", "cache_bytes": "Cache (bytes)",
             "decode_seconds": "Decode step (s)"}
    models = records.costs
    rows = []
    for key, name in names.items():
        if all(key in figures for figures in models.values()):
            row = [name]
            for figures in models.values():
                predicted, measured = figures[f"{key}_predicted"], figures[key]
                row += [_figure(predicted), _figure(measured), percent(predicted / measured - 1, 2)]
            rows.append(row)
    columns = [f"{model}, {what}" for model in models for what in ("predicted", "measured", "error")]
    return Table("Predicted and measured, BF16 with FP32 states", ["", *columns], rows)


def _reliability(records: Records) -> Table:
    rows = [[axis, number(value)] for axis, value in records.reliability.items()]
    return Table("Rank correlation of importance between even and odd samples, mean over layers", ["Axis", "Spearman"],
                 rows)


def _layers(records: Records) -> Listing:
    lines = [f"{layer.index} {layer.symbol} {layer.importance:.3g} ± {layer.standard_error:.1g}, "
             f"influence {layer.influence:.3g}" for layer in records.importance]
    return Listing("Layer importance ± standard error, every layer", "\n".join(lines))


def _or_none(value: float | None) -> str:
    return NONE if value is None else number(value)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
