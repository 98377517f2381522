"""A user's files are dependencies: under plain DVC and in the flow's look at what is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows import dvc_graph
from flows.dvc_graph import GraphError
from tests import forked

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def corpus(repository: Path) -> Path:
    """The stage `sources` as it is, and stages that only count their runs: of what they depend on, its files alone."""
    yaml = YAML()
    params = yaml.load(Path("params.yaml"))
    Path("bench.txt").write_text("a question")
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("some text")
    Path("theirs").mkdir()
    Path("theirs/tokenizer.json").write_text("{}")
    params["tokenize"]["tokenizer"] = "theirs"
    params["annotate"]["sources"] = [{"kind": "files", "paths": ["texts"], "domain": "docs"}]
    params["annotate"]["decontamination"]["against"] = ["bench.txt"]
    yaml.dump(params, Path("params.yaml"))
    stages = yaml.load(ROOT / "dvc.yaml")["stages"]
    stages["sources"]["deps"] = ["work.py"]
    yaml.dump({"stages": {"sources": stages["sources"]} | {name: {
        "cmd": f"echo run >> {name}.log && touch {name}", "outs": [name],
        "deps": [file for file in stages[name]["deps"] if file in stages["sources"]["outs"]],
    } for name in ("annotate", "tokenize")}}, Path("dvc.yaml"))
    dvc_graph.allow_no_git()
    return repository


def runs_after_repro() -> tuple[int, ...]:
    forked.dvc("repro", "-q")
    return tuple(len(Path(f"{name}.log").read_text().split()) for name in ("annotate", "tokenize"))


def test_stages_run_again_when_a_file_of_theirs_changed_and_only_then(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs_after_repro() == (1, 1)
    Path("texts/b.txt").write_text("more text")
    assert runs_after_repro() == (2, 1)
    Path("theirs/tokenizer.json").write_text('{"model": null}')
    assert runs_after_repro() == (2, 2)
    Path("bench.txt").write_text("another question")
    with monkeypatch.context() as patch:
        patch.setattr(dvc_graph, "dvc", forked.dvc)
        nodes = dvc_graph.graph()
        assert set(nodes) == {"annotate", "tokenize"}
        dvc_graph.look()
        assert dvc_graph.stale(nodes) == {"annotate"}
        assert runs_after_repro() == (3, 2)
        dvc_graph.look()
        assert dvc_graph.stale(nodes) == set()

    Path("bench.txt").unlink()
    with pytest.raises(GraphError, match=r"bench\.txt: not found") as error:
        dvc_graph.look()
    assert str(error.value).count("\n") == 1
    assert Path("annotate").exists()            # what was made of it stays
