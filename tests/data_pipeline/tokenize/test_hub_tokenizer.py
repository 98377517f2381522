"""Referees: SentencePiece for the same vocabulary, the tokenizers library's own decoding for a byte-level one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from data_pipeline.config import DataError
from data_pipeline.text.words import texts_of
from data_pipeline.tokenize import fast_tokenizer, tokenizer
from data_pipeline.tokenize.hub_tokenizer import HubEncoder, HubTokenizer
from data_pipeline.tokenize.tokenization import encode_documents, encoder_of
from tests.data_pipeline.small_corpus import byte_level_bpe
from tests.stages.tiny_corpus import MODULES

TEXTS = ["", " ", "</s>a<pad><unk>", "a \u2581 b", "naïve 漢字 \U0001f600\x00\r\n",
         *(file.read_text() for file in MODULES[:20])]
TABLE = pa.table({"text": TEXTS})


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with byte-level BPE, as Nemotron-H's, an added word and a length."""
    directory: Path = tmp_path_factory.mktemp("byte-level")
    made = byte_level_bpe(TEXTS, 600)
    made.add_tokens(["über"])
    made.enable_truncation(8)           # of no meaning for token files
    made.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return directory


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with this project's own tokenizer, as exported."""
    directory: Path = tmp_path_factory.mktemp("pieces")
    (directory / "own.model").write_bytes(tokenizer.train_on([path.read_text() for path in MODULES], 512))
    fast_tokenizer.export(directory / "own.model", directory)
    (directory / "config.json").write_text('{"eos_token_id": 2}')
    return directory


def test_our_own_gives_what_sentencepiece_gives(pieces: Path) -> None:
    ids, lengths, counts = encode_documents(encoder_of(pieces), TABLE)
    expected = encode_documents(encoder_of(pieces / tokenizer.MODEL_FILE), TABLE)
    assert np.array_equal(ids, expected[0]) and np.array_equal(lengths, expected[1]) and counts == expected[2]
    assert counts.single_bytes > 0 and counts.documents == len(TEXTS)
    hub, ours = HubTokenizer(pieces), tokenizer.Tokenizer(pieces / tokenizer.MODEL_FILE)
    assert np.array_equal(hub.token_bytes, ours.token_bytes) and np.array_equal(hub.is_byte, ours.is_byte)
    assert (hub.vocab_size, hub.eod_id, hub.unk_id) == (ours.vocab_size, ours.eod_id, ours.unk_id)


def test_byte_level_keeps_every_byte_and_ends_documents(byte_level: Path) -> None:
    hub, referee = HubTokenizer(byte_level), Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    ids = HubEncoder(hub).encode(texts_of(TABLE))
    documents = np.split(ids, np.flatnonzero(ids == hub.eod_id) + 1)[:-1]
    vocabulary = referee.get_vocab()
    decoded = [referee.decode(each[:-1].tolist(), skip_special_tokens=False) for each in documents]
    assert hub.eod_id == 2 and decoded == TEXTS
    assert [hub.token_bytes[each].sum() for each in documents] == [len(text.encode()) for text in TEXTS]
    assert not hub.token_bytes[:4].any() and hub.token_bytes[vocabulary["über"]] == 5
    assert np.flatnonzero(hub.is_byte).tolist() == sorted(
        vocabulary[token] for token in pre_tokenizers.ByteLevel.alphabet()
        if "\ufffd" in referee.decode([vocabulary[token]]))


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(byte_level: Path, text: str) -> None:
    hub = HubTokenizer(byte_level)
    ids = hub.encode_batch([text])[0]
    assert hub.token_bytes[ids].sum() == len(text.encode()) and hub.eod_id not in ids
    assert Tokenizer.from_file(str(byte_level / "tokenizer.json")).decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("normalizer", "text", "changed"), [
    (normalizers.NFKC(), "ﬁ", "fi"), (normalizers.Lowercase(), "Ich", "ich"),       # of other bytes, and as many
])
def test_a_tokenizer_that_changes_text_is_an_error(
    byte_level: Path, tmp_path: Path, normalizer: normalizers.Normalizer, text: str, changed: str
) -> None:
    changing = Tokenizer.from_file(str(byte_level / "tokenizer.json"))
    changing.normalizer = normalizer
    changing.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    plain = ["plain"]
    assert HubTokenizer(tmp_path).encode_batch(plain) == HubTokenizer(byte_level).encode_batch(plain)
    with pytest.raises(DataError, match=rf"tokenizer\.json: changes a text: '{text}'\.\.\. to '{changed}'") as error:
        HubTokenizer(tmp_path).encode_batch(["plain", text])
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(("file", "content", "message"), [
    ("tokenizer.json", "{", "not a tokenizer"),
    ("tokenizer.json", None, "not a tokenizer"),
    ("tokenizer.json", json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}),
     "WordLevel without a token for each byte"),
    ("generation_config.json", "{}", "no eos_token_id, nor in config.json"),
    ("generation_config.json", "[", "not a JSON object"),
    ("generation_config.json", '{"eos_token_id": 77}', "eos_token_id 77 is no special token"),
])
def test_what_cannot_be_used_is_two_lines(
    byte_level: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        (tmp_path / name).write_bytes((byte_level / name).read_bytes())
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        HubTokenizer(tmp_path)
    assert str(error.value).count("\n") == 1 and file in str(error.value)
