"""The texts of a shard as one flat array of bytes, and their words: what every step that reads text works on.

A word is a maximal run of letters, marks and digits of any script (Unicode's categories L, M and N), with connector
punctuation such as `_` inside it but not at its ends. In scripts written without blanks each letter with its marks is
one, and counts as a part of a word. How a page typesets a word makes no difference: case is folded, compatibility forms
(full-width letters, ligatures) and composed characters are taken apart (Unicode's NFKC_Casefold, but decomposed), and
what is not seen (soft hyphens, joiners, variation selectors, the Arabic tatweel) does not count. A zero-width space
parts words, as in UAX #29. Hashes are the same in every process and machine; for ASCII they never change, for other
text they may with the Unicode version of Python.

    texts = texts_of(table)                 # bytes of all documents, where each begins
    words = words_of(table)                 # their words; computed once for a text column, whoever asks
    hashes, first = ngrams_of(words, 13)    # those of document i: hashes[first[i]:first[i + 1]]
    hashes = passages_of(words, 13)         # the same by what words count: one a word, 0 where too little follows
"""

from __future__ import annotations

import unicodedata
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit, uint64
from numpy.typing import NDArray

Bool = NDArray[np.bool_]
Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
UInt32 = NDArray[np.uint32]
UInt64 = NDArray[np.uint64]
Float64 = NDArray[np.float64]

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
    sizes: UInt8            # (words,), in parts of a word: WORD, or what one letter counts in a script without blanks


def mix(value: UInt64) -> UInt64:
    """SplitMix64's finaliser, of an array: a bijection of 64-bit integers that leaves no visible structure."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


mix64: Any = njit(inline="always")(mix)     # of one integer, in compiled code


# What a character is to a word. From WORD on: how much its word counts, in parts of a word.
SEPARATOR, IGNORED, JOINER, MARK = range(4)
WORD = 20
# Scripts without blanks, by block. A word of English is 1.7 ideographs and kana in translation, and 3 to 4 letters of
# the scripts of South East Asia, marks not counted.
IDEOGRAPH, SYLLABIC = 12, 6
BLOCKS = {
    IDEOGRAPH: "2e80-2fd5 3005-3007 3021-3029 3031-3035 303b 3041-3096 309d-309f 30a1-30fa 30fc-30ff 31f0-31ff "
               "3400-4dbf 4e00-9fff a000-a48c f900-faff ff66-ff9d 1b000-1b16f 16fe0-18cff",
    SYLLABIC: "e01-e2e e30-e46 e81-eae eb0-ec6 edc-edf 1000-109f 1780-17d3 17d7 1950-19df 1a20-1aad a9e0-a9fe "
              "aa60-aadf 11700-1173f",
}
# By category letters or formats; in text a space, an apostrophe (Ukrainian, beside ' and its curly form), a stretch.
EXCEPTIONS = {"\u200b": SEPARATOR, "\u02bc": SEPARATOR, "\u0640": IGNORED}
# Default_Ignorable_Code_Point of Unicode, besides category Cf.
INVISIBLE = "34f 115f-1160 17b4-17b5 180b-180f 3164 fe00-fe0f ffa0"
FOLDED = 0x20000        # code points with a fold of their own; above: ideographs to 0x3ffff, then nothing seen


class Folding(NamedTuple):
    """Of each code point below FOLDED, all of shape (FOLDED,)."""

    kinds: UInt8
    values: UInt64          # sum_k mix(c_k + 1) BASE^k over the characters c_k it is folded into
    powers: UInt64          # BASE^(number of them)


def code_points(ranges: str) -> Int64:
    """The code points in "2e80-2fd5 3005": hexadecimal, with both ends."""
    bounds = [entry.partition("-") for entry in ranges.split()]
    return np.concatenate([np.arange(int(first, 16), int(last or first, 16) + 1) for first, _, last in bounds])


def _folding() -> Folding:
    codes = np.array([code for code in range(FOLDED) if code != 0x0A and not 0xD800 <= code < 0xE000])
    # A line feed between characters keeps them apart: one call folds all.
    joined = "\n".join(map(chr, codes.tolist()))
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", joined).casefold()).split("\n")
    by_category = {"L": WORD, "N": WORD, "M": MARK, "Pc": JOINER, "Cf": IGNORED}
    kinds = np.zeros(FOLDED, np.uint8)
    for code in codes.tolist():
        category = unicodedata.category(chr(code))
        kinds[code] = by_category.get(category, by_category.get(category[0], SEPARATOR))
    for size, blocks in BLOCKS.items():
        chosen = code_points(blocks)
        kinds[chosen[kinds[chosen] == WORD]] = size
    kinds[code_points(INVISIBLE)] = IGNORED
    for character, kind in EXCEPTIONS.items():
        kinds[ord(character)] = kind
    kinds[[0xFF9E, 0xFF9F]] = MARK      # half-width voiced sound marks

    flat = np.frombuffer("".join(folded).encode("utf-32-le"), np.uint32).astype(np.uint64)
    owners = np.repeat(codes, [len(characters) for characters in folded])
    kept = (flat >= FOLDED) | (kinds[np.minimum(flat, FOLDED - 1)] > IGNORED)        # "(1)" for a digit in a ring
    flat, owners = flat[kept], owners[kept]
    ranks = np.arange(len(owners)) - np.searchsorted(owners, owners)
    power = np.array([pow(BASE, exponent, 1 << 64) for exponent in range(int(ranks.max()) + 2)], np.uint64)
    values = np.zeros(FOLDED, np.uint64)
    np.add.at(values, owners, mix(flat + np.uint64(1)) * power[ranks])
    return Folding(kinds, values, power[np.bincount(owners, minlength=FOLDED)])


FOLDING = _folding()


@njit(cache=True, nogil=True)
def decode(text: UInt8, position: int) -> tuple[int, int]:
    """Code point and length in bytes of the character at `position`."""
    lead = int(text[position])
    if lead < 0x80:
        return lead, 1
    if lead < 0xE0:
        return (lead & 0x1F) << 6 | text[position + 1] & 0x3F, 2
    if lead < 0xF0:
        return (lead & 0x0F) << 12 | (text[position + 1] & 0x3F) << 6 | text[position + 2] & 0x3F, 3
    return ((lead & 0x07) << 18 | (text[position + 1] & 0x3F) << 12 | (text[position + 2] & 0x3F) << 6
            | text[position + 3] & 0x3F), 4


@njit(cache=True, nogil=True)
def _find_words(
    buffer: UInt8, offsets: Int64, kinds: UInt8, values: UInt64, powers: UInt64,
    hashes: UInt64, starts: Int64, ends: Int64, sizes: UInt8, first: Int64,
) -> None:
    word = 0
    for document in range(len(offsets) - 1):
        position, stop = offsets[document], offsets[document + 1]
        size = 0                                    # of the word begun, as in Words.sizes; 0 for none
        total, seen, power = uint64(0), uint64(0), uint64(1)
        while position < stop:
            code, length = decode(buffer, position)
            if code < FOLDED:
                kind, value, factor = int(kinds[code]), values[code], powers[code]
            else:
                kind, value, factor = IDEOGRAPH if code < 0x40000 else IGNORED, mix64(uint64(code + 1)), uint64(BASE)
            if kind == IGNORED:
                position += length
                continue
            # A word of letters goes on with letters, marks and what joins; a letter of a blankless script with marks.
            if size and (kind == SEPARATOR or (kind > MARK and kind != size) or (kind != MARK and size != WORD)):
                hashes[word], sizes[word] = mix64(total), size
                word += 1
                size = 0
            if kind >= MARK and not size:
                size = kind if kind > MARK else WORD
                starts[word] = position
                seen, power = uint64(0), uint64(1)
            position += length
            if size:
                seen += value * power
                power *= factor
                if kind != JOINER:                  # what joins counts once something follows
                    total = seen
                    ends[word] = position
        if size:
            hashes[word], sizes[word] = mix64(total), size
            word += 1
        first[document + 1] = word


@njit(cache=True, nogil=True)
def _runs(hashes: UInt64, first: Int64, n: int, result_first: Int64) -> UInt64:
    """sum_k hash[i + k] BASE^k of each run, mixed."""
    result = np.empty(result_first[-1], np.uint64)
    for document in range(len(first) - 1):
        for run in range(result_first[document], result_first[document + 1]):
            start = first[document] + run - result_first[document]
            total, power = uint64(0), uint64(1)
            for position in range(start, start + n):
                total += hashes[position] * power
                power *= uint64(BASE)
            result[run] = mix64(total)
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


def one_text(text: str) -> Texts:
    """`text` alone."""
    data = text.encode()
    return _read_only(np.frombuffer(data, np.uint8), np.array([0, len(data)]))


def _view(column: pa.ChunkedArray) -> Texts:
    array = column.cast(pa.large_string()).combine_chunks()
    if isinstance(array, pa.ChunkedArray):              # of no chunk at all
        array = pa.array([], pa.large_string())
    _, offsets, data = array.buffers()
    buffer = np.frombuffer(data or b"", np.uint8)
    if offsets is None:
        return _read_only(buffer, np.zeros(1, np.int64))
    return _read_only(buffer, np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1])


def _read_only(buffer: UInt8, offsets: Int64) -> Texts:
    """Numba compiles for a writable array anew, and some of Arrow's are."""
    buffer.flags.writeable = offsets.flags.writeable = False
    return Texts(buffer, offsets)


def _words(texts: Texts) -> Words:
    # There are no more words than this, of a byte and a blank each; memory that is not written to costs nothing.
    most = int(texts.offsets[-1] - texts.offsets[0] + len(texts.offsets)) // 2 + 1
    hashes, sizes, first = np.empty(most, np.uint64), np.empty(most, np.uint8), np.zeros(len(texts.offsets), np.int64)
    starts, ends = np.empty(most, np.int64), np.empty(most, np.int64)
    _find_words(texts.buffer, texts.offsets, *FOLDING, hashes, starts, ends, sizes, first)
    count = first[-1]
    return Words(hashes[:count], starts[:count], ends[:count], first, sizes[:count])


def words(text: str) -> tuple[UInt64, Int64, Int64]:
    """Hash, first byte and byte past the end (in the text's UTF-8) of each word, in order."""
    return _words(one_text(text))[:3]


def ngrams_of(words: Words, n: int) -> tuple[UInt64, Int64]:
    """Hash of every run of n words within a document, and where each document's begin, shape (documents + 1,).

    A document has max(0, words - n + 1) of them.
    """
    first = np.zeros_like(words.first)
    np.cumsum(np.maximum(np.diff(words.first) - n + 1, 0), out=first[1:])
    return _runs(words.hashes, words.first, n, first), first


def passages_of(words: Words, n: int) -> UInt64:
    """For each word the hash of the shortest run from it that counts as n words, within a document: (words,).

    Of words parted by blanks that is the n-gram, with the hash `ngrams_of` gives it; in scripts without blanks it is
    22 ideographs for 13 words. 0 where the rest of the document counts less.
    """
    return _passages(words.hashes, words.sizes, words.first, n * WORD)


@njit(cache=True, nogil=True)
def _passages(hashes: UInt64, sizes: UInt8, first: Int64, wanted: int) -> UInt64:
    result = np.zeros(len(hashes), np.uint64)
    for document in range(len(first) - 1):
        stop, end, size = first[document + 1], first[document], 0
        total, power = uint64(0), uint64(1)
        for start in range(first[document], stop):
            while size < wanted and end < stop:
                total += hashes[end] * power
                power *= uint64(BASE)
                size += sizes[end]
                end += 1
            if size < wanted:
                break
            result[start] = mix64(total)
            total = (total - hashes[start]) * uint64(BASE_INVERSE)
            power *= uint64(BASE_INVERSE)
            size -= sizes[start]
    return result
