"""How many n-grams of words a training document shares with held-out text or with evaluation sets.

n = 13 as in GPT-3 (arXiv 2005.14165, appendix C), which cuts 200 characters around a hit and drops a document after ten
hits: at the size of the web, hits are many. Where sources are held out whole, hits are rare and one may be too many:
the limit is `curate.contamination`. Words are those of `data_pipeline.text.words`: neither case nor punctuation nor
typesetting counts, and in scripts without blanks a run of letters stands for n words. HTML's character references are
read as what they stand for.

A text of an evaluation set that is shorter than n words is looked for whole if it has 8 or more, GPT-3's least; shorter
ones are found in text that never saw them and are passed over, with a count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.annotate.passes import Arrays, Groups, Made, Passes, part_of, parted, taken, total
from data_pipeline.annotate.step import Decision, GlobalStep, with_column
from data_pipeline.config import DataError, DecontaminationConfig
from data_pipeline.text.ngrams import hash_set, is_in, ngrams_in, readings
from data_pipeline.text.words import WORD, Int64, UInt64, Words, passages_of

Strings = Callable[[str], Iterator[str]]        # of a file, by its name

FEWEST_WORDS = 8
PART_NGRAMS = 1 << 25           # of a part of the decision: 0.5 to 1 GiB of hash set


class Decontaminate(GlobalStep):
    """Fills `contamination`: the places in a training document where a shared n-gram begins; 0 where held out.

    The decision is a hash set of 16 to 32 bytes an n-gram of held-out and evaluation text, in parts by the hashes'
    prefix: a worker holds all of it up to 2 GiB, else a part at a time, which it reads anew for every shard.
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
        held_out = table.filter(pa.array(table["held_out"].to_pylist(), pa.bool_()))
        hashes = np.concatenate([ngrams_in(words, self.config.ngram) for words in readings(held_out)])
        return {"size": np.array([len(hashes)]), "hashes": hashes}

    def decide(self, surveys: Sequence[Arrays], passes: Passes) -> Decision:
        """`known` holds n-grams of `lengths` words; `texts`: how many of evaluation are looked for by them, whole, not.

        Says on stderr how many are whole and how many not, where there are such.
        """
        n, least = self.config.ngram, min(FEWEST_WORDS, self.config.ngram)
        known, texts = [np.empty(0, np.uint64)], np.zeros(3, np.int64)
        for name in self.config.against:
            found = pa.table({"text": pa.array(list(self._strings(name)), pa.string())})
            for number, words in enumerate(readings(found)):
                lengths = np.minimum(np.diff(np.concatenate([[0], np.cumsum(words.sizes)])[words.first]) // WORD, n)
                of_word = np.repeat(lengths, np.diff(words.first))
                for length in range(least, n + 1):
                    hashes = passages_of(words, length)
                    known.append(hashes[(hashes != 0) & (of_word == length)])
                if not number:
                    texts += [np.sum(lengths == n), np.sum((lengths >= least) & (lengths < n)), np.sum(lengths < least)]
        if texts[1:].any():
            print(f"annotate.decontamination.against: of {texts.sum()} texts {texts[0]} are looked for by runs of {n} "
                  f"words, {texts[1]} of {least} to {n - 1} words as a whole, {texts[2]} shorter ones not at all.",
                  file=sys.stderr, flush=True)
        evaluation = np.concatenate(known)
        parts = passes.parts(total(surveys) + len(evaluation), PART_NGRAMS)
        groups = Groups(surveys, min(parts, len(surveys)))
        made = passes.exchange("sets", partial(_hashes, groups, parts, evaluation), groups.number, _set, parts)
        own = {"texts": texts, "lengths": np.arange(least if texts[1] else n, n + 1)}
        return Decision(Known(made, own), [{}] * len(surveys))

    def _strings(self, name: str) -> Iterator[str]:
        assert self.strings is not None
        try:
            yield from self.strings(name)
        except (OSError, ValueError, RecursionError) as error:      # pa.ArrowInvalid, DataError are ValueErrors
            raise _unreadable(name, str(error).replace("\n", " ")) from error

    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        lengths = np.asarray(shared["lengths"]).tolist()
        training = ~np.array(table["held_out"].to_pylist(), dtype=bool)
        counts = np.max([_hits(words, shared, lengths) for words in readings(table)], axis=0)
        return with_column(table, "contamination", pa.array(counts * training, pa.int32()))


class Known(Mapping[str, np.ndarray]):
    """The arrays that all shards share: `own`, and `known0`, `known1` ..., the hash sets, read when asked for."""

    def __init__(self, sets: Made, own: Arrays):
        self.sets, self.own = sets, own

    def __getitem__(self, name: str) -> np.ndarray:
        return self.own[name] if name in self.own else self.sets[int(name.removeprefix("known"))]["known"]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.own, *(f"known{part}" for part in range(len(self.sets)))])

    def __len__(self) -> int:
        return len(self.own) + len(self.sets)


def _hashes(groups: Groups, parts: int, evaluation: UInt64, group: int) -> Arrays:
    """The n-grams of a group of shards by the prefix of their hash; the first brings those of evaluation text."""
    hashes = np.concatenate([evaluation[: 0 if group else None], *(survey["hashes"] for survey in groups.own(group))])
    return parted(part_of(hashes, parts), parts, {"hashes": hashes})


def _set(given: Made, part: int) -> Arrays:
    return {"known": hash_set(*taken(given, part, ["hashes"]))}


def _hits(words: Words, shared: Arrays, lengths: Sequence[int]) -> Int64:
    """Words of each document at which a known n-gram of one of these lengths begins: (documents,)."""
    hit = np.zeros(len(words.hashes), bool)
    parts = sum(name.startswith("known") for name in shared)
    asked = [passages_of(words, length) for length in lengths]
    for part in range(parts):
        known = shared[f"known{part}"]
        for hashes in asked:
            own = np.flatnonzero((hashes != 0) & (part_of(hashes, parts) == part))
            hit[own] |= is_in(hashes[own], known)
    return np.diff(np.concatenate([[0], np.cumsum(hit)])[words.first])


def _unreadable(name: str, what: str) -> DataError:
    return DataError(f"{name}: cannot be read as evaluation text: {what}.\nMend `annotate.decontamination.against`.")
