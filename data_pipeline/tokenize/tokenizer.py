"""SentencePiece BPE: training on a sample of the curated text, and the tokenizer every later stage uses.

Byte fallback and no normalisation make it lossless (the one exception: U+2581, SentencePiece's own sign for a space,
comes back as a space). Digits stand alone, runs of spaces are pieces of their own, and nothing is put before the
text, so a tokenizer.json can repeat it exactly (fast_tokenizer). Text that spells a control token stays text.

Ids: 0 `<unk>` (never produced), 1 `<s>` (reserved, not used in training), 2 `</s>` the end-of-document mark,
3 `<pad>`; then 256 bytes, then pieces.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from sentencepiece import sentencepiece_model_pb2

from data_pipeline.config import DataError, TokenizerConfig
from data_pipeline.curated import shards, survey, with_ids

UNK_ID, BOS_ID, EOD_ID, PAD_ID = range(4)
BYTE_IDS = range(4, 260)     # single bytes: what a character outside the vocabulary becomes
MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"             # what SentencePiece writes for a space
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6     # ModelProto.SentencePiece.Type
BPE = 2                                         # TrainerSpec.ModelType
# SentencePiece drops a whole document that holds the character it marks unknown ones with.
RESERVED_BY_SENTENCEPIECE = "\u2585"
FEW = 64                     # texts: SentencePiece starts a thread for a list of them, which takes longer
LONGEST_DOCUMENT = 2**30     # bytes, as large as SentencePiece allows; its default drops documents over 4192


class Tokenizer:
    """A trained SentencePiece model.

    Attributes:
        vocab_size: number of ids, control tokens and bytes included.
        eod_id: id that ends a document; its token is `</s>`. Text never encodes to it.
        pieces: what text is merged into, neither control tokens nor bytes. A space is U+2581 in them.
        token_bytes: (vocab_size,) uint16, UTF-8 bytes that each id adds to the decoded text: none for control tokens,
            the end-of-document mark among them; one for a byte, a part of its character.
        is_byte: (vocab_size,) bool, ids that stand for a byte of a character outside the vocabulary.
        digest: SHA-256 of the model file, hexadecimal.

    Raises:
        DataError: the file is missing, is no SentencePiece model, or was trained with other options.
    """

    def __init__(self, path: Path | str):
        model = read_model(Path(path))
        content = Path(path).read_bytes()
        self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = len(model.pieces)
        self.eod_id, self.unk_id = EOD_ID, UNK_ID
        self.pieces: list[str] = [piece.piece for piece in model.pieces if piece.type == NORMAL]
        self.token_bytes = np.zeros(self.vocab_size, np.uint16)
        self.token_bytes[BYTE_IDS.start :] = 1
        self.token_bytes[BYTE_IDS.stop :] = [len(piece.replace(SPACE, " ").encode()) for piece in self.pieces]
        self.is_byte = np.isin(np.arange(self.vocab_size), BYTE_IDS)
        self.digest = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document mark."""
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of each text, in order; `threads` change the speed alone."""
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=threads)
        return ids

    def encode_segments(self, segments: list[bytes]) -> list[list[int]]:
        """Ids of each piece of UTF-8 text."""
        if len(segments) < FEW:
            return [self._model.encode(segment) for segment in segments]
        ids: list[list[int]] = self._model.encode(segments, num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control ids become nothing, bytes that are not UTF-8 become U+FFFD."""
        text: str = self._model.decode([int(i) for i in ids])
        return text


def read_model(path: Path) -> Any:
    """The model file as its protobuf message, a `ModelProto`, if it was trained as `train` does. Raises DataError."""
    model = GetMessageClass(sentencepiece_model_pb2.DESCRIPTOR.message_types_by_name["ModelProto"])()
    try:
        model.ParseFromString(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: not found.\nRun the `tokenizer` stage, which writes it.") from None
    except DecodeError as error:
        raise DataError(
            f"{path}: not a SentencePiece model ({error}).\nRun the `tokenizer` stage, which writes it."
        ) from None
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = [piece.type for piece in model.pieces]
    wrong = [
        name
        for name, differs in {
            "model_type is not bpe": trainer.model_type != BPE,
            "no byte_fallback": not trainer.byte_fallback,
            "a normalization rule": bool(normalizer.precompiled_charsmap),
            "add_dummy_prefix": normalizer.add_dummy_prefix,
            "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
            "whitespace not escaped": not normalizer.escape_whitespaces,
            "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
            "the first pieces are not <unk>, <s>, </s>, <pad> and 256 bytes":
                kinds[: BYTE_IDS.stop] != [UNKNOWN, CONTROL, CONTROL, CONTROL, *[BYTE] * len(BYTE_IDS)]
                or (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) != (UNK_ID, BOS_ID, EOD_ID, PAD_ID),
            "user-defined or unused pieces": set(kinds[BYTE_IDS.stop :]) != {NORMAL},
        }.items()
        if differs
    ]
    if wrong:
        raise DataError(f"{path}: unusable here: {', '.join(wrong)}.\nTrain it with the `tokenizer` stage.")
    return model


def training_texts(curated: Path, config: TokenizerConfig, seed: int) -> Iterator[str]:
    """The texts a tokenizer is trained on: `training_megabytes`, the same share of each domain where it has that.

    What a small domain lacks goes to the larger ones. Raises DataError.
    """
    files, left = shards(curated, "train"), config.training_megabytes * 1e6
    domains, chosen = survey(files, left, seed), []
    for position, domain in enumerate(domains.values()):
        limit = min(float(domain.bytes), left / (len(domains) - position))
        chosen += domain.choose(limit)
        left -= limit
    for batch in with_ids(files, chosen):
        yield from batch["text"].to_pylist()


def train(curated: Path, config: TokenizerConfig, seed: int, out: Path) -> int:
    """Train on a sample of the curated training documents and write `out`/tokenizer.model; bytes of the sample,
    fewer than `training_megabytes` where the corpus has no more.

    A document is one training sentence, newlines included, so that ends of lines merge with what stands before them.
    The same documents, configuration and seed give the same file. Raises DataError when the text cannot fill
    `vocab_size` or needs more.
    """
    sizes: list[int] = []

    def counted() -> Iterator[str]:
        for text in training_texts(curated, config, seed):
            sizes.append(len(text.encode()))
            yield text

    model = train_on(counted(), config.vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    (out / MODEL_FILE).write_bytes(model)
    return sum(sizes)


def train_on(texts: Iterable[str], vocab_size: int) -> bytes:
    """The SentencePiece model trained on `texts`, serialised. Raises DataError."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text.replace(RESERVED_BY_SENTENCEPIECE, " ") for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOD_ID,
            pad_id=PAD_ID,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=LONGEST_DOCUMENT,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rpartition("] ")[2] or str(error)
        reason = reason.partition(" Increase vocab_size")[0]            # by an option that is none here
        raise DataError(
            f"tokenizer.vocab_size: {vocab_size} cannot be trained on this sample: {reason}\n"
            "Change tokenizer.vocab_size, or raise tokenizer.training_megabytes."
        ) from None
    return model.getvalue()
