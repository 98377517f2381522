"""What a result is made of: it changes when a file does, and only then."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from data_pipeline.annotate import annotation
from data_pipeline.config import AnnotateConfig, ClassifierConfig, DataError
from data_pipeline.sources import pieces
from data_pipeline.sources.identity import identity, pinned
from stages.frame.params import load_params

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789012345678901234567890123456789"


def config(*sources: dict[str, object], against: tuple[str, ...] = ()) -> AnnotateConfig:
    values = load_params(ROOT / "params.yaml").annotate.model_dump() | {"sources": list(sources)}
    values["decontamination"]["against"] = list(against)
    return AnnotateConfig.model_validate(values)


def files(*paths: str) -> dict[str, object]:
    return {"kind": "files", "paths": list(paths), "domain": "web"}


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("texts/a.txt", "texts/deep/b.jsonl", "texts/.hidden.txt", "one.txt", "bench.jsonl", "set/train.jsonl",
                 "x.wet"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text('{"text": "words"}\n')
    Path("x.wet.paths").write_text("x.wet\nhttps://host/y.wet\n")
    return tmp_path


def all_of_them() -> AnnotateConfig:
    return config(files("texts", "one.txt", "*.txt"), {"kind": "web", "paths": ["x.wet.paths", "https://host/z.wet"]},
                  {"kind": "hub", "dataset": "set", "revision": "main", "domain": "web"}, against=("bench.jsonl",))


@pytest.mark.parametrize("name", [
    "texts/a.txt", "texts/deep/b.jsonl", "one.txt", "bench.jsonl", "set/train.jsonl", "x.wet", "x.wet.paths"])
def test_every_file_that_is_named_counts_by_size_and_time(texts, name):
    before = json.dumps(identity(all_of_them()))
    assert json.dumps(identity(all_of_them())) == before
    with Path(name).open("a") as file:
        file.write("\n")
    grown = json.dumps(identity(all_of_them()))
    os.utime(name, (1, 1))
    assert len({before, grown, json.dumps(identity(all_of_them()))}) == 3


def test_files_that_come_and_go_count_and_hidden_ones_do_not(texts):
    before = identity(all_of_them())["sources"][0]["texts"]
    assert before["files"] == 2
    Path("texts/.hidden.txt").write_text("more")
    assert identity(all_of_them())["sources"][0]["texts"] == before
    Path("texts/c.bin").touch()                     # passed over in reading, which is told
    assert identity(all_of_them())["sources"][0]["texts"]["files"] == 3
    Path("texts/deep/b.jsonl").rename("texts/deep/d.jsonl")
    assert identity(all_of_them())["sources"][0]["texts"]["digest"] != before["digest"]


def test_linked_directories_count_and_links_in_a_circle_end(texts):
    Path("texts/circle").symlink_to("..", target_is_directory=True)
    Path("texts/set").symlink_to("../set", target_is_directory=True)
    before = identity(config(files("texts")))
    Path("set/train.jsonl").write_text("")
    assert identity(config(files("texts"))) != before


@pytest.mark.parametrize("what", [
    lambda: config(files("nowhere.txt")), lambda: config(files("texts"), against=("nowhere.txt",))])
def test_what_is_not_there_is_two_lines(texts, what):
    with pytest.raises(DataError, match=r"nowhere\.txt") as error:
        identity(what())
    assert str(error.value).count("\n") == 1


def test_addresses_are_named_and_not_asked(texts):
    web = identity(all_of_them())["sources"][1]
    assert web["https://host/z.wet"] == {"address": "https://host/z.wet"}
    assert web["x.wet.paths"]["addresses"] == ["https://host/y.wet"] and web["x.wet.paths"]["files"] == 2


def test_installed_packages_count_by_version():
    found = identity(config({"kind": "installed", "roots": ["sentencepiece"], "megabytes": {"code": 1}}))["sources"][0]
    assert found.keys() == {"python", "sentencepiece"}


def test_a_branch_of_the_hub_is_the_commit_it_names_now(monkeypatch):
    branch = {"kind": "hub", "dataset": "someone/texts", "revision": "main", "domain": "web"}
    scorer = ClassifierConfig(model="someone/scorer")
    asked = config(branch).model_copy(update={"scorers": ["fluency", scorer]})
    monkeypatch.setattr(HfApi, "repo_info", lambda self, name, revision, repo_type: SimpleNamespace(
        sha=COMMIT[::-1] if (name, revision, repo_type) == ("someone/scorer", None, "model") else COMMIT))
    assert pinned(asked).sources[0].revision == COMMIT
    assert pinned(asked).scorers == ["fluency", scorer.model_copy(update={"revision": COMMIT[::-1]})]
    assert identity(pinned(asked))["sources"] == [{"someone/texts": COMMIT}]
    assert identity(pinned(asked))["scorers"] == {"someone/scorer": COMMIT[::-1]}

    def unreachable(self, name, revision, repo_type):
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "repo_info", unreachable)
    assert pinned(config(branch | {"revision": COMMIT})).sources[0].revision == COMMIT
    with pytest.raises(DataError, match="no network") as error:
        pinned(config(branch))
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize("name", ["bench.jsonl", "set/train.jsonl", "texts/a.txt"])
def test_an_interrupted_run_does_not_go_on_from_files_that_changed(texts, name):
    def resumed_from() -> str:
        wanted = config(files("texts"), {"kind": "hub", "dataset": "set", "revision": "main", "domain": "web"},
                        against=("bench.jsonl",))
        return annotation._digest(wanted, 1, [pieces(wanted.sources[0], 1, 1000)])

    before = resumed_from()
    os.utime(name, (1, 1))
    assert resumed_from() != before
