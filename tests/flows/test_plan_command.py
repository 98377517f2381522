"""`make plan`: a table for every profile, and a refusal with a way out."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import plan, profile
from tests import forked

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


STAGES = ("curation", "its near-duplicates", "its repeated strings", "tokenization", "pretraining hybrid-fp8",
          "layer importance", "neuron importance",
          "ranking of 400", "task", "3 short distillations", "2 full distillations", "measures, controls",
          "export compressed", "evaluation compressed-random")


def test_a_profile_is_planned_stage_by_stage(run: Run) -> None:
    """All of the paper's 56B, evaluation over its eight tensor parallel GPUs too."""
    printed, code = run("nemotron-h-56b")
    assert all(row in printed for row in ROWS) and all(f"\n{stage} " in printed for stage in STAGES)
    assert code is None
    assert "1 x H200" in run("h200")[0] and "8 x H100" in run("nemotron-h-8b", "--set=runtime.launcher.nodes=1")[0]


def test_what_is_decided_between_the_passes_is_planned_by_its_formula() -> None:
    """The table of docs/data.md for 10^9 and 10^10 documents of 4,000 bytes in shards of 64 MB, in core-hours."""
    for documents, hours, parts in ((1e9, 2.6, 120), (1e10, 28, 1193)):
        step = plan.NEAR_DUPLICATES.step("", documents, documents * 4000 / 64e6, 64)
        assert (step.seconds or 0) * step.cores / 3600 == pytest.approx(hours, rel=0.02)
        assert math.ceil(documents / plan.NEAR_DUPLICATES.part) == parts and step.host == 1.1e9
        assert step.disk == pytest.approx(documents * 297)
    for text, hours in ((4e12, 15), (40e12, 495)):
        step = plan.REPEATED_STRINGS.step("", text, text / 64e6, 64)
        assert (step.seconds or 0) * step.cores / 3600 == pytest.approx(hours, rel=0.02)
    step = plan.EVALUATION_TEXT.step("", 1e8, 0, 1)         # measured: 27.5 processor seconds, 2.4 GB beside surveys
    assert step.seconds == pytest.approx(27.5, rel=0.1) and step.disk - 8e8 == pytest.approx(2.4e9, rel=0.01)
    small = plan.NEAR_DUPLICATES.step("", 1e6, 60, 8)
    assert small.cores == 1 and small.host == pytest.approx(1.1e9 * 1e6 / 2**23)


def test_nvidias_setup_is_planned_beside_ours(run: Run) -> None:
    printed, code = run("nemotron-h-56b", "--nvidia", "--set", "runtime.launcher.nodes=16",
                        "--set", "pretrain.global_batch_size=384")
    [line] = [line for line in printed.splitlines() if line.startswith("a step, ms")]
    ours, theirs = (float(value.replace(",", "")) for value in line.split()[-2:])
    assert code is None and theirs == pytest.approx(11_874, rel=0.2) and ours > 1.3 * theirs


def test_from_a_shell() -> None:
    printed = forked.run(ROOT, "-m", "flows.plan", "h200").stdout
    assert all(row in printed for row in ROWS)


ONE = ("runtime.parallel={tensor: 1}", "runtime.launcher.nodes=96")
ALONE = (*ONE, "models=[hybrid-fp8]")           # the 56B fits two GPUs and not one


@pytest.mark.parametrize(("profile", "settings", "words"), [
    ("nemotron-h-56b", ALONE, [
        "evaluation of hybrid-fp8 does not fit: 1", "with tensor 1, a H100 SXM has 79.6", "benchmark does not fit: ",
        "Nearest that fits: tensor 2 (runtime.parallel, with runtime.launcher).", "Raise runtime.parallel.tensor"]),
    ("nemotron-h-56b", (*ALONE, "model.hybrid.num_query_groups=1"), [
        "No tensor-parallel size fits: take a larger GPU"]),            # it cannot be split
    ("nemotron-h-56b", ("models=[]", "compress.recompute=null"), [
        "compress does not fit: 3 short distillations take",
        "Nearest that fits: tensor 8 + sequence, pipeline 1, data 768, micro-batch 1, recompute M-"]),
    ("nemotron-h-8b", ONE, ["hybrid-bf16 does not fit: ", "Nearest that fits: tensor"]),
    ("nemotron-h-8b", (*ONE, "--nvidia"), ["hybrid-bf16 does not fit: ", "Nearest that fits: tensor"]),
    ("nemotron-h-8b", ("runtime.parallel.pipeline=5", "runtime.launcher.nodes=195"), [
        "hybrid-fp8 on H100 SXM: ", "52 layers cannot be split into 5 pipeline stages"]),
    *((profile, (), ["hybrid-fp8 on H100 SXM: model: in_proj rows", "or train on a CPU (emulated FP8)"])
      for profile in ("cpu", "smoke")),               # which a GPU would not train either
])
def test_what_does_not_fit_is_refused_with_the_nearest_that_does(
    run: Run, profile: str, settings: tuple[str, ...], words: list[str]
) -> None:
    _, code = run(profile, *(part if part == "--nvidia" else f"--set={part}" for part in settings))
    assert not [word for word in words if word not in str(code)]


def test_a_profile_that_is_not_valid_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the temporary file that it was resolved into."""
    broken = (ROOT / "params.yaml").read_text().replace("seed: 1234", "sede: 1234")
    monkeypatch.setattr(profile, "resolve", lambda name: broken)
    _, code = run("smoke")
    assert str(code).startswith("profiles/smoke.yaml: `seed` is missing.\n")


def test_the_guide_shows_what_the_command_says(run: Run) -> None:
    guide = (ROOT / "docs/gpu.md").read_text().split("## Before it is started")[1]
    [command] = re.findall(r"^    python -m flows.plan (.*--set.*)$", guide, re.M)
    _, code = run(*shlex.split(command))
    [shown] = re.findall(r"^    (hybrid-bf16 does not fit.*)\n    (Nearest.*) \.\.\.$", guide, re.M)
    assert "\n".join(shown) in str(code)
