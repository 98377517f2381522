"""The report's tables on evaluation, from the synthetic tree."""

import json

import pytest
from runs_tree import edit_json, report_stage, write_json, write_runs

from data_pipeline.config import DataError
from stages import evaluation_sections
from stages.records import load
from stages.report_page import Table


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_runs(tmp_path)


def table(blocks, word: str) -> Table:
    return next(block for block in blocks if isinstance(block, Table) and word in block.caption)


def test_every_score_has_its_controls_below(runs):
    for word, columns in (("higher is better", 5), ("whose length", 10)):
        found = table(evaluation_sections.blocks(load(report_stage())), word)
        assert len(found.header) == columns
        assert [row[0] for row in found.rows[-2:]] == ["control", "a guess"]
        assert all(len(row) == columns for row in found.rows)


def test_pairs_are_compared_on_the_same_items(runs):
    models = {"hybrid-bf16": [1] * 40 + [0] * 160, "transformer-bf16": [0] * 20 + [1] * 25 + [0] * 155}
    for name, right in models.items():
        edit_json(runs / "evaluate" / name / "scores.json", cloze=right)
    rows = table(evaluation_sections.blocks(load(report_stage())), "Pairs").rows
    assert len(rows) == 5 * 8, "five pairs; bits per byte, four tasks, three of context"
    row = next(row for row in rows if row[:2] == ["hybrid / Transformer", "cloze, 200 items"])
    assert row[2:5] == ["0.200", "0.125", "0.075"] and row[6] == "0.004"        # 20 against 5
    pooled = [row for row in rows if row[1] == "copy, every length, 600 items"]
    assert len(pooled) == 5


def test_other_items_are_an_error(runs):
    edit_json(runs / "evaluate" / "compressed" / "scores.json", cloze=[1, 0])
    with pytest.raises(DataError, match=r"compressed/scores\.json and .*: not the same items\.\nRun the stage"):
        evaluation_sections.blocks(load(report_stage()))


def test_the_papers_tasks_where_they_were_asked(runs):
    task = {"name": "MMLU", "task": "mmlu", "shots": 5, "metric": "acc,none", "kind": "choice", "chance": 0.25,
            "published": 0.7277}
    records = load(report_stage())
    assert not evaluation_sections.paper_tasks(records)
    for name in records.params.models:
        write_json(runs / "evaluate" / name / "paper_tasks.json", [
            {"task": task, "score": 0.26, "stderr": 0.004, "items": 14_042, "left_out": ""},
            {"task": task | {"name": "PIQA", "published": None}, "score": None, "stderr": None, "items": 0,
             "left_out": "cannot be loaded"}])
    first, second = evaluation_sections.paper_tasks(load(report_stage()))[0].rows
    assert first[:4] == ["MMLU", "5", "acc", "0.260 ± 0.004"] and first[-3:] == ["0.250", "0.728", ""]
    assert second[3] == "–" and second[-1] == "cannot be loaded"
    assert json.dumps(first)
