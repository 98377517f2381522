"""A user's files are dependencies: under plain DVC and in the flow's look at what is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows import dvc_graph
from flows.dvc_graph import GraphError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(repository: Path) -> Path:
    """The stage `sources` as it is, and an `annotate` that only counts its runs."""
    yaml = YAML()
    params = yaml.load(Path("params.yaml"))
    Path("bench.txt").write_text("a question")
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("some text")
    params["annotate"]["sources"] = [{"kind": "files", "paths": ["texts"], "domain": "docs"}]
    params["annotate"]["decontamination"]["against"] = ["bench.txt"]
    yaml.dump(params, Path("params.yaml"))
    sources = yaml.load(ROOT / "dvc.yaml")["stages"]["sources"]
    sources["deps"] = ["work.py"]
    yaml.dump({"stages": {"sources": sources, "annotate": {
        "cmd": "echo run >> runs.log && touch annotated", "deps": ["data/${profile}/sources.json"],
        "outs": ["annotated"],
    }}}, Path("dvc.yaml"))
    dvc_graph.allow_no_git()
    return repository


def runs_after_repro() -> int:
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q", "annotate"], check=True,
                   env=os.environ | dvc_graph.ENVIRONMENT)
    return len(Path("runs.log").read_text().split())


def test_annotate_runs_again_when_a_file_changed_and_only_then(corpus: Path) -> None:
    assert runs_after_repro() == 1
    assert runs_after_repro() == 1
    Path("texts/b.txt").write_text("more text")
    assert runs_after_repro() == 2
    Path("bench.txt").write_text("another question")
    nodes = dvc_graph.graph()
    assert list(nodes) == ["annotate"]
    dvc_graph.look()
    assert dvc_graph.stale(nodes) == {"annotate"}
    assert runs_after_repro() == 3
    dvc_graph.look()
    assert dvc_graph.stale(nodes) == set()

    Path("bench.txt").unlink()
    with pytest.raises(GraphError, match=r"bench\.txt: not found") as error:
        dvc_graph.look()
    assert str(error.value).count("\n") == 1
    assert Path("annotated").exists()           # what was made of it stays
