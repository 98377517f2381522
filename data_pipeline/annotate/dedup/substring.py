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

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numba import int64, njit, uint64

from data_pipeline.annotate.dedup.deduplicate import id_numbers
from data_pipeline.annotate.passes import (
    Arrays,
    Groups,
    Made,
    OfShards,
    Passes,
    order_of,
    part_of,
    parted,
    taken,
    total,
)
from data_pipeline.annotate.step import Decision, GlobalStep, with_column
from data_pipeline.config import SubstringConfig
from data_pipeline.text.words import BASE, Bool, Int64, UInt8, UInt64, mix, mix64, texts_of

PART_BYTES = 1 << 30            # of text, that a part of the decision is about

# Windows in a row with one anchor: its hash, where in the survey's text the first begins, how many.
ANCHOR = np.dtype([("hash", "<u8"), ("first", "<u4"), ("windows", "<u4")])
# The same for anchors that occur again, with the shard and the first 64 bits of the document's id.
MEMBER = np.dtype([*ANCHOR.descr, ("shard", "<u8"), ("id", "<u8")])
RUN = ("shard", "begin", "end")     # of repeated windows, in bytes of the survey's text
BYTE = mix(np.arange(1, 257, dtype=np.uint64))


class Substring(GlobalStep):
    """Fills `repeats`: merged spans of bytes in the text, cut back to whole characters; empty where nothing repeats.

    A survey holds the text it is about (less than 4 GiB) and 64 / (N + 4) bytes of anchors for each of its bytes: 1.6
    times the text at N = 100. For the decision anchors' hashes go to parts by their prefix, which say whether they
    occur again; those that do go there once more with the text of their windows, five bytes for each window, and are
    compared. A worker holds the anchors of a group of shards or of a part, 40 bytes each, then twice the text compared.
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
        return {"size": starts[-1:], "ids": id_numbers(table)[rows], "rows": rows, "starts": starts, "text": text,
                "anchors": anchors}

    def decide(self, surveys: Sequence[Arrays], passes: Passes) -> Decision:
        length, parts = self.config.bytes, passes.parts(total(surveys), PART_BYTES)
        groups = Groups(surveys, min(parts, len(surveys)))
        again = passes.exchange("anchors", partial(_hashes, groups, parts), groups.number, _occur_again, parts)
        runs = passes.exchange("windows", partial(_contexts, groups, again, length, parts), groups.number,
                               partial(_repeats, groups, length), parts)
        made = passes.run("shards", partial(_spans, groups, runs), groups.number)
        return Decision({}, OfShards(made, ["row", "start", "end"], groups))

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


def _inside(buffer: UInt8, positions: Int64) -> Bool:
    """Where a byte goes on with a character that began before it."""
    return (buffer[positions] & 0xC0) == 0x80


def _part(anchors: np.ndarray, parts: int) -> UInt64:
    """The least hash of several is small: its prefix says little before it is mixed."""
    return part_of(mix(anchors["hash"]), parts)


def _hashes(groups: Groups, parts: int, group: int) -> Arrays:
    """The anchors of a group of shards, by part."""
    anchors = np.concatenate([survey["anchors"] for survey in groups.own(group)])
    return parted(_part(anchors, parts), parts, {"hash": np.ascontiguousarray(anchors["hash"])})


def _occur_again(given: Made, part: int) -> Arrays:
    """Of each anchor in a part whether its hash stands there more than once, by the group it came from."""
    hashes = [giver.piece(part, ["hash"], "bounds")[0] for giver in given]
    order = np.argsort(joined := np.concatenate(hashes))
    same = joined[order[1:]] == joined[order[:-1]]
    again = np.zeros(len(joined), dtype=bool)
    again[order[1:][same]] = True
    again[order[:-1][same]] = True
    return {"again": again, "bounds": np.cumsum([0, *map(len, hashes)])}


def _contexts(groups: Groups, again: Made, length: int, parts: int, group: int) -> Arrays:
    """The anchors of a group of shards that occur again, as MEMBER, and the text of their windows, by part."""
    own, shards = groups.own(group), groups.shards(group)
    anchors = [survey["anchors"] for survey in own]
    part = np.concatenate([_part(survey, parts) for survey in anchors])
    chosen = np.empty(len(part), bool)
    chosen[order_of(part, parts)] = taken(again, group, ["again"])[0]
    members = np.zeros(np.count_nonzero(chosen), MEMBER)
    ends = np.cumsum([len(survey) for survey in anchors])[:-1]
    starts = np.cumsum([0, *map(np.count_nonzero, np.split(chosen, ends))])
    for shard, survey, found, some, (start, stop) in zip(
        shards, own, anchors, np.split(chosen, ends), pairwise(starts), strict=True
    ):
        document = np.searchsorted(survey["starts"], found["first"][some], side="right") - 1
        for name in ANCHOR.names or ():
            members[name][start:stop] = found[name][some]
        members["shard"][start:stop], members["id"][start:stop] = shard, survey["ids"][document, 0]
    sorted_ = parted(part[chosen], parts, {"members": members})
    members = sorted_["members"]
    offsets = _offsets(members, length)
    contexts = np.empty(offsets[-1], np.uint8)
    first = members["first"].astype(np.int64)
    for shard, survey in zip(shards, own, strict=True):
        _gather(survey["text"], first, np.flatnonzero(members["shard"] == shard), contexts, offsets)
    return {**sorted_, "contexts": contexts, "context_bounds": offsets[sorted_["bounds"]]}


def _offsets(members: np.ndarray, length: int) -> Int64:
    """Where the context of each begins, and the last ends."""
    return np.concatenate([[0], np.cumsum(members["windows"] + np.int64(length - 1))])


def _repeats(groups: Groups, length: int, given: Made, part: int) -> Arrays:
    """Where runs of repeated windows begin and end, by group of shards."""
    (members,) = taken(given, part, ["members"])
    (text,) = taken(given, part, ["contexts"], "context_bounds")
    order = np.lexsort((members["id"], members["hash"]))        # of a document, in its own order
    source = _offsets(members, length)[:-1][order]
    members = members[order]
    offsets = _offsets(members, length)
    contexts = np.empty_like(text)
    _gather(text, source, np.arange(len(members)), contexts, offsets)
    hashes, ids = (np.ascontiguousarray(members[name]) for name in ("hash", "id"))
    member, begin, end = _compare(contexts, offsets, hashes, ids, members["first"].astype(np.int64), length)
    shard = members["shard"][member].astype(np.int64)
    runs = dict(zip(RUN, (shard, begin, end), strict=True))
    return parted(groups.group_of(shard), groups.number, runs)


def _spans(groups: Groups, runs: Made, group: int) -> Arrays:
    """What is decided of each shard of a group."""
    shard, begin, end = taken(runs, group, RUN)
    return {f"{name}{number}": values
            for number, survey in zip(groups.shards(group), groups.own(group), strict=True)
            for name, values in _merged(survey, begin[shard == number], end[shard == number]).items()}


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
    contexts: UInt8, offsets: Int64, hashes: UInt64, ids: UInt64, first: Int64, length: int
) -> tuple[Int64, Int64, Int64]:
    """Runs of windows that stood before in a context with the same anchor hash: context, first byte, byte past the end.

    Contexts are in order of hash, id and place. The table of windows is open-addressed; a place is 1 + the byte in
    `contexts`, so that those of earlier groups are known by being no larger than the group's first byte.
    """
    found, spans = np.empty((3, 1024), np.int64), 0
    size = 1024
    keys, places, owners = np.empty(size, np.uint64), np.zeros(size, np.int64), np.empty(size, np.int64)
    highest = uint64(1)
    for _ in range(length):
        highest *= uint64(BASE)
    group = 0
    while group < len(ids):
        stop = group
        while stop < len(ids) and hashes[stop] == hashes[group]:
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
                if ids[owner] == ids[member] and first[owner] + following - 1 - offsets[owner] + length > here:
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
