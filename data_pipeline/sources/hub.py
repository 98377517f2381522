"""Data sets of the Hugging Face Hub, streamed; a data set in a local directory is read the same way.

The Hub's clients retry by themselves: a request five times within half a minute, a broken read of a stream up to
`datasets.config.STREAMING_READ_MAX_RETRIES` times, five seconds apart. What still fails is a DataError.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import GatedRepoError, HTTPError

from data_pipeline.config import DataError, HubSource
from data_pipeline.sources.columns import as_bytes, missing_column, require_text
from data_pipeline.sources.piece import Document, Piece, Refusal, checked, seeded
from data_pipeline.sources.readers import ROWS

HUB = "https://huggingface.co"
# Those of the Hub's clients, of Arrow, and of a data set that is not as described.
READING_ERRORS = (OSError, ValueError, RuntimeError, HTTPError, DatasetsError, pa.ArrowException)


@dataclass(frozen=True)
class HubPiece(Piece):
    """One data file of the data set, or several where a file holds many."""

    source: HubSource
    index: int
    count: int

    def read(self) -> Iterator[Document | Refusal]:
        source, row = self.source, 0
        for table in self._tables():
            require_text(name_of(source), source.text_column, table.schema)
            for column in table[source.text_column].chunks:
                for value in as_bytes(column):
                    place = f"file {self.index}, row {row}"
                    yield checked(value, name_of(source), place, source.domain, source.license)
                    row += 1

    def _tables(self) -> Iterator[pa.Table]:
        shard = _open(self.source).shard(self.count, self.index)
        try:
            yield from shard.with_format("arrow").iter(batch_size=ROWS)
        except READING_ERRORS as error:
            raise _mendable(self.source, error, f", file {self.index} of {self.count},") from error


def hub_pieces(source: HubSource, seed: int) -> list[Piece]:
    """A piece a data file. Raises DataError for a data set, configuration, split or column that is not there."""
    count = _open(source).num_shards
    return [HubPiece(source, index, count) for index in seeded(range(count), seed)]


@cache
def _open(source: HubSource) -> datasets.IterableDataset:
    """Once a process: it asks the Hub for the list of files."""
    try:
        stream = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except READING_ERRORS as error:
        raise _mendable(source, error) from error
    if stream.column_names is None:
        return stream
    if source.text_column not in stream.column_names:
        raise missing_column(name_of(source), source.text_column, stream.column_names)
    return stream.select_columns([source.text_column])


def name_of(source: HubSource) -> str:
    return f"{source.dataset}/{source.config}" if source.config else source.dataset


def _mendable(source: HubSource, error: Exception, place: str = "") -> DataError:
    """What is wrong and what to do."""
    page = source.dataset if Path(source.dataset).exists() else f"{HUB}/datasets/{source.dataset}"
    text = str(error).strip().partition("\n")[0]
    if _is_gated(error):
        wrong = "is gated: its owner gives access to accounts that accept its terms."
        remedy = f"Accept them at {page}, then set HF_TOKEN to a token of that account ({HUB}/settings/tokens)."
    elif isinstance(error, DatasetNotFoundError) and "cannot be accessed" in text:
        wrong = "is not on the Hub, or is private."
        remedy = "Correct `dataset` in params.yaml, or set HF_TOKEN to a token that may read it."
    elif isinstance(error, ConnectionError | HTTPError):
        wrong = f"cannot be reached: {text}"
        remedy = ("Connect (and unset HF_HUB_OFFLINE) and run again: what has been read so far is kept. "
                  "Or give `dataset` a local copy's directory, in params.yaml.")
    else:
        wrong = f"cannot be read: {text or type(error).__name__}"
        remedy = f"Correct `dataset`, `config`, `split` or `revision` in params.yaml; {page} shows what there is."
    return DataError(f"annotate.sources: data set {name_of(source)}{place} {wrong}\n{remedy}")


def _is_gated(error: BaseException | None) -> bool:
    if isinstance(error, DatasetNotFoundError) and "gated" in str(error):
        return True         # `datasets` drops the cause when it looks into its cache
    return error is not None and (isinstance(error, GatedRepoError) or _is_gated(error.__cause__))
