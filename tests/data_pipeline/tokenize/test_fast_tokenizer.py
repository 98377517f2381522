"""Referee: sentencepiece itself. transformers and tokenizers must give its ids for every text."""

import io
import json
import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.config import DataError
from data_pipeline.tokenize import fast_tokenizer, tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
FILES = sorted(STDLIB.glob("*.py"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("fast")
    texts = [path.read_text() for path in FILES[::4]]
    (root / "tokenizer.model").write_bytes(tokenizer.train_on(texts, 2048))
    fast_tokenizer.export(root / "tokenizer.model", root / "hub")
    return root / "tokenizer.model", root / "hub"


@pytest.fixture(scope="module")
def ours(trained) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(trained[0])


@pytest.fixture(scope="module")
def theirs(trained):
    return AutoTokenizer.from_pretrained(trained[1])


def assert_equal(ours, theirs, texts: list[str]) -> None:
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert theirs(text)["input_ids"] == ids, repr(text[:200])
        assert theirs.decode(ids) == ours.decode(ids), repr(text[:200])


def test_loader_takes_the_file_as_it_stands(theirs, trained):
    assert isinstance(theirs, PreTrainedTokenizerFast)
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 2, 2, 3)
    assert len(theirs) == 2048
    assert theirs.padding_side == "left"
    assert (trained[1] / "tokenizer.model").read_bytes() == trained[0].read_bytes()      # for llama.cpp's converter
    described = json.loads((trained[1] / "tokenizer_config.json").read_text())
    assert described["add_prefix_space"] is described["add_bos_token"] is False
    assert FastTokenizer.from_file(str(trained[1] / "tokenizer.json")).get_vocab_size() == 2048


def test_thousands_of_real_lines(ours, theirs):
    """Lines of the standard library, each once, all of them with what follows as well."""
    lines = list(dict.fromkeys(line for path in FILES for line in path.read_text().splitlines(keepends=True)))[:4000]
    assert len(lines) == 4000
    pairs = [first + second for first, second in zip(lines[::2], lines[1::2], strict=True)]
    texts = lines + pairs
    ids = ours.encode_batch(texts)
    assert theirs(texts)["input_ids"] == ids
    assert theirs.batch_decode(ids) == texts == [ours.decode(row) for row in ids]


UNITS = [" ", "\t", "\n", "\r\n", " \n", "\n ", "=", "-", "#", "a", "ab", "aba", "in", "0", "x ", " x", "_"]
PLANES = [range(0x20, 0x250), range(0x300, 0x700), range(0x1f00, 0x2600), range(0x3000, 0x3100),
          range(0xac00, 0xac40), range(0xfb00, 0xfb10), range(0xff00, 0xffef), range(0x1f300, 0x1f5ff)]
CHARACTERS = [chr(code) for plane in PLANES for code in plane]
CONTROLS = ["<s>", "</s>", "a <unk> b", "<pad><pad>", "x</s>\n<s>y", " <s> ", "<0x41>", "<0x0A>\n", "\\</s\\>"]


@pytest.mark.parametrize("texts", [
    [path.read_text() for path in FILES[:50]], [unit * count for unit in UNITS for count in [*range(1, 40), 333]],
    [*CHARACTERS, "".join(CHARACTERS), " ".join(CHARACTERS)], CONTROLS,
], ids=["source files", "spaces, tabs and lines", "every class of characters", "control tokens spelt"])
def test_ids_and_texts_are_those_of_sentencepiece(ours, theirs, texts):
    assert_equal(ours, theirs, texts)
    assert texts is not CONTROLS or not {0, 1, 2, 3} & set(theirs("".join(texts))["input_ids"])


def test_random_strings(ours, theirs):
    draw = random.Random(5)
    pieces = [piece.replace("▁", " ") for piece in theirs.convert_ids_to_tokens(list(range(260, 2048)))]
    joined = ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(1500)]
    periodic = [piece * draw.randint(2, 9) + piece[: draw.randint(0, len(piece))] for piece in pieces]
    noise = [draw.randbytes(draw.randint(1, 80)).decode("latin-1") for _ in range(700)]
    broken = [draw.randbytes(draw.randint(1, 80)).decode("utf-8", errors="replace") for _ in range(700)]
    assert_equal(ours, theirs, joined + periodic + noise + broken)


def test_other_options_are_refused(tmp_path):
    model = io.BytesIO()
    texts = [path.read_text()[:2000] for path in FILES[:30]]
    sentencepiece.SentencePieceTrainer.train(     # SentencePiece's defaults: nmt_nfkc, dummy prefix, unigram
        sentence_iterator=iter(texts), model_writer=model, vocab_size=400, max_sentence_length=10_000, minloglevel=2,
        hard_vocab_limit=False)
    (tmp_path / "other.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=r"not bpe.*normalization rule.*add_dummy_prefix.*\nTrain"):
        fast_tokenizer.export(tmp_path / "other.model", tmp_path)
