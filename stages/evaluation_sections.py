"""What the report says of the evaluation: scores beside controls, against context, in pairs; the paper's tasks."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from data_pipeline.config import DataError
from stages.paired import Comparison, compare_accuracy, compare_bits_per_byte
from stages.records import Metrics, Records
from stages.report_page import Block, Paragraph, Table
from stages.verdicts import TASKS, number

NONE = "–"
AT = "_at_"                     # copy_at_2x: the task `copy` at twice the training length
BITS = "bits_per_byte_"


def blocks(records: Records) -> list[Block]:
    return [*scores(records), *against_context(records), *pairs(records), *paper_tasks(records)]


def scores(records: Records) -> list[Block]:
    """Bits per byte and the tasks within one training length."""
    models = _metrics(records)
    domains = records.data.domains
    bits = [[name, number(metrics["bits_per_byte"]), *(with_error(metrics, f"{BITS}{domain}") for domain in domains)]
            for name, metrics in models.items()]
    bits.append(["compressor", _same(models, "bits_per_byte_compressor"),
                 *(_same(models, f"{BITS}{domain}_compressor") for domain in domains)])
    first = next(iter(models.values()))
    items = [f"{text}, {first[f'{task}_items']:,.0f} items" for task, text in TASKS.items()]
    return [Table("Bits per byte of held-out text ± standard error; lower is better", ["Model", "All", *domains], bits),
            _accuracies("Accuracy ± standard error; higher is better", models, list(TASKS), items)]


def against_context(records: Records) -> list[Block]:
    """The tasks whose context is a multiple of the training length."""
    models = _metrics(records)
    names = context_tasks(records)
    if not names:
        return []
    first = next(iter(models.values()))
    columns = [f"{name.replace(AT, ' ')}, {first[f'{name}_items']:,.0f} items" for name in names]
    return [_accuracies("Accuracy where the answer stands in the context, whose length is given in training lengths",
                        models, names, columns)]


def context_tasks(records: Records) -> list[str]:
    scored = next(iter(records.scores.values()))
    return [name for name in scored if AT in name]


def pairs(records: Records) -> list[Block]:
    """Models two by two on the same items."""
    rows = []
    for label, candidate, reference in comparisons(records):
        for measure, found in compare(records, candidate, reference).items():
            rows.append([label, f"{measure}, {found.items:,} items", number(found.candidate), number(found.reference),
                         number(found.difference), f"{number(found.low)} to {number(found.high)}", f"{found.p:.3f}"])
    if not rows:
        return []
    return [
        Table("Pairs, item by item: difference, its 95 % interval, and how often chance alone would do as much",
              ["Pair", "Measure", "First", "Second", "Difference", "95 % interval", "p"], rows, text_columns=2),
        Paragraph(f"p by McNemar's exact test for accuracies, by the bootstrap over documents for bits per byte (where "
                  f"below is better). Of {len(rows)} rows about {len(rows) / 20:.0f} fall below 0.05 by chance."),
    ]


def comparisons(records: Records) -> list[tuple[str, str, str]]:
    """(label, candidate, reference) of the pairs that this profile's models allow."""
    seeds = [*records.hybrid_seeds, None, None]
    wanted = [
        ("hybrid / Transformer", seeds[0], records.transformer),
        ("FP8 / BF16", records.fp8, seeds[0]),
        ("another seed / the first", seeds[1], seeds[0]),
        ("compressed / parent", "compressed", records.params.compress.parent),
        ("compressed / random cut", "compressed", "compressed-random"),
    ]
    return [(label, first, second) for label, first, second in wanted
            if first in records.scores and second in records.scores and first and second]


def compare(records: Records, candidate: str, reference: str) -> dict[str, Comparison]:
    """By measure, of two models; the lengths of a context task count as one. Raises DataError."""
    ours, theirs = records.scores[candidate], records.scores[reference]
    if {name: len(rows) for name, rows in ours.items()} != {name: len(rows) for name, rows in theirs.items()}:
        raise DataError(f"evaluate/{candidate}/scores.json and evaluate/{reference}/scores.json: not the same items.\n"
                        "Run the stage `evaluate` again for both.")
    domains = {name for name in ours if name.startswith(BITS)}
    found = {"bits per byte": compare_bits_per_byte({name: ours[name] for name in domains}, theirs)}
    families: dict[str, list[str]] = defaultdict(list)
    for name in ours:
        if name not in domains:
            task, at, _ = name.partition(AT)
            families[f"{task}, every length" if at else TASKS.get(task, task)].append(name)
    for measure, names in families.items():
        found[measure] = compare_accuracy(*([item for name in names for item in of[name]] for of in (ours, theirs)))
    return found


def paper_tasks(records: Records) -> list[Block]:
    """The paper's own tasks; nothing where they were not asked for."""
    first = next(iter(records.paper_tasks.values()))
    if not first:
        return []
    rows = []
    for place, outcome in enumerate(first):
        task = outcome["task"]
        published = task["published"]
        rows.append([task["name"], str(task["shots"]), task["metric"].split(",")[0],
                     *(_paper_score(found[place]) for found in records.paper_tasks.values()), number(task["chance"]),
                     NONE if published is None else number(published), outcome["left_out"]])
    return [Table("The paper's tasks in lm-evaluation-harness ± standard error",
                  ["Task", "Shots", "Metric", *records.paper_tasks, "A guess", "Nemotron-H-8B-Base", "Left out"], rows)]


def _paper_score(outcome: dict[str, Any]) -> str:
    if outcome["score"] is None:
        return NONE
    return number(outcome["score"]) + (f" ± {number(outcome['stderr'])}" if outcome["stderr"] is not None else "")


def _accuracies(title: str, models: dict[str, Metrics], tasks: list[str], columns: list[str]) -> Table:
    rows = [[name, *(with_error(metrics, f"{task}_accuracy") for task in tasks)] for name, metrics in models.items()]
    rows.append(["control", *(_same(models, f"{task}_accuracy_control") for task in tasks)])
    rows.append(["a guess", *(_same(models, f"{task}_accuracy_chance") for task in tasks)])
    return Table(title, ["Model", *columns], rows)


def _metrics(records: Records) -> dict[str, Metrics]:
    return {name: records.metrics("evaluate", name) for name in records.params.models}


def with_error(metrics: Metrics, key: str) -> str:
    return f"{number(metrics[key])} ± {number(metrics[f'{key}_stderr'])}"


def _same(models: dict[str, Metrics], key: str) -> str:
    """The one value all models share, or its range."""
    found = [metrics[key] for metrics in models.values()]
    low, high = min(found), max(found)
    return number(low) if low == high else f"{number(low)} to {number(high)}"
