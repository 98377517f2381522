"""What the heuristic rules look at: one number a document each, a count or one count over another."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from data_pipeline.annotate.features.characters import CLASSES, ZERO, Classes
from data_pipeline.annotate.features.counting import Count, count_characters, count_words
from data_pipeline.annotate.features.line_counting import PHRASES, count_lines, count_paragraphs
from data_pipeline.annotate.features.repetition import count_n_grams
from data_pipeline.text.words import Int32, Int64, Texts, UInt8, UInt64

# What programs write into what they write, in a comment among the first characters.
GENERATED = r"(?im)^\s*(#|//|/\*).*(auto-?generated|@generated|generated (by|from|automatically)|do not (edit|modify))"
GENERATED_WITHIN = 1500


class Feature(NamedTuple):
    """How a feature is made of counts: one of them, or its share of another."""

    counted: Count
    of: Count | None            # what it is a share of; 0 where there is none
    definition: str


# A word is what stands between white space, in scripts without blanks four letters of that; a line what ends at a line
# feed; lengths are in characters. A duplicate is an occurrence after the first. What rules shall not ask of a language,
# the step `features` sets to a value that breaks none.
FEATURES: dict[str, Feature] = {
    "characters": Feature(Count.CHARACTERS, None, "characters"),
    "words": Feature(Count.WORDS, None, "words"),
    "lines": Feature(Count.LINES, None, "lines"),
    "mean_word_length": Feature(Count.WORD_CHARACTERS, Count.WORDS, "mean length of a word"),
    "longest_word": Feature(Count.LONGEST_WORD, None, "length of the longest word"),
    "mean_line_length": Feature(Count.CHARACTERS, Count.LINES, "characters a line, line feeds among them"),
    "longest_line": Feature(Count.LONGEST_LINE, None, "length of the longest line"),
    "letters": Feature(Count.LETTERS, Count.CHARACTERS, "share of characters that are letters of any script"),
    "digits": Feature(Count.DIGITS, Count.CHARACTERS, "share of characters that are decimal digits of any script"),
    "other_characters": Feature(
        Count.OTHER, Count.CHARACTERS,
        "share of characters but letters, marks, digits, commas, terminal punctuation and line feeds"),
    "white_space": Feature(Count.WHITE_SPACE, Count.CHARACTERS, "share of spaces, tabs and line ends"),
    "brackets": Feature(Count.BRACKETS, Count.CHARACTERS, "share of characters {}[]()⟨⟩ and their wide forms"),
    "url_characters": Feature(Count.URL_CHARACTERS, Count.CHARACTERS, "share of characters in http and https URLs"),
    "encoded_run": Feature(Count.ENCODED_RUN, None, "longest run of [A-Za-z0-9+/=], or of escapes such as \\x0f"),
    "generated": Feature(Count.GENERATED, None, "1 where a comment near the beginning says that a program wrote it"),
    "alphabetic_words": Feature(Count.ALPHABETIC_WORDS, Count.WORDS, "share of words with a letter"),
    "stop_words": Feature(
        Count.STOP_WORDS, None,
        "how many of Gopher's eight stop words occur; in other languages, of jusText's, 8 at most"),
    "hashes": Feature(Count.HASHES, Count.WORDS, "# a word"),
    "ellipses": Feature(Count.ELLIPSES, Count.WORDS, "... and … a word"),
    "newlines": Feature(Count.NEWLINES, Count.WORDS, "line feeds a word"),
    "bullet_lines": Feature(Count.BULLET_LINES, Count.LINES, "share of lines that begin with a bullet or -"),
    "ellipsis_lines": Feature(Count.ELLIPSIS_LINES, Count.LINES, "share of lines that end with ... or …"),
    "comment_lines": Feature(Count.COMMENT_LINES, Count.LINES, "share of lines that begin with #, // or /*"),
    "terminal_lines": Feature(
        Count.TERMINAL_LINES, Count.TEXT_LINES, "share of lines with text that end with terminal punctuation"),
    "end_marked_lines": Feature(
        Count.END_MARKED_LINES, Count.TEXT_LINES,
        "share of lines with text that end with terminal punctuation or a quote"),
    "short_lines": Feature(Count.SHORT_LINES, Count.TEXT_LINES, "share of lines with text of up to 30 characters"),
    "c4_sentences": Feature(
        Count.C4_SENTENCES, None,
        "sentences in the lines C4 keeps: three words or more, none over 1000 characters, no JavaScript, no policies"),
    "lorem_ipsum_lines": Feature(Count.LOREM_IPSUM_LINES, None, "lines of three words or more with lorem ipsum"),
    "curly_bracket_lines": Feature(Count.CURLY_BRACKET_LINES, None, "lines of three words or more with {"),
    "boilerplate_paragraphs": Feature(
        Count.BOILERPLATE_PARAGRAPHS, Count.PARAGRAPHS, "share of paragraphs on cookies, privacy or terms of use"),
    "duplicate_lines": Feature(Count.DUPLICATE_LINES, Count.TEXT_LINES, "share of lines with text that are duplicates"),
    "duplicate_line_characters": Feature(
        Count.DUPLICATE_LINE_CHARACTERS, Count.CHARACTERS, "share of characters in duplicate lines"),
    "duplicate_line_text": Feature(
        Count.DUPLICATE_LINE_CHARACTERS, Count.LINE_CHARACTERS, "the same, of characters that are not line feeds"),
    "duplicate_paragraphs": Feature(
        Count.DUPLICATE_PARAGRAPHS, Count.PARAGRAPHS, "share of paragraphs that are duplicates"),
    "duplicate_paragraph_characters": Feature(
        Count.DUPLICATE_PARAGRAPH_CHARACTERS, Count.CHARACTERS, "share of characters in duplicate paragraphs"),
    **{
        f"top_{n}gram": Feature(
            Count[f"TOP_{n}GRAM"], Count.CHARACTERS,
            f"share of characters in the commonest run of {n} words, the spaces within it counted as one each")
        for n in (2, 3, 4)
    },
    **{
        f"duplicate_{n}grams": Feature(
            Count[f"DUPLICATE_{n}GRAMS"], Count.CHARACTERS,
            f"share of characters in words of duplicate runs of {n} words, each word once")
        for n in range(5, 11)
    },
}


def measure(texts: Texts) -> dict[str, NDArray[np.float32]]:
    """Every feature of every text, each of shape (documents,). Exact up to 2^24, then to 24 bits."""
    counted = counts(texts)
    result = {}
    for name, feature in FEATURES.items():
        values = counted[:, feature.counted].astype(np.float64)
        if feature.of is not None:
            whole = counted[:, feature.of]
            values = np.where(whole, values / np.maximum(whole, 1), 0.0)
        result[name] = values.astype(np.float32)
    return result


def counts(texts: Texts) -> Int64:
    """`Count` of each text, shape (documents, len(Count))."""
    frame = _as_frame(texts)
    suspects = frame.select(pl.col("text").str.contains_any(list(PHRASES), ascii_case_insensitive=True))["text"]
    longest = int(np.diff(texts.offsets).max(initial=0))
    items = longest // 2 + 2                        # no text has more words; pages that are not used are never touched
    size = longest + 2
    result = np.zeros((len(frame), len(Count)), np.int64)
    starts, ends = np.empty(items, np.int64), np.empty(items, np.int64)
    lengths, tally = np.empty(items, np.int32), np.empty(items, np.int32)
    hashes, keys = np.empty(items, np.uint64), np.empty(size, np.uint64)
    slots = np.zeros(1 << (2 * size).bit_length(), np.int64)
    _count(texts.buffer, texts.offsets, suspects.to_numpy(), CLASSES, starts, ends, lengths, hashes, keys, slots, tally,
           result)
    generated = frame.select(pl.col("text").str.head(GENERATED_WITHIN).str.contains(GENERATED))["text"]
    result[:, Count.GENERATED] = generated.to_numpy()
    return result


def _as_frame(texts: Texts) -> pl.DataFrame:
    buffers = [None, pa.py_buffer(texts.offsets), pa.py_buffer(texts.buffer)]
    column = pa.Array.from_buffers(pa.large_string(), len(texts.offsets) - 1, buffers)
    return pl.DataFrame({"text": pl.Series(column)})


@njit(cache=True, nogil=True)
def _count(
    buffer: UInt8, offsets: Int64, suspects: NDArray[np.bool_], classes: Classes, starts: Int64, ends: Int64,
    lengths: Int32, hashes: UInt64, keys: UInt64, slots: Int64, tally: Int32, result: Int64,
) -> None:
    used = ZERO
    for document in range(len(offsets) - 1):
        text, row = buffer[offsets[document] : offsets[document + 1]], result[document]
        count_characters(text, classes, row)
        count_words(text, classes, starts, ends, lengths, hashes, row)
        used = count_lines(text, classes, suspects[document], starts, ends, lengths, keys, slots, used, row)
        used = count_paragraphs(text, classes, suspects[document], keys, slots, used, row)
        used = count_n_grams(lengths, hashes, row[Count.WORDS], keys, slots, used, tally, row)
