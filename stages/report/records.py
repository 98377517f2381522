"""Reading of records, until the package's own: `stages.records` and the error of a record that cannot be used."""

from __future__ import annotations

from data_pipeline.config import DataError
from stages import records
from stages.records import Metrics, load

__all__ = ["Metrics", "RecordError", "Records", "load"]


class Records(records.Records):
    decode_repeats: dict[str, dict[int, list[float]]]       # seconds a token by model and context, interleaved


class RecordError(DataError):
    """A record that is missing, empty, malformed or of an older version: two lines, what and what to do."""
