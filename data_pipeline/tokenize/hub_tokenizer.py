"""The tokenizer of a Hugging Face directory: token files for a model that came with it.

Bytes are counted by id, so what ids decode to must be the text, byte by byte. Byte-level BPE does that (Nemotron-H's),
and BPE of characters with a byte for what it lacks and nothing put before the text (this project's). A tokenizer that
changes a text is an error at the first one. Text that spells a special token stays text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.config import DataError
from data_pipeline.text.words import Int32, Texts
from data_pipeline.tokenize.tokenizer import SPACE

# The character that stands for a byte in byte-level BPE: its own, or one from U+0100 on where that is not printable.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {
    chr(0x100 + number): byte for number, byte in enumerate(sorted(set(range(0x100)) - set(PRINTABLE)))}


class HubTokenizer:
    """tokenizer.json of `directory`, and its end of text: the first id in generation_config.json, else config.json.

    Attributes:
        vocab_size: one more than the largest id.
        eod_id: id that ends a document. Text never encodes to it.
        unk_id: of the token for what the vocabulary lacks, -1 if there is none.
        token_bytes: (vocab_size,) uint16, UTF-8 bytes that each id adds to the decoded text: none for special tokens.
        is_byte: (vocab_size,) bool, ids that stand for a byte of a character outside the vocabulary.
        digest: SHA-256 of tokenizer.json, hexadecimal.
        files: what was read.

    Raises:
        DataError: a file is missing or broken, no special token ends a text, or bytes cannot be counted by id.
    """

    def __init__(self, directory: Path):
        self.path = directory / "tokenizer.json"
        try:
            content = self.path.read_bytes()
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:      # the library raises no other class
            raise DataError(
                f"{self.path}: not a tokenizer ({error}).\nGive a directory that was exported or downloaded whole."
            ) from None
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = hashlib.sha256(content).hexdigest()
        described: dict[str, Any] = json.loads(self._tokenizer.to_str())
        vocabulary, model = self._tokenizer.get_vocab(), described["model"]
        self._byte_level = '"ByteLevel"' in json.dumps(described["decoder"])
        if model["type"] != "BPE" or not (self._byte_level or model.get("byte_fallback")):
            raise DataError(
                f"{self.path}: {model['type']} without a token for each byte; the bytes of its tokens are not known.\n"
                "Take a model with byte-level BPE, or BPE with byte_fallback."
            )
        self.vocab_size = max(vocabulary.values()) + 1
        self.unk_id = vocabulary.get(model.get("unk_token"), -1)
        special = {token["id"]: token["special"] for token in described["added_tokens"]}
        self.eod_id, eod_path = _end_of_text(directory)
        self.files = [self.path, eod_path]
        if not special.get(self.eod_id):
            raise DataError(
                f"{eod_path}: eos_token_id {self.eod_id} is no special token of {self.path.name}.\n"
                "Write the id there that ends a text, by the tokenizer."
            )
        self._bytes = [b""] * self.vocab_size
        self.is_byte = np.zeros(self.vocab_size, np.bool_)
        for token, index in vocabulary.items():
            if index in special:
                self._bytes[index] = b"" if special[index] else token.encode()
            elif self._byte_level and BYTE_OF.keys() >= set(token):
                self._bytes[index] = bytes(map(BYTE_OF.__getitem__, token))
                self.is_byte[index] = len(token) == 1 and BYTE_OF[token] >= 128
            elif self._byte_level:      # which the library's decoder takes as it is
                self._bytes[index] = token.encode()
            else:
                self.is_byte[index] = len(token) == 6 and token.startswith("<0x")
                self._bytes[index] = (bytes([int(token[3:5], 16)]) if self.is_byte[index]
                                      else token.replace(SPACE, " ").encode())
        self.token_bytes = np.array(list(map(len, self._bytes)), np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end-of-document mark. Raises DataError where their bytes are not the text's."""
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for text, ids in zip(texts, found, strict=True):
            kept = text if self._byte_level else text.replace(SPACE, " ")
            if (changed := b"".join(map(self._bytes.__getitem__, ids))) != kept.encode():
                raise DataError(
                    f"{self.path}: changes a text: {text[:40]!r}... to {changed.decode(errors='replace')[:40]!r}...\n"
                    "Take a model whose tokenizer keeps every byte, or leave such documents out."
                )
        return found


class HubEncoder:
    """Encodes documents with `tokenizer`, each ended by its end-of-document id."""

    def __init__(self, tokenizer: HubTokenizer):
        self.tokenizer = tokenizer

    def encode(self, texts: Texts) -> Int32:
        """Ids of all documents of `texts` one after the other."""
        documents = [texts.buffer[start:end].tobytes().decode() for start, end in pairwise(texts.offsets.tolist())]
        ids = self.tokenizer.encode_batch(documents)
        return np.fromiter(chain.from_iterable((*each, self.tokenizer.eod_id) for each in ids), np.int32)


def _end_of_text(directory: Path) -> tuple[int, Path]:
    """The id, and the file that says it. Raises DataError."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        try:
            found = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: not a JSON object ({error}).\nExport or download the model again.") from None
        first = found[0] if isinstance(found, list) and found else found
        if type(first) is int:
            return first, path
    raise DataError(
        f"{directory / 'generation_config.json'}: no eos_token_id, nor in config.json.\n"
        "Write the id there that ends a text, by the tokenizer."
    )
