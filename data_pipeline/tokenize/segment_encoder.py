"""The ids SentencePiece gives, many times faster: each distinct segment of the text is encoded once and remembered.

Why this is exact. BPE starts from single characters and merges, again and again, the neighbouring pair whose union is
the best-scored piece of the vocabulary, the leftmost among equals, until no union is a piece. Where two characters a, b
stand next to each other and no piece of the vocabulary holds "ab", no merge ever reaches across: every union that would
is not a piece. What is merged left of such a place then neither changes the candidates right of it nor their order
among themselves, so the ids of the whole are the ids of the parts, one after the other. With this project's options
nothing else looks across: no normalisation, nothing put before the text, spaces kept one by one (`Tokenizer` refuses
other models). SentencePiece itself encodes the parts; here they are only found, remembered and put together.

The vocabulary decides how long segments are. Trained with SentencePiece's defaults (pieces keep to one script and hold
a space only at their beginning) they are words, numbers and runs of punctuation: four bytes on average in source code.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numba import njit, uint64

from data_pipeline.text.words import Bool, Int32, Int64, Texts, UInt8, UInt64, one_text
from data_pipeline.tokenize.tokenizer import SPACE, Tokenizer

ENTRIES = 1 << 20           # segments remembered; then everything is forgotten, so that memory stays bounded
KEY_BYTES = 1 << 25         # and bytes of them
BYTES_AT_ONCE = 1 << 20     # of text: what is written down about its segments stays in cache
SLOTS = 2 * ENTRIES         # of the hash table, a power of two
TAG = 0xFFFFFFFF00000000    # a slot: the hash's upper half, and entry + 1; 0 is free
ASCII_PAIRS = 1 << 14       # the first places of the pair table: neighbours in ASCII, found without hashing
OTHER_PAIRS = 1 << 20
SPACE_SIGN = int.from_bytes(SPACE.encode())     # U+2581: the same as a space to SentencePiece
MULTIPLIER = 0x9E3779B97F4A7C15


class SegmentEncoder:
    """Encodes documents with `tokenizer`, each ended by its end-of-document id.

    Memory: about 250 MB at most, more only for a single segment longer than KEY_BYTES. What is remembered changes the
    speed, never the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._joined = joined_pairs(tokenizer.pieces)
        self._slots = np.zeros(SLOTS, np.uint64)
        self._key_ends = np.zeros(ENTRIES, np.int64)        # entry e: keys[key_ends[e - 1]:key_ends[e]]
        self._id_ends = np.zeros(ENTRIES, np.int64)
        self._entries = 0
        self._forget(KEY_BYTES)

    def encode(self, texts: Texts) -> Int32:
        """Ids of all documents of `texts` one after the other."""
        offsets, result, first = texts.offsets, [np.empty(0, np.int32)], 0
        while first < len(offsets) - 1:
            last = int(np.searchsorted(offsets, offsets[first] + BYTES_AT_ONCE, "right"))
            last = max(first + 2, last)
            result += self._encode(texts.buffer, offsets[first:last])
            first = last - 1
        return np.concatenate(result)

    def encode_text(self, text: str) -> list[int]:
        """Ids of one text, without an end-of-document id."""
        ids: list[int] = self.encode(one_text(text))[:-1].tolist()
        return ids

    def _encode(self, buffer: UInt8, offsets: Int64) -> Iterator[Int32]:
        ends = _split(buffer, offsets, self._joined)
        entries = np.empty(len(ends), np.int32)
        first, done = offsets[0], 0
        while done < len(ends):
            known = self._entries
            stop, self._entries = _look_up(
                buffer, first, ends, done, self._slots, self._keys, self._key_ends, known, entries
            )
            self._learn(known)
            yield _gather(entries[done:stop], self._ids, self._id_ends)
            if stop < len(ends):
                self._forget(max(KEY_BYTES, int(ends[stop] - ends[stop - 1])))
            first, done = ends[stop - 1], stop

    def _learn(self, known: int) -> None:
        """Encode the keys of the entries from `known` on."""
        ends = self._key_ends[known - 1 : self._entries].tolist()
        content = self._keys[ends[0] : ends[-1]].tobytes()
        keys = [content[start - ends[0] : end - ends[0]] for start, end in pairwise(ends)]
        if not keys:
            return
        ids = self.tokenizer.encode_segments(keys)
        first = self._id_ends[known - 1]
        id_ends = first + np.cumsum(np.fromiter(map(len, ids), np.int64, len(ids)))
        self._id_ends[known : self._entries] = id_ends
        self._ids[first : id_ends[-1]] = np.fromiter(chain.from_iterable(ids), np.int32, id_ends[-1] - first)

    def _forget(self, key_bytes: int) -> None:
        """Start with one entry, the empty segment that stands for the end of a document, and room for `key_bytes`."""
        self._slots[:] = 0
        self._keys = np.empty(key_bytes, np.uint8)
        self._ids = np.empty(key_bytes + 1, np.int32)       # a byte becomes one id at most
        self._entries, self._id_ends[0], self._ids[0] = 1, 1, self.tokenizer.eod_id


def joined_pairs(pieces: list[str]) -> Bool:
    """For each pair of characters, by its place `_pair`, whether a piece may hold the two side by side.

    Pairs outside ASCII share places, so that some are taken for joined that are not; that costs length, not exactness.
    """
    pairs = {pair for piece in pieces for pair in pairwise(piece.replace(SPACE, " "))}
    joined = np.zeros(ASCII_PAIRS + OTHER_PAIRS, np.bool_)
    for left, right in pairs:
        joined[_pair(uint64(int.from_bytes(left.encode())), uint64(int.from_bytes(right.encode())))] = True
    return joined


@njit(cache=True, nogil=True, inline="always")
def _pair(left: Any, right: Any) -> Any:
    """Place of a pair of characters, each the integer that its bytes in UTF-8 spell."""
    if left < 128 and right < 128:
        return left << uint64(7) | right
    mixed = (left * uint64(MULTIPLIER) ^ right) * uint64(MULTIPLIER)
    return uint64(ASCII_PAIRS) + (mixed >> uint64(44))


@njit(cache=True, nogil=True)
def _split(buffer: UInt8, offsets: Int64, joined: Bool) -> Int64:
    """Ends of all segments; after a document's last one stands an empty one, which marks the document's end."""
    ends = np.empty(offsets[-1] - offsets[0] + len(offsets) - 1, np.int64)
    count = 0
    for document in range(len(offsets) - 1):
        position, stop = offsets[document], offsets[document + 1]
        first, previous = position, uint64(0)
        while position < stop:
            start, character = position, uint64(buffer[position])
            position += 1
            if character >= 128:
                while position < stop and buffer[position] & 0xC0 == 0x80:
                    character = character << uint64(8) | uint64(buffer[position])
                    position += 1
                if character == SPACE_SIGN:
                    character = uint64(32)
            if start > first and not joined[_pair(previous, character)]:
                ends[count] = start
                count += 1
            previous = character
        if stop > first:
            ends[count] = stop
            count += 1
        ends[count] = stop
        count += 1
    return ends[:count].copy()


@njit(cache=True, nogil=True)
def _look_up(
    buffer: UInt8, first: int, ends: Int64, segment: int, slots: UInt64, keys: UInt8, key_ends: Int64, known: int,
    entries: Int32,
) -> tuple[int, int]:
    """Entry of each segment from `segment` on, new ones with their keys added, as far as there is room.

    `first` is the first byte of that segment. Returns the segment where it stopped, and the number of entries.
    """
    mask = uint64(len(slots) - 1)
    start = first
    while segment < len(ends):
        end = ends[segment]
        if end == start:
            entries[segment] = 0
            segment += 1
            continue
        value = uint64(end - start)
        for position in range(start, end):
            value = (value ^ uint64(buffer[position])) * uint64(MULTIPLIER)
            value ^= value >> uint64(29)
        slot, tag = value & mask, value & uint64(TAG)
        while slots[slot] != 0:
            if slots[slot] & uint64(TAG) == tag:
                entry = np.int64(slots[slot] & ~uint64(TAG)) - 1
                key = key_ends[entry - 1]
                same = key_ends[entry] - key == end - start
                position = start
                while same and position < end:
                    same = keys[key + position - start] == buffer[position]
                    position += 1
                if same:
                    break
            slot = (slot + uint64(1)) & mask
        if slots[slot] == 0:
            key = key_ends[known - 1]
            if known == len(key_ends) or key + end - start > len(keys):
                break
            keys[key : key + end - start] = buffer[start:end]
            key_ends[known] = key + end - start
            slots[slot] = tag | uint64(known + 1)
            known += 1
        entries[segment] = np.int64(slots[slot] & ~uint64(TAG)) - 1
        segment += 1
        start = end
    return segment, known


@njit(cache=True, nogil=True)
def _gather(entries: Int32, ids: Int32, id_ends: Int64) -> Int32:
    """The ids of the entries one after the other."""
    total = 0
    for entry in entries:
        total += id_ends[entry] - (id_ends[entry - 1] if entry else 0)
    result = np.empty(total, np.int32)
    position = 0
    for entry in entries:
        for index in range(id_ends[entry - 1] if entry else 0, id_ends[entry]):
            result[position] = ids[index]
            position += 1
    return result
