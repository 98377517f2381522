"""What is printed while stages run."""

from __future__ import annotations

import pytest

from flows import console
from flows.console import Console


def test_without_a_terminal_progress_prints_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    shown = Console()
    shown.start("pretrain@hybrid-fp8")
    for seconds in range(1, 46):
        now[0] = 100.0 + seconds
        shown.progress("pretrain@hybrid-fp8", f"step {seconds}/60")
    shown.end("pretrain@hybrid-fp8", "ran in 00:00:45")
    shown.progress("pretrain@hybrid-fp8", "step 46/60")       # a watcher that comes late
    assert [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()] == [
        ["00:00:00", "pretrain@hybrid-fp8           started"],
        ["00:00:20", "pretrain@hybrid-fp8           step 20/60"],
        ["00:00:40", "pretrain@hybrid-fp8           step 40/60"],
        ["00:00:45", "pretrain@hybrid-fp8           ran in 00:00:45"],
    ]


def test_on_a_terminal_the_last_line_shows_what_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    shown = Console()
    shown.start("compress")
    shown.start("benchmark")
    shown.progress("compress", "step 3/9")
    last = capsys.readouterr().out.split("\r\033[K")[-1]
    assert last == "compress step 3/9   benchmark"
    shown.progress("benchmark", "step 1/2 " + "x" * 80)
    assert len(capsys.readouterr().out.split("\r\033[K")[-1]) == 39


def test_table_columns_line_up() -> None:
    text = console.table([{"stage": "a", "result": "ran"}, {"stage": "pretrain", "result": ""}])
    assert text.splitlines() == ["stage     result", "----------------", "a         ran", "pretrain"]
