"""Fills `features`: what the heuristic and repetition rules look at."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from data_pipeline.annotate.features.counting import STOP_WORDS
from data_pipeline.annotate.features.measures import measure
from data_pipeline.annotate.step import SCHEMA, Step, with_column
from data_pipeline.text.language import UNKNOWN, stop_words
from data_pipeline.text.words import texts_of, words, words_of

GOPHER_STOP_WORDS = len(STOP_WORDS)
# Values that break no rule, as FineWeb-2 (arXiv 2506.20920) asks nothing there: a line of 30 characters is short in no
# script without blanks, and some have hardly a sentence mark.
LINES = {"short_lines": 0}
MARKS = {"terminal_lines": 1, "end_marked_lines": 1, "c4_sentences": 5}
UNASKED = {**dict.fromkeys(("zh", "ja", "km"), LINES), **dict.fromkeys(("th", "lo", "my"), LINES | MARKS)}


class Features(Step):
    """Rules are not applied here: a threshold may change without a text being read again.

    Goes after `Language`: of a text in another language than English its own stop words are counted, up to eight as
    Gopher's are. Where there is no list (Chinese, Japanese, Thai ...) all eight count as there: the rule asks nothing.
    Nor do others ask what a script does not have: UNASKED.
    """

    name = "features"

    def apply(self, table: pa.Table) -> pa.Table:
        measured = measure(texts_of(table))
        languages = np.array(table["language"].to_pylist(), dtype=object)
        for language in set(languages) - {None, UNKNOWN, "en"}:
            rows = np.flatnonzero(languages == language)
            measured["stop_words"][rows] = _stop_words_of(table.select(["text"]).take(rows), language)
            for feature, value in UNASKED.get(language, {}).items():
                measured[feature][rows] = value
        fields = list(SCHEMA.field("features").type)
        columns = [pa.array(measured[field.name]) for field in fields]
        return with_column(table, "features", pa.StructArray.from_arrays(columns, fields=fields))


def _stop_words_of(table: pa.Table, language: str) -> list[int]:
    """How many different stop words of the language each text has, up to GOPHER_STOP_WORDS."""
    known = stop_words(language)
    if known is None:
        return [GOPHER_STOP_WORDS] * len(table)
    found = words_of(table)
    hashes = words("\n".join(known))[0]
    stops = np.where(np.isin(found.hashes, hashes), found.hashes, 0)
    documents = np.split(stops, found.first[1:-1])
    return [min(GOPHER_STOP_WORDS, int(np.count_nonzero(np.unique(document)))) for document in documents]
