"""Repeated substrings against a dictionary of all windows and a sorted list of suffixes."""

import inspect
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.annotate.dedup import substring
from data_pipeline.annotate.dedup.substring import Substring, without
from data_pipeline.annotate.step import text_id
from data_pipeline.config import SubstringConfig
from tests.data_pipeline.annotate.here import column, cut, run, table

Row = dict[str, object]


def row(text: str, **fields: object) -> Row:
    return {"text": text, "domain": "web", **fields}


def repeats(rows: list[Row], length: int, shards: int = 1) -> list[list[int]]:
    """The column `repeats` of all shards."""
    step = Substring(SubstringConfig(bytes=length, domains=["web"]))
    return column("repeats", run(step, [table(part) for part in cut(rows, shards)], shares=False))


def spans_of(covered: np.ndarray) -> list[int]:
    return np.flatnonzero(np.diff(covered, prepend=False, append=False)).tolist()


def by_dictionary(texts: list[str], length: int) -> list[list[int]]:
    """The definition: a window repeats one that ended before it, or stood in a document with a lower id."""
    first: dict[bytes, tuple[int, int]] = {}
    result: list[list[int]] = [[]] * len(texts)
    for document in sorted(range(len(texts)), key=lambda index: text_id(texts[index])):
        data = texts[document].encode()
        covered = np.zeros(len(data), dtype=bool)
        for start in range(len(data) - length + 1):
            where, place = first.setdefault(data[start : start + length], (document, start))
            if where != document or place + length <= start:
                covered[start : start + length] = True
        result[document] = spans_of(covered)
    return result


def by_suffixes(texts: list[str], length: int) -> list[list[int]]:
    """From the suffixes in order: those next to each other that agree in `length` bytes are occurrences of a window."""
    order = sorted(range(len(texts)), key=lambda index: text_id(texts[index]))
    documents = [texts[index].encode() for index in order]
    starts = np.cumsum([0, *map(len, documents)])
    data = b"".join(documents)
    inside = [position for start, stop in pairwise(starts)
              for position in range(start, stop - length + 1)]
    inside.sort(key=lambda position: (data[position : position + length], position))
    covered = np.zeros(len(data), dtype=bool)
    first = inside[0]
    for position in inside[1:]:
        if data[position : position + length] != data[first : first + length]:
            first = position
        elif position - first >= length or np.searchsorted(starts, first, "right") != np.searchsorted(
                starts, position, "right"):
            covered[position : position + length] = True
    result: list[list[int]] = [[]] * len(texts)
    for index, (start, stop) in zip(order, pairwise(starts), strict=True):
        result[index] = spans_of(covered[start:stop])
    return result


def random_texts(random: np.random.Generator) -> list[str]:
    """Distinct texts made of shared pieces, of runs of one letter, and of letters drawn from few or many."""
    letters = list(("ab", "a ", "xyz012", "abcdefghijklmnop")[random.integers(4)])
    pieces = ["".join(random.choice(letters, random.integers(1, 120))) for _ in range(4)]

    def text() -> str:
        parts = []
        for _ in range(random.integers(0, 6)):
            kind = random.random()
            parts.append(pieces[random.integers(4)][random.integers(0, 20):] if kind < 0.5 else
                         letters[0] * int(random.integers(0, 90)) if kind < 0.6 else
                         "".join(random.choice(letters, random.integers(1, 60))))
        return "".join(parts)

    return sorted({text() for _ in range(8)}, key=lambda _: random.random())


@pytest.mark.parametrize("shards", [1, 3, 9])
def test_random_texts(shards, monkeypatch):
    monkeypatch.setattr(substring, "PART_BYTES", {1: 1 << 30, 3: 200, 9: 20}[shards])      # up to 30 parts
    random = np.random.default_rng(shards)
    found = 0
    for _ in range(150):
        texts, length = random_texts(random), int(random.integers(16, 50))
        expected = by_dictionary(texts, length)
        assert repeats([row(text) for text in texts], length, shards) == expected
        found += sum(map(bool, expected))
    assert found > 150


@pytest.mark.parametrize("length", [16, 50, 100, 500])
def test_real_text(length, monkeypatch):
    modules = (json, inspect, np.ma.core, np.linalg._linalg, np.lib._function_base_impl)
    texts = [Path(str(module.__file__)).read_text(encoding="utf-8")[:60_000] for module in modules]
    texts += [texts[1][20_000:30_000] + texts[2][:500]]
    expected = by_suffixes(texts, length)
    assert expected == by_dictionary(texts, length)
    assert sum(map(len, expected)) > (20 if length <= 100 else 0)
    rows = [row(text) for text in texts]
    assert repeats(rows, length, 2) == expected
    monkeypatch.setattr(substring, "PART_BYTES", 20_000)    # a dozen parts
    assert repeats(rows, length, 3) == expected


def test_what_stays_is_the_first_occurrence_and_all_of_it():
    [spans] = repeats([row("-" * 1000)], 100)
    assert spans == [100, 1000]
    assert repeats([row("0123456789" * 10 + "0123456789")], 50) == [[50, 110]]
    assert repeats([row("0123456789" * 9)], 50) == [[]]       # the second would overlap the first


def test_only_training_text_of_the_domains_that_is_no_duplicate():
    shared = "x" + "a string that is the same in all of these documents, and long enough to be noticed".upper()
    texts = sorted((f"{number} {shared} {number}" for number in range(6)), key=text_id)
    ignored = [row(texts[0], held_out=True), row(texts[1], duplicate="near-duplicate"), row(texts[2], domain="code")]
    found = repeats([row(texts[5]), *ignored, row(texts[4]), row(texts[3])], 60, shards=2)
    at = texts[5].index(shared)
    assert found == [[at - 1, at + len(shared) + 1], [], [], [], [at - 1, at + len(shared) + 1], []]
    assert repeats([*ignored, row("short")], 60) == [[], [], [], []]
    assert repeats([], 60) == []


def test_spans_are_cut_back_to_whole_characters_and_can_be_taken_out():
    """What repeats ends within a character: 🦊 and 🦋 share three bytes of four."""
    shared = "das gemeinsame Stück, über das nicht zweimal zu sprechen ist"
    first, second = sorted((f"1é{shared}🦊", f"2è{shared}🦋"), key=text_id)
    spans = dict(zip((first, second), repeats([row(first), row(second)], 24), strict=True))
    assert spans[first] == []
    left, taken = without(second, spans[second])
    assert taken == [shared] and left == second.replace(shared, "")
    assert without("abc", []) == ("abc", [])
    assert without("aébc", [1, 3, 4, 5]) == ("ab", ["é", "c"])
