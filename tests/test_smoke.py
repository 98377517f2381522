"""The whole pipeline at toy size, as a person runs it: in an unpacked archive without git, twice."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("data_pipeline", "flows", "kernels", "model", "profiles", "stages", "dvc.yaml", "params.yaml",
           "pyproject.toml", "requirements.lock", ".dvcignore")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", tmp_path / ".dvc/config")
    return tmp_path


def reproduce(archive: Path, *arguments: str) -> dict[str, str]:
    """Run the flow; stage -> result. Fails with what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "PYTHONPATH"))}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "flows.reproduce", *arguments]
    done = subprocess.run(command, cwd=archive, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.split("\n\n")[1].splitlines()[2:]
    return {row.split()[0]: row.split()[1] for row in table}


def metrics(archive: Path, *parts: str) -> dict[str, float]:
    return dict(json.loads(archive.joinpath("runs/smoke", *parts, "metrics.json").read_text()))


@pytest.mark.timeout(900)      # 90 s alone on two cores; others may be at work
def test_every_stage_runs_and_then_none(archive: Path) -> None:
    first = reproduce(archive, "--profile", "smoke")
    assert set(first.values()) == {"ran"}
    params = YAML(typ="safe").load(archive / "params.yaml")
    assert len(first) == 6 + len(params["variants"]) + 2 * len(params["models"])

    for variant in params["variants"]:
        rows = list(csv.DictReader((archive / f"runs/smoke/pretrain/{variant}/training.csv").open()))
        assert len(rows) == metrics(archive, "pretrain", variant)["steps"]
        assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    compressed = metrics(archive, "compress")
    assert compressed["compressed_parameters"] < compressed["parent_parameters"]
    for model in params["models"]:
        assert 0 < metrics(archive, "evaluate", model)["bits_per_byte"] < 16
        assert (archive / f"data/smoke/hub/{model}/config.json").exists()
    assert "<svg" in (archive / "reports/smoke/index.html").read_text()

    second = reproduce(archive)
    assert second.keys() == first.keys()
    assert set(second.values()) == {"cached"}
