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
from data_pipeline.text.words import Texts
from data_pipeline.tokenize.segment_encoder import Int32
from data_pipeline.tokenize.tokenizer import SPACE


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
        self.token_bytes = np.zeros(self.vocab_size, np.uint16)
        self.is_byte = np.zeros(self.vocab_size, np.bool_)
        for token, index in vocabulary.items():
            if index in special:
                self.token_bytes[index] = 0 if special[index] else len(token.encode())
            elif self._byte_level:      # each of its characters is a byte, U+0100 to U+0121 one below 128
                self.token_bytes[index] = len(token)
                self.is_byte[index] = len(token) == 1 and not (token.isascii() or "\u0100" <= token <= "\u0121")
            else:
                self.is_byte[index] = len(token) == 6 and token.startswith("<0x")
                self.token_bytes[index] = 1 if self.is_byte[index] else len(token.replace(SPACE, " ").encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without an end-of-document mark. Raises DataError where their bytes are not the text's."""
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for text, ids in zip(texts, found, strict=True):
            size = len((text if self._byte_level else text.replace(SPACE, " ")).encode())
            if (counted := int(self.token_bytes[ids].sum())) != size:
                raise DataError(
                    f"{self.path}: changes a text of {size} bytes to one of {counted}: {text[:40]!r}...\n"
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
