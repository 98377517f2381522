"""The texts of a shard as one flat array of bytes, and their words: what every step that reads text works on.

A word is a maximal run of ASCII letters, digits, underscores and non-ASCII characters, with A-Z taken as a-z; in
Python's terms `re.findall(r"[a-z0-9_\\u0080-\\U0010ffff]+", lower(text))`, where `lower` changes ASCII letters only.
Hashes are the same in every process, version and machine.

    texts = texts_of(table)                 # bytes of all documents, where each begins
    words = words_of(table)                 # their words; computed once for a text column, whoever asks
    hashes, first = ngrams_of(words, 13)    # those of document i: hashes[first[i]:first[i + 1]]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit, uint64
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
UInt64 = NDArray[np.uint64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

# Polynomial hashing modulo 2^64: the base is odd, so it has an inverse and a hash can roll forward.
BASE = 0x9E3779B97F4A7C15
BASE_INVERSE = pow(BASE, -1, 1 << 64)


class Texts(NamedTuple):
    """Document i is buffer[offsets[i]:offsets[i + 1]], in UTF-8. The buffer is the table's own memory: read-only."""

    buffer: UInt8           # (bytes,)
    offsets: Int64          # (documents + 1,)


class Words(NamedTuple):
    """The words of all documents, in order; those of document i are first[i] to first[i + 1]."""

    hashes: UInt64          # (words,)
    starts: Int64           # (words,), first byte in Texts.buffer
    ends: Int64             # (words,), byte past the end in Texts.buffer
    first: Int64            # (documents + 1,)


def mix(value: UInt64) -> UInt64:
    """SplitMix64's finaliser, of an array: a bijection of 64-bit integers that leaves no visible structure."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


mix64: Any = njit(inline="always")(mix)     # of one integer, in compiled code


def _byte_tables() -> tuple[NDArray[np.bool_], UInt64]:
    """For each byte: is it part of a word, and a random-looking value equal for both cases of a letter."""
    codes = np.arange(256, dtype=np.uint64)
    lowered = np.where((codes >= 65) & (codes <= 90), codes + np.uint64(32), codes)
    in_word = (codes >= 128) | (codes == ord("_"))
    for first, last in (("0", "9"), ("A", "Z"), ("a", "z")):
        in_word |= (codes >= ord(first)) & (codes <= ord(last))
    return in_word, mix(lowered + np.uint64(1))


IN_WORD, BYTE_VALUE = _byte_tables()


@njit(cache=True, nogil=True)
def _count_words(buffer: UInt8, offsets: Int64) -> Int64:
    first = np.zeros(len(offsets), np.int64)
    for document in range(len(offsets) - 1):
        count, inside = 0, False
        for position in range(offsets[document], offsets[document + 1]):
            now = IN_WORD[buffer[position]]
            count += now and not inside
            inside = now
        first[document + 1] = first[document] + count
    return first


@njit(cache=True, nogil=True)
def _find_words(buffer: UInt8, offsets: Int64, hashes: UInt64, starts: Int64, ends: Int64) -> None:
    word = 0
    for document in range(len(offsets) - 1):
        position, stop = offsets[document], offsets[document + 1]
        while position < stop:
            if not IN_WORD[buffer[position]]:
                position += 1
                continue
            starts[word] = position
            total, power = uint64(0), uint64(1)
            while position < stop and IN_WORD[buffer[position]]:
                total += BYTE_VALUE[buffer[position]] * power
                power *= uint64(BASE)
                position += 1
            ends[word] = position
            hashes[word] = mix64(total)
            word += 1


@njit(cache=True, nogil=True)
def _roll(word_hashes: UInt64, first: Int64, n: int, result_first: Int64) -> UInt64:
    """sum_k hash[i + k] BASE^k, from one window to the next by a division by BASE."""
    result = np.empty(result_first[-1], np.uint64)
    highest = uint64(1)
    for _ in range(n - 1):
        highest *= uint64(BASE)
    for document in range(len(first) - 1):
        start, out = first[document], result_first[document]
        count = result_first[document + 1] - out
        total, power = uint64(0), uint64(1)
        for position in range(start, start + n if count else start):
            total += word_hashes[position] * power
            power *= uint64(BASE)
        for index in range(count):
            result[out + index] = mix64(total)
            if index + 1 < count:
                following = word_hashes[start + index + n]
                total = (total - word_hashes[start + index]) * uint64(BASE_INVERSE) + following * highest
    return result


def texts_of(table: pa.Table) -> Texts:
    """The column `text` without a copy where it is one chunk."""
    return _view(table["text"])


def words_of(table: pa.Table) -> Words:
    """Words of the column `text`; steps that look at the same column one after the other share one result."""
    global _last
    column = table["text"]
    if _last is None or _memory(_last[0]) != _memory(column):
        _last = column, _words(_view(column))
    return _last[1]


# The column stands beside its words so that its memory, by which it is known again, cannot be another's.
_last: tuple[pa.ChunkedArray, Words] | None = None


def _memory(column: pa.ChunkedArray) -> list[tuple[int, int, int]]:
    return [(chunk.offset, len(chunk), chunk.buffers()[2].address if chunk.buffers()[2] else 0)
            for chunk in column.chunks]


def _view(column: pa.ChunkedArray) -> Texts:
    array = column.cast(pa.large_string()).combine_chunks()
    if isinstance(array, pa.ChunkedArray):              # of no chunk at all
        array = pa.array([], pa.large_string())
    _, offsets, data = array.buffers()
    buffer = np.frombuffer(data or b"", np.uint8)
    if offsets is None:
        return Texts(buffer, np.zeros(1, np.int64))
    return Texts(buffer, np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1])


def _words(texts: Texts) -> Words:
    first = _count_words(texts.buffer, texts.offsets)
    words = Words(np.empty(first[-1], np.uint64), np.empty(first[-1], np.int64), np.empty(first[-1], np.int64), first)
    _find_words(texts.buffer, texts.offsets, words.hashes, words.starts, words.ends)
    return words


def words(text: str) -> tuple[UInt64, Int64, Int64]:
    """Hash, first byte and byte past the end (in the text's UTF-8) of each word, in order."""
    data = text.encode()
    return _words(Texts(np.frombuffer(data, np.uint8), _readonly(np.array([0, len(data)]))))[:3]


def _readonly(values: Int64) -> Int64:
    """Numba compiles anew for a writable array: one text takes the same code as a shard."""
    values.flags.writeable = False
    return values


def ngrams_of(words: Words, n: int) -> tuple[UInt64, Int64]:
    """Hash of every run of n words within a document, and where each document's begin, shape (documents + 1,).

    A document has max(0, words - n + 1) of them.
    """
    first = np.zeros_like(words.first)
    np.cumsum(np.maximum(np.diff(words.first) - n + 1, 0), out=first[1:])
    return _roll(words.hashes, words.first, n, first), first


def ngrams(word_hashes: UInt64, n: int) -> UInt64:
    """Hash of every run of n words of one text, in order: shape (max(0, words - n + 1),)."""
    first = np.array([0, len(word_hashes)])
    return _roll(word_hashes, first, n, np.array([0, max(0, len(word_hashes) - n + 1)]))
