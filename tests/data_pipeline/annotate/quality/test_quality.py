"""The quality step and its scorers against plain Python, regular expressions and transformers."""

import itertools
import pickle
import re
import shutil
import string
import sysconfig
from collections import Counter
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from data_pipeline.annotate.quality import classifier, fluency, reference, structure, training_text
from data_pipeline.annotate.quality.quality import Quality
from data_pipeline.annotate.quality.quality_labels import keys_of
from data_pipeline.annotate.quality.training_text import TrainingText
from data_pipeline.annotate.step import SCHEMA
from data_pipeline.config import ClassifierConfig, DataError
from data_pipeline.text.words import ngrams_of, texts_of, words_of
from tests.data_pipeline.annotate.here import run, table
from tests.data_pipeline.plain_words import words_of_text
from tests.data_pipeline.real_texts import PROSE

OWN = ["fluency", "reference", "structure"]
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def pages(packages: str, domain: str, source: str) -> list[dict[str, object]]:
    """Rows of a source's code, or of its comments as prose."""
    rows = []
    for package in packages.split():
        for path in sorted((STANDARD_LIBRARY / package).rglob("*.py")):
            code = path.read_text(encoding="utf-8")
            text = code if domain == "code" else "\n".join(re.findall(r'"""(.*?)"""', code, re.S))
            if len(text) > 300:
                rows.append({"text": text, "source": source.format(package), "domain": domain, "path": str(path)})
    return rows


def shuffled(rows: list[dict[str, object]], seed: int, **changes: object) -> list[dict[str, object]]:
    """The rows with the words of each text in a random order, so that only pairs of words tell them apart."""
    random = np.random.default_rng(seed)
    return [{**row, "text": " ".join(random.permutation(str(row["text"]).split())), **changes} for row in rows]


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    """Code and prose of the standard library, the same in disorder as another source, held-out and double ones."""
    library = pages("asyncio email logging", "code", "python/{}") + pages("asyncio email", "reference", "python/{}")
    other = shuffled(library, 1, source="other")
    odd = [{**row, "text": f"{row['text']} {number}"} for number, row in enumerate(pages("json", "docs", "third"))]
    odd = [{**row, "held_out": True} for row in odd] + [{**row, "duplicate": "copy"} for row in shuffled(odd, 2)]
    return table(library + other + odd)


def scores_by_id(shards: list[pa.Table]) -> dict[str, tuple[list[float] | None, float | None]]:
    rows = [row for shard in shards for row in shard.select(["id", "scores", "perplexity"]).to_pylist()]
    return {row["id"]: (row["scores"], row["perplexity"]) for row in rows}


def test_scores_are_filled_for_training_documents_that_are_no_duplicates(corpus):
    [scored] = run(pickle.loads(pickle.dumps(Quality(OWN, 1))), [corpus])
    assert scored.schema == SCHEMA
    others = [name for name in SCHEMA.names if name not in ("scores", "perplexity")]
    assert scored.select(others).equals(corpus.select(others))
    for row in scored.to_pylist():
        if row["held_out"] or row["duplicate"]:
            assert row["scores"] is None and row["perplexity"] is None
        else:
            assert len(row["scores"]) == 3 and np.isfinite(row["scores"]).all()
            assert row["perplexity"] == pytest.approx(2 ** -row["scores"][0], rel=1e-5)


@pytest.mark.parametrize("count", [2, 7])
def test_scores_do_not_depend_on_shards(corpus, count):
    step = Quality(OWN, 1)
    order = np.random.default_rng(count).permutation(len(corpus))
    shards = [corpus.take(part) for part in np.array_split(order, count)]
    assert scores_by_id(run(step, shards)) == scores_by_id(run(step, [corpus]))


def test_training_text_is_bounded_and_the_same_for_any_shards(corpus, monkeypatch):
    monkeypatch.setattr(training_text, "WORDS", 20_000)
    monkeypatch.setattr(training_text, "LONGEST_DOCUMENT", 3000)
    whole, parts = training_text.survey(corpus), [training_text.survey(corpus.take(part)) for part in
                                                  np.array_split(np.arange(len(corpus))[::-1], 5)]
    lengths = np.diff(words_of(corpus).first).tolist()
    scored = [(row, length) for row, length in zip(corpus.to_pylist(), lengths, strict=True)
              if not row["held_out"] and not row["duplicate"]]
    long = [row["id"] for row, length in scored if length > 3000 and not row["source"].startswith("python/")]
    assert long and set(training_text.collect([whole], "long").keys) <= set(keys_of(long))
    for part in ("reference", "corpus"):
        expected = training_text.collect([whole], part)
        assert 10_000 < len(expected.hashes) <= 20_000
        assert all(len(shard[f"{part}_hashes"]) <= 20_000 for shard in parts)
        for ours, theirs in zip(training_text.collect(parts, part), expected, strict=True):
            assert np.array_equal(ours, theirs)
        ids = [row["id"] for row, length in scored
               if length <= 3000 and row["source"].startswith("python/") == (part == "reference")]
        keys = np.sort(keys_of(ids))
        assert np.array_equal(expected.keys, keys[: len(expected.keys)])
    step = Quality(OWN, 1)      # scores of what was left out of the training text too
    assert scores_by_id(run(step, [corpus])) == scores_by_id(run(step, [corpus.slice(0, 40), corpus.slice(40)]))


def test_held_out_and_double_text_teaches_nothing(corpus):
    rows = corpus.to_pylist()
    changed = table([{**row, "text": f"queue {row['text']}"} if row["held_out"] or row["duplicate"] else row
                     for row in rows])
    before, after = (run(Quality(OWN, 1), [shard])[0]["scores"].to_pylist() for shard in (corpus, changed))
    assert before == after


def plain_fluency(text: str, counted: list[str], kinds: int) -> float:
    """The formula on the words of `counted`; `kinds`, distinct words, is the model's even where a text is left out."""
    lists = [[word for word, _ in words_of_text(other)] for other in counted]
    single = Counter(word for words in lists for word in words)
    double = Counter(pair for words in lists for pair in itertools.pairwise(words))
    total = single.total()
    words = [word for word, _ in words_of_text(text)]
    return float(np.mean([
        np.log2((double[v, w] + 20 * (single[w] + 1) / (total + kinds + 1)) / (single[v] + 20))
        for v, w in itertools.pairwise(words)
    ]))


def test_fluency_is_the_formula_without_the_text_itself():
    texts = [PROSE, "Ein Satz, der nicht englisch ist — naïve x1.", "the queue of the tasks that wait for the worker"]
    others = ["the queue that waits for the zebra", "one", "", "Ω"]
    rows = table([{"text": text, "source": "python/x"} for text in texts] + [{"text": text} for text in others]
                 + [{"text": "the table", "source": "python/encodings"}])
    words = words_of(rows)
    model = fluency.train(training_text.collect([training_text.survey(rows)], "reference"))
    own, everything = training_text.is_reference(rows, words), np.ones(len(rows), bool)
    assert own.tolist() == [True] * 3 + [False] * 5
    found = fluency.mean_log2(words, ngrams_of(words, 2)[0], everything, own, model)
    kinds = len({word for text in texts for word in [word for word, _ in words_of_text(text)]})
    for index, text in enumerate(texts):
        left = [other for other in texts if other != text]
        assert found[index] == pytest.approx(plain_fluency(text, left, kinds))
    assert found[3] == pytest.approx(plain_fluency(others[0], texts, kinds))
    assert found[4:7].tolist() == [fluency.FEWER_WORDS] * 3


def test_fluency_and_reference_tell_order_from_disorder(corpus):
    scores = np.array([row for row in run(Quality(OWN, 1), [corpus])[0]["scores"].to_pylist() if row])
    library = [row["source"].startswith("python/") for row in corpus.to_pylist()
               if not row["held_out"] and not row["duplicate"]]
    for scorer, least in ((0, 0.9), (1, 0.8)):
        assert area_under_curve(scores[library, scorer], scores[~np.array(library), scorer]) > least


def area_under_curve(high: np.ndarray, low: np.ndarray) -> float:
    return float((high[:, None] > low).mean())


def random_text(documents: int, seed: int) -> TrainingText:
    """Documents of 120 words out of 5000, nothing to tell one class from another by."""
    random = np.random.default_rng(seed)
    vocabulary = np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64)
    keys = np.sort(random.integers(0, 2**64, documents, dtype=np.uint64))
    first = np.arange(documents + 1) * 120
    hashes = random.choice(vocabulary, documents * 120)
    hashes[:100] = hashes[0]                            # the first document says one word over and over
    return TrainingText(keys, np.zeros(documents, np.int8), first, hashes)


def logits(text: TrainingText, model: dict[str, np.ndarray], flip: bool = False) -> np.ndarray:
    keys = text.keys ^ np.uint64(flip)
    return reference.logits(text.words, *ngrams_of(text.words, 2), np.ones(len(keys), bool), keys, model)


def test_reference_scores_a_document_as_if_unseen():
    ours, theirs = random_text(300, 1), random_text(300, 2)
    model = reference.train(ours, theirs, seed=1)
    unseen = area_under_curve(logits(ours, model), logits(theirs, model))
    seen = area_under_curve(logits(ours, model, flip=True), logits(theirs, model, flip=True))
    assert 0.43 < unseen < 0.57 and seen > 0.95


def test_a_document_without_words_has_scores():
    texts = (PROSE, "", "...", "one")
    rows = table([{"text": text, "source": source} for source in ("a", "python/b") for text in texts])
    scores = np.array(run(Quality(OWN, 1), [rows])[0]["scores"].to_pylist())
    assert np.isfinite(scores).all() and np.abs(scores).max() < 100
    empty = run(Quality(OWN, 1), [rows, rows.slice(0, 0)])[1]
    assert len(empty) == 0 and empty.schema == SCHEMA


def test_reference_weighs_code_and_prose_the_same():
    lengths = np.array([100, 50, 100, 100, 100, 100, 20])
    wanted = np.array([True, True, True, False, False, False, False])
    kinds = np.array([1, 0, 0, 1, 1, 0, 2], dtype=np.int8)
    weights = reference._weights(lengths, wanted, kinds, np.ones(7, bool))
    for kind in (0, 1):
        assert weights[wanted & (kinds == kind)].sum() == pytest.approx(weights[~wanted & (kinds == kind)].sum())
    assert weights[6] == 0 and weights[:6].mean() == pytest.approx(1)           # no headers in the reference
    assert not reference._weights(lengths, wanted, kinds, np.arange(7) != 0)[kinds == 1].any()      # no code either
    everything = reference._weights(lengths, wanted, kinds, ~wanted)    # nothing to tell apart in the half: both halves
    assert np.array_equal(everything, weights)


def test_reference_descends_like_plain_numpy():
    ours, theirs = random_text(3, 3), random_text(4, 4)
    model = reference.train(ours, theirs, seed=5)["reference_weights"]
    texts = [(key, 1.0, ours, i) for i, key in enumerate(ours.keys)]
    texts += [(key, 0.0, theirs, i) for i, key in enumerate(theirs.keys)]
    for half in (0, 1):
        weights = np.zeros(2**18 + 1)
        seen = [row for row in texts if int(row[0]) % 2 != half]
        if len({row[1] for row in seen}) < 2:
            seen = texts
        share = {target: sum(row[1] == target for row in seen) for target in (0.0, 1.0)}
        mean = 2 * min(share.values()) / len(seen)
        random = np.random.default_rng([5, half])
        members = np.array([texts.index(row) for row in seen])
        steps = [index for _ in range(reference.EPOCHS) for index in random.permutation(members)]
        for step, index in enumerate(steps):
            _, target, text, row = texts[index]
            words = text.hashes[row * 120 : row * 120 + 120]
            features = (np.concatenate([words, ngrams_of(text.words, 2)[0][row * 119 : row * 119 + 119]])
                        >> np.uint64(64 - 18)).astype(int)
            probability = 1 / (1 + np.exp(-weights[-1] - 16 * weights[features].mean()))
            weight = min(share.values()) / share[target] / mean
            norm = max(1, 16**2 * (np.bincount(features) ** 2.0).sum() / 239**2)
            change = (1 - step / len(steps)) / norm * weight * (target - probability)
            weights[-1] += change
            np.add.at(weights, features, change * 16 / 239)
        np.testing.assert_allclose(model[half], weights, rtol=1e-9, atol=1e-12)


def test_a_corpus_of_reference_text_alone_cannot_train_the_classifier():
    rows = table(pages("json", "code", "python/{}"))
    with pytest.raises(DataError, match=r"annotate\.scorers: `reference`.*\n.*annotate\.sources"):
        run(Quality(OWN, 1), [rows])
    [scored] = run(Quality(["fluency", "structure"], 1), [rows])
    assert all(len(scores) == 2 for scores in scored["scores"].to_pylist())


def test_text_without_a_reference_is_judged_by_the_installed_one(monkeypatch):
    monkeypatch.setattr(training_text, "INSTALLED_BYTES", 200_000)
    good = [f"{PROSE} Case {i} differs because the queue holds {i} tasks." for i in range(20)]
    bad = ["".join(np.random.default_rng(i).permutation(list(text))) for i, text in enumerate(good)]
    rows = table([{"text": text, "domain": "web"} for text in good + bad])
    step = Quality(OWN, 1)
    assert not len(training_text.collect([step.survey(rows)], "reference").keys)
    scores = np.array(run(step, [rows])[0]["scores"].to_pylist())
    assert scores[:20, 0].min() > scores[20:, 0].max()
    assert scores[:20, 2].mean() > scores[20:, 2].mean()
    parts = run(step, [rows.slice(0, 9), rows.slice(9)])
    assert np.array_equal(scores, pa.concat_tables(parts)["scores"].to_pylist())


def plain_structure(text: str, code: bool) -> float:
    def words(pattern: str, flags: re.RegexFlag = re.NOFLAG) -> int:
        return len(re.findall(rf"{pattern}(?![A-Za-z0-9_\u0080-\U0010ffff])", text, flags | re.I))

    before = r"(?<![A-Za-z0-9_\u0080-\U0010ffff])"
    comment = r"^(?:.*?(?:#|//|/\*)|[ \t\r]*\*)[#/*!]*[ \t\r][A-Za-z0-9_\u0080-\U0010ffff]"
    if code:
        found = [
            (len(re.findall(comment, text, re.M)), 4.0),
            (words(r"^[ \t\r]*(?:def|class|async|struct|enum|template|namespace|typedef|interface)", re.M), 2.0),
            (words(r"^[ \t\r]*(?:raise|assert|throw|static_assert)", re.M), 1.0),
            (text.count("->") + words(
                r":[ \t\r]*(?:int|str|bool|float|bytes|none|any|list|dict|tuple|set|optional|callable|sequence)"), 3.0),
        ]
    else:
        reasons = "because|therefore|thus|hence|if|when|whereas|which|instead|although|however|example|note"
        headings = "parameters|args|arguments|returns|yields|raises|examples|example|notes|note|see|references"
        found = [
            (len(re.findall(r"[a-z)`][.!?](?=[ \t\r\n]|\Z)", text)), 8.0),
            (words(rf"{before}(?:{reasons})"), 6.0),
            (words(rf"^[ \t\r]*(?:{headings})", re.M), 2.0),
            (len(re.findall(r"^[ \t\r]*(?:>>>|```|\.\.)", text, re.M)), 2.0),
        ]
    return float(np.mean([min(1.0, count / len(text) * 1000 / enough) for count, enough in found]))


def test_structure_is_the_regular_expressions():
    rows = pages("asyncio", "code", "a") + pages("email", "docs", "b") + pages("json", "reference", "c")
    rows += [{"text": text, "domain": domain} for domain in ("docs", "code", "headers") for text in (
        "ä — é.\n\n.. note:: Ünïcode!\n>>> f(x)\n```\nSee also", "x: int -> str  # one # two\n\n  // three\nraise X",
        "template <class T> struct A {};  // a\n!# b /* c\n !// d\n/ / e\nf * g\n ** h\n*/ i",
        "/**\n * @brief Adds.\n *\n * Two\n *x */ int a; /*! b */\n#### C\n",
        PROSE, "# ", "//", "...", ">>",
    )]
    shard = table(rows)
    found = structure.structure(texts_of(shard), words_of(shard), training_text.kinds_of(shard))
    expected = [plain_structure(str(row["text"]), row["domain"] in ("code", "headers")) for row in rows]
    assert len(set(expected)) > 40
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.fixture(scope="module")
def tiny_classifier(tmp_path_factory) -> Path:
    """A BERT of random weights with three outputs and 48 positions, its tokenizer one token a character."""
    directory = tmp_path_factory.mktemp("classifier")
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=48, num_labels=3, initializer_range=0.3)
    BertForSequenceClassification(config).save_pretrained(directory)
    return directory


def test_classifier_gives_the_models_log_odds(tiny_classifier):
    texts = [PROSE[start : start + size] for start, size in ((0, 5), (3, 200), (9, 30), (40, 48), (2, 1))]
    model = BertForSequenceClassification.from_pretrained(tiny_classifier).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_classifier)
    expected = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text[:48], return_tensors="pt")).logits[0]
        share = logits.double().softmax(-1)[2]
        expected.append(float(torch.log(share / (1 - share))))
    config = ClassifierConfig(model=str(tiny_classifier), label=2, batch=2)
    found = classifier.scores(config, pa.chunked_array([texts]), np.ones(5, bool))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    some = classifier.scores(config, pa.chunked_array([texts]), np.array([True, False, False, True, False]))
    np.testing.assert_allclose(some, [expected[0], np.nan, np.nan, expected[3], np.nan], rtol=1e-4)

    rows = table([{"text": text} for text in texts])
    rows = rows.set_column(SCHEMA.get_field_index("held_out"), "held_out", pa.array([False, True] + [False] * 3))
    scores = run(Quality([config, "structure"], 1), [rows])[0]["scores"].to_pylist()
    assert scores[1] is None
    assert [pair[0] for pair in scores if pair] == pytest.approx([expected[i] for i in (0, 2, 3, 4)], rel=1e-4)


def test_a_regression_is_its_own_score():
    assert classifier._score(torch.tensor([[1.5], [-2.0]]), 0).tolist() == [1.5, -2.0]


def test_a_model_without_a_trained_head_or_with_scores_that_are_no_numbers_is_refused(tiny_classifier, tmp_path):
    text = pa.chunked_array([["some text"]])
    for name, change in (("headless", lambda model: model.bert),
                         ("spoilt", lambda model: model.classifier.bias.data.fill_(torch.nan) is None or model)):
        shutil.copytree(tiny_classifier, tmp_path / name)
        change(BertForSequenceClassification.from_pretrained(tiny_classifier)).save_pretrained(tmp_path / name)
    with pytest.raises(DataError, match=r"headless is no classifier: it has no classifier\.bias.*\n"):
        classifier.scores(ClassifierConfig(model=str(tmp_path / "headless")), text, np.ones(1, bool))
    with pytest.raises(DataError, match=r"spoilt gives scores that are no numbers\.\n"):
        classifier.scores(ClassifierConfig(model=str(tmp_path / "spoilt")), text, np.ones(1, bool))


def test_a_classifier_that_cannot_be_had_is_named(tiny_classifier, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"annotate\.scorers.*someone/scorer at 0123abc.*\n.*local directory"):
        Quality([ClassifierConfig(model="someone/scorer", revision="0123abc")], 1)
    with pytest.raises(DataError, match=r"3 outputs.*label: 3"):
        Quality([ClassifierConfig(model=str(tiny_classifier), label=3)], 1)

