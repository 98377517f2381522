"""The structure scorer: how much a document explains, from 0 to 1.

Prose: ends of sentences, words that give reasons, headings of sections, examples. Code: lines with comments,
definitions, type annotations, checked conditions. Each is counted per 1000 characters up to an amount that is as good
as any more; the score is the mean of the four shares of that amount.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from data_pipeline.annotate.quality.training_text import PROSE
from data_pipeline.text.words import Bool, Float64, Int8, Int64, Texts, UInt8, UInt64, Words, words

# Amounts per 1000 characters that are as good as any more.
PROSE_ENOUGH = np.array([8.0, 6.0, 2.0, 2.0])       # sentences, reasons, headings, examples
CODE_ENOUGH = np.array([4.0, 2.0, 3.0, 1.0])        # comments, definitions, annotations, checks


def _hashes(text: str) -> UInt64:
    return np.sort(words(text)[0])


# Arguments of the compiled code, not its constants: what numba caches does not see another module's change.
REASONS = _hashes("because therefore thus hence if when whereas which instead although however example note")
HEADINGS = _hashes("parameters args arguments returns yields raises example examples note notes see references")
DEFINITIONS = _hashes("def class async struct enum template namespace typedef interface")
TYPES = _hashes("int str bool float bytes none any list dict tuple set optional callable sequence")
CHECKS = _hashes("raise assert throw static_assert")

# Bytes. Those from 128 on are of letters of other alphabets, as good as always.
IN_WORD = np.array([byte >= 128 or chr(byte) == "_" or chr(byte).isalnum() for byte in range(256)])
ENDS_A_WORD = np.array([byte >= 128 or chr(byte) in "abcdefghijklmnopqrstuvwxyz)`" for byte in range(256)])
NEWLINE, SPACE, TAB, RETURN = b"\n \t\r"
STOPS = np.array([chr(byte) in ".!?" for byte in range(256)])
WIDE_STOPS = tuple(int.from_bytes(sign.encode()) for sign in "。！？")     # which no blank follows
HASH, SLASH, STAR, EXCLAMATION, COLON, GREATER, MINUS, BACKTICK, DOT = b"#/*!:>-`."


def structure(texts: Texts, table_words: Words, kinds: Int8) -> Float64:
    """The score of each document: (documents,). `kinds`: as `training_text.kinds_of` gives them."""
    code = kinds != PROSE
    counts, characters = _count(texts.buffer, texts.offsets, code)
    counts += _count_words(
        texts.buffer, texts.offsets, table_words.hashes, table_words.starts, table_words.first, code,
        REASONS, HEADINGS, DEFINITIONS, TYPES, CHECKS,
    )
    enough = np.where(code[:, None], CODE_ENOUGH, PROSE_ENOUGH)
    return np.minimum(counts / np.maximum(characters, 1)[:, None] * 1000 / enough, 1).mean(axis=1)


@njit(inline="always")
def _is_blank(byte: int) -> bool:
    return byte in (SPACE, TAB, RETURN)


@njit(inline="always")
def _is_sign(byte: int) -> bool:
    return byte in (HASH, SLASH, STAR, EXCLAMATION)


@njit(inline="always")
def _opens_comment(buffer: UInt8, position: int, stop: int, line_start: bool) -> bool:
    """Whether the run of signs at `position` opens a comment (#, //, /*, or * on a line of one) that has words."""
    marked, previous = line_start and buffer[position] == STAR, 0
    while position < stop and _is_sign(buffer[position]):
        sign = buffer[position]
        marked = marked or sign == HASH or (previous == SLASH and sign in (SLASH, STAR))
        previous = sign
        position += 1
    return marked and position + 1 < stop and _is_blank(buffer[position]) and bool(IN_WORD[buffer[position + 1]])


@njit(cache=True, nogil=True)
def _count(buffer: UInt8, offsets: Int64, code: Bool) -> tuple[Float64, Int64]:
    """Of each document the four counts, as far as bytes tell them, and the characters."""
    counts = np.zeros((len(code), 4))
    characters = np.zeros(len(code), np.int64)
    for document in range(len(code)):
        begin, stop = offsets[document], offsets[document + 1]
        line_start, commented = True, False        # nothing but blanks yet; this line has its comment counted
        for position in range(begin, stop):
            byte = buffer[position]
            characters[document] += (byte & 0xC0) != 0x80
            if byte == NEWLINE:
                line_start, commented = True, False
                continue
            following = buffer[position + 1] if position + 1 < stop else NEWLINE
            if code[document]:
                if _is_sign(byte):
                    if not commented and (position == begin or not _is_sign(buffer[position - 1])):
                        commented = _opens_comment(buffer, position, stop, line_start)
                        counts[document, 0] += commented
                elif byte == MINUS and following == GREATER:
                    counts[document, 2] += 1
            elif STOPS[byte]:
                closes = _is_blank(following) or following == NEWLINE
                if closes and position > begin and ENDS_A_WORD[buffer[position - 1]]:
                    counts[document, 0] += 1
                elif line_start and byte == DOT and following == DOT:      # .. directive
                    counts[document, 3] += 1
            elif byte >= 0xE3 and position + 2 < stop and (
                    int(byte) << 16 | int(following) << 8 | int(buffer[position + 2])) in WIDE_STOPS:
                counts[document, 0] += 1
            elif line_start and byte in (GREATER, BACKTICK) and position + 2 < stop:
                counts[document, 3] += following == byte and buffer[position + 2] == byte     # >>> or ```
            line_start = line_start and _is_blank(byte)
    return counts, characters


@njit(inline="always")
def _within(sorted_hashes: UInt64, value: np.uint64) -> np.bool_:
    index = np.searchsorted(sorted_hashes, value)
    return np.bool_(index < len(sorted_hashes) and sorted_hashes[index] == value)


@njit(cache=True, nogil=True)
def _count_words(
    buffer: UInt8, offsets: Int64, hashes: UInt64, starts: Int64, first: Int64, code: Bool,
    reasons: UInt64, headings: UInt64, definitions: UInt64, types: UInt64, checks: UInt64,
) -> Float64:
    """Of each document the four counts, as far as words tell them."""
    counts = np.zeros((len(code), 4))
    for document in range(len(code)):
        begin = offsets[document]
        for word in range(first[document], first[document + 1]):
            position = starts[word] - 1
            while position >= begin and _is_blank(buffer[position]):
                position -= 1
            opens_line = position < begin or buffer[position] == NEWLINE
            if code[document]:
                if opens_line:
                    counts[document, 1] += _within(definitions, hashes[word])
                    counts[document, 3] += _within(checks, hashes[word])
                elif buffer[position] == COLON:
                    counts[document, 2] += _within(types, hashes[word])
            else:
                counts[document, 1] += _within(reasons, hashes[word])
                if opens_line:
                    counts[document, 2] += _within(headings, hashes[word])
    return counts
