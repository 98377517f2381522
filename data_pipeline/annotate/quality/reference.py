"""The reference scorer: a linear classifier of reference text against the corpus, on words and pairs of words.

The offline counterpart of the third classifier of Nemotron-CC, DCLM's fastText model of instruction text against a
crawl (arXiv 2406.11794): logistic regression on hashed words and pairs of words. An example is a window of WINDOW
words; its logit is a bias plus the mean weight of its features, and so is a document's, whatever its length.

Two models are trained, each on the documents of one half of all keys; a document is scored by the one that has not
seen its half, whether it was in the sample or not. Code weighs the same in both classes, and so does prose, lest the
one be told by being the other.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numba import njit, uint64

from data_pipeline.annotate.passes import Arrays
from data_pipeline.annotate.quality.training_text import TrainingText
from data_pipeline.config import DataError
from data_pipeline.text.words import Bool, Float64, Int8, Int64, UInt64, Words, ngrams_of

BUCKET_BITS = 18            # of hashed features
WINDOW = 128                # words an example
SCALE = 16.0                # of the mean weight: about the root of an example's features
EPOCHS = 8
LEARNING_RATE = 1.0         # of stochastic gradient descent; falls to nothing in a straight line


class Examples(NamedTuple):
    """Windows of words: pairs lie one fewer to a document than words, so a window's pairs begin before its words."""

    hashes: UInt64          # (words,) of all documents
    pairs: UInt64           # (words - documents,)
    starts: Int64           # (examples,) first word
    stops: Int64            # (examples,) word past the end
    documents: Int64        # (examples,)


def train(reference: TrainingText, corpus: TrainingText, seed: int) -> Arrays:
    """The weights of both models, (2, buckets + 1) float64, the last of each its bias.

    Model i is for the documents whose key ends in bit i: it has seen the others.

    Raises:
        DataError: the corpus holds nothing to tell the reference from.
    """
    keys = np.concatenate([reference.keys, corpus.keys])
    kinds = np.concatenate([reference.kinds, corpus.kinds])
    wanted = np.arange(len(keys)) < len(reference.keys)
    examples = _examples(reference, corpus)
    lengths, document = examples.stops - examples.starts, examples.documents
    models = []
    for half in (0, 1):
        weights = _weights(lengths, wanted[document], kinds[document], (keys & np.uint64(1))[document] != half)
        rows = np.flatnonzero(weights)
        random = np.random.default_rng([seed % 2**32, half])
        order = np.concatenate([random.permutation(rows) for _ in range(EPOCHS)])
        models.append(_descend(*examples, wanted[document].astype(np.float64), weights, order))
    return {"reference_weights": np.stack(models)}


def _examples(*parts: TrainingText) -> Examples:
    starts, stops, documents = [], [], []
    words = documents_before = 0
    for part in parts:
        for document, (first, last) in enumerate(itertools.pairwise(part.first)):
            windows = np.arange(first, last, WINDOW)
            starts.append(words + windows)
            stops.append(words + np.minimum(windows + WINDOW, last))
            documents.append(np.full(len(windows), documents_before + document))
        words += len(part.hashes)
        documents_before += len(part.keys)
    return Examples(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([ngrams_of(part.words, 2)[0] for part in parts]),
        *(np.concatenate([np.empty(0, np.int64), *values]) for values in (starts, stops, documents)),
    )


def _weights(lengths: Int64, wanted: Bool, kinds: Int8, seen: Bool) -> Float64:
    """Of each example: by its words, so that each kind of text weighs the same in both classes; mean 1, 0 if left out.

    A kind that one class lacks tells nothing of quality and is left out. Where the half to be seen has
    nothing to tell apart, as in a corpus of a few documents, both halves are seen.
    """
    for allowed in (seen, np.ones_like(seen)):
        weights = np.zeros(len(lengths))
        for kind in np.unique(kinds):
            cells = [allowed & (kinds == kind) & (wanted == value) for value in (True, False)]
            if all(cell.any() for cell in cells):
                share = min(lengths[cell].sum() for cell in cells)
                for cell in cells:
                    weights[cell] = lengths[cell] / lengths[cell].sum() * share
        if weights.any():
            return weights / weights[weights > 0].mean()
    raise DataError(
        "annotate.scorers: `reference` tells reference text from other text of two words or more, of which the corpus "
        "holds none.\nAdd other text to annotate.sources, or take `reference` out of annotate.scorers, in params.yaml."
    )


def logits(words: Words, pairs: UInt64, pairs_first: Int64, scored: Bool, keys: UInt64, model: Arrays) -> Float64:
    """The score of each document, (documents,): NaN where not `scored`, the bias alone where there are no words.

    Args:
        words: of a shard.
        pairs, pairs_first: hashes of its pairs of words, as `ngrams_of(words, 2)` gives them.
        scored: (documents,) which to score.
        keys: (documents,), as `keys_of` gives them.
        model: what `train` returned.
    """
    halves = (keys & np.uint64(1)).astype(np.int64)
    return _logits(words.hashes, words.first, pairs, pairs_first, scored, halves, model["reference_weights"])


@njit(inline="always")
def _bucket(value: np.uint64) -> np.uint64:
    return value >> uint64(64 - BUCKET_BITS)


@njit(cache=True, nogil=True)
def _descend(
    hashes: UInt64, pairs: UInt64, starts: Int64, stops: Int64, documents: Int64,
    targets: Float64, example_weights: Float64, order: Int64,
) -> Float64:
    table = np.zeros(((1 << BUCKET_BITS) + 1, 2))           # weights beside counts of the example's features
    features = np.empty(2 * WINDOW, np.int64)
    for step in range(len(order)):
        example = order[step]
        start, stop = starts[example], stops[example]
        first_pair = start - documents[example]
        size = 0
        for index in range(start, stop):
            features[size] = _bucket(hashes[index])
            size += 1
        for index in range(first_pair, first_pair + stop - start - 1):
            features[size] = _bucket(pairs[index])
            size += 1
        total, squares = 0.0, 0.0
        for feature in features[:size]:
            total += table[feature, 0]
            squares += 2 * table[feature, 1] + 1            # (c + 1)^2 - c^2
            table[feature, 1] += 1
        probability = 1 / (1 + np.exp(-(table[-1, 0] + SCALE * total / size)))
        # A window that repeats a few words has a large norm: its step must not overshoot.
        norm = max(1.0, SCALE**2 * squares / size**2)
        rate = LEARNING_RATE * (1 - step / len(order)) / norm
        change = rate * example_weights[example] * (targets[example] - probability)
        table[-1, 0] += change
        for feature in features[:size]:
            table[feature, 0] += change * SCALE / size
            table[feature, 1] = 0.0
    return table[:, 0].copy()


@njit(cache=True, nogil=True)
def _logits(
    hashes: UInt64, first: Int64, pairs: UInt64, pairs_first: Int64, scored: Bool, halves: Int64, weights: Float64
) -> Float64:
    result = np.full(len(scored), np.nan)
    for document in range(len(scored)):
        start, stop = first[document], first[document + 1]
        first_pair, last_pair = pairs_first[document], pairs_first[document + 1]
        if not scored[document]:
            continue
        own = weights[halves[document]]
        total = 0.0
        for index in range(start, stop):
            total += own[_bucket(hashes[index])]
        for index in range(first_pair, last_pair):
            total += own[_bucket(pairs[index])]
        result[document] = own[-1] + SCALE * total / max(1, stop - start + last_pair - first_pair)
    return result
