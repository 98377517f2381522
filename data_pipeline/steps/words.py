"""Words of a text as numpy arrays: the unit of n-gram decontamination, repetition rules and the fluency scorer.

A word is a maximal run of ASCII letters, digits, underscores and non-ASCII characters, with A-Z taken as a-z; in
Python's terms `re.findall(r"[a-z0-9_\\u0080-\\U0010ffff]+", lower(text))`, where `lower` changes ASCII letters only.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]

# Polynomial hashing modulo 2^64: the base is odd, so it has an inverse and any window is two look-ups in a prefix sum.
BASE = 0x9E3779B97F4A7C15
BASE_INVERSE = pow(BASE, -1, 1 << 64)


def mix(values: UInt64) -> UInt64:
    """SplitMix64's finaliser: a bijection of 64-bit integers that leaves no visible structure."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def powers(base: int, count: int) -> UInt64:
    """base^0 .. base^(count-1) modulo 2^64."""
    return _powers(base, 1 << max(12, (count - 1).bit_length()))[:count]


@lru_cache(maxsize=64)
def _powers(base: int, count: int) -> UInt64:
    values = np.full(count, base, dtype=np.uint64)
    values[0] = 1
    return np.cumprod(values, dtype=np.uint64)


def window_hashes(values: UInt64, starts: Int64, ends: Int64) -> UInt64:
    """Hash of values[start:end] for each pair: equal windows have equal hashes, wherever they stand."""
    prefix = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * powers(BASE, len(values)), dtype=np.uint64, out=prefix[1:])
    return mix((prefix[ends] - prefix[starts]) * powers(BASE_INVERSE, len(values) + 1)[starts])


def _byte_tables() -> tuple[NDArray[np.bool_], UInt64]:
    """For each byte: is it part of a word, and a random-looking value equal for both cases of a letter."""
    codes = np.arange(256, dtype=np.uint64)
    lowered = np.where((codes >= 65) & (codes <= 90), codes + np.uint64(32), codes)
    in_word = (codes >= 128) | (codes == ord("_"))
    for first, last in (("0", "9"), ("A", "Z"), ("a", "z")):
        in_word |= (codes >= ord(first)) & (codes <= ord(last))
    return in_word, mix(lowered + np.uint64(1))


IN_WORD, BYTE_VALUE = _byte_tables()


def words(text: str) -> tuple[UInt64, Int64, Int64]:
    """Hash, first byte and byte past the end (in the text's UTF-8) of each word, in order."""
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    edges = np.flatnonzero(np.diff(IN_WORD[data], prepend=False, append=False))
    starts, ends = edges[0::2], edges[1::2]
    return window_hashes(BYTE_VALUE[data], starts, ends), starts, ends


def ngrams(word_hashes: UInt64, n: int) -> UInt64:
    """Hash of every run of n words, in order: shape (max(0, words - n + 1),)."""
    count = len(word_hashes) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for position, power in enumerate(powers(BASE, n)):
        total += word_hashes[position : position + count] * power
    return mix(total)
