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


STAGES = ("curation", "tokenization", "pretraining hybrid-fp8", "layer importance", "neuron importance",
          "ranking of 400", "task", "3 short distillations", "2 full distillations", "measures, controls",
          "export compressed", "evaluation compressed-random")


def test_a_profile_is_planned_stage_by_stage(run: Run) -> None:
    """All of the paper's 56B but its evaluation, which is one GPU's."""
    printed, code = run("nemotron-h-56b")
    assert all(row in printed for row in ROWS) and all(f"\n{stage} " in printed for stage in STAGES)
    assert str(code).count("does not fit") == str(code).count("leave the model out of `models`") == 3
    assert "evaluation compressed does not fit" in str(code)
    assert run("nemotron-h-56b", "--set", "models=[]")[1] is None


def test_nvidias_setup_is_planned_beside_ours(run: Run) -> None:
    printed, code = run("nemotron-h-56b", "--nvidia", "--set", "runtime.launcher.nodes=16",
                        "--set", "pretrain.global_batch_size=384")
    [line] = [line for line in printed.splitlines() if line.startswith("a step, ms")]
    ours, theirs = (float(value.replace(",", "")) for value in line.split()[-2:])
    assert code is None and theirs == pytest.approx(11_874, rel=0.2) and ours > 1.3 * theirs


def test_distillations_that_do_not_fit_are_refused_with_the_nearest_layout(run: Run) -> None:
    _, code = run("nemotron-h-56b", "--set", "models=[]", "--set", "compress.recompute=null")
    assert "compress does not fit: 3 short distillations take" in str(code)
    assert "Nearest that fits: tensor 8 + sequence, pipeline 1, data 768, micro-batch 1, recompute M-" in str(code)


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
