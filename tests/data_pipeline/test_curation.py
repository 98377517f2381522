"""Curation end to end on a little of what is installed: split, overlap, determinism, resumption, errors."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.config import CurateConfig, DataError, MinHashConfig
from data_pipeline.curation import curate
from data_pipeline.steps.decontaminate import ngram_hashes
from data_pipeline.steps.step import text_id

DOMAINS = ("code", "docs", "reference")


def config(**changes: object) -> CurateConfig:
    values = {
        "roots": ["sympy", "networkx", "datasets"],
        "domains": DOMAINS,
        "megabytes_per_domain": dict.fromkeys(DOMAINS, 0.25),
        "held_out_fraction": 0.1,
        "minhash": MinHashConfig(shingle_characters=24, bands=20, rows=13),
        "decontamination_ngram": 13,
        "shards": 3,
    }
    return CurateConfig.model_validate({**values, **changes})


def silent(step: int, total: int, **figures: object) -> None:
    assert 0 <= step <= total


def files(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    """(directory, funnel) of an unbroken run in this process."""
    directory = tmp_path_factory.mktemp("curated")
    funnel = curate(config(), 1, directory / "out", directory / "scratch", 1, silent)
    assert not (directory / "scratch" / "resumed").exists()
    return directory / "out", funnel


def read(directory: Path, split: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in sorted((directory / split).glob("part-*.parquet"))])


def test_files_are_as_described(curated):
    out, _ = curated
    train, held_out = read(out, "train"), read(out, "heldout")
    assert held_out.columns == ["id", "text", "source", "path", "domain", "license"]
    assert train.columns == [*held_out.columns, "quality", "label"]
    assert len(list((out / "train").iterdir())) == 3
    for frame in (train, held_out):
        assert frame["id"].to_list() == [text_id(text) for text in frame["text"]]
        assert frame.null_count().sum_horizontal().item() == 0
        assert set(frame["domain"]) == set(DOMAINS)
    assert train["quality"].is_between(0, 19).all()
    assert "high" in set(train["label"]) <= {"high", "medium-high", "medium", "medium-low", "low"}
    ids = pl.concat([train["id"], held_out["id"]])
    assert ids.n_unique() == len(ids)


def test_manifest_counts_what_is_there(curated):
    out, _ = curated
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["decontamination_ngram"] == 13 and len(manifest["corpus_digest"]) == 64
    for split in ("train", "heldout"):
        for domain, entry in manifest[split].items():
            rows = read(out, split).filter(pl.col("domain") == domain)
            assert entry["documents"] == len(rows)
            assert entry["bytes"] == sum(len(text.encode()) for text in rows["text"])
            assert entry["sources"] == sorted(set(rows["source"]))


def test_held_out_sources_are_never_trained_on(curated):
    out, _ = curated
    assert not set(read(out, "train")["source"]) & set(read(out, "heldout")["source"])


def test_no_ngram_is_shared_with_held_out_text(curated):
    out, _ = curated
    held_out = {value for text in read(out, "heldout")["text"] for value in ngram_hashes(text, 13).tolist()}
    assert len(held_out) > 1000
    for text in read(out, "train")["text"]:
        assert held_out.isdisjoint(ngram_hashes(text, 13).tolist())


def test_funnel_adds_up(curated):
    out, funnel = curated
    assert [row["domain"] for row in funnel[:3]] == list(DOMAINS) and {row["step"] for row in funnel[:3]} == {"read"}
    manifest = json.loads((out / "manifest.json").read_text())
    for domain in DOMAINS:
        rows = [row for row in funnel if row["domain"] == domain]
        for before, after in pairwise(rows):
            assert before["documents"] - after["documents"] == sum(after["reasons"].values())
        assert 0.2e6 < rows[0]["bytes"] <= 0.25e6
        assert rows[-1]["documents"] == manifest["train"][domain]["documents"]
        assert rows[-1]["bytes"] == manifest["train"][domain]["bytes"]


def test_worker_processes_change_nothing(curated, tmp_path):
    # polars has been used in this process: forked workers would hang
    out, funnel = curated
    assert curate(config(), 1, tmp_path / "out", tmp_path / "scratch", 2, silent) == funnel
    assert files(tmp_path / "out") == files(out)


class Stop(Exception):
    pass


@pytest.mark.parametrize("work", ["license", "minhash"])
def test_an_interrupted_run_ends_the_same(curated, tmp_path, work):
    """Stopped in the middle of `work`, with a half-written shard left behind."""
    out, funnel = curated

    def stop(step: int, total: int, **figures: object) -> None:
        if figures["work"] == work:
            raise Stop

    with pytest.raises(Stop):
        curate(config(), 1, tmp_path / "broken", tmp_path / "scratch", 1, stop)
    shutil.rmtree(tmp_path / "broken", ignore_errors=True)
    (finished,) = (tmp_path / "scratch").glob("*/read-00000.parquet")
    finished.with_name(f"{work}-00002.partial").write_bytes(b"half")
    reads = finished.stat().st_mtime_ns
    assert curate(config(), 1, tmp_path / "out", tmp_path / "scratch", 1, silent) == funnel
    assert files(tmp_path / "out") == files(out)
    assert (tmp_path / "scratch" / "resumed").exists()
    assert finished.stat().st_mtime_ns == reads


def test_another_seed_is_another_corpus(curated, tmp_path):
    out, _ = curated
    small = config(domains=["code"], megabytes_per_domain={"code": 0.25})
    curate(small, 2, tmp_path / "out", tmp_path / "scratch", 1, silent)
    first, second = set(read(out, "train")["path"]), set(read(tmp_path / "out", "train")["path"])
    assert len(first & second) < 0.2 * len(second)


def test_a_domain_with_nothing_to_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.installed._standard_library_files", list)
    only_reference = config(roots=["mdurl"], domains=["code", "reference"])
    with pytest.raises(DataError, match=r"`reference`: no document.*\n.*megabytes_per_domain\.reference"):
        curate(only_reference, 1, tmp_path / "out", tmp_path / "scratch", 1, silent)


def test_a_domain_left_empty_by_the_steps_is_named(tmp_path):
    strict = config(roots=["jinja2"], domains=["code"], megabytes_per_domain={"code": 0.25}, decontamination_ngram=2)
    with pytest.raises(DataError, match=r"`code`: no document to train on is left.*\n.*megabytes_per_domain\.code"):
        curate(strict, 1, tmp_path / "out", tmp_path / "scratch", 1, silent)


def test_unreadable_files_are_counted(tmp_path, monkeypatch):
    from data_pipeline.sources import installed

    real = installed._standard_library_files()
    broken = [file._replace(file=Path("/nowhere") / file.path) for file in real[:100]]
    monkeypatch.setattr(installed, "_standard_library_files", lambda: broken + real[100:])
    small = config(roots=["jinja2"], domains=["code"], megabytes_per_domain={"code": 0.25})
    funnel = curate(small, 1, tmp_path / "out", tmp_path / "scratch", 1, silent)
    assert 0 < funnel[0]["reasons"]["unreadable"] <= 100
