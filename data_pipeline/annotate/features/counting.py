"""Counts over the characters and words of a text, in compiled code.

Here a word is a maximal run of characters that are not white space (Python's `str.split`): the thresholds of Gopher,
C4 and FineWeb were set for such words, and a tokeniser that parts punctuation from words turns their decisions over. In
scripts without blanks four letters make a word, about as long as one of English, from where a run of them begins.
"""

from __future__ import annotations

from enum import IntEnum, auto

import numpy as np
from numba import njit, uint64

from data_pipeline.annotate.features.characters import (
    BLANK,
    BLANKLESS,
    BRACKET,
    DIGIT,
    ELLIPSIS,
    ENCODED,
    LETTER,
    MARK,
    PLAIN,
    SPACE,
    ZERO,
    Classes,
    decode,
)
from data_pipeline.text.words import BASE, Int32, Int64, UInt8, UInt64, mix, mix64

BLANKLESS_WORD = 4              # letters
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")        # Gopher's
BYTE_VALUE = mix(np.arange(1, 257, dtype=np.uint64))


class Count(IntEnum):
    """Columns of the counts. What is counted becomes a number a rule can look at in `measures`."""

    CHARACTERS = 0
    LETTERS = auto()
    DIGITS = auto()
    OTHER = auto()                  # not one of PLAIN
    WHITE_SPACE = auto()
    BRACKETS = auto()
    URL_CHARACTERS = auto()
    HASHES = auto()
    ELLIPSES = auto()
    NEWLINES = auto()
    LINE_CHARACTERS = auto()        # all but line feeds
    ENCODED_RUN = auto()
    GENERATED = auto()              # 0 or 1
    WORDS = auto()
    WORD_CHARACTERS = auto()
    LONGEST_WORD = auto()
    ALPHABETIC_WORDS = auto()
    STOP_WORDS = auto()
    LINES = auto()
    LONGEST_LINE = auto()
    TEXT_LINES = auto()             # lines that are not all white space
    BULLET_LINES = auto()
    ELLIPSIS_LINES = auto()
    TERMINAL_LINES = auto()
    END_MARKED_LINES = auto()
    SHORT_LINES = auto()
    COMMENT_LINES = auto()
    DUPLICATE_LINES = auto()
    DUPLICATE_LINE_CHARACTERS = auto()
    C4_SENTENCES = auto()
    LOREM_IPSUM_LINES = auto()
    CURLY_BRACKET_LINES = auto()
    PARAGRAPHS = auto()
    DUPLICATE_PARAGRAPHS = auto()
    DUPLICATE_PARAGRAPH_CHARACTERS = auto()
    BOILERPLATE_PARAGRAPHS = auto()
    TOP_2GRAM = auto()              # characters; in the order of n
    TOP_3GRAM = auto()
    TOP_4GRAM = auto()
    DUPLICATE_5GRAMS = auto()
    DUPLICATE_6GRAMS = auto()
    DUPLICATE_7GRAMS = auto()
    DUPLICATE_8GRAMS = auto()
    DUPLICATE_9GRAMS = auto()
    DUPLICATE_10GRAMS = auto()


def _hash(word: str) -> int:
    return sum(int(BYTE_VALUE[byte]) * pow(BASE, k, 1 << 64) for k, byte in enumerate(word.encode())) % (1 << 64)


STOP_WORD_HASHES = np.array([_hash(word) for word in STOP_WORDS], np.uint64)
LONGEST_STOP_WORD = max(len(word) for word in STOP_WORDS)


@njit(cache=True, nogil=True)
def count_characters(text: UInt8, classes: Classes, row: Int64) -> None:
    """What `row` (len(Count),) has of characters, URLs, symbols and encoded data."""
    characters = letters = digits = other = blank = brackets = url = hashes = ellipses = newlines = 0
    encoded = longest = escapes = dots = 0
    position = escapes_end = ZERO
    in_url = False
    while position < len(text):
        byte = text[position]
        code, size = decode(text, position)
        kind = classes[code]
        characters += 1
        letters += (kind & LETTER) != 0
        digits += (kind & DIGIT) != 0
        other += (kind & PLAIN) == 0
        blank += (kind & BLANK) != 0
        brackets += (kind & BRACKET) != 0
        hashes += byte == 0x23
        newlines += byte == 0x0A
        encoded = encoded + 1 if kind & ENCODED else 0
        longest = max(longest, encoded)
        if byte == 0x2E:
            dots += 1
            ellipses += dots % 3 == 0
        else:
            dots = 0
            ellipses += (kind & ELLIPSIS) != 0
        if byte == 0x5C and _is_escape(text, position):
            escapes = escapes + 4 if position == escapes_end else 4
            escapes_end = position + 4
            longest = max(longest, escapes)
        if in_url:
            in_url = not _ends_url(byte, kind)
            url += in_url
        elif byte == 0x3A:
            scheme = _url_scheme(text, position, classes)
            in_url = scheme > 0
            url += scheme + in_url
        position += size
    row[Count.CHARACTERS], row[Count.LETTERS], row[Count.DIGITS], row[Count.OTHER] = characters, letters, digits, other
    row[Count.WHITE_SPACE], row[Count.BRACKETS], row[Count.URL_CHARACTERS] = blank, brackets, url
    row[Count.HASHES], row[Count.ELLIPSES], row[Count.NEWLINES] = hashes, ellipses, newlines
    row[Count.LINE_CHARACTERS], row[Count.ENCODED_RUN] = characters - newlines, longest


@njit(cache=True, nogil=True)
def _is_escape(text: UInt8, position: int) -> bool:
    r"""Is there \x and two hexadecimal digits?"""
    if position + 4 > len(text) or text[position] != 0x5C or text[position + 1] != 0x78:
        return False
    for index in range(position + 2, position + 4):
        lowered = text[index] | 0x20
        if not (0x30 <= text[index] <= 0x39 or 0x61 <= lowered <= 0x66):
            return False
    return True


@njit(cache=True, nogil=True)
def _url_scheme(text: UInt8, colon: int, classes: Classes) -> int:
    """Characters of `http` or `https` before the colon of a URL; 0 where there is none."""
    if colon < 4 or colon + 3 >= len(text) or text[colon + 1] != 0x2F or text[colon + 2] != 0x2F:
        return 0
    following = text[colon + 3]
    if _ends_url(following, classes[decode(text, colon + 3)[0]]):
        return 0
    with_s = text[colon - 1] == 0x73 and colon >= 5
    end = colon - 1 if with_s else colon
    http = text[end - 4] == 0x68 and text[end - 3] == 0x74 and text[end - 2] == 0x74 and text[end - 1] == 0x70
    return (5 if with_s else 4) if http else 0


@njit(cache=True, nogil=True)
def _ends_url(byte: int, kind: int) -> bool:
    return bool(kind & SPACE) or byte == 0x22 or byte == 0x3C or byte == 0x3E         # " < >


@njit(cache=True, nogil=True)
def _is_whole(blankless: int, seen: int, last: int) -> bool:
    """Does a blankless letter begin a word, after one with so many of them, such classes and such a last?"""
    if blankless:
        return blankless == BLANKLESS_WORD or not last & (BLANKLESS | MARK)
    return bool(seen & LETTER)


@njit(cache=True, nogil=True)
def count_words(
    text: UInt8, classes: Classes, starts: Int64, ends: Int64, lengths: Int32, hashes: UInt64, row: Int64,
) -> None:
    """Fill starts, ends (bytes), lengths (characters) and hashes (case counts) of the words; count them."""
    count = characters = longest = alphabetic = stops = 0
    position = ZERO
    while position < len(text):
        code, size = decode(text, position)
        if classes[code] & SPACE:
            position += size
            continue
        starts[count] = position
        length, seen, last, blankless = 0, 0, 0, 0
        total, power = uint64(0), uint64(1)
        while position < len(text):
            code, size = decode(text, position)
            kind = int(classes[code])
            if kind & SPACE or (kind & BLANKLESS and length and _is_whole(blankless, seen, last)):
                break
            seen |= kind
            last = kind
            blankless += (kind & BLANKLESS) != 0
            length += 1
            for index in range(position, position + size):
                total += BYTE_VALUE[text[index]] * power
                power *= uint64(BASE)
            position += size
        ends[count], lengths[count], hashes[count] = position, length, mix64(total)
        count += 1
        characters += length
        longest = max(longest, length)
        alphabetic += (seen & LETTER) != 0
        if length <= LONGEST_STOP_WORD:
            for index in range(len(STOP_WORD_HASHES)):
                if STOP_WORD_HASHES[index] == total:
                    stops |= 1 << index
    row[Count.WORDS], row[Count.WORD_CHARACTERS], row[Count.LONGEST_WORD] = count, characters, longest
    row[Count.ALPHABETIC_WORDS] = alphabetic
    for index in range(len(STOP_WORD_HASHES)):
        row[Count.STOP_WORDS] += stops >> index & 1
