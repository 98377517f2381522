"""`make plan`: a table for every profile, and a refusal with a way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flows.plan", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("profile", ["h200", "nemotron-h-56b"])
def test_a_profile_is_planned(profile: str) -> None:
    done = run(profile)
    assert done.returncode == 0, done.stderr
    for row in ("hybrid-fp8", "activations", "memory of a GPU, GiB", "between replicas", "tokens/s a GPU", "GPU-hours"):
        assert row in done.stdout


def test_a_layout_that_does_not_fit_is_refused_with_the_nearest_that_does() -> None:
    done = run("nemotron-h-8b", "--set", "runtime.parallel={tensor: 1}", "--set", "runtime.launcher.nodes=96")
    assert done.returncode == 1
    assert "hybrid-bf16 does not fit: " in done.stderr and "Nearest that fits: tensor" in done.stderr


def test_a_layout_that_cannot_be_says_why() -> None:
    done = run("nemotron-h-8b", "--set", "runtime.parallel.pipeline=5", "--set", "runtime.launcher.nodes=195")
    assert done.returncode == 1 and "52 layers cannot be split into 5 pipeline stages" in done.stderr
