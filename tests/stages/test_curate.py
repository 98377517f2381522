"""The curate stage, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "curate.megabytes_per_domain={code: 0.25, docs: 0.25, reference: 0.25}", "runtime.workers=1", "curate.shards=2"
)


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.curate", "--params", str(ROOT / "params.yaml"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=200)


def with_settings(*assignments: str) -> list[str]:
    return [word for assignment in (*SMALL, *assignments) for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("curate")
    result = run(directory, "--out", "result", *with_settings())
    assert result.returncode == 0, result.stderr
    assert "step " in result.stdout and "work read" in result.stdout
    return directory


def test_metrics_say_what_the_manifest_and_the_funnel_say(done):
    metrics = json.loads((done / "result/runs/curate/metrics.json").read_text())
    funnel = json.loads((done / "result/runs/curate/funnel.json").read_text())
    manifest = json.loads((done / "result/data/curated/manifest.json").read_text())
    for part in ("train", "heldout"):
        assert metrics[f"documents_{part}"] == sum(entry["documents"] for entry in manifest[part].values())
        assert metrics[f"bytes_{part}"] == sum(metrics[f"bytes_{part}_{domain}"] for domain in manifest[part])
    assert metrics["documents_train"] == sum(row["documents"] for row in funnel if row["step"] == "quality_labels")
    read, heuristics, normalised = (
        sum(row["documents"] for row in funnel if row["step"] == step) for step in ("read", "heuristics", "normalise")
    )
    assert metrics["removed_share_heuristics"] == pytest.approx(1 - heuristics / normalised, rel=1e-5)
    assert 0 <= metrics["removed_share_license"] < 0.2 and read > heuristics
    assert all(0 <= metrics[name] < 0.5 for name in metrics if "share" in name)


def test_nothing_is_left_behind(done):
    assert not list((done / ".scratch").glob("curate-*/"))
    assert not list(done.rglob("*.partial"))
    provenance = json.loads((done / "result/runs/curate/provenance.json").read_text())
    assert provenance["resumed"] is False


def test_an_error_is_two_lines(tmp_path):
    result = run(tmp_path, "--out", "result", *with_settings("curate.roots=[no-such-distribution]"))
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 2 and "no-such-distribution" in result.stderr
    assert not (tmp_path / "result/data/curated").exists()
