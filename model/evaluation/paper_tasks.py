"""The paper's evaluation tasks: lm-evaluation-harness's own definitions, the paper's shots, data of this machine.

Every task gives bits per byte of the right answer, which tells models apart long before they choose better than a guess
does; those of options also the accuracy. Mathematics and programs are scored by the right answer after OLMo's ready
prompts, of the paper's shots; with `generation` the harness's tasks also have the model write, and grade it.

What differs from NVIDIA's evaluation: examples of a prompt come from other validation items where the paper's came from
training splits (MMLU's, and those of mathematics and programs, are the harness's fixed ones); a prompt that does not
fit the model's context loses its beginning, as in the harness, and is counted; NVIDIA graded mathematics with
Math-Verify and NeMo-Skills and sanitised programs with EvalPlus. RULER is left to the harness's command line.

Shots and the 8B model's results are those of NVIDIA's model card of Nemotron-H-8B-Base.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol
from unittest import mock

import datasets
import lm_eval.utils
from lm_eval.api.metrics import bits_per_byte, mean_stderr
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.tasks import TaskManager

from model.evaluation.harness import HarnessLM, bits_per_byte_stderr, choice_task
from model.evaluation.sandbox import code_eval_in_sandbox
from model.evaluation.schema import Generation, PaperScore, PaperTask

Parts = Mapping[str, ConfigurableTask]              # the harness's tasks by name: MMLU is one a subject
Row = dict[str, Any]                                # of the harness's samples: an item and the model's answers

FEWSHOT_SEED = 1234             # the harness's own
# Where tasks are defined, if not in a folder of their name: to read the whole registry takes seconds.
FOLDERS = {"mmlu": ["mmlu/default"], "arc_challenge": ["arc"], "social_iqa": ["siqa"], "gsm8k_cot": ["gsm8k"],
           "minerva_math": ["minerva_math", "benchmarks"], "minerva_math500": ["minerva_math"],
           "leaderboard_math_hard": ["leaderboard/math"]}
REGISTRY = Path(lm_eval.__file__).parent / "tasks"

# ARC challenge as the paper asks it: all options shown, the answer a letter, as in MMLU. The harness's own task shows
# none and scores their texts.
ALL_OPTIONS = {
    "doc_to_text": "{{question.strip()}}{% for text in choices.text %}\n{{'ABCDE'[loop.index0]}}. {{text}}{% endfor %}"
                   "\nAnswer:",
    "doc_to_choice": "{{['A', 'B', 'C', 'D', 'E'][:choices.text|length]}}",
}


def _answers_text(text: str) -> dict[str, Any]:
    """The form of a task, answered by letters, in which the right answer's text follows the bare question."""
    return {"doc_to_text": "Question: {{question.strip()}}\nAnswer:", "doc_to_choice": f"{{{{[{text}]}}}}",
            "doc_to_target": 0}


OF_LIST, OF_LABELS = "choices[answer]", "choices.text[choices.label.index(answerKey)]"

PAPER_TASKS = (
    PaperTask("MMLU", "mmlu", 5, "acc,none", "choice", 0.25, 0.7277, gold=_answers_text(OF_LIST)),
    PaperTask("MMLU-Pro, chain of thought", "mmlu_pro", 5, "exact_match,custom-extract", "absent", 0.1, 0.4401),
    PaperTask("GSM8K, chain of thought", "gsm8k_cot", 8, "exact_match,flexible-extract", "text", 0.0, 0.8711,
              requests="GSM8K"),
    PaperTask("MATH, chain of thought", "minerva_math", 4, "math_verify,none", "text", 0.0, 0.4652, requests="MATH"),
    PaperTask("MATH level 5", "leaderboard_math_hard", 4, "exact_match,none", "text", 0.0, 0.2293, requests="MATH",
              level="Level 5"),
    PaperTask("MATH-500", "minerva_math500", 4, "math_verify,none", "text", 0.0, 0.4443, requests="MATH-500"),
    PaperTask("HumanEval", "humaneval", 0, "pass@1,create_test", "code", 0.0, 0.5854, requests="HumanEval"),
    PaperTask("HumanEval+", "humaneval_plus", 0, "pass@1,create_test", "absent", 0.0, 0.5549),
    PaperTask("MBPP", "mbpp", 3, "pass_at_1,none", "code", 0.0, 0.6537, requests="MBPP"),
    PaperTask("MBPP+", "mbpp_plus", 0, "pass_at_1,none", "absent", 0.0, 0.5952),
    PaperTask("ARC challenge, options shown", "arc_challenge", 25, "acc,none", "choice", 0.25, 0.8874, ALL_OPTIONS,
              _answers_text(OF_LABELS)),
    PaperTask("HellaSwag", "hellaswag", 10, "acc_norm,none", "choice", 0.25, 0.8323),
    PaperTask("Winogrande", "winogrande", 5, "acc,none", "choice", 0.5, 0.8051),
    PaperTask("CommonsenseQA", "commonsense_qa", 7, "acc,none", "choice", 0.2, 0.7871,
              gold=_answers_text(OF_LABELS)),
    PaperTask("PIQA", "piqa", 0, "acc_norm,none", "choice", 0.5, None),
    PaperTask("OpenBookQA", "openbookqa", 0, "acc_norm,none", "choice", 0.25, None),
    PaperTask("RACE", "race", 0, "acc,none", "absent", 0.25, None),
    PaperTask("Social IQa", "social_iqa", 0, "acc,none", "choice", 1 / 3, None),
    PaperTask("TruthfulQA", "truthfulqa_mc2", 0, "acc,none", "absent", 0.5, None),
)


class EvaluationSets(Protocol):
    """Where the data is: `data_pipeline.evaluation_sets`."""

    def load(self, path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        """What `datasets.load_dataset` would give."""

    def requests(self, name: str) -> list[dict[str, str]]:
        """`context`, `continuation` and `level` of each ready prompt."""


def run_paper_tasks(
    model: HarnessLM, tasks: Sequence[PaperTask], sets: EvaluationSets, items: int, generation: Generation
) -> list[PaperScore]:
    """Ask `model` each of `tasks`, at most `items` items of each, drawn evenly over its parts.

    Raises what `sets` raises for a set that is missing or another version's.
    """
    with (mock.patch.object(datasets, "load_dataset", sets.load),
          mock.patch.object(lm_eval.utils.env, "from_string", functools.cache(lm_eval.utils.env.from_string))):
        # the harness compiles a template anew for every item
        parts = {task.name: _draw(_parts(task), items) for task in tasks if task.kind == "choice"}
        parts |= {task.name: _draw(_ready(task, sets), items) for task in tasks if task.requests}
        rows = _ask(model, parts)
        answers = {name: [_answer(part, row) for part, row in of] for name, of in rows.items()}
        lengths = {task.name: [_by_length(part, row) for part, row in rows[task.name]]
                   for task in tasks if task.kind == "choice"}
        lettered = [task for task in tasks if task.gold]
        for task in lettered:
            _change(parts[task.name], task.gold)
        for name, of in _ask(model, {task.name: parts[task.name] for task in lettered}).items():
            answers[name] = [_answer(part, row) for part, row in of]
        written = {task.name: _written(model, task, items) for task in tasks
                   if (task.kind == "text" and generation != "none") or (task.kind == "code" and generation == "code")}
    return [_score(task, model, [row for _, row in rows.get(task.name, [])], answers.get(task.name, []),
                   written.get(task.name, []), lengths.get(task.name, [])) for task in tasks]


def _parts(task: PaperTask) -> Parts:
    folders = [str(REGISTRY / name) for name in FOLDERS.get(task.task, [task.task])]
    manager = TaskManager(include_defaults=False, include_path=folders)
    parts: Parts = manager.load([task.task])["tasks"]
    _change(parts, {**task.changes, "num_fewshot": task.shots})
    return parts


def _ready(task: PaperTask, sets: EvaluationSets) -> Parts:
    """The right answer alone, after its ready prompt."""
    rows = [{"context": row["context"], "choices": [row["continuation"]], "answer": 0}
            for row in sets.requests(task.requests) if task.level in ("", row["level"])]
    return {f"gold_{task.task}": choice_task(f"gold_{task.task}", rows)}


def _change(parts: Parts, changes: Mapping[str, Any]) -> None:
    """Set fields of the harness's tasks, for the item and for the examples before it."""
    for part in parts.values():
        for key, value in changes.items():
            part.set_config(key, value)
            if hasattr(part.fewshot_cfg, key):
                setattr(part.fewshot_cfg, key, value)


def _draw(parts: Parts, items: int) -> Parts:
    """The parts with `items` items among them, evenly drawn; those left with none are left out."""
    total = sum(len(part.task_docs) for part in parts.values())
    wanted = min(items, total)
    places = [place * total // wanted for place in range(wanted)]
    chosen, start = {}, 0
    for name, part in parts.items():
        end = start + len(part.task_docs)
        if own := [place - start for place in places if start <= place < end]:
            split = part.config.test_split or part.config.validation_split
            part.dataset[split] = part.task_docs.select(own)
            part.set_config("process_docs", None)           # `task_docs` are processed
            chosen[name] = part
        start = end
    return chosen


def _ask(model: HarnessLM, parts: Mapping[str, Parts]) -> dict[str, list[tuple[ConfigurableTask, Row]]]:
    """Every item of all parts with what the model made of it, by the paper's task: one call, for full batches."""
    tasks = {name: part for of in parts.values() for name, part in of.items()}
    if not tasks:
        return {}
    for part in tasks.values():
        part.set_fewshot_seed(FEWSHOT_SEED)
    outcome: Any = harness_evaluate(
        model, {"tasks": dict(tasks), "groups": {}}, bootstrap_iters=0, confirm_run_unsafe_code=True)
    return {task: [(part, row) for name, part in of.items() for row in outcome["samples"][name]]
            for task, of in parts.items()}


def _answer(part: ConfigurableTask, row: Row) -> tuple[float, int]:
    """Log-likelihood in nats of the right answer, and its bytes, the blanks before it among them: the harness scores
    with it those that end the context."""
    place = _place(part, row)
    context, answer = row["arguments"][place][:2]
    return row["filtered_resps"][place][0], len((context[len(context.rstrip()) :] + answer).encode())


def _place(part: ConfigurableTask, row: Row) -> int:
    """Of the right answer among the options."""
    right: Any = part.doc_to_text(row["doc"]) if part.multiple_input else part.doc_to_target(row["doc"])
    return int(part.doc_to_choice(row["doc"]).index(right) if isinstance(right, str) else right)


def _by_length(part: ConfigurableTask, row: Row) -> tuple[float, float]:
    """What the item gives who takes the longest option, and the shortest; of k equal ones 1/k."""
    sizes = [len(context) + len(answer) for context, answer in row["arguments"]]
    longest, shortest = ((sizes[_place(part, row)] == size) / sizes.count(size) for size in (max(sizes), min(sizes)))
    return longest, shortest


def _written(model: HarnessLM, task: PaperTask, items: int) -> list[Row] | str:
    """Items with the answers that the model wrote, graded; or why there are none."""
    with code_eval_in_sandbox() if task.kind == "code" else contextlib.nullcontext():
        try:
            parts = _draw(_parts(task), items)
        except (ImportError, AssertionError) as error:          # what grades mathematics is not locked
            return f"not written: {' '.join(str(error).split())[:200]}"
        return [row for _, row in _ask(model, {task.name: parts})[task.name]]


def _score(
    task: PaperTask, model: HarnessLM, asked: Iterable[Row], answers: list[tuple[float, int]], written: list[Row] | str,
    lengths: list[tuple[float, float]],
) -> PaperScore:
    asked = list(asked)
    metric, filtered = task.metric.split(",")
    answered = [] if isinstance(written, str) else [row for row in written if row["filter"] == filtered]
    values = [int(row[metric]) for row in (asked if task.kind == "choice" else answered)]
    if task.kind == "absent":
        why = "its data is in no package"
    elif values:
        why = ""
    else:
        why = written if isinstance(written, str) else "the right answer only; `evaluate.generation` has it written"
    return PaperScore(
        task,
        score=sum(values) / len(values) if values else None,
        stderr=mean_stderr(values) if len(values) > 1 else None,
        right=values,
        items=len(answers),
        bits_per_byte=bits_per_byte(answers) if answers else None,
        bits_per_byte_stderr=bits_per_byte_stderr(answers) if len(answers) > 1 else None,
        cut=max(_cut(model, asked), _cut(model, answered)),
        left_out=why,
        by_length=max(map(fmean, zip(*lengths, strict=True))) if lengths else None,
    )


def _cut(model: HarnessLM, rows: Iterable[Row]) -> int:
    """Items of which a request lost its beginning."""
    texts = ([tuple(part for part in request if isinstance(part, str)) for request in row["arguments"]] for row in rows)
    return sum(not model.cut.isdisjoint(requests) for requests in texts)
