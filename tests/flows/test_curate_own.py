"""Text of one's own: files and a web archive, as a user gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.curate_own import refuse_own_results, settings, sources_of, words
from stages.frame.params import load_params
from tests.data_pipeline.annotate_corpus import STDLIB
from tests.data_pipeline.sources.test_sources_web import warc

ROOT = Path(__file__).resolve().parents[2]
Curate = Callable[..., subprocess.CompletedProcess[str]]


def page(words: str, number: int) -> bytes:
    body = f"<html><head><title>{number}</title></head><body><p>{words}</p></body></html>".encode()
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
    return warc("response", f"http://site{number}.org/page", http, "application/http; msgtype=response")


def write_texts(directory: Path) -> None:
    topics = (STDLIB / "pydoc_data" / "topics.py").read_text().replace("\\n'", "").replace("'", "")
    texts = [" ".join(topics[start : start + 2500].split()) for start in range(0, 60_000, 2500)]
    lines = [json.dumps({"content": text}) for text in (*texts[:15], texts[3])]
    (directory / "my texts").mkdir()
    (directory / "my texts" / "picture.png").write_bytes(b"\x89PNG")
    (directory / "my texts" / "a.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "crawl.warc").write_bytes(b"".join(page(text, number) for number, text in enumerate(texts[15:])))


def test_files_and_an_archive_are_curated_and_the_funnel_shown(tmp_path: Path, curate: Curate) -> None:
    write_texts(tmp_path)
    rules = 'curate.rules={"web": {"set": "prose", "labels": ["medium-low", "low"]}}'
    (tmp_path / "bench.jsonl").write_text(json.dumps({"question": page_text(tmp_path)[500:900]}) + "\n")
    done = curate("my texts", "crawl.warc", "--out", "my out", "--text-column", "content", "--set", rules, "--set",
                  "runtime.workers=1", "--against", "bench.jsonl", "--languages", "en fr")
    assert done.returncode == 0, done.stderr
    mine = tmp_path / "my out"
    funnel = json.loads((mine / "runs/curate/funnel.json").read_text())
    parameters = json.loads((mine / "runs/curate/provenance.json").read_text())["parameters"]
    assert parameters["curate"]["language"]["keep"] == ["en", "fr"]
    shared, = (row for row in funnel if row["step"] == "decontaminate")
    assert list(shared["reasons"].values()) == [1]
    assert {row["domain"] for row in funnel} == {"web"}
    read, copies = (next(row for row in funnel if row["step"] == step) for step in ("read", "copies"))
    assert 16 < read["documents"] <= 25 and copies["reasons"] == {"copy": 1}
    assert "Passed over: 1 files (.png 1).\n" in done.stdout
    for row in funnel:
        assert f"{row['step'].replace('_', ' ')}  " in done.stdout
    assert done.stdout.splitlines()[-2].startswith("Curated text: my out/data/curated/train")
    assert done.stdout.splitlines()[-1] == "What went, and why: my out/report/index.html"
    report = (mine / "report/index.html").read_text()
    assert f"Of {read['documents']} documents" in report and "1 files passed over" in report
    train = pq.read_table(mine / "data/curated/train/part-00000.parquet")
    assert train.num_rows == funnel[-1]["documents"] and len(set(train["source"].to_pylist())) > 1
    assert not (tmp_path / ".scratch").exists()


def page_text(directory: Path) -> str:
    """Of the third document."""
    return str(json.loads((directory / "my texts/a.jsonl").read_text().splitlines()[2])["content"])


def test_one_long_document_has_a_page(tmp_path: Path, curate: Curate) -> None:
    """All histograms have one value: edges rounded to six digits coincided beyond 10,000 characters. A document of more
    than 50,000 words is left out of what scorers learn from, unless it is all there is."""
    rules = 'curate.rules.web.labels=["low"]'
    text = (STDLIB / "pydoc_data" / "topics.py").read_text().replace("\\n'", "").replace("'", "")
    assert len(text.split()) > 50_000
    (tmp_path / "book.txt").write_text(text)
    done = curate("book.txt", "--out", "mine", "--set", rules, "--set", "curate.perplexity.labels=[]",
                  "--set", "annotate.decontamination.against=[]", "--set", "runtime.workers=1")
    assert done.returncode == 0, done.stderr
    assert "Of 1 document" in (tmp_path / "mine/report/index.html").read_text()


def test_advice_names_the_flags_and_works(tmp_path: Path, curate: Curate) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "some text"}) + "\n")
    done = curate("a.jsonl", "--set", "runtime.workers=1")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 2
    assert "`text_column`" in done.stderr and "--text-column" in done.stderr and "params.yaml" not in done.stderr
    for flag, value, said in (
        ("--domain", "My Texts", "--domain My Texts: "), ("--labels", "best", "--set curate.rules: "),
        ("--set", "annotate.mask=[all]", "--set annotate.mask: "),
        ("--set", "pretrain.tokens=9", "--set pretrain.tokens=9: no effect on curation."),
    ):
        again = curate("a.jsonl", "--text-column", "content", flag, value)
        assert said in again.stderr and len(again.stderr.strip().splitlines()) == 2


@pytest.mark.parametrize(("given", "expected"), [
    ("my texts", ["my texts"]),                         # there as it is
    ("'my texts' x.warc", ["my texts", "x.warc"]),
    ("x.warc *.warc", ["x.warc", "*.warc"]),
    ("notes[1].txt", ["notes[1].txt"]),
    ("nowhere.txt", ["nowhere.txt"]),                   # which the stage refuses
    ("x.warc https://host/y.warc.gz", ["x.warc", "https://host/y.warc.gz"]),
])
def test_words_of_a_make_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my texts").mkdir()
    for name in ("x.warc", "notes[1].txt"):
        Path(name).touch()
    assert words(given) == expected


@pytest.mark.parametrize("given", ["my texts/ x.warc", "bob's texts"])
def test_words_that_are_not_there_say_how_to_quote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.warc").touch()
    with pytest.raises(SystemExit, match="'my texts' more/") as error:
        words(given)
    assert str(error.value).count("\n") == 1


def test_results_are_not_read_by_the_next_run(tmp_path: Path, curate: Curate) -> None:
    (tmp_path / "a.txt").write_text("some text")
    done = curate(".")
    assert done.returncode == 1 and "curated-own: lies in ." in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2 and not (tmp_path / "curated-own").exists()


@pytest.mark.parametrize(("given", "out", "is_refused"), [
    ("**/*.parquet", "own", True), ("*", "own", True), ("*/data/*/*.parquet", "own", True), ("**/*.json", "own", True),
    ("te*", "texts/own", True), ("link", "texts/own", True), ("texts", "more/../texts/own", True),
    ("*.parquet", "own", False), ("**/*.jsonl.gz", "own", False), ("texts/**/*.parquet", "own", False),
    ("texts/*", "own", False), ("a**", "own", False), ("https://a.org/x.warc.gz?*", "own", False),
])
def test_wildcards_and_links_that_lead_to_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, out: str,
                                                  is_refused: bool) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("texts", "more"):
        Path(name).mkdir()
    Path("link").symlink_to("texts")
    with pytest.raises(SystemExit, match=" lies in ") if is_refused else nullcontext():
        refuse_own_results([given], Path(out))


def test_what_is_not_there_is_two_lines(tmp_path: Path) -> None:
    """From the command and its stage as processes of their own."""
    done = subprocess.run([sys.executable, "-m", "flows.curate_own", "nowhere.jsonl"], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "nowhere.jsonl" in done.stderr and len(done.stderr.strip().splitlines()) == 2
    assert not (tmp_path / "curated-own/data/annotated").exists()


def test_a_name_that_is_not_utf_8_is_two_lines_when_it_is_named(curate: Curate) -> None:
    done = curate(os.fsdecode(b"caf\xe9.txt"))
    assert done.returncode == 1 and done.stderr.splitlines()[1] == "Name its directory, or a wildcard: 'caf?.txt'."
    assert len(done.stderr.splitlines()) == 2


def test_paths_of_a_source_are_the_callers() -> None:
    given = ["/all/both", "https://host/x.warc.gz", "all/*.jsonl.gz"]
    (files,) = sources_of(given, "web", "text")
    assert files["paths"] == [*given[:2], str(Path("all/*.jsonl.gz").absolute())]



def test_settings_are_valid_for_text_and_for_code() -> None:
    for domain, name in (("web", "web"), ("docs", "prose"), ("code", "code")):
        values = settings(sources_of(["x.jsonl"], domain, "text"), domain)
        params = load_params(ROOT / "params.yaml", tuple(f"{key}={json.dumps(value)}" for key, value in values.items()))
        assert params.curate.rules[domain].set == name
        assert params.annotate.held_out.fraction == 0
        assert params.curate.language.domains == ([] if domain == "code" else [domain])
    for domain in ("code_mine", "headers"):             # by the beginning, as labels have it
        values = settings([], domain)
        assert values["curate.rules"][domain]["set"] == "code" and values["curate.language.domains"] == []
    assert settings([], "code", ["en"])["curate.language.domains"] == ["code"]         # as it was asked for
    values = settings([], "web", ["de"], ["bench.jsonl"], ["low"])
    assert values["curate.language.keep"] == ["de"] and values["curate.rules"]["web"]["labels"] == ["low"]
    assert values["annotate.decontamination.against"] == [
        "paper-tasks", str(Path("bench.jsonl").absolute())]
