"""Annotation: the same documents whatever shards, workers and executor; interrupted, killed and bad shards."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from data_pipeline.annotate.annotation import annotate
from data_pipeline.annotate.reading import Quota, load, read
from data_pipeline.annotate.step import SCHEMA, text_id
from data_pipeline.config import AnnotateConfig, DataError, ExecutorConfig, FilesSource
from data_pipeline.curate.curation import curate
from data_pipeline.sources import pieces
from data_pipeline.workers.executor import workers
from tests.data_pipeline.annotate_corpus import REPEAT, annotate_config, curate_config, write_corpus

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.usefixtures("little_reference")
HERE = ExecutorConfig(executor="local", workers=1)


def silent(step: int, total: int, **figures: object) -> None:
    assert 0 <= step <= total


def run(config: AnnotateConfig, directory: Path, executor: ExecutorConfig = HERE, progress=silent) -> Path:
    out = directory / "annotated"
    out.mkdir(parents=True)
    annotate(config, 1, out, directory / "scratch", executor, progress)
    return out


def rows(annotated: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in sorted(annotated.glob("part-*.parquet"))])


def files(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def curated_rows(annotated: Path, directory: Path, executor: ExecutorConfig = HERE) -> list[dict]:
    """Documents of both splits in order, and what the report is told."""
    out = directory / "curated"
    out.mkdir()
    records = curate(
        annotated, curate_config(), 1, out, directory / "curate-scratch", directory / "cache", executor, silent
    )
    found = [pl.concat([pl.read_parquet(file) for file in sorted((out / split).iterdir())]).to_dicts()
             for split in ("train", "heldout")]
    return [*found, records.funnel, records.histograms, records.dropped, (out / "manifest.json").read_text()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def annotated(corpus, little_reference, tmp_path_factory) -> Path:
    """By one worker, in one shard."""
    return run(annotate_config(corpus), tmp_path_factory.mktemp("annotated"))


@pytest.fixture(scope="module")
def in_shards(corpus, little_reference, tmp_path_factory) -> Path:
    """By one worker, in many shards, without a break."""
    return run(annotate_config(corpus, shard_megabytes=0.1), tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def few_files(corpus, little_reference, tmp_path_factory) -> tuple[AnnotateConfig, dict[str, bytes]]:
    """A quarter of the corpus in a few shards, and what comes of it without a break."""
    directory = tmp_path_factory.mktemp("few")
    for domain in ("code", "docs"):
        (directory / domain).mkdir()
        for number in range(2):
            shutil.copy(corpus / domain / f"{number}.jsonl", directory / domain)
    config = annotate_config(directory, shard_megabytes=0.05)
    return config, files(run(config, directory / "whole"))


@pytest.fixture(scope="module")
def curated(annotated, tmp_path_factory) -> list[dict]:
    return curated_rows(annotated, tmp_path_factory.mktemp("curated"))


def test_the_manifest_names_what_is_in_the_shards(few_files):
    """Their names and sizes alone may be those of other text, and a resumed stage would take it for the same."""
    _, whole = few_files
    shards = [hashlib.sha256(whole[name]).hexdigest() for name in sorted(whole) if name.startswith("part-")]
    assert json.loads(whole["manifest.json"])["digest"] == hashlib.sha256("".join(shards).encode()).hexdigest()


def test_every_column_is_filled_and_every_document_is_there(corpus, annotated):
    frame = rows(annotated)
    assert frame.columns == SCHEMA.names
    texts = [json.loads(line)["text"] for file in corpus.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(frame) == len(texts)
    assert frame["id"].to_list() == [text_id(text) for text in frame["text"]]
    always = ["masked", "language", "language_share", "features", "held_out", "repeats", "contamination"]
    assert not frame.select(always).null_count().sum_horizontal().item()
    scored = ~frame["held_out"] & frame["duplicate"].is_null()
    assert (frame["scores"].is_not_null() == scored).all() and (frame["perplexity"].is_not_null() == scored).all()
    assert set(frame.filter(held_out=True)["source"]).isdisjoint(frame.filter(held_out=False)["source"])
    duplicates = {(why or "").removesuffix(" of a held-out document") for why in frame["duplicate"]}
    assert {"copy", "near-duplicate"} <= duplicates
    (masked,) = frame.filter(pl.col("text").str.contains("about this, or to nobody")).iter_rows(named=True)
    assert masked["masked"] >= 1 and "Write to <EMAIL> about" in masked["text"]
    manifest = json.loads((annotated / "manifest.json").read_text())
    assert manifest["domains"] == {"code": (frame["domain"] == "code").sum(), "docs": (frame["domain"] == "docs").sum()}


def test_repeats_are_where_the_text_says(annotated):
    spans = [(text.encode()[start:end].decode()) for text, repeats in rows(annotated).select("text", "repeats").rows()
             for start, end in zip(repeats[::2], repeats[1::2], strict=True)]
    assert sum(REPEAT.strip() in span for span in spans) >= 3


@pytest.mark.parametrize(("shard_megabytes", "least"), [(0.4, 2), (0.1, 7)])
def test_shards_change_nothing(corpus, annotated, curated, in_shards, tmp_path, shard_megabytes, least):
    few = annotate_config(corpus, shard_megabytes=shard_megabytes)
    other = in_shards if shard_megabytes == 0.1 else run(few, tmp_path)
    assert len(list(other.glob("part-*.parquet"))) >= least > len(list(annotated.glob("part-*.parquet")))
    assert_frame_equal(rows(other), rows(annotated))
    assert curated_rows(other, tmp_path) == curated


@pytest.mark.parametrize(("executor", "cluster"), [
    pytest.param("ray", "debug", marks=pytest.mark.slow), ("slurm", "debug"),
    pytest.param("slurm", "local", marks=pytest.mark.slow),             # jobs of their own
])
def test_executors_change_nothing(corpus, curated, tmp_path, monkeypatch, executor, cluster):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    slurm = {"cluster": cluster, "folder": str(tmp_path / "slurm")}
    config = ExecutorConfig.model_validate({"executor": executor, "workers": 2, "slurm": slurm})
    other = run(annotate_config(corpus, shard_megabytes=0.4), tmp_path, config)
    assert curated_rows(other, tmp_path, config) == curated


def test_caps_take_the_same_documents_whoever_reads(corpus, tmp_path):
    source = {"kind": "files", "paths": [str(corpus / "docs")], "domain": "docs", "megabytes": 0.12}
    found = []
    for shard_megabytes, processes in ((1, 1), (0.02, 2)):
        config = annotate_config(corpus, sources=[source], shard_megabytes=shard_megabytes,
                                 held_out={"fraction": 0.1, "unit": "document"})
        executor = ExecutorConfig(executor="local", workers=processes)
        found.append(rows(run(config, tmp_path / f"{shard_megabytes}-{processes}", executor)))
    assert_frame_equal(*found)
    size = sum(map(len, found[0]["text"].str.encode("hex"))) / 2
    assert 0.9 * 0.12e6 < size <= 0.12e6


def test_documents_too_large_for_the_sample_do_not_end_a_piece(tmp_path):
    """Fifteen of them are twice the cap; of what follows the cap takes the same, wherever the file is cut."""
    sizes = [1500] * 15 + [100] * 150
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} {'x' * size}"}) + "\n"
                                              for n, size in enumerate(sizes)))
    source = FilesSource(kind="files", paths=[str(tmp_path / "a.jsonl")], domain="docs", megabytes=0.01)
    config, found = annotate_config(tmp_path, sources=[source]), []
    for piece_bytes in (1000, 30_000):
        directory = tmp_path / f"{piece_bytes}"
        directory.mkdir()
        with workers(HERE) as pool:
            shards = read(config, [pieces(source, 1, piece_bytes)], directory, pool, lambda share, new: None).shards
        found.append([text for shard in shards for text in load(shard)["text"].to_pylist()])
    assert found[0] == found[1] and len(found[0]) > 80


def test_a_cap_passes_over_what_is_too_large():
    quota = Quota({"docs": 1000.0})
    assert quota.take("docs", 101) == "too large for the sample" and quota.take("docs", 100) is None
    for _ in range(9):
        assert quota.wants("docs") and quota.take("docs", 99) is None
    assert quota.size["docs"] == 991 and not quota.wants("docs") and not quota.wants("code")
    assert not quota.wants_more() and Quota(None).wants_more() and Quota(None).wants("anything")


class Stop(Exception):
    pass


def stopped(config: AnnotateConfig, directory: Path, work: str) -> Path:
    """The scratch directory of a run that ended in the middle of `work`."""
    calls = []

    def stop(step: int, total: int, **figures: object) -> None:
        calls.append(figures["work"])
        if calls.count(work) == 4:
            raise Stop

    with pytest.raises(Stop):
        run(config, directory / "broken", progress=stop)
    return directory / "broken" / "scratch"


@pytest.mark.parametrize("work", ["read", "deduplicate", "score"])
def test_an_interrupted_run_ends_the_same(corpus, annotated, in_shards, tmp_path, work):
    """Stopped in the middle of `work`, with a half-written shard left behind."""
    config = annotate_config(corpus, shard_megabytes=0.1)
    scratch = stopped(config, tmp_path, work)
    (directory,) = scratch.iterdir()
    directory.joinpath("round4-00001.partial").write_bytes(b"half")
    assert not (scratch / "resumed").exists()

    out = tmp_path / "out"
    out.mkdir()
    works = set()
    annotate(config, 1, out, scratch, HERE, lambda step, total, **figures: works.add(figures["work"]))
    assert (scratch / "resumed").exists()
    assert ("read" in works) == (work == "read"), "what was read is not read again"
    assert files(out) == files(in_shards)
    assert_frame_equal(rows(out), rows(annotated))


@pytest.mark.parametrize(("work", "anew"), [("read", 0), ("deduplicate", 3), ("score", 7)])
def test_a_damaged_piece_is_made_again(few_files, tmp_path, capsys, work, anew):
    """The last of each kind of piece that a stop in the middle of `work` leaves, each in turn. What decisions and the
    shards before this round were made of is kept no longer."""
    config, whole = few_files
    broken = stopped(config, tmp_path, work)
    kinds = {re.sub(r"[0-9]{4,}", "#", file.name): file.relative_to(broken)
             for file in sorted(broken.rglob("[!.]*")) if file.is_file()}
    begun_anew = 0
    for kind, piece in kinds.items():
        scratch, out = tmp_path / kind / "scratch", tmp_path / kind / "out"
        shutil.copytree(broken, scratch)
        out.mkdir()
        content = bytearray((scratch / piece).read_bytes())
        content[len(content) // 2] ^= 1
        (scratch / piece).write_bytes(content)
        annotate(config, 1, out, scratch, HERE, silent)
        said = capsys.readouterr().out
        assert said.count(f"{scratch / piece}: damaged; made again.") == 1, kind
        begun_anew += "annotated anew" in said
        assert files(out) == whole, kind
    assert kinds and begun_anew == anew, list(kinds)


def test_a_worker_killed_midway_is_replaced(corpus, annotated, curated, tmp_path, capfd):
    """kill -9 of one of two workers, as the kernel does for want of memory. polars has been used in this process:
    forked workers would hang."""
    import psutil

    killed: list[int] = []
    of_other_tests = psutil.Process().children()

    def kill_one(step: int, total: int, **figures: object) -> None:
        children = [child for child in psutil.Process().children() if child not in of_other_tests]
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        if figures["work"] == "describe" and len(workers) == 2 and not killed:
            killed.append(workers[-1].pid)
            os.kill(workers[-1].pid, signal.SIGKILL)
            time.sleep(0.1)

    config = annotate_config(corpus, shard_megabytes=0.1)
    other = run(config, tmp_path, ExecutorConfig(executor="local", workers=2), kill_one)
    assert killed
    assert_frame_equal(rows(other), rows(annotated))
    assert curated_rows(other, tmp_path) == curated


def test_a_bad_shard_is_named_and_the_others_are_kept(corpus, in_shards, tmp_path, capfd):
    """A shard damaged on disk; mended, the run goes on with what is missing."""
    config = annotate_config(corpus, shard_megabytes=0.1)
    damaged = {}

    def damage(step: int, total: int, **figures: object) -> None:
        if figures["work"] == "hold-out" and not damaged:
            (file,) = (tmp_path / "scratch").glob("*/round1-00002.parquet")
            damaged[file] = file.read_bytes()
            file.write_bytes(b"not Parquet")

    with pytest.raises(DataError, match=r"^hold out, shard 00002: .*Parquet.*\n.*kept") as raised:
        run(config, tmp_path, progress=damage)
    assert str(raised.value).count("\n") == 1
    (directory,) = {file.parent for file in damaged}
    done = sorted(file.name for file in directory.glob("round2-*.parquet"))
    assert "round2-00002.parquet" not in done and len(done) == len(list(directory.glob("round1-*.parquet"))) - 1
    for file, content in damaged.items():
        file.write_bytes(content)
    out = tmp_path / "again"
    out.mkdir()
    annotate(config, 1, out, tmp_path / "scratch", HERE, silent)
    assert files(out) == files(in_shards)


def test_input_that_cannot_be_read_stops_the_run_after_the_rest(corpus, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jsonl").write_text(json.dumps({"content": "a column of another name"}) + "\n")
    sources = [*annotate_config(corpus).model_dump()["sources"],
               {"kind": "files", "paths": [str(bad)], "domain": "docs"}]
    with pytest.raises(DataError, match=r"a\.jsonl|no document") as raised:
        run(annotate_config(corpus, sources=sources), tmp_path)
    assert str(raised.value).count("\n") == 1
    assert not (tmp_path / "annotated" / "manifest.json").exists()
