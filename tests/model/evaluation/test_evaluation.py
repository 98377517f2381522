"""The adapter against lm-eval's own Hugging Face adapter on the same exported model; figures against definitions."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model import costs, hub
from model.config import ModelError
from model.evaluation import harness
from model.evaluation.schema import ChoiceSample
from model.hybrid_lm import HybridLM
from tests.held_bytes import HeldBytes
from tests.model.evaluation.peers import CONFIGS, export, harness_adapter, requests

GIB = 2**30
WINDOW = 48
TEXT = Path(harness.__file__).read_text()
PAIRS = [
    ("def add(a, b):\n", "    return a + b\n"),          # white space at the boundary goes to the continuation
    ("def add(a, b):\n", "    return a b +\n"),
    ("the quick brown", " fox"),
    ("the quick brown", " foxes and hounds"),            # the same context, longer
    ("the quick brown fo", "x"),                         # a boundary inside a word
    ("", "no context at all"),
    ("x = 'é", "tude 漢字 ☃'"),                            # byte fallback
    (TEXT[:1000], TEXT[1000:1020]),                      # longer than the window: the beginning is lost
    ("a </s> b", " </s>"),                               # spelt, not meant
]
TEXTS = [TEXT[:1500], "short", TEXT[3000:3100], "漢字" * 30]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export(tmp_path_factory.mktemp("hub"), CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_scores_as_the_harness_adapter_for_transformers(
    exported: dict[str, Path], name: str
) -> None:
    ours = harness.load(exported[name], WINDOW)
    theirs = harness_adapter(exported[name], WINDOW, batch_size=3)
    assert ours.prefix_token_id == theirs.prefix_token_id
    for text in [*TEXTS, *(context + continuation for context, continuation in PAIRS)]:
        assert ours.tok_encode(text) == theirs.tok_encode(text)

    asked = requests("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    scores = ours.loglikelihood(asked)
    assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert len({round(score, 3) for score, _ in scores}) == len(PAIRS), "the model tells them apart"

    rolling = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-6, abs=1e-3
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_lengths_and_bfloat16_layers_as_on_a_gpu(
    exported: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests("loglikelihood", PAIRS)
    exact = [score for score, _ in harness.load(exported[name], WINDOW).loglikelihood(asked)]
    monkeypatch.setitem(harness.LENGTH_MULTIPLE, "cpu", 16)
    monkeypatch.setitem(harness.STEM_ROWS, "cpu", 1)
    padded = harness.load(exported[name], WINDOW).loglikelihood(asked)
    assert [score for score, _ in padded] == pytest.approx(exact, abs=1e-4)
    monkeypatch.setitem(harness.DTYPES, "cpu", torch.bfloat16)
    rounded = [score for score, _ in harness.load(exported[name], WINDOW).loglikelihood(asked)]
    assert rounded != exact and rounded == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_text_as_the_harness_adapter_for_transformers(
    exported: dict[str, Path], name: str
) -> None:
    """Greedy text, cut at a stop sequence, and of a prompt too long for the window."""
    ours = harness.load(exported[name], WINDOW)
    theirs = harness_adapter(exported[name], WINDOW)
    free = [(prompt, {"until": [], "max_gen_toks": 20, "do_sample": False})
            for prompt in ("def add(a, b):", TEXT[:900], "x")]
    expected = theirs.generate_until(requests("generate_until", free), disable_tqdm=True)
    answers = ours.generate_until(requests("generate_until", free))
    assert answers == expected
    assert all(answers) and ours.cut == {(TEXT[:900],)}
    stop = answers[0][4:6]
    stopped = requests("generate_until", [(free[0][0], free[0][1] | {"until": [stop, "never"]})])
    assert ours.generate_until(stopped) == [answers[0].split(stop)[0]] == theirs.generate_until(
        stopped, disable_tqdm=True)


def test_texts_begin_with_the_id_that_begins_them(exported: dict[str, Path], tmp_path: Path) -> None:
    """Of published models it is another than the one that ends them."""
    directory = shutil.copytree(exported["hybrid"], tmp_path / "other")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token_id": 1}))
    names = json.loads((directory / "tokenizer_config.json").read_text()) | {"bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    ours = harness.load(directory, WINDOW)
    theirs = harness_adapter(directory, WINDOW)
    rolling = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours.prefix_token_id == theirs.prefix_token_id == 1 != ours.eot_token_id
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-6, abs=1e-3)


def test_any_of_several_ids_ends_a_text(exported: dict[str, Path], tmp_path: Path) -> None:
    """generation_config.json of a chat model has a list; the first stands before a text."""
    name = next(iter(CONFIGS))
    shutil.copytree(exported[name], several := tmp_path / "several")
    one = harness.load(several, WINDOW)
    asked = requests("loglikelihood", [("", " x"), ("def", " add")])
    free = requests("generate_until", [("def add(a, b):", {"until": [], "max_gen_toks": 20, "do_sample": False})])
    (whole,), scores = one.generate_until(free), one.loglikelihood(asked)
    ids = one.tok_encode(whole)
    end_ids = [one.eot_token_id, ids[-1]]
    (several / "generation_config.json").write_text(json.dumps({"eos_token_id": end_ids}))
    (several / "SHA256SUMS").unlink(missing_ok=True)
    again = harness.load(several, WINDOW)
    assert again.loglikelihood(asked) == scores
    (cut,) = again.generate_until(free)
    assert len(cut) < len(whole) and whole.startswith(cut)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_context_that_runs_once_gives_the_scores_of_whole_rows(
    exported: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of several lengths in one batch, with one choice and with more than a stem takes."""
    asked = requests("loglikelihood", [
        (TEXT[40 * i : 40 * i + 30 + 7 * i], choice)
        for i, choices in enumerate([" a", " return x + y", "\n\n    yield"][: 1 + i % 3] for i in range(8))
        for choice in choices
    ])
    asked += requests("loglikelihood", [(TEXT[:60] + "\nx =", f" {value}") for value in range(100, 140)])
    scores, tokens = [], []
    for most in (1, 32):
        monkeypatch.setitem(harness.STEM_ROWS, "cpu", most)
        model = harness.load(exported[name], WINDOW, choice_length=100)
        seen: list[int] = []
        model.model.backbone.embeddings.register_forward_hook(lambda _, ids, y, seen=seen: seen.append(ids[0].numel()))
        scores.append(model.loglikelihood(asked))
        tokens.append(sum(seen))
    whole, shared = scores
    assert [score for score, _ in shared] == pytest.approx([score for score, _ in whole], abs=1e-4)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in whole]
    assert tokens[1] < 0.75 * tokens[0]


def test_choices_may_see_more_than_texts(exported: dict[str, Path]) -> None:
    asked = requests("loglikelihood", [(TEXT[:500], " import")])
    short, long, whole = (harness.load(exported["hybrid"], WINDOW, choice_length=length)
                          for length in (None, 400, 2000))
    assert len(whole.tok_encode(TEXT[:500])) < 400
    seen = [model.loglikelihood(asked)[0][0] for model in (short, long, whole)]
    assert seen[1] == pytest.approx(seen[2]) and seen[0] != pytest.approx(seen[1])
    texts = requests("loglikelihood_rolling", [(TEXT[:500],)])
    assert long.loglikelihood_rolling(texts) == short.loglikelihood_rolling(texts)


def test_what_is_longer_than_the_window_is_scored_in_pieces(exported: dict[str, Path]) -> None:
    model = harness.load(exported["hybrid"], WINDOW)
    context, continuation = TEXT[:60], TEXT[60:560]
    ids, rest = model._encode_pair(context, continuation)
    assert len(rest) > 3 * WINDOW
    expected = 0.0
    for start in range(0, len(rest), WINDOW // 2):
        seen, asked = ids + rest[:start], rest[start : start + WINDOW // 2]
        window = torch.tensor([(seen + asked)[-(WINDOW + 1):]])
        with torch.inference_mode():
            logits = model.model(window[:, :-1]).double().log_softmax(-1)[0, -len(asked):]
        expected += logits.gather(-1, window[0, -len(asked):, None]).sum().item()
    [(score, greedy), _] = model.loglikelihood(requests("loglikelihood", [(context, continuation), ("short", " one")]))
    assert score == pytest.approx(expected, rel=1e-5) and not greedy
    assert model.cut == {(context, continuation)}
    other = model.within(WINDOW // 2)
    other.loglikelihood(requests("loglikelihood", [("short", " one")]))
    assert (other.choice_length, other.cut, model.choice_length) == (WINDOW // 2, set(), WINDOW)
    assert model.within(2 * WINDOW).choice_length == WINDOW


def test_greedy_is_seen(exported: dict[str, Path]) -> None:
    """A continuation made of the likeliest tokens is greedy, and a shorter one is scored from the same pass."""
    model = harness.load(exported["hybrid"], WINDOW)
    context = model.tok_encode("import json")
    ids = list(context)
    for _ in range(4):
        ids.append(int(model.model(torch.tensor([ids]))[0, -1].argmax()))
    likeliest = ids[len(context) :]
    other = [*likeliest[:3], (likeliest[3] + 1) % 512]
    scores = model._loglikelihood_tokens(
        [(("", ""), context, likeliest), (("", ""), context, likeliest[:2]), (("", ""), context, other)]
    )
    assert [greedy for _, greedy in scores] == [True, True, False]
    assert scores[0][0] < scores[1][0] < 0


def rows() -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """Texts of two domains, and choices of which the harness must find the likeliest."""
    texts = {
        "code": [{"id": f"code/{i}", "text": TEXT[400 * i : 400 * i + 350]} for i in range(8)],
        "docs": [{"id": f"docs/{i}", "text": "naïve " * (i + 1)} for i in range(4)],
    }
    choices = {
        "next_word": [
            {"id": f"next_word/{i}", "context": TEXT[90 * i :][:80], "choices": [" a", " of", " xyz"], "answer": i % 3}
            for i in range(12)
        ],
        "recall": [{"id": "recall/0", "context": "12", "choices": ["3", "4"], "answer": 0}] * 4,     # digits stay text
    }
    return texts, choices


def test_metrics_against_their_definitions(exported: dict[str, Path]) -> None:
    model = harness.load(exported["hybrid"], WINDOW)
    texts, choices = rows()
    result = harness.evaluate(model, texts, choices)
    totals: dict[str, tuple[float, int]] = {}
    for domain, members in texts.items():
        nats = model.loglikelihood_rolling(requests("loglikelihood_rolling", [(row["text"],) for row in members]))
        sizes = [len(row["text"].encode()) for row in members]
        bits = [-value / math.log(2) for value in nats]
        totals[domain] = sum(bits), sum(sizes)
        ratio = sum(bits) / sum(sizes)
        assert result.metrics[f"bits_per_byte_{domain}"] == pytest.approx(ratio, rel=1e-6)
        # Delta method for a ratio of means: what the bootstrap estimates.
        residuals = [bit - ratio * size for bit, size in zip(bits, sizes, strict=True)]
        spread = math.sqrt(sum(value**2 for value in residuals)) / sum(sizes)
        assert result.metrics[f"bits_per_byte_{domain}_stderr"] == pytest.approx(spread, rel=0.3)
    overall = sum(bits for bits, _ in totals.values()) / sum(size for _, size in totals.values())
    assert result.metrics["bits_per_byte"] == pytest.approx(overall, rel=1e-6)

    hits = []
    for row in choices["next_word"]:
        scores = model.loglikelihood(requests("loglikelihood", [(row["context"], choice) for choice in row["choices"]]))
        hits.append(max(range(3), key=lambda index, scores=scores: scores[index][0]) == row["answer"])
    share = sum(hits) / 12
    assert result.metrics["next_word_accuracy"] == pytest.approx(share)
    assert result.metrics["next_word_accuracy_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 11))
    assert result.metrics["next_word_items"] == 12
    assert result.metrics["recall_accuracy"] in (0.0, 1.0)
    assert "recall_cut" not in result.metrics
    assert set(result.samples) == {"bits_per_byte_code", "bits_per_byte_docs", "next_word", "recall"}
    shown = result.samples["next_word"][0]
    assert isinstance(shown, ChoiceSample)
    assert shown.chosen == shown.log_likelihoods.index(max(shown.log_likelihoods))


def test_resumed_evaluation_equals_an_unbroken_one(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(harness.BATCH_TOKENS, "cpu", 256)
    texts, choices = rows()
    unbroken = harness.evaluate(harness.load(exported["hybrid"], WINDOW), texts, choices)

    def stop(step: int, total: int) -> None:
        if len(list(tmp_path.glob("*.json"))) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.evaluate(
            harness.load(exported["hybrid"], WINDOW, scratch=tmp_path, progress=stop), texts, choices
        )
    pieces = {piece: piece.stat().st_mtime_ns for piece in tmp_path.glob("*.json")}
    assert len(pieces) == 3
    assert not (tmp_path / "resumed").exists()
    seen: list[tuple[int, int]] = []
    resumed = harness.evaluate(
        harness.load(exported["hybrid"], WINDOW, scratch=tmp_path, progress=lambda *step: seen.append(step)),
        texts,
        choices,
    )
    assert resumed == unbroken
    assert (tmp_path / "resumed").exists()
    assert all(piece.stat().st_mtime_ns == time for piece, time in pieces.items()), "not computed again"
    assert seen[-1] == (44, 44), "12 x 3 + 4 x 2 continuations"
    monkeypatch.undo()                                              # other batches, as on another device
    other = harness.evaluate(harness.load(exported["hybrid"], WINDOW, scratch=tmp_path), texts, choices)
    assert other.metrics == pytest.approx(unbroken.metrics, rel=1e-4)


def test_requests_that_cannot_be_scored(exported: dict[str, Path], tmp_path: Path) -> None:
    model = harness.load(exported["hybrid"], WINDOW)
    with pytest.raises(ModelError, match="nothing to score"):
        model.loglikelihood(requests("loglikelihood", [("a", "")]))
    for options in ({"do_sample": True}, {"max_gen_toks": WINDOW}):
        with pytest.raises(ModelError, match=r"A request wants (samples|48 tokens); .* in 48 tokens, prompt included"):
            model.generate_until(requests("generate_until", [("a", options)]))
    shutil.copytree(exported["hybrid"], tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: not found"):
        harness.load(tmp_path / "other", WINDOW)


def test_one_document_or_item_has_no_standard_error(exported: dict[str, Path]) -> None:
    texts, choices = rows()
    found = harness.evaluate(harness.load(exported["hybrid"], WINDOW), {"code": texts["code"][:1]}, {
        "recall": choices["recall"][:1]}).metrics
    assert found.keys() == {"bits_per_byte_code", "bits_per_byte", "recall_accuracy", "recall_items"}
    controls = {"bits_per_byte_code_compressor": 3.5, "recall_accuracy_control": 1, "recall_accuracy_chance": 0.5}
    assert [(score.measure, score.stderr, score.control) for score in harness.card_scores(found | controls)] == [
        ("bits per byte code", None, "3.500"), ("recall accuracy", None, "1.000, 0.500")]


def test_a_model_that_overflows_is_refused(exported: dict[str, Path]) -> None:
    """Of choices that are not numbers the first counted as chosen: an accuracy of 1 where it was the right one."""
    model = harness.load(exported["hybrid"], WINDOW)
    with torch.no_grad():
        model.model.get_parameter("backbone.layers.1.mixer.down_proj.weight").fill_(3e38)
    with pytest.raises(ModelError, match="A log-likelihood is not finite: activations overflow"):
        model.loglikelihood(requests("loglikelihood", [("x = ", "1"), ("x = ", "2")]))
    with pytest.raises(ModelError, match="Logits are not finite: activations overflow"):
        model.generate_until(requests("generate_until", [("x = ", {"until": [], "max_gen_toks": 2})]))


def test_planned_memory_is_that_of_a_batch(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in BF16 that live beside the weights while a full batch is scored, logits some rows at a time."""
    monkeypatch.setattr(costs, "EVALUATION_TOKENS", 512)
    monkeypatch.setattr(costs, "EVALUATION_LOGITS", 128)
    monkeypatch.setattr(harness, "HEAD_ROWS", 128)
    monkeypatch.setitem(harness.BATCH_TOKENS, "cpu", 512)
    monkeypatch.setitem(harness.DTYPES, "cpu", torch.bfloat16)
    one_more = 2 * 512 * 2048           # a CPU's squared ReLU makes a tensor between
    for widths, besides in (({"ffn_hidden_size": 8, "vocab_size": 1024}, 0),
                            ({"ffn_hidden_size": 2048, "vocab_size": 512}, one_more)):
        config = CONFIGS["transformer"].model_copy(update=widths | {"pattern": "-", "head_dim": 2})
        model = HybridLM.from_state(config, HybridLM(config).state_dict(), torch.bfloat16)
        whole = harness.load(exported["transformer"], 511)
        judge = harness.HarnessLM(model, whole.encoder, [2], 511)
        with HeldBytes(model.parameters()) as held:
            judge._scores("rolling", [([1], [5] * 512)], 511)
        planned = costs.evaluation_bytes(config, 511) - 2 * costs.parameters(config) - GIB + besides
        assert 0.8 * planned < held.most < 1.05 * planned, widths


def test_a_gpu_that_is_too_small_is_told_before_weights_are_read(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text((exported["hybrid"] / "config.json").read_text())     # and no weights
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: SimpleNamespace(name="small GPU", total_memory=GIB))
    with pytest.raises(ModelError, match=r"not fit: 1\.\d GiB with tensor 1, a small GPU has 1\.0\.\n.*larger GPU"):
        harness.load(tmp_path, WINDOW)
    config = hub.read_config(tmp_path)
    with pytest.raises(ModelError, match=r"not fit: (?!1\.)\d+\.\d GiB"):       # one context, longer than a full batch
        harness.load(tmp_path, WINDOW, 2**20)
    added = costs.evaluation_bytes(config, 2**20) - costs.evaluation_bytes(config, WINDOW)
    assert added >= 2 * (2**20 - costs.EVALUATION_TOKENS) * 3 * config.hidden_size


def test_contexts_that_lose_their_beginning_are_counted(exported: dict[str, Path]) -> None:
    """Items are made for one tokenizer, and a model from elsewhere has another."""
    texts, _ = rows()
    asked = [{"id": f"recall/{size}", "context": f"ab = 1\n{'x' * size}\nab =", "choices": [" 1", " 2"], "answer": 0}
             for size in (1, 200, 400)]
    found = harness.evaluate(harness.load(exported["hybrid"], WINDOW), {"code": texts["code"][:1]}, {"recall": asked})
    assert (found.metrics["recall_cut"], found.metrics["recall_items"]) == (2, 3)
    [said] = harness.cut_contexts(found.metrics)
    assert said.startswith("recall: 2 of 3 contexts lost their beginning")
