"""Only text under permissive licences goes on."""

from __future__ import annotations

import pyarrow as pa

from data_pipeline.sources.licenses import is_permissive
from data_pipeline.steps.step import Outcome, Step


class License(Step):
    name = "license"

    def apply(self, table: pa.Table, decision: None) -> Outcome:
        refused = {value: f"licence {value}" for value in set(table["license"].to_pylist()) if not is_permissive(value)}
        return Outcome(table, [refused.get(value) for value in table["license"].to_pylist()])
