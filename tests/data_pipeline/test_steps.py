"""Normalisation, heuristics, held-out sources, copies, n-gram overlap and quality, against plain Python."""

import inspect
import re
import sched
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.config import DataError
from data_pipeline.steps.decontaminate import Decontaminate, is_in, ngram_hashes
from data_pipeline.steps.exact_dedup import ExactDedup
from data_pipeline.steps.heuristics import Heuristics, commonest_run_share, repeated_run_share
from data_pipeline.steps.hold_out import HoldOut, choose_held_out
from data_pipeline.steps.license import License
from data_pipeline.steps.normalise import Normalise
from data_pipeline.steps.quality import (
    BigramModel,
    QualityLabels,
    QualityScores,
    counts_of,
    ensemble_bins,
    label_of,
    weighted_quantiles,
)
from data_pipeline.steps.step import SCHEMA, text_id
from data_pipeline.steps.words import ngrams, words

PROSE = (
    "The scheduler keeps a queue of the tasks that wait. When a worker is free, it takes the oldest of them and runs "
    "it to the end. If the task fails, the error is kept with its result, so that whoever asks for it will see what "
    "happened. A task that was cancelled before it began never runs, and asking for its result raises an error."
)


def table(*rows: dict[str, object]) -> pa.Table:
    base = {"source": "s", "path": "p", "domain": "docs", "license": "MIT", "held_out": False}
    return pa.Table.from_pylist([{**base, "id": text_id(str(row["text"])), **row} for row in rows], SCHEMA)


def reference_words(text: str) -> list[str]:
    lowered = "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text)
    return re.findall("[a-z0-9_\u0080-\U0010ffff]+", lowered)


def reference_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = reference_words(text)
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]


UNICODE = "ÄÖ naïve_naïve x1 x1 x1 x1 é\u0301 日本語 日本語 -- == 0.5e-3"
TEXTS = ["", "one", PROSE, PROSE.upper() + "\n\n" + PROSE[40:], UNICODE]


@pytest.mark.parametrize("n", [1, 2, 13])
def test_ngrams_are_equal_exactly_where_plain_python_says(n):
    plain = [gram for text in TEXTS for gram in reference_ngrams(text, n)]
    hashed = np.concatenate([ngram_hashes(text, n) for text in TEXTS]).tolist()
    assert len(plain) == len(hashed)
    assert len(set(plain)) == len(set(hashed)) == len(set(zip(plain, hashed, strict=True)))


def test_ngram_hashes_never_change():
    # other stages and earlier runs compare with these
    assert ngram_hashes("Hello, World!", 1).tolist() == ngram_hashes("hello world", 1).tolist()
    assert ngram_hashes("hello world", 2).tolist() == [4019751668136865060]
    assert len(ngram_hashes("twelve words only", 13)) == 0


def test_is_in_is_numpys():
    random = np.random.default_rng(0)
    values, known = random.integers(0, 50, 100, dtype=np.uint64), np.unique(random.integers(0, 50, 20, dtype=np.uint64))
    assert np.array_equal(is_in(values, known), np.isin(values, known))
    assert not is_in(values, known[:0]).any()


def test_one_shared_ngram_drops_a_training_document():
    shared = " ".join(PROSE.split()[:13])
    held_out = table({"text": PROSE, "held_out": True}, {"text": "Another text.", "held_out": True})
    train = table(
        {"text": f"(x) {shared.upper()} and so on"},
        {"text": " ".join(PROSE.split()[:12]) + " but not the thirteenth"},
        {"text": "another"},
    )
    step = Decontaminate(13)
    decisions = step.decide([step.survey(held_out), step.survey(train)])
    assert step.apply(held_out, decisions[0]).reasons == [None, None]
    assert step.apply(train, decisions[1]).reasons == ["shares 13 words in a row with held-out text", None, None]


def test_normalise():
    header = "#!/usr/bin/env python\n# A tool.\n# Copyright 2020 Someone\n# Licensed under MIT\n\n"
    texts = {
        "schÃ¶n \u0065\u0301\r\nnext": "schön é\nnext\n",
        "a  \n\n\n\n\n\nb\t\n": "a\n\n\nb\n",
        "\ufeffx = '“’ﬁ'": "x = '“’ﬁ'\n",                  # quotes and ligatures are data in code
        header + "x = 1\n": "#!/usr/bin/env python\n# A tool.\nx = 1\n",
        "# About rights\n\nx = 1\n": "# About rights\n\nx = 1\n",
    }
    outcome = Normalise().apply(table(*({"text": text, "domain": "code"} for text in texts), {"text": " \n\n"}), None)
    assert outcome.table["text"].to_pylist()[:-1] == list(texts.values())
    assert outcome.table["id"].to_pylist()[:-1] == [text_id(text) for text in texts.values()]
    assert outcome.reasons == [None] * len(texts) + ["empty"]


CODE = inspect.getsource(sched)
COMMENTS = "\n".join(f"# a comment, number {i}, about nothing" for i in range(60))


@pytest.mark.parametrize(
    ("domain", "text", "reason"),
    [
        ("docs", PROSE, None),
        ("docs", "Too short to tell.", "too short"),
        ("docs", PROSE + "\n" + "A" * 300, "encoded data"),
        ("docs", PROSE + " word" * 300, "long lines"),
        ("docs", "\n".join(f"numpy scipy pandas {i} torch datasets polars" for i in range(40)), "few stop words"),
        ("docs", PROSE + "\n" + "# # # # # # # # # #", "symbols"),
        ("docs", PROSE + "\n" + "\n".join(f"{i * 7919} {i * 104729}" for i in range(60)), "few words with letters"),
        ("docs", "\n".join([PROSE] * 3), "repeated lines"),
        ("docs", "\n".join(f"{i}. {PROSE}" for i in range(3)), "repeated phrases"),
        ("code", CODE, None),
        ("code", "x = 1\n", "too short"),
        ("code", "# Code generated by protoc. DO NOT EDIT.\n" + CODE, "generated"),
        ("code", "'''generated by hand'''\n" + CODE, None),
        ("code", "\n".join(f"number = {i * 104729}" for i in range(80)), "mostly numbers"),
        ("code", COMMENTS + "\nx = 1\n", "mostly comments"),
        ("code", CODE + "x = 'a' + " * 200, "long lines"),
        ("code", CODE + "value = compute(value, other)\n" * 300, "repeated lines"),
        ("reference", CODE, None),
    ],
)
def test_heuristics(domain, text, reason):
    assert Heuristics().apply(table({"text": text, "domain": domain}), None).reasons == [reason]


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("text", [*TEXTS, "a b a b a b c d a b", PROSE * 2])
def test_repetition_shares(text, n):
    found, grams = reference_words(text), reference_ngrams(text, n)
    total = sum(len(word.encode()) for word in found)
    seen, covered = set(), set()
    for start, gram in enumerate(grams):
        if gram in seen:
            covered |= set(range(start, start + n))
        seen.add(gram)
    arrays = words(text)
    assert repeated_run_share(*arrays, n) == pytest.approx(
        sum(len(found[i].encode()) for i in covered) / total if covered else 0.0)
    counts = Counter(grams)
    best = max(counts.values(), default=0)
    possible = {
        best * sum(len(word.encode()) for word in gram) / total for gram, count in counts.items() if count == best
    } if len(grams) > 1 else {0.0}
    assert any(commonest_run_share(*arrays, n) == pytest.approx(share) for share in possible)


def test_licence_step_refuses_and_says_why():
    rows = table(*({"text": "a", "license": value} for value in ("MIT", "MPL-2.0 AND MIT", "unknown")))
    assert License().apply(rows, None).reasons == [None, "licence MPL-2.0 AND MIT", "licence unknown"]


def test_held_out_sources_meet_every_domain():
    random = np.random.default_rng(0)
    sizes = {(f"package{i}", domain): int(size) for i in range(60) for domain, size in
             zip(("code", "docs"), random.lognormal(8, 1.5, 2), strict=True)}
    sizes["giant", "code"] = sizes["giant", "docs"] = 2 * sum(sizes.values())
    sizes["only-reference", "reference"], sizes["also-reference", "reference"] = 1000, 9000
    chosen = choose_held_out(sizes, 0.1, seed=3)
    assert "giant" not in chosen and len(chosen) < 62
    for domain in ("code", "docs", "reference"):
        total = sum(size for (_, d), size in sizes.items() if d == domain)
        held = sum(size for (source, d), size in sizes.items() if d == domain and source in chosen)
        assert 0.1 * total <= held <= 0.15 * total + 1
    assert choose_held_out(dict(reversed(sizes.items())), 0.1, seed=3) == chosen
    assert choose_held_out(sizes, 0.1, seed=4) != chosen


def test_a_domain_of_one_source_cannot_be_split():
    with pytest.raises(DataError, match=r"`docs`.*\n.*megabytes_per_domain\.docs.*held_out_fraction"):
        choose_held_out({("a", "docs"): 10, ("b", "code"): 1, ("c", "code"): 9}, 0.1, seed=1)


def test_hold_out_marks_all_domains_of_a_source():
    rows = [{"text": str(i), "source": f"package{i % 20}", "domain": ("code", "docs")[i % 2]} for i in range(60)]
    shards = [table(*rows[:31]), table(*rows[31:])]
    step = HoldOut(0.1, seed=1)
    decisions = step.decide([step.survey(shard) for shard in shards])
    marked = [row for shard, decision in zip(shards, decisions, strict=True)
              for row in step.apply(shard, decision).table.to_pylist()]
    held, kept = ({row["source"] for row in marked if row["held_out"] is flag} for flag in (True, False))
    assert held and kept and not held & kept


def test_exact_dedup_keeps_the_held_out_copy():
    shards = [table({"text": "a"}, {"text": "b"}, {"text": "c"}), table({"text": "b"}, {"text": "a", "held_out": True})]
    step = ExactDedup()
    assert step.decide([step.survey(shard) for shard in shards]) == [
        ["copy of a held-out document", None, None], ["copy", None]
    ]


def test_weighted_quantiles_are_the_inverted_distribution_function():
    random = np.random.default_rng(1)
    values, weights = random.integers(0, 9, 40).astype(float), random.integers(1, 100, 40)
    repeated = np.sort(np.repeat(values, weights))
    shares = np.arange(1, 20) / 20
    expected = np.quantile(repeated, shares, method="inverted_cdf")
    assert np.array_equal(weighted_quantiles(values, weights, shares), expected)


def test_ensemble_takes_the_best_bin():
    random = np.random.default_rng(2)
    scores, sizes = random.normal(size=(4000, 3)), np.full(4000, 100)
    bins = ensemble_bins(scores, sizes)
    scores[:, 1] = -np.abs(scores[:, 1] - np.median(scores[:, 1]))
    ranks = np.argsort(np.argsort(scores, axis=0), axis=0) / 4000 * 20
    assert np.abs(bins - np.floor(ranks.max(axis=1))).max() <= 1
    assert np.bincount(bins, minlength=20)[19] / 4000 == pytest.approx(1 - 0.95**3, abs=0.02)
    assert [label_of(b) for b in (19, 18, 17, 12, 11, 7, 6, 0)] == [
        "high", "medium-high", "medium", "medium", "medium-low", "medium-low", "low", "low"
    ]


def bigram_model(texts: list[str]) -> BigramModel:
    hashes = [words(text)[0] for text in texts]
    return BigramModel(counts_of(np.concatenate(hashes)), counts_of(np.concatenate([ngrams(h, 2) for h in hashes])))


def test_bigram_model_is_the_formula_and_leaves_a_text_out():
    texts = [PROSE, PROSE[::-1].replace("\n", " "), "the queue of the tasks that never wait for the worker"]
    model = bigram_model(texts)
    single = Counter(word for text in texts for word in reference_words(text))
    double = Counter(gram for text in texts for gram in reference_ngrams(text, 2))
    total, kinds = sum(single.values()), len(single)
    text = "the queue that waits for the zebra"
    expected = np.mean([
        np.log2((double[v, w] + 20 * (single[w] + 1) / (total + kinds + 1)) / (single[v] + 20))
        for v, w in reference_ngrams(text, 2)
    ])
    assert model.mean_log2(text, own=False) == pytest.approx(expected)
    vocabulary = " ".join(reference_words(texts[2]))            # the same words stay known when the text is left out
    doubled = bigram_model([*texts, vocabulary])
    assert doubled.mean_log2(vocabulary, own=True) == pytest.approx(model.mean_log2(vocabulary, own=False))
    assert doubled.mean_log2(vocabulary, own=False) > doubled.mean_log2(vocabulary, own=True)


def test_quality_prefers_prose_to_shuffled_and_repetitive_text():
    random = np.random.default_rng(3)
    sentences = [f"{PROSE} Case {i} differs because the queue holds {i} tasks. Note it." for i in range(60)]
    noise = ["".join(random.permutation(list(text))) for text in sentences]
    rows = [{"text": text, "source": "python/x", "domain": "reference"} for text in sentences[:20]]
    rows += [{"text": text} for text in sentences[20:] + noise] + [{"text": PROSE, "held_out": True}]
    shard: pa.Table = table(*rows)
    for step in (QualityScores(), QualityLabels()):
        outcome = step.apply(shard, step.decide([step.survey(shard)])[0])
        assert outcome.reasons == [None] * len(rows)
        shard = outcome.table
    quality = shard["quality"].to_pylist()
    assert quality[-1] is None and shard["label"].to_pylist()[-1] is None
    good, bad = quality[20:60], quality[60:-1]
    assert np.median(good) > np.median(bad)
    fluency = [scores[0] for scores in shard["scores"].to_pylist()[:-1]]
    assert min(fluency[20:60]) > max(fluency[60:])
    assert set(shard["label"].to_pylist()[:-1]) <= {"high", "medium-high", "medium", "medium-low", "low"}
