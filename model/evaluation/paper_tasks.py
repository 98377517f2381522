"""The paper's evaluation tasks under their names in lm-evaluation-harness, with the paper's shots and results.

Shots and the 8B model's results are those of NVIDIA's model card of Nemotron-H-8B-Base. NVIDIA graded mathematics with
Math-Verify and NeMo-Skills and sanitised programs with EvalPlus, so the harness's own grading comes close to those
figures and does not repeat them. RULER is left to the harness's command line: it makes its texts with packages and
downloads of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate as harness_evaluate
from lm_eval.tasks import TaskManager

from model.evaluation.sandbox import code_eval_in_sandbox
from model.evaluation.schema import PaperScore, PaperTask

FEWSHOT_SEED = 1234             # the harness's own
BOOTSTRAP_SAMPLES = 1000


# ARC challenge as the paper asks it: all options shown, the answer a letter, as in MMLU. The harness's own task shows
# none and scores their texts.
ALL_OPTIONS = {
    "doc_to_text": "{{question.strip()}}{% for text in choices.text %}\n{{'ABCDE'[loop.index0]}}. {{text}}{% endfor %}"
                   "\nAnswer:",
    "doc_to_choice": "{{['A', 'B', 'C', 'D', 'E'][:choices.text|length]}}",
}

PAPER_TASKS = (
    PaperTask("MMLU", "mmlu", 5, "acc,none", "choice", 0.25, 0.7277),
    PaperTask("MMLU-Pro, chain of thought", "mmlu_pro", 5, "exact_match,custom-extract", "text", 0.1, 0.4401),
    PaperTask("GSM8K, chain of thought", "gsm8k_cot", 8, "exact_match,flexible-extract", "text", 0.0, 0.8711),
    PaperTask("MATH, chain of thought", "minerva_math", 4, "math_verify,none", "text", 0.0, 0.4652),
    PaperTask("MATH level 5", "leaderboard_math_hard", 4, "exact_match,none", "text", 0.0, 0.2293),
    PaperTask("MATH-500", "minerva_math500", 4, "math_verify,none", "text", 0.0, 0.4443),
    PaperTask("HumanEval", "humaneval", 0, "pass@1,create_test", "code", 0.0, 0.5854),
    PaperTask("HumanEval+", "humaneval_plus", 0, "pass@1,create_test", "code", 0.0, 0.5549),
    PaperTask("MBPP", "mbpp", 3, "pass_at_1,none", "code", 0.0, 0.6537),
    PaperTask("MBPP+", "mbpp_plus", 0, "pass_at_1,none", "code", 0.0, 0.5952),
    PaperTask("ARC challenge, options shown", "arc_challenge", 25, "acc,none", "choice", 0.25, 0.8874, ALL_OPTIONS),
    PaperTask("HellaSwag", "hellaswag", 10, "acc_norm,none", "choice", 0.25, 0.8323),
    PaperTask("Winogrande", "winogrande", 5, "acc,none", "choice", 0.5, 0.8051),
    PaperTask("CommonsenseQA", "commonsense_qa", 7, "acc,none", "choice", 0.2, 0.7871),
    PaperTask("PIQA", "piqa", 0, "acc_norm,none", "choice", 0.5, None),
    PaperTask("OpenBookQA", "openbookqa", 0, "acc_norm,none", "choice", 0.25, None),
    PaperTask("RACE", "race", 0, "acc,none", "choice", 0.25, None),
    PaperTask("Social IQa", "social_iqa", 0, "acc,none", "choice", 1 / 3, None),
    PaperTask("TruthfulQA", "truthfulqa_mc2", 0, "acc,none", "choice", 0.5, None),
)


def run_paper_tasks(
    model: LM, tasks: Sequence[PaperTask], items: int | None, code_execution: bool
) -> list[PaperScore]:
    """Ask `model` those of `tasks` whose data can be had, at most `items` of each (of each of its parts)."""
    if not tasks:
        return []
    manager = TaskManager()
    return [_run(model, manager, task, items, code_execution) for task in tasks]


def _run(model: LM, manager: TaskManager, task: PaperTask, items: int | None, code_execution: bool) -> PaperScore:
    if task.kind == "code" and not code_execution:
        return PaperScore(task, left_out="runs programs; `evaluate.code_execution` is false")
    with code_eval_in_sandbox() if task.kind == "code" else contextlib.nullcontext():
        try:
            loaded: Any = manager.load([task.task])
        except Exception as error:      # no network, no such data set, a package missing: each in its library's words
            return PaperScore(task, left_out=f"cannot be loaded: {' '.join(repr(error).split())[:200]}")
        for part in loaded["tasks"].values():
            for key, value in {**task.changes, "num_fewshot": task.shots}.items():
                part.set_config(key=key, value=value)
            part.set_fewshot_seed(FEWSHOT_SEED)
        outcome: Any = harness_evaluate(
            model, loaded, limit=items, bootstrap_iters=BOOTSTRAP_SAMPLES, confirm_run_unsafe_code=True
        )
    found = {**outcome["results"], **outcome.get("groups", {})}[task.task]
    metric, filtered = task.metric.split(",")
    stderr = found.get(f"{metric}_stderr,{filtered}")
    counts = [count["effective"] for count in outcome["n-samples"].values()]
    return PaperScore(
        task, float(found[task.metric]), stderr if isinstance(stderr, float) else None, sum(counts)
    )
