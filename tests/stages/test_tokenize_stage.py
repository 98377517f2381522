"""The tokenizer and tokenize stages on a small corpus, run as a user runs them."""

import hashlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tiny_corpus import contents, write_params

from data_pipeline.tokenize import fast_tokenizer
from data_pipeline.tokenize.tokenizer import Tokenizer
from tests.data_pipeline.small_corpus import write_curated
from tests.forked import run


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A directory in which both stages have run."""
    directory = tmp_path_factory.mktemp("stages")
    write_params(directory, **{"pretrain.tokens": BUDGET, "runtime.workers": 2})
    write_curated(directory / "data/tiny/curated", labels=LABELS)
    run(directory, "-m", "stages.tokenizer")
    run(directory, "-m", "stages.tokenize")
    return directory


@pytest.fixture
def fresh(done, tmp_path) -> Path:
    """A copy in which only the tokenizer stage has run."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "data/tiny/tokens")
    return tmp_path


BUDGET = 300_000
LABELS = ("high", "medium-high", "medium", "low")       # none is `medium-low`


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def train_documents(directory: Path) -> pl.DataFrame:
    return pl.read_parquet(sorted((directory / "data/tiny/curated/train").glob("*.parquet")))


def test_tokenizer_stage_measures_held_out_text(done):
    tokenizer = Tokenizer(done / "data/tiny/tokenizer/tokenizer.model")
    metrics = read(done / "runs/tiny/tokenizer/metrics.json")
    assert 0 < metrics["training_megabytes"] <= 0.3
    assert metrics["vocab_size"] == tokenizer.vocab_size == 1024
    assert metrics["digest"] == tokenizer.digest
    assert 0 <= metrics["byte_fallback_share"] < 0.1
    for name in ("bytes_per_token", "bytes_per_token_code", "bytes_per_token_docs"):
        assert 1.5 < metrics[name] < 6


def test_no_held_out_text_stops_the_tokenizer_before_its_work(tmp_path):
    """As `annotate.held_out.fraction: 0` leaves it."""
    write_params(tmp_path)
    for heldout in write_curated(tmp_path / "data/tiny/curated").glob("heldout/*.parquet"):
        pl.read_parquet(heldout).clear().write_parquet(heldout)
    failed = run(tmp_path, "-m", "stages.tokenizer", check=False)
    assert failed.returncode == 1 and "annotate.held_out.fraction" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 2 and "training" not in failed.stdout.lower()


def test_the_tokenizer_of_a_hub_directory_makes_token_files_elsewhere(done, fresh):
    """The same tokenizer as tokenizer.json: other files than the names of what made them are the same bytes."""
    fast_tokenizer.export(done / "data/tiny/tokenizer/tokenizer.model", fresh / "downloaded")
    (fresh / "downloaded/generation_config.json").write_text('{"eos_token_id": 2}')
    run(fresh, "-m", "stages.tokenize", "--out", "mine", "--set", "tokenize.tokenizer=downloaded", "--set",
        "runtime.workers=1")
    made, expected = contents(fresh / "mine/data/tokens"), contents(done / "data/tiny/tokens")
    described = [json.loads(files.pop("tokens.json")) for files in (made, expected)]
    assert made == expected
    digest = hashlib.sha256((fresh / "downloaded/tokenizer.json").read_bytes()).hexdigest()
    assert described[0] == described[1] | {"tokenizer_digest": digest}
    assert "downloaded/tokenizer.json" in read(fresh / "mine/runs/tokenize/provenance.json")["inputs"]
    failed = run(fresh, "-m", "stages.tokenize", "--out", "mine", "--set", "tokenize.tokenizer=down", check=False)
    assert failed.returncode == 1 and "tokenize.tokenizer: down is no directory.\nName a" in failed.stderr


def test_every_training_document_is_there_once_in_order_and_ended(done):
    tokenizer = Tokenizer(done / "data/tiny/tokenizer/tokenizer.model")
    tokens = read(done / "data/tiny/tokens/tokens.json")
    documents = train_documents(done)
    seen = 0
    for name, figures in tokens["files"].items():
        if not name.startswith("train/"):
            continue
        domain, _, label = name.removeprefix("train/").partition("-")
        expected = documents.filter(domain=domain, label=label)["text"].to_list()
        stored = [list(map(int, ids)) for ids in IndexedDataset(str(done / "data/tiny/tokens" / name))]
        assert [ids[-1] for ids in stored] == [tokens["eod_id"]] * len(expected)
        assert [tokenizer.decode(ids[:-1]) for ids in stored] == expected
        assert figures == {"documents": len(expected), "tokens": sum(map(len, stored)),
                           "bytes": sum(len(text.encode()) for text in expected)}
        seen += len(expected)
    assert seen == len(documents) > 20


def test_validation_is_held_out_and_limited(done):
    tokenizer = Tokenizer(done / "data/tiny/tokenizer/tokenizer.model")
    heldout = pl.read_parquet(done / "data/tiny/curated/heldout/*.parquet")
    for domain in ("code", "docs"):
        figures = read(done / "data/tiny/tokens/tokens.json")["files"][f"validation/{domain}"]
        stored = IndexedDataset(str(done / "data/tiny/tokens/validation" / domain))
        texts = [tokenizer.decode(ids[:-1]) for ids in stored]
        assert set(texts) <= set(heldout.filter(domain=domain)["text"])
        assert sum(len(text.encode()) for text in texts) == figures["bytes"]
        token_bytes = np.load(done / "data/tiny/tokens/token_bytes.npy")
        assert sum(int(token_bytes[ids].sum()) for ids in stored) == figures["bytes"]
        assert 10_000 < figures["bytes"] <= 30_000


def test_digests_blend_and_metrics(done):
    tokens = read(done / "data/tiny/tokens/tokens.json")
    metrics = read(done / "runs/tiny/tokenize/metrics.json")
    files = tokens["files"]
    assert (tokens["vocab_size"], tokens["eod_id"], tokens["dtype"]) == (1024, 2, "uint16")
    assert tokens["tokenizer_digest"] == Tokenizer(done / "data/tiny/tokenizer/tokenizer.model").digest
    assert tokens["corpus_digest"] == "0" * 64
    assert metrics["tokens_train"] == sum(f["tokens"] for name, f in files.items() if name.startswith("train/"))
    assert metrics["tokens_train"] == metrics["tokens_train_code"] + metrics["tokens_train_docs"]
    phases = read(done / "data/tiny/tokens/blend.json")["phases"]
    assert [phase["until"] for phase in phases] == [0.6, 0.8, 0.95, 1.0]
    for phase in phases:
        assert sum(phase["weights"].values()) == pytest.approx(1)
        assert set(phase["weights"]) <= set(files)
    assert "train/code-medium-low" not in files
    assert set(phases[-1]["weights"]) == {"train/code-high", "train/docs-high"}
    first = phases[0]["weights"]
    assert first["train/code-low"] / first["train/code-high"] == pytest.approx(
        files["train/code-low"]["tokens"] / files["train/code-high"]["tokens"])


KILLED = """
import os, runpy, signal, sys
from data_pipeline.tokenize import tokenization
encode, count = tokenization.encode_documents, 0
def encode_and_die(*arguments):
    global count
    count += 1
    if count == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)
tokenization.encode_documents = encode_and_die
sys.argv = ["stages.tokenize"]
runpy.run_module("stages.tokenize", run_name="__main__")
"""


def test_a_killed_run_goes_on_with_the_same_result(done, fresh):
    write_params(fresh, **{"pretrain.tokens": BUDGET})                          # one worker: the stage's own process
    (fresh / "killed.py").write_text(KILLED.format(calls=12))
    assert run(fresh, "-m", "killed", check=False).returncode == -signal.SIGKILL
    assert not (fresh / "data/tiny/tokens").exists()
    assert [path.parent.name for path in fresh.glob(".scratch/tokenize-*/shards/*/counts.json")] == ["part-00000"]
    run(fresh, "-m", "stages.tokenize")
    assert contents(fresh / "data/tiny/tokens") == contents(done / "data/tiny/tokens")
    assert read(fresh / "runs/tiny/tokenize/provenance.json")["resumed"] is True
    assert not list((fresh / ".scratch").glob("tokenize-*/"))


def test_metrics_of_each_domain(done):
    metrics = read(done / "runs/tiny/tokenize/metrics.json")
    files = read(done / "data/tiny/tokens/tokens.json")["files"]
    for domain in ("code", "docs"):
        names = [name for name in files if name.startswith(f"train/{domain}-")] + [f"validation/{domain}"]
        tokens = np.concatenate([np.fromfile(done / f"data/tiny/tokens/{name}.bin", np.uint16) for name in names])
        size = sum(files[name]["bytes"] for name in names)
        assert metrics[f"bytes_per_token_{domain}"] == pytest.approx(size / len(tokens), rel=1e-5)
        assert metrics[f"tokens_per_document_{domain}"] == pytest.approx(
            len(tokens) / sum(files[name]["documents"] for name in names), rel=1e-5)
        assert metrics[f"byte_fallback_share_{domain}"] == pytest.approx(
            np.mean((tokens >= 4) & (tokens < 260)), rel=1e-5)
        assert metrics[f"unknown_share_{domain}"] == 0
    assert 0 < metrics["byte_fallback_share"] < 0.1 and metrics["unknown_share"] == 0


def test_repeats_are_reported_and_bounded(done, fresh):
    blend = read(done / "data/tiny/tokens/blend.json")
    metrics = read(done / "runs/tiny/tokenize/metrics.json")
    files = read(done / "data/tiny/tokens/tokens.json")["files"]
    assert blend["tokens"] == BUDGET
    assert set(blend["repeats"]) == {name for name in files if name.startswith("train/")}
    for name, repeats in blend["repeats"].items():
        assert metrics[f"repeats_{name[6:].replace('-', '_')}"] == pytest.approx(repeats, rel=1e-5)
    drawn = sum(repeats * files[name]["tokens"] for name, repeats in blend["repeats"].items())
    assert drawn == pytest.approx(BUDGET)
    assert 0 < metrics["repeats_most"] <= 8

    write_params(fresh, **{"tokenize.repeats": 1.5, "pretrain.tokens": 10**9})
    failed = run(fresh, "-m", "stages.tokenize", check=False)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "tokenize.phases[3] (until 1.0): needs 50,000,000 tokens; its files, read 1.5 times" in failed.stderr
    assert not list(fresh.glob(".scratch/tokenize-*/shards"))           # before any work

    asked = "tokenize.phases=[{until: 1.0, weights: {code: 0.1, docs: 0.9}, labels: [high, medium-high, medium, low]}]"
    said = run(fresh, "-m", "stages.tokenize", "--out", "mine", "--set", asked, "--set", "tokenize.repeats=1", "--set",
               "pretrain.tokens=100000").stdout
    given = files_of(fresh / "mine/data/tokens/tokens.json", "docs") / 100_000
    assert f"domain `docs`, read 1 times in all, gives {given:.4g} of the phase, not the 0.9 it weighs" in said


def files_of(tokens: Path, domain: str) -> int:
    return sum(file["tokens"] for name, file in read(tokens)["files"].items() if name.startswith(f"train/{domain}-"))
