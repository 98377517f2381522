"""Fills `features`: what the heuristic and repetition rules look at."""

from __future__ import annotations

import pyarrow as pa

from data_pipeline.steps.measures import measure
from data_pipeline.steps.step import SCHEMA, Step, with_column
from data_pipeline.steps.words import texts_of


class Features(Step):
    """Rules are not applied here: a threshold may change without a text being read again."""

    name = "features"

    def apply(self, table: pa.Table) -> pa.Table:
        measured = measure(texts_of(table))
        fields = list(SCHEMA.field("features").type)
        columns = [pa.array(measured[field.name]) for field in fields]
        return with_column(table, "features", pa.StructArray.from_arrays(columns, fields=fields))
