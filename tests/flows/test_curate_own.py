"""Text of one's own: files and a web archive, as a user gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from flows.curate_own import settings, sources_of
from stages.params import load_params
from tests.data_pipeline.annotate_corpus import STDLIB

ROOT = Path(__file__).resolve().parents[2]


def page(words: str, number: int) -> bytes:
    body = f"<html><head><title>{number}</title></head><body><p>{words}</p></body></html>".encode()
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
    head = (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://site{number}.org/page\r\n"
            f"WARC-Record-ID: <urn:uuid:{number}>\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
            f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n")
    return head.encode() + http + b"\r\n\r\n"


def write_texts(directory: Path) -> None:
    topics = (STDLIB / "pydoc_data" / "topics.py").read_text().replace("\\n'", "").replace("'", "")
    texts = [" ".join(topics[start : start + 2500].split()) for start in range(0, 60_000, 2500)]
    lines = [json.dumps({"content": text}) for text in (*texts[:15], texts[3])]
    (directory / "texts").mkdir()
    (directory / "texts" / "picture.png").write_bytes(b"\x89PNG")
    (directory / "texts" / "a.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "crawl.warc").write_bytes(b"".join(page(text, number) for number, text in enumerate(texts[15:])))


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "flows.curate_own", *arguments], cwd=directory, env=environment,
                          capture_output=True, text=True, timeout=200)


def test_files_and_an_archive_are_curated_and_the_funnel_shown(tmp_path: Path) -> None:
    write_texts(tmp_path)
    rules = 'curate.rules={"web": {"set": "prose", "labels": ["medium-low", "low"]}}'
    done = run(tmp_path, "texts", "crawl.warc", "--out", "mine", "--text-column", "content", "--set", rules,
               "--set", "runtime.workers=1")
    assert done.returncode == 0, done.stderr
    funnel = json.loads((tmp_path / "mine/runs/curate/funnel.json").read_text())
    assert {row["domain"] for row in funnel} == {"web"}
    read, copies = (next(row for row in funnel if row["step"] == step) for step in ("read", "copies"))
    assert 16 < read["documents"] <= 25 and copies["reasons"] == {"copy": 1}
    assert "Passed over: 1 files (.png 1).\n" in done.stdout
    for row in funnel:
        assert f"{row['step'].replace('_', ' ')}  " in done.stdout
    assert done.stdout.splitlines()[-2].startswith("Curated text: mine/data/curated/train")
    assert done.stdout.splitlines()[-1] == "What went, and why: mine/report/index.html"
    assert f"Of {read['documents']} documents" in (tmp_path / "mine/report/index.html").read_text()
    train = pq.read_table(tmp_path / "mine/data/curated/train/part-00000.parquet")
    assert train.num_rows == funnel[-1]["documents"] and len(set(train["source"].to_pylist())) > 1
    assert not (tmp_path / ".scratch").exists()


def test_what_is_not_there_is_two_lines(tmp_path: Path) -> None:
    done = run(tmp_path, "nowhere.jsonl")
    assert done.returncode == 1
    assert "nowhere.jsonl" in done.stderr and len(done.stderr.strip().splitlines()) == 2
    assert not (tmp_path / "curated-own/data/annotated").exists()


def test_a_name_that_is_not_utf_8_is_two_lines_when_it_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, os.fsdecode(b"caf\xe9.txt"))
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
