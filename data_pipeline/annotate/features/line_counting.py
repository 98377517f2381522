"""Counts over the lines and paragraphs of a text, in compiled code.

A line ends at a line feed, a paragraph at two or more.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from data_pipeline.annotate.features.characters import (
    BRACKET,
    BULLET,
    ELLIPSIS,
    QUOTE,
    SPACE,
    TERMINAL,
    ZERO,
    Classes,
    decode,
    last_class,
)
from data_pipeline.annotate.features.counting import Count
from data_pipeline.annotate.features.repetition import first_equal, hash_of, table_mask
from data_pipeline.text.words import Int32, Int64, UInt8, UInt64

# A line of C4 goes for one of the first eight; NeMo Curator's boilerplate begins at the third.
PHRASES = (
    "lorem ipsum", "javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
    "use cookies", "privacy overview", "privacy & cookies policy", "privacy and cookies policy",
)
C4_PHRASES = 8
LONGEST_C4_WORD = 1000
SHORT_LINE = 30                 # FineWeb
PHRASE_BYTES = np.frombuffer("".join(PHRASES).encode(), np.uint8)
PHRASE_ENDS = np.cumsum([len(phrase) for phrase in PHRASES])


@njit(cache=True, nogil=True)
def count_lines(
    text: UInt8, classes: Classes, suspect: bool, starts: Int64, ends: Int64, lengths: Int32, keys: UInt64,
    slots: Int64, used: int, row: Int64,
) -> int:
    """What `row` has of lines. starts, ends, lengths: of the words; keys, slots, used: see `first_equal`.

    `suspect` says that one of PHRASES occurs in the text. Returns `used` for the next call.
    """
    mask = table_mask(row[Count.NEWLINES] + 1)
    duplicates = duplicate_characters = longest = lines = 0
    kept = word = position = ZERO
    while position < len(text):
        end = position
        while end < len(text) and text[end] != 0x0A:
            end += 1
        lines += 1
        first_word = word
        while word < row[Count.WORDS] and starts[word] < end:
            word += 1
        keys[kept], characters = hash_of(text, position, end)
        longest = max(longest, characters)
        if word > first_word:
            if first_equal(keys, kept, slots, mask, used) != kept:
                duplicates += 1
                duplicate_characters += characters
            kept += 1
            row[Count.SHORT_LINES] += characters <= SHORT_LINE
            _line_ends(text, classes, position, end, starts[first_word], ends[word - 1], row)
            _c4_line(text, classes, suspect, starts, ends, lengths, first_word, word, row)
        position = end + 1
    row[Count.LINES], row[Count.LONGEST_LINE], row[Count.TEXT_LINES] = lines, longest, kept
    row[Count.DUPLICATE_LINES], row[Count.DUPLICATE_LINE_CHARACTERS] = duplicates, duplicate_characters
    return used + kept


@njit(cache=True, nogil=True)
def _line_ends(text: UInt8, classes: Classes, line: int, line_end: int, start: int, end: int, row: Int64) -> None:
    """What the line text[line:line_end] begins and ends with; without white space around it is text[start:end]."""
    first = text[start]
    row[Count.BULLET_LINES] += classes[decode(text, start)[0]] & BULLET != 0
    slash = first == 0x2F and start + 1 < end and (text[start + 1] == 0x2F or text[start + 1] == 0x2A)
    row[Count.COMMENT_LINES] += first == 0x23 or slash
    row[Count.TERMINAL_LINES] += last_class(text, classes, line, line_end)[0] & TERMINAL != 0
    last = last_class(text, classes, start, end)[0]
    dots = end - start >= 3 and text[end - 1] == 0x2E and text[end - 2] == 0x2E and text[end - 3] == 0x2E
    row[Count.ELLIPSIS_LINES] += dots or last & ELLIPSIS != 0
    row[Count.END_MARKED_LINES] += last & (TERMINAL | QUOTE) != 0


@njit(cache=True, nogil=True)
def _c4_line(
    text: UInt8, classes: Classes, suspect: bool, starts: Int64, ends: Int64, lengths: Int32, first: int, stop: int,
    row: Int64,
) -> None:
    """C4 on the line of the words first to stop - 1, in the order of the program that made C4."""
    if stop - first < 3:
        return
    for word in range(first, stop):
        if lengths[word] > LONGEST_C4_WORD:
            return
    start, end = starts[first], ends[stop - 1]
    phrase = _phrase(text, start, end, 0, C4_PHRASES) if suspect else -1
    if phrase == 0:
        row[Count.LOREM_IPSUM_LINES] += 1
        return
    if phrase == 1:
        return
    for position in range(start, end):
        if text[position] == 0x7B:
            row[Count.CURLY_BRACKET_LINES] += 1
            return
    if phrase >= 0:
        return
    for word in range(first, stop - 1):
        row[Count.C4_SENTENCES] += _ends_sentence(text, classes, starts[word], ends[word])
    row[Count.C4_SENTENCES] += 1


@njit(cache=True, nogil=True)
def _ends_sentence(text: UInt8, classes: Classes, start: int, end: int) -> bool:
    """Does the word end with terminal punctuation, before any quotes, closing brackets and references such as [3]?"""
    while end > start:
        last = text[end - 1]
        kind, before = last_class(text, classes, start, end)
        if last == 0x5D:                                                    # ]
            opening = end - 2
            while opening > start and 0x30 <= text[opening] <= 0x39:
                opening -= 1
            end = opening if opening >= start and text[opening] == 0x5B else end - 1
        elif kind & (QUOTE | BRACKET) and last != 0x28 and last != 0x7B and last != 0x5B:       # ( { [
            end = before
        else:
            return kind & TERMINAL != 0
    return False


@njit(cache=True, nogil=True)
def _phrase(text: UInt8, start: int, end: int, first: int, stop: int) -> int:
    """The first of PHRASES[first:stop] in text[start:end], in any case; -1 for none."""
    for phrase in range(first, stop):
        begin = PHRASE_ENDS[phrase - 1] if phrase else 0
        size = PHRASE_ENDS[phrase] - begin
        for position in range(start, end - size + 1):
            matched = 0
            while matched < size:
                byte = text[position + matched]
                if (byte + 32 if 0x41 <= byte <= 0x5A else byte) != PHRASE_BYTES[begin + matched]:
                    break
                matched += 1
            if matched == size:
                return phrase
    return -1


@njit(cache=True, nogil=True)
def count_paragraphs(
    text: UInt8, classes: Classes, suspect: bool, keys: UInt64, slots: Int64, used: int, row: Int64
) -> int:
    """What `row` has of paragraphs; arguments as in `count_lines`, which comes before."""
    if not row[Count.WORDS]:
        return used
    start, stop = ZERO, len(text)
    code, size = decode(text, start)
    while classes[code] & SPACE:
        start += size
        code, size = decode(text, start)
    kind, last = last_class(text, classes, start, stop)
    while kind & SPACE:
        stop = last
        kind, last = last_class(text, classes, start, stop)
    mask = table_mask(row[Count.LINES])
    count = ZERO
    while start < stop:
        end = start
        while end < stop and not (text[end] == 0x0A and end + 1 < stop and text[end + 1] == 0x0A):
            end += 1
        keys[count], characters = hash_of(text, start, end)
        if first_equal(keys, count, slots, mask, used) != count:
            row[Count.DUPLICATE_PARAGRAPHS] += 1
            row[Count.DUPLICATE_PARAGRAPH_CHARACTERS] += characters
        if suspect and _phrase(text, start, end, 2, len(PHRASE_ENDS)) >= 0:
            row[Count.BOILERPLATE_PARAGRAPHS] += 1
        count += 1
        start = end
        while start < stop and text[start] == 0x0A:
            start += 1
    row[Count.PARAGRAPHS] = count
    return used + count
