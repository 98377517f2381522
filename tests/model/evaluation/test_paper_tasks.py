"""The paper's tasks against the harness's own registry, and one run end to end on data in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.api.model import TemplateLM

from model.evaluation import paper_tasks
from model.evaluation.harness import LocalTask
from model.evaluation.paper_tasks import PAPER_TASKS, run_paper_tasks
from model.evaluation.schema import PaperTask

TASKS = Path(lm_eval.__file__).parent / "tasks"
FOLDERS = {"minerva_math500": "minerva_math", "leaderboard_math_hard": "leaderboard/math", "gsm8k_cot": "gsm8k",
           "humaneval_plus": "humaneval", "mbpp_plus": "mbpp", "arc_challenge": "arc",
           "truthfulqa_mc2": "truthfulqa", "social_iqa": "siqa"}


class Loader(yaml.SafeLoader):
    """Reads `!function` as text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def files(task: str, *suffixes: str) -> list[Path]:
    """Files of the task's folder, and the group of its name, which may stand elsewhere."""
    inside = (TASKS / FOLDERS.get(task, task)).rglob("*")
    found = [path for path in (*inside, TASKS / f"benchmarks/{task}.yaml") if path.is_file()]
    return sorted(path for path in found if path.suffix in suffixes)


def declarations(task: str) -> dict[str, dict[str, Any]]:
    """Tasks and groups that the folder of `task` declares, by name, with what they include."""
    found: dict[str, dict[str, Any]] = {}
    for path in files(task, ".yaml", ".yml"):
        values = yaml.load(path.read_text(), Loader)
        if not isinstance(values, dict):
            continue
        included = values.get("include")
        if isinstance(included, str) and (path.parent / included).exists():
            values = yaml.load((path.parent / included).read_text(), Loader) | values
        for key in ("task", "group"):
            if isinstance(values.get(key), str):
                found[values[key]] = values
        for tag in [values["tag"]] if isinstance(values.get("tag"), str) else values.get("tag") or []:
            found.setdefault(tag, values)
    return found


@pytest.mark.parametrize("task", PAPER_TASKS, ids=lambda task: task.task)
def test_names_and_metrics_are_the_harnesss(task: PaperTask) -> None:
    known = declarations(task.task)
    assert task.task in known, sorted(known)[:20]
    text = "\n".join(path.read_text() for path in files(task.task, ".yaml", ".yml", ".py", ""))
    metric, filtered = task.metric.split(",")
    assert metric.replace("pass@1", "pass_at_k") in text
    assert filtered == "none" or filtered in text
    assert ("code_eval" in text) == (task.kind == "code"), "what runs programs is marked"


def test_table_is_sane() -> None:
    assert len({task.task for task in PAPER_TASKS}) == len({task.name for task in PAPER_TASKS}) == len(PAPER_TASKS)
    for task in PAPER_TASKS:
        assert 0 <= task.chance < 1 and (task.published is None or task.chance < task.published < 1)


class Prefers(TemplateLM):
    """Prefers longer continuations, for their length too."""

    eot_token_id = 0

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return list(string.encode())

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return [(float(len(continuation) ** 2), False) for _, _, continuation in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError


class Manager:
    """Stands for the harness's, whose tasks need the network."""

    def load(self, names: list[str]) -> dict[str, Any]:
        [name] = names
        if name != "arc_challenge":
            raise ConnectionError("no route to\nhuggingface.co")
        rows = [{"question": f"Q{number}", "choices": ["no", "yes!"], "answer": 1 if number < 6 else 0}
                for number in range(8)]
        config = {"task": name, "output_type": "multiple_choice", "doc_to_text": "question",
                  "doc_to_choice": "choices", "doc_to_target": "answer",
                  "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]}
        return {"tasks": {name: LocalTask(config, rows)}, "groups": {}}


def test_what_can_be_had_is_run_and_the_rest_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_tasks, "TaskManager", Manager)
    zero_shot = [PaperTask(task.name, task.task, 0, task.metric, task.kind, task.chance, task.published)
                 for task in PAPER_TASKS if not task.changes]
    zero_shot.append(PaperTask("ARC", "arc_challenge", 0, "acc_norm,none", "choice", 0.25, None))
    found = {score.task.task: score for score in run_paper_tasks(Prefers(), zero_shot, None, code_execution=False)}
    assert list(found) == [task.task for task in zero_shot]
    arc = found["arc_challenge"]
    assert (arc.score, arc.items, arc.left_out) == (0.75, 8, "") and arc.stderr == pytest.approx(0.1637, abs=1e-3)
    assert "code_execution` is false" in found["humaneval"].left_out
    assert found["mmlu"].left_out == "cannot be loaded: ConnectionError('no route to\\nhuggingface.co')"
    with_code = run_paper_tasks(Prefers(), [task for task in zero_shot if task.kind == "code"], 4, code_execution=True)
    assert all("cannot be loaded" in score.left_out for score in with_code)
    assert run_paper_tasks(Prefers(), (), None, False) == []


class Letters(Prefers):
    """Prefers B, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.asked += [request.args for request in requests]
        return [(float(request.args[1].strip() == "B"), False) for request in requests]


def test_arc_shows_every_option_and_is_answered_by_a_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    [arc] = [task for task in PAPER_TASKS if task.task == "arc_challenge"]
    easy = yaml.load((TASKS / "arc/arc_easy.yaml").read_text(), Loader)         # which arc_challenge includes
    config = {key: value for key, value in easy.items() if key.startswith(("doc_to", "output", "metric"))}
    rows = [
        {"question": "Which is hot? ", "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
         "answerKey": "2"},
        {"question": "Which flies?", "choices": {"text": ["ox", "cow", "hen", "pig"], "label": ["A", "B", "C", "D"]},
         "answerKey": "C"},
    ]

    class Arc:
        def load(self, names: list[str]) -> dict[str, Any]:
            return {"tasks": {"arc_challenge": LocalTask({"task": "arc_challenge", **config}, rows)}, "groups": {}}

    monkeypatch.setattr(paper_tasks, "TaskManager", Arc)
    model = Letters()
    [score] = run_paper_tasks(model, [dataclasses.replace(arc, shots=0)], None, code_execution=False)
    assert (score.score, score.items) == (0.5, 2)
    assert {context for context, _ in model.asked} == {
        "Which is hot?\nA. ice\nB. fire\nC. snow\nAnswer:", "Which flies?\nA. ox\nB. cow\nC. hen\nD. pig\nAnswer:"}
    assert [choice.strip() for context, choice in model.asked if "hot" in context] == ["A", "B", "C"]
    assert len(model.asked) == 7
