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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline import evaluation_sets
from data_pipeline.annotate.passes import Arrays, Groups, Made, Passes, Places, part_of, parted, taken, total
from data_pipeline.annotate.step import Decision, GlobalStep, with_column
from data_pipeline.config import PAPER_TASKS, DataError, DecontaminationConfig
from data_pipeline.text.ngrams import hash_set, is_in, ngrams_in, readings
from data_pipeline.text.words import WORD, Int64, UInt64, Words, passages_of

Strings = Callable[[str], Iterator[str]]        # of a file, by its name

FEWEST_WORDS = 8
HELD_OUT = "held-out text"
PART_NGRAMS = 1 << 25           # of a part of the decision: 0.5 to 1 GiB of hash set


class Decontaminate(GlobalStep):
    """Fills `contamination`: the places in a training document where a shared n-gram begins; 0 where held out. And
    `contaminated_by`: the evaluation set at most of these places, or "held-out text".

    The decision is a hash set of 16 to 32 bytes an n-gram of held-out and evaluation text, in parts by the hashes'
    prefix: a worker holds all of it up to 2 GiB, else a part at a time, which it reads anew for every shard. As much
    again for each evaluation set, whole, read for documents that share something.
    Two different n-grams have the same hash with probability 2^-64: 10^9 of them in 10^12 words of training text meet
    by chance some 50 times.

    Args:
        strings: reads the files of `against` (`data_pipeline.sources.readers.strings`).

    Raises DataError where a file of `against` is missing, damaged, or not of a kind that sources are read from, and
    where the paper's sets are not installed.
    """

    name = "decontaminate"

    def __init__(self, config: DecontaminationConfig, strings: Strings | None = None):
        self.config, self.strings = config, strings
        assert strings or not config.files
        for name in config.files:
            if not Path(name).is_file():
                raise _unreadable(name, "no such file")
        if PAPER_TASKS in config.against:
            evaluation_sets.root()

    @property
    def sets(self) -> list[str]:
        """Names of the evaluation sets, by which their texts are read: the paper's, files."""
        return [name for one in self.config.against for name in (evaluation_sets.SETS if one == PAPER_TASKS else [one])]

    def survey(self, table: pa.Table) -> Arrays:
        held_out = table.filter(pa.array(table["held_out"].to_pylist(), pa.bool_()))
        hashes = np.concatenate([ngrams_in(words, self.config.ngram) for words in readings(held_out)])
        return {"size": np.array([len(hashes)]), "hashes": hashes}

    def decide(self, surveys: Sequence[Arrays], passes: Passes) -> Decision:
        """`known0` ... hold n-grams of `lengths` words, `set0` ... those of each of `sets`; `texts`: how many of
        evaluation are looked for by them, whole, not.

        Says on stderr how many are whole and how many not, where there are such.
        """
        n, least = self.config.ngram, min(FEWEST_WORDS, self.config.ngram)
        known, texts = [np.empty(0, np.uint64)], np.zeros(3, np.int64)
        of_sets: dict[str, UInt64] = {}
        for place, name in enumerate(self.sets):
            found, of_set = pa.table({"text": pa.array(list(self._strings(name)), pa.string())}), []
            for number, words in enumerate(readings(found)):
                lengths = np.minimum(np.diff(np.concatenate([[0], np.cumsum(words.sizes)])[words.first]) // WORD, n)
                of_word = np.repeat(lengths, np.diff(words.first))
                for length in range(least, n + 1):
                    hashes = passages_of(words, length)
                    of_set.append(hashes[(hashes != 0) & (of_word == length)])
                if not number:
                    texts += [np.sum(lengths == n), np.sum((lengths >= least) & (lengths < n)), np.sum(lengths < least)]
            known += of_set
            of_sets[f"set{place}"] = hash_set(np.concatenate(of_set))
        if texts[1:].any():
            print(f"annotate.decontamination.against: of {texts.sum()} texts {texts[0]} are looked for by runs of {n} "
                  f"words, {texts[1]} of {least} to {n - 1} words as a whole, {texts[2]} shorter ones not at all.",
                  file=sys.stderr, flush=True)
        evaluation = np.concatenate(known)
        parts = passes.parts(total(surveys) + len(evaluation), PART_NGRAMS)
        groups = Groups(surveys, min(parts, len(surveys)))
        made = passes.exchange("sets", partial(_hashes, groups, parts, evaluation), groups.number, _set, parts)
        own = {"texts": texts, "lengths": np.arange(least if texts[1] else n, n + 1)} | of_sets
        places: dict[str, tuple[Arrays, str]] = {name: (own, name) for name in own}
        places |= {f"known{part}": (sets, "known") for part, sets in enumerate(made)}
        return Decision(Places(places), [{}] * len(surveys))

    def _strings(self, name: str) -> Iterator[str]:
        if name in evaluation_sets.SETS:
            yield from evaluation_sets.strings(name)
            return
        assert self.strings is not None
        try:
            read = list(self.strings(name))
            found = [text.encode(errors="replace").decode() for text in read]       # JSON spells surrogates
            if not any(map(str.strip, found)):
                raise ValueError("it holds no text")
            if broken := sum(map(str.__ne__, read, found)):
                print(f"{name}: {broken} of {len(read)} texts hold half a surrogate pair; what stands beside it is "
                      "looked for.", file=sys.stderr, flush=True)
            yield from found
        except (OSError, ValueError, RecursionError) as error:      # pa.ArrowInvalid, DataError are ValueErrors
            raise _unreadable(name, str(error).replace("\n", " ")) from error

    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        lengths = np.asarray(shared["lengths"]).tolist()
        training = ~np.array(table["held_out"].to_pylist(), dtype=bool)
        known = [f"known{part}" for part in range(sum(name.startswith("known") for name in shared))]
        counts = training * _hits(table, shared, known, lengths)
        found = np.flatnonzero(counts)
        names = np.full(len(table), None, object)
        names[found] = self._most_shared(table.take(pa.array(found)), shared, lengths)
        table = with_column(table, "contaminated_by", pa.array(names.tolist(), pa.string()))
        return with_column(table, "contamination", pa.array(counts, pa.int32()))

    def _most_shared(self, table: pa.Table, shared: Arrays, lengths: Sequence[int]) -> list[str]:
        """For each document the evaluation set that shares most with it, the first of equals; held-out text if none."""
        best, names = np.zeros(len(table), np.int64), np.full(len(table), HELD_OUT, object)
        for place, name in enumerate(self.sets if len(table) else []):
            counts = _hits(table, shared, [f"set{place}"], lengths)
            names[counts > best] = name
            best = np.maximum(best, counts)
        return names.tolist()


def _hashes(groups: Groups, parts: int, evaluation: UInt64, group: int) -> Arrays:
    """The n-grams of a group of shards by the prefix of their hash; the first brings those of evaluation text."""
    hashes = np.concatenate([evaluation[: 0 if group else None], *(survey["hashes"] for survey in groups.own(group))])
    return parted(part_of(hashes, parts), parts, {"hashes": hashes})


def _set(given: Made, part: int) -> Arrays:
    return {"known": hash_set(*taken(given, part, ["hashes"]))}


def _hits(table: pa.Table, shared: Arrays, sets: Sequence[str], lengths: Sequence[int]) -> Int64:
    """Words of each document at which an n-gram of one of these lengths begins that is in the hash sets of these names,
    parts of one: (documents,)."""
    return np.asarray(np.max([_hits_of(words, shared, sets, lengths) for words in readings(table)], axis=0))


def _hits_of(words: Words, shared: Arrays, sets: Sequence[str], lengths: Sequence[int]) -> Int64:
    hit = np.zeros(len(words.hashes), bool)
    asked = [passages_of(words, length) for length in lengths]
    for part, name in enumerate(sets):
        known = shared[name]
        for hashes in asked:
            own = np.flatnonzero((hashes != 0) & (part_of(hashes, len(sets)) == part))
            hit[own] |= is_in(hashes[own], known)
    return np.diff(np.concatenate([[0], np.cumsum(hit)])[words.first])


def _unreadable(name: str, what: str) -> DataError:
    return DataError(f"{name}: cannot be read as evaluation text: {what}.\nMend `annotate.decontamination.against`.")
