"""README says what the committed claims do, and the command that makes it so."""

import json
from pathlib import Path

import pytest

from stages.report import readme

ROOT = Path(__file__).resolve().parents[3]
ROWS = [{"number": "1", "key": "sizes", "title": "Sizes follow", "answer": "holds"},
        {"number": "2a", "key": "loss", "title": "As good", "answer": "cannot be told"},
        {"number": "2b", "key": "tasks", "title": "As good at tasks", "answer": "does not hold"}]


def test_the_committed_readme_is_up_to_date(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme.RESULTS.mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"Before\n\n{readme.START}\nstale\n{readme.END}\n\nAfter\n")
    for name, rows in (("cpu", ROWS), ("h200", ROWS[:2])):
        (readme.RESULTS / f"claims-{name}.json").write_text(json.dumps({"profile": name, "claims": rows}))
    return tmp_path


def test_the_table_is_written_and_checked(folder, capsys):
    assert readme.main(["--check"]) == 1
    assert capsys.readouterr().out.endswith("Run `python -m stages.report.readme`.\n")
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0
    text = (folder / "README.md").read_text()
    assert text.startswith("Before\n") and text.endswith("\nAfter\n") and "stale" not in text
    assert "`cpu`: of 3, 1 hold (✓), 1 do not (✗), 1 cannot be told (○)." in text
    assert "| 2a | As good | ○ | ○ |" in text and "| 2b | As good at tasks | **✗** |  |" in text
    (readme.RESULTS / "claims-cpu.json").write_text(json.dumps({"claims": ROWS[:1]}))
    assert readme.main(["--check"]) == 1


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"claims": [{"key": "x", "title": "", "number": "1", "answer": "maybe"}]}'])
def test_what_is_no_claims_file_is_two_lines(folder, capsys, content):
    (readme.RESULTS / "claims-cpu.json").write_text(content)
    assert readme.main([]) == 1
    first, second = capsys.readouterr().out.strip().splitlines()
    assert "docs/results/claims-cpu.json: " in first and second.startswith("Copy reports/PROFILE")


def test_a_readme_without_markers_is_named(folder, capsys):
    (folder / "README.md").write_text("Nothing\n")
    assert readme.main([]) == 1
    assert "do not both stand in it" in capsys.readouterr().out
