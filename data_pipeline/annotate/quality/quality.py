"""Quality scores, after Nemotron-CC (arXiv 2412.02595): an ensemble of scorers that see quality from different sides.

The paper's three are classifiers that have to be fetched. Ours by default are trained here, in seconds, on reference
text that every installation holds (`scorers.training_text`); a model of the Hub can stand beside or instead of them:

    fluency     how likely the words are under a bigram model of the reference        (scorers.fluency)
    reference   a linear classifier's logit for reference text against the corpus     (scorers.reference)
    structure   how much is explained: sentences, headings, comments, types           (scorers.structure)

Scores are only ever compared within a domain, as ranks: `quality_labels` makes bins and labels of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from data_pipeline.annotate.passes import Arrays, Passes
from data_pipeline.annotate.quality import classifier, fluency, reference, training_text
from data_pipeline.annotate.quality.quality_labels import keys_of
from data_pipeline.annotate.quality.structure import structure
from data_pipeline.annotate.step import Decision, GlobalStep, with_column
from data_pipeline.config import ClassifierConfig
from data_pipeline.text.words import ngrams_of, texts_of, words_of


class Quality(GlobalStep):
    """Fills `scores`, one value a scorer in the order of `scorers`, and `perplexity`, for training documents that are
    no duplicates.

    A standard-library document is scored as if the scorers had not seen it: fluency without its own counts, reference
    by the model of the other half.

    Args:
        scorers: AnnotateConfig.scorers.
        seed: of the order in which the reference scorer sees its examples.

    Raises:
        DataError: a classifier that cannot be had here.
    """

    name = "quality"

    def __init__(self, scorers: Sequence[str | ClassifierConfig], seed: int):
        self.scorers, self.seed = list(scorers), seed
        for scorer in self.scorers:
            if isinstance(scorer, ClassifierConfig):
                classifier.check(scorer)

    def survey(self, table: pa.Table) -> Arrays:
        return training_text.survey(table)

    def decide(self, surveys: Sequence[Arrays], passes: Passes) -> Decision:
        """Trains the scorers. Raises DataError where the corpus holds no text of two words but reference text."""
        text = training_text.collect(surveys, "reference")
        counted = text.keys[-1:]                    # reference documents up to this key are in the counts
        if not len(text.keys):
            text = training_text.installed_reference(self.seed)
        shared = {"counted": counted, **fluency.train(text)}
        if "reference" in self.scorers:
            corpus = training_text.collect(surveys, "corpus")
            if not len(corpus.keys):                # a book or two is a corpus as well
                corpus = training_text.collect(surveys, "long")
            shared |= reference.train(text, corpus, self.seed)
        return Decision(shared, [{}] * len(surveys))

    def apply(self, table: pa.Table, shared: Arrays, own: Arrays) -> pa.Table:
        words = words_of(table)
        pairs, pairs_first = ngrams_of(words, 2)
        scored, keys = training_text.is_scored(table), keys_of(table["id"].to_pylist())
        counted = training_text.is_reference(table, words) & (keys <= shared["counted"].max(initial=0))
        mean_log2 = fluency.mean_log2(words, pairs, scored, counted, shared)
        columns = []
        for scorer in self.scorers:
            if isinstance(scorer, ClassifierConfig):
                columns.append(classifier.scores(scorer, table["text"], scored))
            elif scorer == "fluency":
                columns.append(mean_log2)
            elif scorer == "reference":
                columns.append(reference.logits(words, pairs, pairs_first, scored, keys, shared))
            else:
                columns.append(structure(texts_of(table), words, training_text.kinds_of(table)))
        rows = zip(np.stack(columns, axis=1).tolist(), scored, strict=True)
        table = with_column(table, "scores", [scores if is_scored else None for scores, is_scored in rows])
        perplexity = np.exp2(-mean_log2).astype(np.float32)
        return with_column(table, "perplexity", pa.array(perplexity, mask=~scored))
