"""The text column of records: found, checked, and taken out of Arrow arrays."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pyarrow as pa

from data_pipeline.config import DataError

TEXT_TYPES = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
    pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view,
)


def missing_column(name: str, column: str, columns: Iterable[str]) -> DataError:
    """The error for a table that lacks the column of the text, or has several of that name."""
    names = sorted(columns)
    if (count := names.count(column)) > 1:
        return DataError(f"annotate.sources: {name} has {count} columns {column!r}.\n"
                         "Give each a name of its own.")
    return DataError(
        f"annotate.sources: {name} has no column {column!r}; it has {', '.join(names)}.\n"
        "Set `text_column` to the one that holds the text, in params.yaml."
    )


def require_text(name: str, column: str, schema: pa.Schema) -> None:
    """Raises DataError where `schema` has no such column, or one of another type."""
    if schema.names.count(column) != 1:
        raise missing_column(name, column, schema.names)
    kind = schema.field(column).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_json = isinstance(values, pa.JsonType)
    if not (is_json or pa.types.is_null(values) or any(is_text(values) for is_text in TEXT_TYPES)):
        raise DataError(
            f"annotate.sources: column {column!r} of {name} holds {kind}, not text.\n"
            "Set `text_column` to the one that holds the text, in params.yaml."
        )


def as_bytes(column: pa.Array) -> list[bytes | None]:
    """The values before they are decoded: Arrow does not see to it that strings are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column.type, pa.JsonType):        # values of several types, spelt as JSON
        values = (None if value is None else json.loads(value) for value in column.to_pylist())
        return [value.encode(errors="surrogatepass") if isinstance(value, str) else None for value in values]
    return column.cast(pa.large_binary()).to_pylist()
