"""Strings of at least N bytes that stood before, in this document or another: spans that training would see twice.

Exact, as Google's deduplicate-text-datasets (arXiv 2107.06499; step 2c of the public Nemotron-CC recipe), with two
differences: the first occurrence stays, and it stays whole (an occurrence that overlaps it is none). First is the one
in the document with the lowest id, so nothing depends on shards. Held-out documents and those with `duplicate` set are
left out, as are those of other domains.

How, without a suffix array: every window of N bytes is known by its anchor, the least hash of its runs of N/2 bytes
(winnowing, Schleimer et al. 2003). Equal windows have equal anchors, and windows in a row share one: there are
4 / (N + 4) anchors a byte of random text. Only windows whose anchor occurs again are compared, by hash and then byte by
byte, so that no collision of hashes can pass for a repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numba import int64, njit, uint64
from numpy.typing import NDArray

from data_pipeline.annotate.dedup.deduplicate import id_numbers
from data_pipeline.annotate.step import Arrays, Decision, GlobalStep, with_column
from data_pipeline.config import SubstringConfig
from data_pipeline.text.words import BASE, Int64, UInt8, UInt64, mix, mix64, texts_of

PARTITIONS = 32                 # of the anchors, by hash: `decide` reads one at a time
CONTEXT_BYTES = 1 << 29         # text that `decide` compares at a time, unless one partition alone has more

# Windows in a row with one anchor: its hash, where in the survey's text the first begins, how many.
ANCHOR = np.dtype([("hash", "<u8"), ("first", "<u4"), ("windows", "<u4")])
# The same for anchors that occur again, with the shard and the document's place among all in the order of ids.
MEMBER = np.dtype([*ANCHOR.descr, ("shard", "<i4"), ("rank", "<i8")])
BYTE = mix(np.arange(1, 257, dtype=np.uint64))


class Substring(GlobalStep):
    """Fills `repeats`: merged spans of bytes in the text, cut back to whole characters; empty where nothing repeats.

    A survey holds the text it is about (less than 4 GiB) and 64 / (N + 4) bytes of anchors for each of its bytes: 1.6
    times the text at N = 100. `decide` holds 40 bytes a document, 1/32 of the anchors, the text of one shard, and what
    it found (16 bytes a run); beyond that 1.6 times CONTEXT_BYTES, and reads the texts once for as many bytes. There
    are five to compare for each window whose anchor occurs again.
    """

    name = "substring"

    def __init__(self, config: SubstringConfig):
        self.config = config

    def survey(self, table: pa.Table) -> Arrays:
        length, texts = self.config.bytes, texts_of(table)
        rows = np.array([
            row for row, (held_out, duplicate, domain) in enumerate(zip(
                *(table[name].to_pylist() for name in ("held_out", "duplicate", "domain")), strict=True))
            if not held_out and duplicate is None and domain in self.config.domains
            and texts.offsets[row + 1] - texts.offsets[row] >= length
        ], dtype=np.int64)
        pieces = [texts.buffer[texts.offsets[row] : texts.offsets[row + 1]] for row in rows]
        text = np.concatenate([np.empty(0, np.uint8), *pieces])
        starts = np.cumsum([0, *map(len, pieces)])
        anchors = np.empty(len((parts := _anchors(text, starts, length))[0]), ANCHOR)
        anchors["hash"], anchors["first"], anchors["windows"] = parts
        partition = (mix(anchors["hash"]) % np.uint64(PARTITIONS)).astype(np.uint8)
        ends = np.cumsum(np.bincount(partition, minlength=PARTITIONS))
        parted = np.split(anchors[np.argsort(partition, kind="stable")], ends[:-1])
        own = {"ids": id_numbers(table)[rows], "rows": rows, "starts": starts, "text": text}
        return own | {f"anchors{number}": part for number, part in enumerate(parted)}

    def decide(self, surveys: Sequence[Arrays]) -> Decision:
        found = [_repeats(surveys, members, self.config.bytes) for members in _batches(surveys, self.config.bytes)]
        return Decision({}, [
            _merged(survey, *(np.concatenate([np.empty(0, np.int64), *(batch[shard][side] for batch in found)])
                              for side in (0, 1)))
            for shard, survey in enumerate(surveys)
        ])

    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        texts, row = texts_of(table), own["row"]
        base, stop = texts.offsets[row], texts.offsets[row + 1]
        starts, ends = base + own["start"], base + own["end"]
        for _ in range(3):      # a character has at most three bytes after its first
            starts = starts + _inside(texts.buffer, starts)
            ends = ends - ((ends < stop) & _inside(texts.buffer, np.minimum(ends, stop - 1)))
        spans = np.stack([starts - base, ends - base], axis=1).astype(np.int32).ravel()
        offsets = np.zeros(table.num_rows + 1, np.int32)
        np.cumsum(2 * np.bincount(row, minlength=table.num_rows), out=offsets[1:])
        return with_column(table, "repeats", pa.ListArray.from_arrays(offsets, spans))


def without(text: str, repeats: Sequence[int]) -> tuple[str, list[str]]:
    """What is left of `text` without its spans of `repeats`, and the spans."""
    data = text.encode()
    edges = [0, *repeats, len(data)]
    pieces = [data[start:end].decode() for start, end in pairwise(edges)]
    return "".join(pieces[0::2]), pieces[1::2]


def _inside(buffer: UInt8, positions: Int64) -> NDArray[np.bool_]:
    """Where a byte goes on with a character that began before it."""
    return (buffer[positions] & 0xC0) == 0x80


def _batches(surveys: Sequence[Arrays], length: int) -> Iterator[np.ndarray]:
    """The anchors that occur more than once, as MEMBER, with those of one hash in one batch."""
    ids = np.concatenate([survey["ids"] for survey in surveys])
    rank = np.empty(len(ids), np.int64)
    rank[np.lexsort((ids[:, 1], ids[:, 0]))] = np.arange(len(ids))
    starts = [survey["starts"] for survey in surveys]
    ranks = np.split(rank, np.cumsum([len(own) - 1 for own in starts])[:-1])
    waiting: list[np.ndarray] = []
    size = 0
    for partition in range(PARTITIONS):
        parts = [survey[f"anchors{partition}"] for survey in surveys]
        again = np.split(_occurs_again(np.concatenate([part["hash"] for part in parts])),
                         np.cumsum([len(part) for part in parts])[:-1])
        for shard, (part, chosen) in enumerate(zip(parts, again, strict=True)):
            members = np.empty(np.count_nonzero(chosen), MEMBER)
            for name in ("hash", "first", "windows"):
                members[name] = part[name][chosen]
            members["shard"] = shard
            members["rank"] = ranks[shard][np.searchsorted(starts[shard], members["first"], side="right") - 1]
            waiting.append(members)
            size += int(members["windows"].sum()) + len(members) * (length - 1)
        if size >= CONTEXT_BYTES:
            yield np.concatenate(waiting)
            waiting, size = [], 0
    yield np.concatenate([np.empty(0, MEMBER), *waiting])


def _occurs_again(hashes: UInt64) -> NDArray[np.bool_]:
    """Which hashes stand more than once among them."""
    order = np.argsort(hashes)
    same = hashes[order[1:]] == hashes[order[:-1]]
    result = np.zeros(len(hashes), dtype=bool)
    result[order[1:][same]] = True
    result[order[:-1][same]] = True
    return result


def _repeats(surveys: Sequence[Arrays], members: np.ndarray, length: int) -> list[tuple[Int64, Int64]]:
    """For each shard, where in its survey's text runs of repeated windows begin and end, in bytes."""
    members = members[np.lexsort((members["rank"], members["hash"]))]       # of a document, in its own order
    first, shard = members["first"].astype(np.int64), members["shard"]
    offsets = np.zeros(len(members) + 1, np.int64)
    np.cumsum(members["windows"] + np.int64(length - 1), out=offsets[1:])
    contexts = np.empty(offsets[-1], np.uint8)
    for number, survey in enumerate(surveys):
        _gather(survey["text"], first, np.flatnonzero(shard == number), contexts, offsets)
    hashes, ranks = np.ascontiguousarray(members["hash"]), np.ascontiguousarray(members["rank"])
    member, begins, ends = _compare(contexts, offsets, hashes, ranks, first, length)
    return [(begins[own], ends[own]) for own in (shard[member] == number for number in range(len(surveys)))]


def _merged(survey: Arrays, begins: Int64, ends: Int64) -> Arrays:
    """Spans by row of the table and byte of the document, those that touch or overlap as one."""
    order = np.argsort(begins)
    begins, ends = begins[order], ends[order]
    starts = survey["starts"]
    document = np.searchsorted(starts, begins, side="right") - 1
    new = np.ones(len(begins) + 1, dtype=bool)
    new[1:-1] = (begins[1:] > ends[:-1]) | (document[1:] != document[:-1])
    document = document[new[:-1]]
    return {"row": survey["rows"][document], "start": begins[new[:-1]] - starts[document],
            "end": ends[new[1:]] - starts[document]}


@njit(cache=True, nogil=True)
def _anchors(text: UInt8, starts: Int64, length: int) -> tuple[UInt64, Int64, Int64]:
    """Hash, first window and number of windows of each run of windows with one anchor."""
    gram = length // 2
    width = length - gram + 1                       # grams in a window
    highest = uint64(1)
    for _ in range(gram):
        highest *= uint64(BASE)
    capacity = len(text) * 8 // length + 64
    hashes, firsts, counts = np.empty(capacity, np.uint64), np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    runs = 0
    ring = np.empty(width, np.uint64)               # hashes of the last grams
    for document in range(len(starts) - 1):
        start = starts[document]
        total, least, least_at, slot = uint64(0), uint64(0), -width, 0
        recurs, split = False, False                # stands the least more than once; has its run been split for that
        for position in range(start, starts[document + 1]):
            total = total * uint64(BASE) + BYTE[text[position]]
            index = position - start - gram + 1
            if index < 0:
                continue
            if index > 0:
                total -= BYTE[text[position - gram]] * highest
            ring[slot] = total
            if least_at + width <= index:           # the least has left the window: look for the next
                least, least_at, recurs = total, index, False
                for age in range(1, min(width, index + 1)):
                    value = ring[slot - age if age <= slot else slot - age + width]
                    recurs = value == least or (recurs and value > least)
                    if value < least:
                        least, least_at = value, index - age
            elif total <= least:
                recurs = total == least
                least, least_at = total, index
            slot = slot + 1 if slot + 1 < width else 0
            if index < width - 1:
                continue
            same = index > width - 1 and hashes[runs - 1] == least
            if same and (split or not recurs):
                counts[runs - 1] += 1
                continue
            split = same                            # windows of one run may equal each other: two runs show that
            if runs == capacity:
                capacity *= 2
                hashes = np.concatenate((hashes, hashes))
                firsts = np.concatenate((firsts, firsts))
                counts = np.concatenate((counts, counts))
            hashes[runs], firsts[runs], counts[runs] = least, start + index - width + 1, 1
            runs += 1
    return hashes[:runs], firsts[:runs], counts[:runs]


@njit(cache=True, nogil=True)
def _gather(text: UInt8, first: Int64, members: Int64, contexts: UInt8, offsets: Int64) -> None:
    for member in members:
        shift = first[member] - offsets[member]
        for position in range(offsets[member], offsets[member + 1]):
            contexts[position] = text[position + shift]


@njit(cache=True, nogil=True)
def _same(contexts: UInt8, one: int, other: int, size: int) -> bool:
    index = 0
    while index < size and contexts[one + index] == contexts[other + index]:
        index += 1
    return index == size


@njit(cache=True, nogil=True)
def _compare(
    contexts: UInt8, offsets: Int64, hashes: UInt64, ranks: Int64, first: Int64, length: int
) -> tuple[Int64, Int64, Int64]:
    """Runs of windows that stood before in a context with the same anchor hash: context, first byte, byte past the end.

    Contexts are in order of hash, rank and place. The table of windows is open-addressed; a place is 1 + the byte in
    `contexts`, so that those of earlier groups are known by being no larger than the group's first byte.
    """
    found, spans = np.empty((3, 1024), np.int64), 0
    size = 1024
    keys, places, owners = np.empty(size, np.uint64), np.zeros(size, np.int64), np.empty(size, np.int64)
    highest = uint64(1)
    for _ in range(length):
        highest *= uint64(BASE)
    group = 0
    while group < len(ranks):
        stop = group
        while stop < len(ranks) and hashes[stop] == hashes[group]:
            stop += 1
        base, mask = offsets[group], 1
        while mask < 2 * (offsets[stop] - base - (stop - group) * (length - 1)):
            mask *= 2
        if mask > size:
            size = mask
            keys, places, owners = np.empty(size, np.uint64), np.zeros(size, np.int64), np.empty(size, np.int64)
        mask -= 1
        for member in range(group, stop):
            begin, total, following = offsets[member], uint64(0), int64(-1)
            for position in range(begin, offsets[member + 1]):
                total = total * uint64(BASE) + BYTE[contexts[position]]
                at = position - length + 1
                if at < begin:
                    continue
                if at > begin:
                    total -= BYTE[contexts[at - 1]] * highest
                key = mix64(total)
                slot = int64(key & uint64(mask))
                while places[slot] > base:
                    if keys[slot] == key:
                        # after a repeat at the byte before, only the last byte is new
                        known = length - 1 if places[slot] - 1 == following else 0
                        if _same(contexts, places[slot] - 1 + known, at + known, length - known):
                            break
                    slot = (slot + 1) & mask
                if places[slot] <= base:
                    keys[slot], places[slot], owners[slot] = key, at + 1, member
                    following = int64(-1)
                    continue
                following = places[slot]
                owner, here = owners[slot], first[member] + at - begin
                if ranks[owner] == ranks[member] and first[owner] + following - 1 - offsets[owner] + length > here:
                    continue
                if spans > 0 and found[0, spans - 1] == member and found[2, spans - 1] == here + length - 1:
                    found[2, spans - 1] += 1
                    continue
                if spans == found.shape[1]:
                    found = np.concatenate((found, found), axis=1)
                found[0, spans], found[1, spans], found[2, spans] = member, here, here + length
                spans += 1
        group = stop
    return found[0, :spans], found[1, :spans], found[2, :spans]
