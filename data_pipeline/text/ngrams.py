"""N-grams of words as hashes, and sets of them: what two texts share is found by these.

HTML's character references are read as what they stand for.
"""

from __future__ import annotations

import html
import re

import numpy as np
import polars as pl
import pyarrow as pa
from numba import njit, uint64

from data_pipeline.text.words import Bool, UInt64, Words, passages_of, words_of

REFERENCE = re.compile(r"&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
ZERO_WIDTH_SPACE = "\u200b"


def readings(table: pa.Table) -> list[Words]:
    """The words of the column `text`, with what HTML's character references stand for.

    A zero-width space stands for a blank on some pages and within words on others: where a text has one there are two
    readings, words parted there and not.
    """
    special = pl.Series(table["text"]).str.contains(f"{REFERENCE.pattern}|{ZERO_WIDTH_SPACE}")
    if not special.any():
        return [words_of(table)]
    parted = [_unescaped(text) if found else text
              for text, found in zip(table["text"].to_pylist(), special.to_list(), strict=True)]
    joined = [text.replace(ZERO_WIDTH_SPACE, "") for text in parted]
    return [words_of(pa.table({"text": texts})) for texts in ([parted] if parted == joined else [parted, joined])]


def _unescaped(text: str) -> str:
    for _ in range(2):          # pages escape twice: &amp;quot;
        text = REFERENCE.sub(lambda reference: html.unescape(reference[0]), text)
    return text


def ngrams_in(words: Words, n: int) -> UInt64:
    """64-bit hashes of the n-grams of these words, in order. They are the same in every process and version.

    A text with fewer than n words has none: it can neither contaminate nor be found.
    """
    hashes = passages_of(words, n)
    return hashes[hashes != 0]


@njit(inline="always")
def slot_of(table: UInt64, key: np.uint64) -> np.uint64:
    """Where `key` stands in an open-addressed table of 64-bit hashes, or the empty place, a 0, where it would."""
    mask = uint64(len(table) - 1)
    slot = key & mask
    while table[slot] != 0 and table[slot] != key:
        slot = (slot + uint64(1)) & mask
    return slot


@njit(cache=True, nogil=True)
def hash_set(hashes: UInt64) -> UInt64:
    """The table of these hashes, at most half full, for `is_in`."""
    size = 2
    while size < 2 * len(hashes):
        size *= 2
    table = np.zeros(size, np.uint64)
    for value in hashes:
        entry = max(value, uint64(1))
        table[slot_of(table, entry)] = entry
    return table


@njit(cache=True, nogil=True)
def is_in(hashes: UInt64, table: UInt64) -> Bool:
    """Which hashes stand in a `hash_set`: bool, shape of `hashes`."""
    result = np.zeros(len(hashes), np.bool_)
    for index in range(len(hashes)):
        entry = max(hashes[index], uint64(1))
        result[index] = table[slot_of(table, entry)] == entry
    return result
