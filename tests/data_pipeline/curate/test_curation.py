"""The cut: what stays, what is said about it, and thresholds that can be changed without annotating again."""

import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from data_pipeline.annotate.annotation import annotate
from data_pipeline.annotate.step import SCHEMA, text_id
from data_pipeline.config import AnnotateConfig, CurateConfig, DataError, ExecutorConfig
from data_pipeline.curate import cut as cutting
from data_pipeline.curate.curation import CurationRecords, curate
from data_pipeline.curate.heuristics import Rule
from data_pipeline.text.ngrams import ngrams_in, readings
from tests.data_pipeline.annotate_corpus import LABELS, REPEAT, annotate_config, curate_config, write_corpus

DOMAINS = ("code", "docs")
HERE = ExecutorConfig(executor="local", workers=1)
STEPS = ["read", "license", "language", "copies", "near_duplicates", "heuristics", "perplexity", "decontaminate",
         "substring", "held_out"]


def silent(step: int, total: int, **figures: object) -> None:
    assert 0 <= step <= total


def run(annotated: Path, config: CurateConfig, directory: Path, executor: ExecutorConfig = HERE) -> CurationRecords:
    (directory / "out").mkdir(parents=True)
    return curate(annotated, config, 1, directory / "out", directory / "scratch", directory / "cache", executor, silent)


def read(directory: Path, split: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in sorted((directory / split).glob("part-*.parquet"))])


@pytest.fixture(scope="module")
def annotated(tmp_path_factory, little_reference) -> Path:
    directory = tmp_path_factory.mktemp("annotated")
    corpus = write_corpus(directory / "corpus")
    (directory / "out").mkdir()
    config = annotate_config(corpus, shard_megabytes=0.2)
    annotate(config, 1, directory / "out", directory / "scratch", HERE, silent)
    return directory / "out"


@pytest.fixture(scope="module")
def before(annotated) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(file) for file in sorted(annotated.glob("part-*.parquet"))])


@pytest.fixture(scope="module")
def curated(annotated, tmp_path_factory):
    """(directory, records) of an unbroken run in this process."""
    directory = tmp_path_factory.mktemp("curated")
    records = run(annotated, curate_config(), directory)
    assert not (directory / "scratch" / "resumed").exists()
    return directory / "out", records


def test_files_are_as_described(curated):
    out, _ = curated
    train, held_out = read(out, "train"), read(out, "heldout")
    assert held_out.columns == ["id", "text", "source", "path", "domain", "license"]
    assert train.columns == [*held_out.columns, "quality", "label"]
    for frame in (train, held_out):
        assert frame["id"].to_list() == [text_id(text) for text in frame["text"]]
        assert frame.null_count().sum_horizontal().item() == 0
        assert set(frame["domain"]) == set(DOMAINS)
    assert train["quality"].is_between(0, 19).all()
    assert "high" in set(train["label"]) <= set(LABELS)
    ids = pl.concat([train["id"], held_out["id"]])
    assert ids.n_unique() == len(ids)


def test_manifest_counts_what_is_there(curated):
    out, _ = curated
    manifest = json.loads((out / "manifest.json").read_text())
    train, heldout = (read(out, split) for split in ("train", "heldout"))
    ids = [*(train["id"] + train["label"]), *heldout["id"]]
    assert manifest["decontamination_ngram"] == 13
    assert manifest["corpus_digest"] == hashlib.sha256("".join(ids).encode()).hexdigest()
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
    held_out, train = ({value for words in readings(pa.table({"text": read(out, part)["text"].to_list()}))
                        for value in ngrams_in(words, 13).tolist()} for part in ("heldout", "train"))
    assert len(held_out) > 1000 and len(train) > 1000 and held_out.isdisjoint(train)


def test_funnel_adds_up(curated, before):
    out, records = curated
    assert list(dict.fromkeys(row.step for row in records.funnel)) == STEPS
    manifest = json.loads((out / "manifest.json").read_text())
    for domain in DOMAINS:
        rows = [row for row in records.funnel if row.domain == domain]
        assert rows[0].documents == (before["domain"] == domain).sum()
        for earlier, later in pairwise(rows):
            assert earlier.documents - later.documents == sum(later.reasons.values())
        assert rows[-1].documents == manifest["train"][domain]["documents"]
        assert rows[-1].bytes == manifest["train"][domain]["bytes"]


def test_each_planted_document_goes_for_its_reason(curated):
    reasons = {why for row in curated[1].funnel for why in row.reasons}
    assert {"language de", "language un", "generated > 0"} <= reasons
    assert any(why.startswith("copy") for why in reasons) and any(why.startswith("near-duplicate") for why in reasons)


def test_labels_are_byte_weighted_percentiles_over_what_is_eligible(curated, before):
    """Recomputed here from the annotated columns, in plain NumPy."""
    train = {row["id"]: row for row in read(curated[0], "train").iter_rows(named=True)}
    english = (pl.col("domain") != "docs") | ((pl.col("language") == "en") & (pl.col("language_share") >= 0.3))
    for domain in DOMAINS:
        eligible = before.filter((pl.col("domain") == domain) & pl.col("scores").is_not_null() & english)
        scores = np.array(eligible["scores"].to_list(), dtype=np.float64)
        sizes = np.array([len(text.encode()) for text in eligible["text"]])
        cuts = np.quantile(scores, np.arange(1, 20) / 20, axis=0, weights=sizes, method="inverted_cdf").T
        best = np.max([np.digitize(*column) for column in zip(scores.T, cuts, strict=True)], axis=0)
        pairs = zip(eligible["id"], best, strict=True)
        found = [(train[identity]["quality"], value) for identity, value in pairs if identity in train]
        assert len(found) > 10 and all(quality == value for quality, value in found)
        edges = curated[1].histograms["perplexity"][domain].edges
        assert (edges[0], edges[-1]) == pytest.approx((eligible["perplexity"].min(), eligible["perplexity"].max()))


def test_histograms_hold_every_eligible_document_and_the_thresholds(curated):
    histograms = curated[1].histograms
    assert {"characters", "perplexity", "fluency", "structure", "language_share"} <= histograms.keys()
    for name, domains in histograms.items():
        for domain, entry in domains.items():
            assert len(entry.edges) == len(entry.counts) + 1 and 25 <= len(entry.counts) <= 40
            assert entry.edges == sorted(entry.edges)
            assert sum(entry.counts) == sum(histograms["fluency"][domain].counts), (name, domain)
    words = histograms["words"]["docs"]
    assert (words.low, words.high) == (30, None) and "Gopher" in words.source


def test_dropped_shows_what_broke_each_rule(curated, before):
    records = curated[1]
    for domain in DOMAINS:
        counted: dict[str, int] = {}
        for row in records.funnel:
            if row.domain == domain and row.step != "held_out":
                counted |= row.reasons
        shown = records.dropped[domain]
        assert {why: entry.documents for why, entry in shown.items() if why != "substring"} == counted
        for why, entry in shown.items():
            assert 1 <= len(entry.examples) <= 6
            for example in entry.examples:
                assert example.value and 0 < len(example.excerpt) <= 600, why
                text = before.filter(source=example.source, path=example.path, domain=domain)["text"].item()
                assert example.excerpt in text
    removed = [example.excerpt for example in records.dropped["docs"]["substring"].examples]
    assert removed and all(len(text.encode()) >= 200 for text in removed)
    (generated,) = records.dropped["code"]["generated > 0"].examples
    assert generated.value == "generated 1 > 0 (Codex)"


def test_what_reading_and_the_cut_drop_for_one_reason_is_counted_together(annotated, curated, tmp_path):
    shutil.copytree(annotated, tmp_path / "annotated")
    manifest = json.loads((annotated / "manifest.json").read_text())
    manifest["refusals"] = {"docs": {"empty": {"documents": 2, "where": ["a.jsonl, byte 0"]},
                                     "license": {"documents": 3, "where": ["b"]}}}
    (tmp_path / "annotated/manifest.json").write_text(json.dumps(manifest))
    stays = set(read(curated[0], "train").filter(domain="docs")["path"].head(1))
    for file in (tmp_path / "annotated").glob("part-*.parquet"):
        emptied = pl.when(pl.col("path").is_in(stays), domain="docs").then(pl.lit("\n")).otherwise("text")
        pl.read_parquet(file).with_columns(text=emptied).write_parquet(file)
    records = run(tmp_path / "annotated", curate_config(), tmp_path)
    went = sum(row.reasons.get("empty", 0) for row in records.funnel if row.domain == "docs")
    entry = records.dropped["docs"]["empty"]
    assert entry.documents == went > 2
    assert [example.value for example in entry.examples][:2] == ["empty", "no text after normalisation"]
    was_read, licensed = (row for row in records.funnel if row.domain == "docs" and row.step in ("read", "license"))
    assert was_read.documents == licensed.documents + 3 and licensed.reasons == {"not permissive": 3}


def row_of(number: int, text: str = "", **values: Any) -> dict[str, Any]:
    """A row of the annotated Parquet that every step of the cut leaves alone."""
    text = text or f"This is document {number} of those that stay."
    return {"id": text_id(str(number)), "text": text, "source": "s", "path": str(number), "domain": "docs",
            "license": "MIT", "masked": 0, "language": "en", "language_share": 0.9, "held_out": False,
            "features": {"characters": len(text), "longest_line": max(map(len, text.split("\n"))), "encoded_run": 0},
            "scores": [0.7, 0.0], "perplexity": 50.0, "contamination": 0} | values


def test_each_step_takes_what_it_should_and_nothing_else():
    low, removed = {"scores": [0.0, 0.0]}, "zz" + "b" * 30
    encoded, long_line = "a b\n" * 300 + "Q" * 300, "a\n" * 600 + "b" * 1001
    rows = [
        row_of(0), row_of(1, language="de"), row_of(2, language_share=0.2, perplexity=999.0),
        *(row_of(number, duplicate="copy", scores=None, perplexity=None) for number in range(3, 12)),
        row_of(12, duplicate="near-duplicate", scores=None, perplexity=None),
        row_of(13, "too short", repeats=[0, 3]), row_of(14, long_line),
        row_of(15, encoded, features={"characters": 1500, "longest_line": 300, "encoded_run": 300}),
        row_of(16, perplexity=101.0, **low), row_of(17, perplexity=100.0, **low), row_of(18, perplexity=300.0),
        row_of(19, contamination=1, contaminated_by="held-out text"),
        row_of(20, f"{removed} and what stays of it zzz", repeats=[0, 32, 54, 57]),
        row_of(21, f"{removed} little", repeats=[0, 32]),
        row_of(22, held_out=True, scores=None, perplexity=None), row_of(23, "c", domain="code", **low),
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    rules = [Rule("longest_line", None, 1000, "r"), Rule("encoded_run", None, 255, "r"),
             Rule("characters", 20, None, "r")]
    config = curate_config(rules={"docs": {"set": "prose", "labels": LABELS}})
    cut = cutting.Cut(config, {"docs": rules}, ["fluency", "structure"], 13,
                      dict.fromkeys(DOMAINS, np.tile(np.arange(1, 20) / 20, (2, 1))), {"docs": 100.0})
    ranges = cutting.survey(table, cut).ranges
    assert ranges["perplexity", "docs"] == (50, 300) and ranges["characters", "docs"] == (9, 2201)
    assert ranges["language_share", "docs"] == pytest.approx((0.9, 0.9)) and ("language_share", "code") not in ranges
    cut.edges.update({key: cutting.edges(*values) for key, values in ranges.items()})
    result = cutting.apply(table, cut)
    assert {step: dict(why["docs"]) for step, why in result.report["reasons"].items()} == {
        "language": {"language de": 1, "share of en < 0.3": 1}, "copies": {"copy": 9},
        "near_duplicates": {"near-duplicate": 1},
        "heuristics": {"characters < 20": 1, "longest_line > 1000": 1, "encoded_run > 255": 1},
        "perplexity": {"perplexity": 1}, "decontaminate": {"shares 13 words in a row with held-out text": 1},
        "substring": {"little but repeats": 1}, "held_out": {"held out": 1}}
    assert result.train["path"].to_pylist() == ["0", "17", "18", "20", "23"]
    assert result.train["label"].to_pylist() == ["medium", "low", "medium", "medium", "low"]
    assert result.train["text"][3].as_py() == " and what stays of it "
    assert result.heldout["path"].to_pylist() == ["22"] and result.report["shortened"] == {"docs": 2}
    shown = result.report["examples"]["docs"]
    assert [one.key for one in shown["copy"]] == sorted(cutting.keys_of([row["id"] for row in rows[3:12]]))[:6]
    assert {one.excerpt for one in shown["substring"]} == {removed}
    assert shown["longest_line > 1000"][0].excerpt.count("b") == 450
    assert shown["encoded_run > 255"][0].excerpt.count("Q") == 300
    unscored = pa.Table.from_pylist([row_of(0, scores=None, perplexity=None)], SCHEMA)
    assert cutting.apply(unscored, cut, np.array([19])).train["label"].to_pylist() == ["high"]
    assert cutting.apply(unscored, cut, np.array([0])).train["label"].to_pylist() == ["low"]


def test_repeated_strings_stay_once(curated, before):
    everything = sum(text.count(REPEAT.strip()) for text in before.filter(held_out=False)["text"])
    left = sum(text.count(REPEAT.strip()) for text in read(curated[0], "train")["text"])
    assert everything > 2 and left <= 1


def test_workers_change_nothing(annotated, curated, tmp_path):
    records = run(annotated, curate_config(), tmp_path, ExecutorConfig(executor="local", workers=2))
    assert records == curated[1]
    for file in curated[0].rglob("*.*"):
        assert (tmp_path / "out" / file.relative_to(curated[0])).read_bytes() == file.read_bytes()


def test_a_threshold_changes_the_cut_alone(annotated, curated, tmp_path):
    rules = {"docs": {"set": "prose", "labels": LABELS, "thresholds": {"words": (400, None)}}}
    records = run(annotated, curate_config(rules=rules), tmp_path)
    (entry,) = [row for row in records.funnel if row.step == "heuristics" and row.domain == "docs"]
    assert entry.reasons["words < 400"] > 10
    assert records.histograms["words"]["docs"].low == 400
    assert records.histograms["words"]["docs"].counts == curated[1].histograms["words"]["docs"].counts
    assert "characters" not in records.dropped["code"]      # no rules for code


def test_rules_spare_documents_of_other_labels(annotated, tmp_path):
    rules = {"docs": {"set": "prose", "labels": ["low"], "thresholds": {"words": (400, None)}}}
    run(annotated, curate_config(rules=rules), tmp_path)
    train, held_out = read(tmp_path / "out", "train"), read(tmp_path / "out", "heldout")
    short = train.filter((pl.col("domain") == "docs") & (pl.col("text").str.count_matches(r"\S+") < 380))
    assert len(short) and "low" not in set(short["label"])
    short = held_out.filter((pl.col("domain") == "docs") & (pl.col("text").str.count_matches(r"\S+") < 380))
    assert not len(short), "held-out text has no label that could spare it"


class Stop(Exception):
    pass


def test_an_interrupted_cut_ends_the_same(annotated, curated, tmp_path):
    def stop(step: int, total: int, **figures: object) -> None:
        if figures["work"] == "cut" and figures["documents/s"]:
            raise Stop

    with pytest.raises(Stop):
        (tmp_path / "broken").mkdir()
        curate(annotated, curate_config(), 1, tmp_path / "broken", tmp_path / "scratch", tmp_path / "c", HERE, stop)
    (finished,) = (tmp_path / "scratch").glob("*/cut-00000.json")
    written = finished.stat().st_mtime_ns
    assert run(annotated, curate_config(), tmp_path) == curated[1]
    assert (tmp_path / "scratch" / "resumed").exists() and finished.stat().st_mtime_ns == written


@pytest.mark.parametrize("harm", [
    lambda content: content[: len(content) // 2], lambda content: b"", lambda content: None,
    lambda content: content[:200] + bytes(byte ^ 1 for byte in content[200:400]) + content[400:],
])
def test_a_damaged_annotated_shard_is_named(annotated, tmp_path, harm):
    shutil.copytree(annotated, tmp_path / "annotated")
    shard = sorted((tmp_path / "annotated").glob("part-*.parquet"))[-1]
    harmed = harm(shard.read_bytes())
    shard.unlink()
    if harmed is not None:
        shard.write_bytes(harmed)
    with pytest.raises(DataError, match=f"^annotated shard {shard.name}: .+\n.+ are kept") as error:
        run(tmp_path / "annotated", curate_config(), tmp_path)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize("file", ["cut-00000.json", "cut-00000-train.parquet", "cut-00000-heldout.parquet"])
def test_a_damaged_cut_is_made_again(annotated, curated, tmp_path, capsys, file):
    run(annotated, curate_config(), tmp_path / "first")
    (directory,) = (path for path in (tmp_path / "first/scratch").iterdir() if path.is_dir())
    shutil.copytree(tmp_path / "first/scratch", tmp_path / "scratch")
    piece = tmp_path / "scratch" / directory.name / file
    content = piece.read_bytes()
    piece.write_bytes(content.replace(b"1", b"2") if file.endswith("json") else content[:-9])
    assert run(annotated, curate_config(), tmp_path) == curated[1]
    assert capsys.readouterr().out.count(f"{piece}: damaged; made again.") == 1 and piece.read_bytes() == content


@pytest.mark.parametrize(("split", "said"), [
    ("train", r"to train on is left; most went for: words < 10000 \(\d\d\), .*\nRead"),
    ("heldout", r"held out is left; .*\nRaise annotate\.held_out\.fraction, read")])
def test_a_domain_left_empty_is_named_with_what_took_it(annotated, tmp_path, split, said):
    rules = {"docs": {"set": "prose", "labels": LABELS, "thresholds": {"words": (10_000, None)}}}
    copy = tmp_path / "annotated"
    if split == "heldout":                  # nothing of it was held out
        shutil.copytree(annotated, copy)
        for file in copy.glob("part-*.parquet"):
            frame = pl.read_parquet(file)
            frame.filter((pl.col("domain") != "docs") | ~pl.col("held_out")).write_parquet(file)
        rules = {}
    with pytest.raises(DataError, match=rf"`docs`: no document {said} more .*curate\.rules\.docs"):
        run(copy if split == "heldout" else annotated, curate_config(rules=rules), tmp_path)


def test_a_feature_that_is_none_is_named(annotated, tmp_path):
    rules = {"docs": {"set": "prose", "labels": LABELS, "thresholds": {"wrods": (1, None)}}}
    with pytest.raises(DataError, match=r"curate\.rules\.docs.*wrods"):
        run(annotated, curate_config(rules=rules), tmp_path)


def test_a_language_that_is_never_found_is_named(annotated, tmp_path):
    language = {"keep": ["en", "nb", "EN", "he", "zh", "un"], "share": 0.3, "domains": ["docs"]}
    with pytest.raises(DataError, match=r"curate\.language\.keep names EN, nb, which.*\n.* nn, no, "):
        run(annotated, curate_config(language=language), tmp_path)


def test_two_outputs_of_a_classifier_are_two_scorers():
    """Else the histogram of one would stand over the thresholds of the other."""
    given = annotate_config(Path()).model_dump()
    both = given | {"scorers": [{"model": "m"}, {"model": "m", "label": 1}]}
    assert cutting.cut_of(curate_config(), {"config": both}).scorers == ["m", "m[1]"]
    for twice in (["fluency", "fluency"], [{"model": "m"}, {"model": "m", "revision": "1"}]):
        with pytest.raises(ValueError, match="stands in it twice"):
            AnnotateConfig.model_validate(given | {"scorers": twice})


@pytest.mark.parametrize(("domains", "megabytes"), [([], 10), (["docs"], 1e-6)])
def test_rephrasing_that_asks_nothing_is_refused(annotated, tmp_path, domains, megabytes):
    """It is enabled, and would change nothing: no endpoint is asked, nor a key."""
    language, synthesis = {"keep": ["en"], "share": 0.3, "domains": domains}, curate_config().synthesis.model_dump()
    synthesis |= {"enabled": True, "megabytes": megabytes}
    with pytest.raises(DataError, match=rf"^curate\.synthesis: .* {megabytes:g} megabytes .*\n.*language\.domains"):
        run(annotated, curate_config(language=language, synthesis=synthesis), tmp_path)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.2, 0.2), (0, 5e5), (37, 90_000), (-9.0, -2.0)])
def test_edges_hold_the_range(low, high):
    edges = cutting.edges(low, high)
    assert len(edges) == cutting.BINS + 1 and (np.diff(edges) > 0).all()
    assert edges[0] <= low and edges[-1] >= high - 1e-6
