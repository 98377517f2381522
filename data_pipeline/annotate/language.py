"""The step that says in what language documents are."""

from __future__ import annotations

import pyarrow as pa

from data_pipeline.annotate.step import Step, with_column
from data_pipeline.text.language import detect


class Language(Step):
    """Fills `language` and `language_share`."""

    name = "language"

    def apply(self, table: pa.Table) -> pa.Table:
        found = [detect(text) for text in table["text"].to_pylist()]
        table = with_column(table, "language", [code for code, _ in found])
        return with_column(table, "language_share", [share for _, share in found])
