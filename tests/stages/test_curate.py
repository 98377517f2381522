"""The stages annotate and curate, run as a user runs them."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import forked

ROOT = Path(__file__).resolve().parents[2]
ROOTS = "[numpy, datasets, tokenizers, polars]"
SMALL = ("runtime.workers=1", "annotate.shard_megabytes=0.4", "annotate.held_out.fraction=0.15", "annotate.sources=[{"
         f"kind: installed, roots: {ROOTS}, megabytes: {{code: 0.3, docs: 0.3, reference: 0.3}}}}]")


def run(directory: Path, stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(directory, "-m", f"stages.{stage}", "--params", str(ROOT / "params.yaml"), *arguments,
                      check=False)


def with_settings(stage: str, *assignments: str) -> list[str]:
    small = [assignment for assignment in SMALL if assignment.startswith((stage, "runtime"))]
    return [word for assignment in (*small, *assignments) for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("curate")
    for stage, work in (("annotate", "read"), ("curate", "cut")):
        result = run(directory, stage, "--out", "result", *with_settings(stage))
        assert result.returncode == 0, result.stderr
        assert f"work {work} documents/s" in result.stdout
    return directory


def test_metrics_say_what_the_manifest_and_the_funnel_say(done):
    metrics = json.loads((done / "result/runs/curate/metrics.json").read_text())
    funnel = json.loads((done / "result/runs/curate/funnel.json").read_text())
    manifest = json.loads((done / "result/data/curated/manifest.json").read_text())
    for part in ("train", "heldout"):
        assert metrics[f"documents_{part}"] == sum(entry["documents"] for entry in manifest[part].values())
        assert metrics[f"bytes_{part}"] == sum(metrics[f"bytes_{part}_{domain}"] for domain in manifest[part])
    left = {step: sum(row["documents"] for row in funnel if row["step"] == step)
            for step in ("read", "license", "language", "near_duplicates", "heuristics", "held_out")}
    assert metrics["documents_train"] == left["held_out"]
    assert metrics["removed_share_heuristics"] == pytest.approx(
        1 - left["heuristics"] / left["near_duplicates"], rel=1e-5)
    assert metrics["duplicate_share"] == pytest.approx(1 - left["near_duplicates"] / left["language"], rel=1e-5)
    assert metrics["removed_share_license"] == pytest.approx(1 - left["license"] / left["read"], rel=1e-5)
    assert all(0 <= metrics[name] < 0.5 for name in metrics if "share" in name)
    annotated = json.loads((done / "result/runs/annotate/metrics.json").read_text())
    assert annotated["documents"] == left["license"] and annotated["shards"] > 1


def test_the_other_records_are_there(done):
    for name in ("histograms", "dropped"):
        assert json.loads((done / f"result/runs/curate/{name}.json").read_text())


def test_nothing_is_left_behind(done):
    for stage in ("annotate", "curate"):
        assert not list((done / ".scratch").glob(f"{stage}-*/"))
        provenance = json.loads((done / f"result/runs/{stage}/provenance.json").read_text())
        assert provenance["resumed"] is False
        assert shlex.split(provenance["command"])[-len(with_settings(stage)) :] == with_settings(stage)
    assert not list(done.rglob("*.partial"))
    assert provenance["inputs"].keys() == {"result/data/annotated"}
