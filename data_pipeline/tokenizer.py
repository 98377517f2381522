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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import polars as pl
import sentencepiece
import xxhash

from data_pipeline.config import DataError, TokenizerConfig

UNK_ID, BOS_ID, EOD_ID, PAD_ID = range(4)
MODEL_FILE = "tokenizer.model"
COLUMNS = ("id", "text", "domain")
# SentencePiece drops a whole document that holds the character it marks unknown ones with.
RESERVED_BY_SENTENCEPIECE = "\u2585"
LONGEST_DOCUMENT = 2**30     # bytes, as large as SentencePiece allows; its default drops documents over 4192


class Tokenizer:
    """A trained SentencePiece model.

    Attributes:
        vocab_size: number of ids, control tokens and bytes included.
        eod_id: id that ends a document; its token is `</s>`. Text never encodes to it.
        digest: SHA-256 of the model file, hexadecimal.

    Raises:
        DataError: the file is missing, is no SentencePiece model, or has other control ids.
    """

    def __init__(self, path: Path | str):
        path = Path(path)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: not found.\nRun the `tokenizer` stage, which writes it.") from None
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f"{path}: not a SentencePiece model ({error}).\nRun the `tokenizer` stage, which writes it."
            ) from None
        found = [self._model.unk_id(), self._model.bos_id(), self._model.eos_id(), self._model.pad_id()]
        if found != [UNK_ID, BOS_ID, EOD_ID, PAD_ID]:
            raise DataError(
                f"{path}: the ids of <unk>, <s>, </s>, <pad> are {found}, expected [0, 1, 2, 3].\n"
                "Train the tokenizer with the `tokenizer` stage."
            )
        self.vocab_size: int = self._model.vocab_size()
        self.eod_id = EOD_ID
        self.digest = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without an end-of-document mark."""
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of each text, in order; `threads` change the speed alone."""
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=threads)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control ids become nothing, bytes that are not UTF-8 become U+FFFD."""
        text: str = self._model.decode([int(i) for i in ids])
        return text

    def is_byte(self, token: int) -> bool:
        """Whether the id stands for a single byte, as characters outside the vocabulary do."""
        return bool(self._model.is_byte(token))


def shards(curated: Path, split: str) -> list[Path]:
    """The Parquet files of `curated`/SPLIT (`train`, `heldout`) in order. Raises DataError."""
    files = sorted((curated / split).glob("part-*.parquet"))
    if not files:
        raise DataError(f"{curated / split}: no part-*.parquet files.\nRun the `curate` stage, which writes them.")
    return files


def scan(curated: Path, split: str) -> pl.LazyFrame:
    """The documents of `curated`/SPLIT in file and row order. Raises DataError."""
    files = shards(curated, split)
    frame = pl.scan_parquet(files)
    if missing := [name for name in COLUMNS if name not in frame.collect_schema()]:
        raise DataError(f"{files[0]}: columns {missing} are missing.\nRun the `curate` stage again.")
    return frame


def domain_bytes(documents: pl.LazyFrame) -> dict[str, int]:
    """Bytes of UTF-8 text of each domain, smallest first."""
    sizes = documents.group_by("domain").agg(bytes=pl.col("text").str.len_bytes().sum()).collect()
    return dict(sizes.sort("bytes", "domain").rows())


def sample(documents: pl.LazyFrame, limits: Mapping[str, float], seed: int) -> pl.DataFrame:
    """Whole documents of each domain up to `limits[domain]` bytes, chosen in an order drawn by `seed`.

    A document that no longer fits is passed over, so that one large document does not end the choice; a domain whose
    documents are all too large gives its smallest. The result keeps the order of `documents` and their columns.
    """
    sizes = documents.select("id", "domain", bytes=pl.col("text").str.len_bytes()).collect(engine="streaming")
    chosen: list[str] = []
    for domain in sorted(limits):
        rows = sizes.filter(domain=domain).select("id", "bytes").rows()
        rows.sort(key=lambda row: xxhash.xxh3_64_intdigest(row[0].encode(), seed=seed))
        room, before = limits[domain], len(chosen)
        for identity, size in rows:
            if size <= room:
                chosen.append(identity)
                room -= size
        if rows and len(chosen) == before:
            chosen.append(min(rows, key=lambda row: (row[1], row[0]))[0])
    return documents.filter(pl.col("id").is_in(chosen)).collect()


def training_sample(curated: Path, config: TokenizerConfig, seed: int) -> pl.DataFrame:
    """The documents a tokenizer is trained on: `training_megabytes`, the same share of each domain where it has that.

    What a small domain lacks goes to the larger ones.
    """
    documents = scan(curated, "train")
    sizes = domain_bytes(documents)
    left, limits = config.training_megabytes * 1e6, {}
    for position, (domain, size) in enumerate(sizes.items()):
        limits[domain] = min(float(size), left / (len(sizes) - position))
        left -= limits[domain]
    return sample(documents, limits, seed)


def train(curated: Path, config: TokenizerConfig, seed: int, out: Path) -> None:
    """Train on a sample of the curated training documents and write `out`/tokenizer.model.

    A document is one training sentence, newlines included, so that ends of lines merge with what stands before them.
    The same documents, configuration and seed give the same file. Raises DataError when the text cannot fill
    `vocab_size` or needs more.
    """
    texts = training_sample(curated, config, seed)["text"]
    out.mkdir(parents=True, exist_ok=True)
    (out / MODEL_FILE).write_bytes(train_on(texts, config.vocab_size))


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
        raise DataError(
            f"tokenizer.vocab_size: {vocab_size} cannot be trained on this sample: {reason}\n"
            "Change tokenizer.vocab_size, or raise tokenizer.training_megabytes."
        ) from None
    return model.getvalue()
