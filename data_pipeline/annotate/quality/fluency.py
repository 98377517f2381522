"""The fluency scorer: mean log2 probability of a word under a word-bigram model of reference text.

    p(w | v) = (c(v w) + k p(w)) / (c(v) + k),    p(w) = (c(w) + 1) / (words + distinct words + 1)

A document the counts were made from is scored without its own. The perplexity of a word, 2 to the negative mean, serves
the perplexity filter that Nemotron-CC runs with KenLM (arXiv 2412.02595, section 2.1).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from data_pipeline.annotate.passes import Arrays
from data_pipeline.annotate.quality.training_text import TrainingText
from data_pipeline.text.ngrams import slot_of
from data_pipeline.text.words import Bool, Float64, Int64, UInt32, UInt64, Words, ngrams_of

SMOOTHING = 20.0        # k, the pseudo-counts of the unigram behind each bigram
FEWER_WORDS = -64.0     # the score of a document without a pair of words


def train(text: TrainingText) -> Arrays:
    """Counts of words and of pairs of words within a document, as hash tables."""
    result: dict[str, np.ndarray] = {}
    for name, hashes in (("words", text.words.hashes), ("pairs", ngrams_of(text.words, 2)[0])):
        table, counts = _counted(*np.unique(hashes, return_counts=True))
        result |= {f"fluency_{name}": table, f"fluency_{name}_counts": counts}
    return result


def mean_log2(words: Words, pairs: UInt64, scored: Bool, own: Bool, model: Arrays) -> Float64:
    """Mean log2 p(w | v) over the words of each document after its first: (documents,), NaN where not `scored`.

    Args:
        words: of a shard.
        pairs: hashes of its pairs of words, as `ngrams_of(words, 2)` gives them.
        scored: (documents,) which to score.
        own: (documents,) those that the model has counted.
        model: what `train` returned.
    """
    counts = model["fluency_words_counts"]
    total, distinct = int(counts.sum()), int(np.count_nonzero(counts))
    return _mean_log2(
        words.hashes, pairs, words.first, scored, own, model["fluency_words"], counts,
        model["fluency_pairs"], model["fluency_pairs_counts"], total, distinct,
    )


@njit(cache=True, nogil=True)
def _counted(hashes: UInt64, numbers: Int64) -> tuple[UInt64, UInt32]:
    """A table of `hashes`, and how often each stands there, `numbers` of it at a time."""
    slots = 4
    while slots < 2 * len(hashes):
        slots *= 2
    table, counts = np.zeros(slots, np.uint64), np.zeros(slots, np.uint32)
    for index in range(len(hashes)):
        slot = slot_of(table, hashes[index])
        table[slot] = hashes[index]
        counts[slot] += numbers[index]
    return table, counts


@njit(cache=True, nogil=True)
def _mean_log2(
    hashes: UInt64, pair_hashes: UInt64, first: Int64, scored: Bool, own: Bool,
    words: UInt64, word_counts: UInt32, pairs: UInt64, pair_counts: UInt32, total: int, distinct: int,
) -> Float64:
    result = np.full(len(scored), np.nan)
    own_words, own_word_counts = _counted(hashes[:0], first[:0])
    own_pairs, own_pair_counts = _counted(hashes[:0], first[:0])
    pair_start = 0
    for document in range(len(scored)):
        start, stop = first[document], first[document + 1]
        first_pair = pair_start
        pair_start += max(0, stop - start - 1)
        if not scored[document]:
            continue
        if stop - start < 2:
            result[document] = FEWER_WORDS
            continue
        kinds_and_total = total + distinct + 1.0
        is_own = own[document]
        if is_own:
            once = np.ones(stop - start, np.int64)
            own_words, own_word_counts = _counted(hashes[start:stop], once)
            own_pairs, own_pair_counts = _counted(pair_hashes[first_pair:pair_start], once)
            kinds_and_total -= stop - start
        previous, log_sum = 0.0, 0.0
        for index in range(start, stop):
            single = float(word_counts[slot_of(words, hashes[index])])
            if is_own:
                single -= own_word_counts[slot_of(own_words, hashes[index])]
            if index > start:
                pair = pair_hashes[first_pair + index - start - 1]
                double = float(pair_counts[slot_of(pairs, pair)])
                if is_own:
                    double -= own_pair_counts[slot_of(own_pairs, pair)]
                unigram = (single + 1.0) / kinds_and_total
                log_sum += np.log2((double + SMOOTHING * unigram) / (previous + SMOOTHING))
            previous = single
        result[document] = log_sum / (stop - start - 1)
    return result
