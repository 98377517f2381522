"""`make plan`: a table for every profile, and a refusal with a way out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import plan

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[str, object]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: what it prints, and with what it exits."""

    def main(*arguments: str) -> tuple[str, object]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["plan", *arguments])
        try:
            plan.main()
            code = None
        except SystemExit as error:
            code = error.code
        return capsys.readouterr().out, code

    return main


ROWS = ("hybrid-fp8", "activations", "memory of a GPU, GiB", "between replicas", "tokens/s a GPU", "GPU-hours")


def test_a_profile_is_planned(run: Run) -> None:
    printed, code = run("nemotron-h-56b")
    assert code is None
    assert all(row in printed for row in ROWS)


def test_from_a_shell() -> None:
    done = subprocess.run([sys.executable, "-m", "flows.plan", "h200"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(row in done.stdout for row in ROWS)


def test_a_layout_that_does_not_fit_is_refused_with_the_nearest_that_does(run: Run) -> None:
    _, code = run("nemotron-h-8b", "--set", "runtime.parallel={tensor: 1}", "--set", "runtime.launcher.nodes=96")
    assert "hybrid-bf16 does not fit: " in str(code) and "Nearest that fits: tensor" in str(code)


def test_a_layout_that_cannot_be_says_why(run: Run) -> None:
    _, code = run("nemotron-h-8b", "--set", "runtime.parallel.pipeline=5", "--set", "runtime.launcher.nodes=195")
    assert "52 layers cannot be split into 5 pipeline stages" in str(code)
