"""MinHash band hashes of documents.

The public Nemotron-CC recipe: shingles of 24 characters, 20 bands of 13 rows (paper 2412.02595; NVIDIA-NeMo/Nemotron,
recipes/data/curation/nemotron-cc, step 2b). Two documents whose sets of shingles have Jaccard similarity J share a band
with probability 1 - (1 - J^rows)^bands: one half at J = 0.77.
"""

from __future__ import annotations

import unicodedata

import numpy as np
from numba import njit, uint32, uint64

from data_pipeline.config import MinHashConfig
from data_pipeline.text.words import BASE, FOLDED, FOLDING, IGNORED, Int64, Texts, UInt8, UInt32, UInt64, decode, mix64

BLOCK = 2048        # shingles permuted at a time: 8 KiB, which stay in the first cache through all permutations
BLANK, UNSEEN = 0x20, 0xFFFFFFFF
UNSEEN_FROM = 0x40000       # tags and selectors of variants; what lies between there and FOLDED are ideographs


def _folds() -> UInt32:
    """What each code point below FOLDED counts as: one character, BLANK or UNSEEN."""
    folds = np.arange(FOLDED, dtype=np.uint32)
    for code in range(0x80, FOLDED):
        character = chr(code)
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", character).casefold())
        kept = next((one for one in (folded, character.lower()) if len(one) == 1), character)
        folds[code] = BLANK if kept.isspace() else ord(kept)
    folds[FOLDING.kinds == IGNORED] = UNSEEN
    folds[0x41:0x5B] += 0x20                                            # A-Z
    folds[[*range(9, 14), 0x200B]] = BLANK                              # and a zero-width space, as in words
    return folds


FOLDS = _folds()


def band_hashes(texts: Texts, config: MinHashConfig, seed: int) -> UInt64:
    """One 64-bit hash for each band and document, shape (bands, documents).

    A shingle is a run of `shingle_characters` Unicode characters of the folded text: case is folded and full-width and
    other compatibility forms are plain, where that leaves one character; a run of white space is one blank, none at the
    ends; what is not seen (soft hyphens) does not count. A text shorter than that is one shingle. Two documents
    that agree in no row of a band get the same hash with probability 2^-64: one such pair is expected among 10^9
    documents. Hashes of ASCII never change, those of other text may with the Unicode version of Python.

    Permutation i of the shingles' hashes x is x -> a_i x modulo 2^32, with a_i and x odd. (No addend: a_i x is uniform
    over the odd numbers as it is, and no x is special among them, as 0 would be.)

    Floor: a multiplication and a minimum for each permutation and shingle. On AVX2 those are 2 + 1 operations on two
    ports for 8 permutations: 49 cycles a character at 260 of them. Measured on one core of a Xeon of the Sapphire
    Rapids generation: 84 MB/s for the permutations alone, 77 MB/s with folding and shingles.
    """
    random = np.random.default_rng(seed)
    multipliers = random.integers(0, 2**32, config.bands * config.rows, dtype=np.uint32) | np.uint32(1)
    return _band_hashes(texts.buffer, texts.offsets, FOLDS, config.shingle_characters, multipliers, config.bands)


@njit(cache=True, nogil=True)
def _fold(buffer: UInt8, folds: UInt32, start: int, stop: int, codes: UInt32) -> int:
    """Write the folded characters of buffer[start:stop] to `codes`; how many there are."""
    count, position, blank = 0, start, False
    while position < stop:
        point, size = decode(buffer, position)
        position += size
        code = folds[point] if point < FOLDED else uint32(point if point < UNSEEN_FROM else UNSEEN)
        if code == UNSEEN:
            continue
        if code == BLANK:
            blank = count > 0
            continue
        if blank:
            codes[count] = BLANK
            count += 1
            blank = False
        codes[count] = code
        count += 1
    return count


@njit(cache=True, nogil=True)
def _permute(shingles: UInt32, multipliers: UInt32, least: UInt32) -> None:
    """Lower `least` to the minimum of each permutation; compiled to vector instructions."""
    for permutation in range(len(multipliers)):
        multiplier, lowest = multipliers[permutation], least[permutation]
        for index in range(len(shingles)):
            lowest = min(lowest, uint32(multiplier * shingles[index]))
        least[permutation] = lowest


@njit(cache=True, nogil=True)
def _band_hashes(
    buffer: UInt8, offsets: Int64, folds: UInt32, characters: int, multipliers: UInt32, bands: int
) -> UInt64:
    documents, rows = len(offsets) - 1, len(multipliers) // bands
    result = np.empty((bands, documents), np.uint64)
    longest = 0
    for document in range(documents):
        longest = max(longest, offsets[document + 1] - offsets[document])
    codes = np.empty(longest, np.uint32)
    block = np.empty(BLOCK, np.uint32)
    least = np.empty(len(multipliers), np.uint32)
    highest = uint64(1)
    for _ in range(characters):
        highest *= uint64(BASE)
    for document in range(documents):
        count = _fold(buffer, folds, offsets[document], offsets[document + 1], codes)
        least[:] = np.uint32(0xFFFFFFFF)
        total, filled = uint64(0), 0
        for index in range(count):
            total = total * uint64(BASE) + codes[index] + uint64(1)
            if index >= characters:
                total -= (codes[index - characters] + uint64(1)) * highest
            if index >= characters - 1:
                block[filled] = uint32(mix64(total) >> uint64(32)) | uint32(1)
                filled += 1
                if filled == BLOCK:
                    _permute(block, multipliers, least)
                    filled = 0
        if count < characters:
            block[0] = uint32(mix64(total) >> uint64(32)) | uint32(1)
            filled = 1
        _permute(block[:filled], multipliers, least)
        for band in range(bands):
            value = uint64(0)
            for row in range(band * rows, (band + 1) * rows):
                value = mix64(value ^ uint64(least[row]))
            result[band, document] = value
    return result
