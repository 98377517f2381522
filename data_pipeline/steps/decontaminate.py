"""How many n-grams of words a training document shares with held-out text or with evaluation sets.

n = 13 as in GPT-3 (arXiv 2005.14165, appendix C), which cuts 200 characters around a hit and drops a document after ten
hits: at the size of the web, hits are many. Where sources are held out whole, hits are rare and one may be too many:
the limit is `curate.contamination`. Words are those of `data_pipeline.steps.words`: case and punctuation do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numba import njit, uint64
from numpy.typing import NDArray

from data_pipeline.config import DataError, DecontaminationConfig
from data_pipeline.steps.step import Arrays, Decision, GlobalStep, with_column
from data_pipeline.steps.words import UInt64, ngrams, ngrams_of, words, words_of

Strings = Callable[[str], Iterator[str]]        # of a file, by its name


def ngram_hashes(text: str, n: int) -> UInt64:
    """64-bit hashes of the n-grams of words in `text`, in order, shape (max(0, words - n + 1),).

    A text with fewer than n words has no n-gram: it can neither contaminate nor be found. Hashes are the same in every
    process and version.
    """
    return ngrams(words(text)[0], n)


class Decontaminate(GlobalStep):
    """Fills `contamination`: the places in a training document where a shared n-gram begins; 0 where held out.

    The decision is a hash set of 16 to 32 bytes an n-gram of held-out and evaluation text; `decide` holds 16 more.
    Two different n-grams have the same hash with probability 2^-64: 10^9 of them in 10^12 words of training text meet
    by chance some 50 times.

    Args:
        strings: reads the files of `against` (`data_pipeline.sources.readers.strings`).

    Raises DataError where a file of `against` is missing, damaged, or not of a kind that sources are read from.
    """

    name = "decontaminate"

    def __init__(self, config: DecontaminationConfig, strings: Strings | None = None):
        self.config, self.strings = config, strings
        assert strings or not config.against
        for name in config.against:
            if not Path(name).is_file():
                raise _unreadable(name, "no such file")

    def survey(self, table: pa.Table) -> Arrays:
        hashes, first = ngrams_of(words_of(table), self.config.ngram)
        held_out = np.array(table["held_out"].to_pylist(), dtype=bool)
        return {"hashes": hashes[np.repeat(held_out, np.diff(first))]}

    def decide(self, surveys: Sequence[Arrays]) -> Decision:
        texts = (text for name in self.config.against for text in self._strings(name))
        evaluated = [ngram_hashes(text, self.config.ngram) for text in texts]
        known = hash_set(np.concatenate([*(survey["hashes"] for survey in surveys), *evaluated]))
        return Decision({"known": known}, [{}] * len(surveys))

    def _strings(self, name: str) -> Iterator[str]:
        assert self.strings is not None
        try:
            yield from self.strings(name)
        except (OSError, ValueError, RecursionError) as error:      # pa.ArrowInvalid, DataError are ValueErrors
            raise _unreadable(name, str(error).replace("\n", " ")) from error

    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        hashes, first = ngrams_of(words_of(table), self.config.ngram)
        hits = np.concatenate([[0], np.cumsum(is_in(hashes, shared["known"]))])
        training = ~np.array(table["held_out"].to_pylist(), dtype=bool)
        return with_column(table, "contamination", pa.array(np.diff(hits[first]) * training, pa.int32()))


@njit(cache=True, nogil=True)
def hash_set(hashes: UInt64) -> UInt64:
    """An open-addressed table of 64-bit hashes, at most half full, for `is_in`. 0 is an empty place."""
    size = 2
    while size < 2 * len(hashes):
        size *= 2
    table, mask = np.zeros(size, np.uint64), uint64(size - 1)
    for value in hashes:
        entry = max(value, uint64(1))
        slot = entry & mask
        while table[slot] != 0 and table[slot] != entry:
            slot = (slot + uint64(1)) & mask
        table[slot] = entry
    return table


@njit(cache=True, nogil=True)
def is_in(hashes: UInt64, table: UInt64) -> NDArray[np.bool_]:
    """Which hashes stand in a `hash_set`: bool, shape of `hashes`."""
    result, mask = np.zeros(len(hashes), np.bool_), uint64(len(table) - 1)
    for index in range(len(hashes)):
        entry = max(hashes[index], uint64(1))
        slot = entry & mask
        while table[slot] != 0 and table[slot] != entry:
            slot = (slot + uint64(1)) & mask
        result[index] = table[slot] == entry
    return result


def _unreadable(name: str, what: str) -> DataError:
    return DataError(f"{name}: cannot be read as evaluation text: {what}.\nMend `annotate.decontamination.against`.")
