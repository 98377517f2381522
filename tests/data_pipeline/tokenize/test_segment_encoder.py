"""Referee: SentencePiece on whole documents. Every id must be its."""

import random
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece

from data_pipeline.text.words import texts_of
from data_pipeline.tokenize import segment_encoder, tokenizer
from data_pipeline.tokenize.segment_encoder import SegmentEncoder, _split, joined_pairs

STDLIB = Path(sysconfig.get_paths()["stdlib"])
FILES = sorted(STDLIB.glob("*.py"))
TOPICS = (STDLIB / "pydoc_data" / "topics.py").read_text()
AWKWARD = [
    "", " ", "   leading", "trailing   ", "\n", "a\n\n\n    b\n", "\tdef f(x):\r\n\treturn 1\n", "x" * 5000, " " * 777,
    "naïve café ﬁ Å Å Ⅷ", "日本語のテキスト、漢字。カタカナ", "👩‍👩‍👧 emoji", "\x00\x01\x7f\ufeff\ufffd", "▅ ▄ █",
    "<s> </s> <unk> <pad> <0x41>", "</s>", "\u00a0\u2003\u3000 spaces", "\U0010ffff", "20250123 3.14",
    "▁", " ▁ ▁▁x▁y ▁", "a▁b c ▁▁  ▁d\n▁", "é▁ ▁é", "__init__.py: self._x1 -> None", "𝔘𝔫𝔦 e\u0301\u0301x",
]


@pytest.fixture(scope="module", params=[1024, 12_000])
def path(request, tmp_path_factory) -> Path:
    """A model of mostly Python, and a larger one that also knows Cyrillic, Greek, Chinese and literal U+2581."""
    texts = [file.read_text() for file in FILES[::3]]
    if request.param > 5000:
        draw = random.Random(1)
        syllables = ["при", "вет", "мир", "код", "αβγ", "δε", "漢", "字", "語", "日本", "の", "▁▁", "a▁", "é", "ü"]
        texts += [" ".join("".join(draw.choices(syllables, k=draw.randint(1, 6))) for _ in range(400))
                  for _ in range(60)]
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    file.write_bytes(tokenizer.train_on(texts, request.param))
    return file


@pytest.fixture
def encoder(path) -> SegmentEncoder:
    return SegmentEncoder(tokenizer.Tokenizer(path))


def referee(path: Path, texts: Sequence[str]) -> np.ndarray:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return np.concatenate([np.array([*ids, 2], np.int32) for ids in model.encode(list(texts))])


def encode(encoder: SegmentEncoder, texts: Sequence[str]) -> np.ndarray:
    return encoder.encode(texts_of(pa.table({"text": list(texts)})))


def test_megabytes_of_source_and_prose(encoder, path):
    texts = [file.read_text() for file in FILES[::2]]
    texts += [TOPICS[start : start + 7000] for start in range(0, 10**6, 14_000)]
    assert sum(map(len, texts)) > 2e6
    expected = referee(path, texts)
    np.testing.assert_array_equal(encode(encoder, texts), expected)
    np.testing.assert_array_equal(encode(encoder, texts), expected)         # from memory
    assert 5_000 < encoder._entries < len(expected) / 5


def test_awkward_texts_alone(encoder, path):
    for text in AWKWARD:
        ids = referee(path, [text])
        np.testing.assert_array_equal(encode(encoder, [text]), ids, err_msg=repr(text))
        assert encoder.encode_text(text) == ids[:-1].tolist()


def test_awkward_texts_together_and_ends_of_documents(encoder, path):
    ids = encode(encoder, AWKWARD)
    np.testing.assert_array_equal(ids, referee(path, AWKWARD))
    assert np.count_nonzero(ids == encoder.tokenizer.eod_id) == len(AWKWARD)        # no text became one
    assert not np.isin(ids, [0, 1, 3]).any()


def test_random_strings_of_pieces_and_noise(encoder, path):
    draw = random.Random(3)
    pieces = [piece.replace("▁", draw.choice(" ▁")) for piece in encoder.tokenizer.pieces]
    texts = ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(2000)]
    texts += [piece * draw.randint(2, 9) + piece[: draw.randint(0, len(piece))] for piece in pieces[:3000]]
    texts += [draw.randbytes(draw.randint(1, 80)).decode("latin-1") for _ in range(500)]
    texts += ["".join(chr(draw.choice([draw.randrange(32, 0xD800), draw.randrange(0xE000, 0x110000), 32, 0x2581]))
                      for _ in range(30)) for _ in range(500)]
    np.testing.assert_array_equal(encode(encoder, texts), referee(path, texts))


def test_no_piece_is_ever_cut(encoder):
    """What the proof rests on: a boundary stands only where no piece holds the two characters."""
    joined = joined_pairs(encoder.tokenizer.pieces)
    for space in (" ", "▁"):
        texts = texts_of(pa.table({"text": [piece.replace("▁", space) for piece in encoder.tokenizer.pieces]}))
        np.testing.assert_array_equal(_split(texts.buffer, texts.offsets, joined), np.repeat(texts.offsets[1:], 2))


def test_segments_are_short(encoder):
    texts = texts_of(pa.table({"text": [file.read_text() for file in FILES[:60]]}))
    segments = len(_split(texts.buffer, texts.offsets, joined_pairs(encoder.tokenizer.pieces)))
    assert len(texts.buffer) / segments < 6


@pytest.mark.parametrize(("entries", "key_bytes"), [(50, 1 << 20), (1 << 20, 300), (2, 16)])
def test_forgetting_changes_nothing(path, monkeypatch, entries, key_bytes):
    monkeypatch.setattr(segment_encoder, "ENTRIES", entries)
    monkeypatch.setattr(segment_encoder, "KEY_BYTES", key_bytes)
    encoder = SegmentEncoder(tokenizer.Tokenizer(path))
    texts = [*AWKWARD, (STDLIB / "ast.py").read_text()[: 20 * entries * key_bytes]]
    for _ in range(2):
        np.testing.assert_array_equal(encode(encoder, texts), referee(path, texts))


def test_a_slice_of_a_table_and_no_documents(encoder, path):
    table = pa.table({"text": AWKWARD})
    np.testing.assert_array_equal(encoder.encode(texts_of(table.slice(5, 7))), referee(path, AWKWARD[5:12]))
    assert len(encode(encoder, pa.array([], pa.string()).to_pylist())) == 0
