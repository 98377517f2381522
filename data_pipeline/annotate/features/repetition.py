"""Repetition within a text, in compiled code: equal keys, commonest and repeated runs of words."""

from __future__ import annotations

import numpy as np
from numba import njit, uint64

from data_pipeline.annotate.features.counting import BYTE_VALUE, Count
from data_pipeline.text.words import BASE, Int32, Int64, UInt8, UInt64


@njit(cache=True, nogil=True)
def first_equal(keys: UInt64, index: int, slots: Int64, mask: int, used: int) -> int:
    """Index of the first key equal to keys[index]; called for index 0, 1, 2 ...

    slots is an open-addressed table of mask + 1 places, of numbers `used` + index + 1. What is not above `used` is from
    before and counts as empty, so that the table is never cleared.
    """
    slot = (keys[index] * uint64(BASE)) >> uint64(32) & uint64(mask)
    while True:
        seen = slots[slot] - used
        if seen <= 0:
            slots[slot] = used + index + 1
            return index
        if keys[seen - 1] == keys[index]:
            return seen - 1
        slot = slot + uint64(1) & uint64(mask)


@njit(cache=True, nogil=True)
def table_mask(items: int) -> int:
    """Of a table for so many items: its size, the least power of two that leaves half of it empty, less one."""
    size = 2
    while size < 2 * items:
        size *= 2
    return size - 1


@njit(cache=True, nogil=True)
def hash_of(text: UInt8, start: int, end: int) -> tuple[np.uint64, int]:
    """Hash of text[start:end], and its characters."""
    total, power, characters = uint64(0), uint64(1), 0
    for position in range(start, end):
        total += BYTE_VALUE[text[position]] * power
        power *= uint64(BASE)
        characters += text[position] & 0xC0 != 0x80
    return total, characters


@njit(cache=True, nogil=True)
def count_n_grams(
    lengths: Int32, hashes: UInt64, words: int, keys: UInt64, slots: Int64, used: int, tally: Int32, row: Int64
) -> int:
    """Characters in the commonest 2-, 3- and 4-gram, and under repeats of 5- to 10-grams; keys grow word by word."""
    mask = table_mask(words)
    for index in range(words):          # a slice of a slice takes Numba seconds to compile
        keys[index] = hashes[index]
    power = uint64(1)
    repeats = True
    for n in range(2, 11):
        count = words - n + 1
        power *= uint64(BASE)
        for index in range(count):
            keys[index] += hashes[index + n - 1] * power
        if count < 1 or (n > 5 and not repeats):
            break
        column = Count.TOP_2GRAM + n - 2
        if n < 5:
            row[column] = _commonest(lengths, count, n, keys, slots, mask, used, tally)
        else:
            row[column] = _repeated(lengths, count, n, keys, slots, mask, used)
            repeats = row[column] > 0
        used += count
    return used


@njit(cache=True, nogil=True)
def _commonest(
    lengths: Int32, count: int, n: int, keys: UInt64, slots: Int64, mask: int, used: int, tally: Int32
) -> int:
    """Characters of the n-gram seen most often, the first of several, with the spaces in it, times how often."""
    for index in range(count):
        tally[index] = 0
        tally[first_equal(keys, index, slots, mask, used)] += 1
    best = 0
    for index in range(1, count):
        if tally[index] > tally[best]:
            best = index
    return tally[best] * (lengths[best : best + n].sum() + n - 1)


@njit(cache=True, nogil=True)
def _repeated(lengths: Int32, count: int, n: int, keys: UInt64, slots: Int64, mask: int, used: int) -> int:
    """Characters of the words under n-grams that stood in the text before, each word once."""
    covered_to, characters = 0, 0
    for index in range(count):
        if first_equal(keys, index, slots, mask, used) != index:
            for word in range(max(index, covered_to), index + n):
                characters += lengths[word]
            covered_to = index + n
    return characters
