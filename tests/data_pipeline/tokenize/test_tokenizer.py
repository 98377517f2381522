import io
import random
import sysconfig
from pathlib import Path

import polars as pl
import pytest
import sentencepiece

from data_pipeline.config import DataError, TokenizerConfig
from data_pipeline.tokenize import tokenizer as library
from tests.data_pipeline.small_corpus import write_curated
from tests.data_pipeline.tokenize.test_segment_encoder import AWKWARD

STDLIB = Path(sysconfig.get_paths()["stdlib"])
STDLIB_TEXT = (STDLIB / "ast.py").read_text()
LONG = ("ast.py", "turtle.py", "typing.py", "tarfile.py")


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    return write_curated(tmp_path_factory.mktemp("corpus") / "curated", held_out=["json"])


@pytest.fixture(scope="module")
def model_path(curated, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    library.train(curated, TokenizerConfig(vocab_size=1024, training_megabytes=0.4), 7, out)
    return out / "tokenizer.model"


@pytest.fixture(scope="module")
def tokenizer(model_path) -> library.Tokenizer:
    return library.Tokenizer(model_path)


@pytest.mark.parametrize("text", [*AWKWARD, *(path.read_text() for path in map(STDLIB.joinpath, LONG))])
def test_round_trip_loses_nothing_and_bytes_of_the_tokens_are_those_of_the_text(tokenizer, text):
    """But for U+2581, which is decoded as a space; files are longer than any limit of a line."""
    ids, expected = tokenizer.encode(text), text.replace("\u2581", " ")
    assert tokenizer.decode(ids) == expected
    assert tokenizer.token_bytes[ids].sum() == len(expected.encode())


def test_bytes_of_each_token(tokenizer):
    """Control tokens have none, a byte is one though it is no whole character, a piece is what it decodes to."""
    assert tokenizer.token_bytes[:260].tolist() == [0] * 4 + [1] * 256
    decoded = [len(tokenizer.decode([token]).encode()) for token in range(260, 1024)]
    assert tokenizer.token_bytes[260:].tolist() == decoded and max(decoded) > 4


def test_text_that_spells_a_control_token_stays_text(tokenizer):
    for name in ("<unk>", "<s>", "</s>", "<pad>"):
        assert not {0, 1, 2, 3} & set(tokenizer.encode(f"a {name} b{name}"))


def test_ids_and_pieces(tokenizer, model_path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    assert [model.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (1024, 2)
    pieces = [model.id_to_piece(i) for i in range(260, 1024)]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece) and len(piece.strip("▁")) > 1] == []
    assert any(piece.endswith("\n") and len(piece) > 1 for piece in pieces)      # documents are trained whole
    assert any(set(piece) == {"▁"} and len(piece) >= 4 for piece in pieces)      # indentation is a piece


def test_same_seed_same_file_other_seed_other_sample(curated, tmp_path):
    config = TokenizerConfig(vocab_size=640, training_megabytes=0.2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert 0.1e6 < library.train(curated, config, seed, tmp_path / name) <= 0.2e6
    digests = [library.Tokenizer(tmp_path / name / "tokenizer.model").digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_what_was_trained_on_is_told_where_the_corpus_has_less_than_was_asked_for(curated, tmp_path):
    config, whole = TokenizerConfig(vocab_size=640, training_megabytes=99), pl.read_parquet(curated / "train/*.parquet")
    assert library.train(curated, config, 1, tmp_path) == whole["text"].str.len_bytes().sum() < 99e6


def test_batches_and_threads_change_nothing(tokenizer):
    texts = [*AWKWARD, (STDLIB / "ast.py").read_text()]
    assert tokenizer.encode_batch(texts, threads=3) == [tokenizer.encode(text) for text in texts]


def test_training_texts_are_balanced_and_give_the_remainder_to_large_domains(curated):
    rows = pl.read_parquet(sorted(curated.glob("train/*.parquet")))
    domain_of = dict(rows.select("text", "domain").rows())
    available = {domain: len("".join(rows.filter(domain=domain)["text"]).encode()) for domain in ("code", "docs")}
    small, large = sorted(available, key=available.__getitem__)
    config = TokenizerConfig(vocab_size=512, training_megabytes=2.5 * available[small] / 1e6)
    sizes = {small: 0, large: 0}
    for text in library.training_texts(curated, config, 3):
        sizes[domain_of[text]] += len(text.encode())
    assert sizes[small] == available[small]
    assert 1.4 * available[small] < sizes[large] <= 1.5 * available[small]


def test_a_line_of_a_megabyte_trains():
    words = "".join(random.Random(0).choices("abcdefghij", k=1_000_000))
    plain, longer = library.train_on([STDLIB_TEXT], 640), library.train_on([STDLIB_TEXT, words], 640)
    assert plain != longer


def test_a_document_with_sentencepieces_reserved_character_is_not_dropped():
    plain, marked = library.train_on([STDLIB_TEXT + " "], 640), library.train_on([STDLIB_TEXT + "▅"], 640)
    assert plain == marked


def test_impossible_vocabulary_is_named():
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: 4096 cannot .*too high.*\n.*training_megabytes"):
        library.train_on(["too little text to learn from\n" * 30], 4096)
    with pytest.raises(DataError, match=r"vocab_size: 1200 cannot .* 1200 vs \d+\.\nChange tokenizer\.vocab_size"):
        library.train_on(["".join(map(chr, range(0x4E00, 0x5634)))] * 20, 1200)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(DataError, match="not found"):
        library.Tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        library.Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="no part-"):
        library.train(tmp_path, TokenizerConfig(vocab_size=512, training_megabytes=1), 0, tmp_path)


def test_models_with_other_control_ids_are_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([STDLIB_TEXT]), model_writer=model, model_type="bpe", vocab_size=700, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        max_sentence_length=10**6, minloglevel=2)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=r"tokenizer\.model: unusable here: the first pieces are not.*<pad>.*\nTrain"):
        library.Tokenizer(tmp_path / "tokenizer.model")
