"""Data sets of the Hugging Face Hub, streamed; a data set in a local directory is read the same way.

The Hub's clients retry most requests by themselves: five times within half a minute, a broken read of a stream up to
`datasets.config.STREAMING_READ_MAX_RETRIES` times, five seconds apart. What still fails is a DataError. Each file is
opened by itself, so that a schema may change from file to file.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cache
from lzma import LZMAError
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import GatedRepoError, HTTPError

from data_pipeline.config import DataError, HubSource
from data_pipeline.sources.columns import as_bytes, missing_column, require_text
from data_pipeline.sources.piece import Document, Piece, Refusal, checked, seeded
from data_pipeline.sources.readers import ROWS
from data_pipeline.sources.streams import TRY_AGAIN, WAITS, wait

HUB = "https://huggingface.co"
# Those of the Hub's clients, of Arrow, of damaged packing, and of a data set that is not as described.
READING_ERRORS = (OSError, ValueError, TypeError, RuntimeError, EOFError, HTTPError, DatasetsError, LZMAError,
                  pa.ArrowException, zlib.error)


@dataclass(frozen=True)
class HubPiece(Piece):
    """One data file of the data set."""

    source: HubSource
    index: int
    count: int

    def read(self) -> Iterator[Document | Refusal]:
        """The first file says what the data set is: a column that is no text is an error only there."""
        source, row, file = self.source, 0, f"{name_of(self.source)}, file {self.index}"
        table = None
        for table in self._tables():
            if source.text_column not in table.column_names:
                names = f"{', '.join(sorted(table.column_names)):.200}"
                yield Refusal(source.domain, f"no column {source.text_column!r}", f"{file}, but {names}")
                return
            try:
                require_text(file, source.text_column, table.schema)
            except DataError:
                if self.index == 0:
                    raise
                kind = table.schema.field(source.text_column).type
                yield Refusal(source.domain, f"no column {source.text_column!r} of text", f"{file}, {kind}")
                return
            for column in table[source.text_column].chunks:
                for value in as_bytes(column):
                    place = f"file {self.index}, row {row}"
                    yield checked(value, name_of(source), place, source.domain, source.license)
                    row += 1
        if table is None:
            yield Refusal(source.domain, "empty", file)

    def _tables(self) -> Iterator[pa.Table]:
        try:
            stream = _stream(self.source, self.index)
            if self.source.text_column in (stream.column_names or ()):
                stream = stream.select_columns([self.source.text_column])
            yield from stream.with_format("arrow").iter(batch_size=ROWS)
        except StopIteration:           # of a file without a byte
            return
        except DataError:
            raise
        except READING_ERRORS as error:
            raise _mendable(self.source, error, f", file {self.index} of {self.count},") from error


def hub_pieces(source: HubSource, seed: int) -> list[Piece]:
    """A piece a data file. Raises DataError for a data set, configuration, split or column that is not there."""
    try:
        count = len(_files(_builder(source), source.split))
        columns = _stream(source, 0).column_names
    except StopIteration:
        columns = None
    except DataError:
        raise
    except READING_ERRORS as error:
        raise _mendable(source, error) from error
    if columns is not None and source.text_column not in columns:
        raise missing_column(name_of(source), source.text_column, columns)
    return [HubPiece(source, index, count) for index in seeded(range(count), seed)]


@cache
def _builder(source: HubSource) -> datasets.DatasetBuilder:
    """Once a process: it asks the Hub for the list of files, at the commit that the revision names then.

    The clients ask for lists once; where the Hub is busy they are asked again here.
    """
    for planned in (*WAITS, None):
        try:
            return datasets.load_dataset_builder(source.dataset, source.config, revision=source.revision)
        except READING_ERRORS as error:
            busy = getattr(getattr(error, "response", None), "status_code", None) in TRY_AGAIN
            if planned is None or not busy:
                raise _mendable(source, error) from error
            time.sleep(wait(error, planned))
    raise AssertionError


def _files(builder: datasets.DatasetBuilder, split: str) -> list[str]:
    files = builder.config.data_files or {}
    if split not in files:
        raise ValueError(f"Bad split: {split}. Available splits: {list(map(str, files))}")
    return files[split]


def _stream(source: HubSource, index: int) -> datasets.IterableDataset:
    """One file with a schema of its own: `datasets` casts all files to that of the first, or fails."""
    builder = copy(_builder(source))
    builder.config, builder.info = copy(builder.config), copy(builder.info)
    files = _files(builder, source.split)
    builder.config.data_files = DataFilesDict({source.split: DataFilesList([files[index]], [])})
    builder.info.features = builder.config.features = None
    return builder.as_streaming_dataset(source.split)


def name_of(source: HubSource) -> str:
    """The data set and, where there is one, its configuration."""
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
    elif isinstance(error, ConnectionError | HTTPError) or "LocalEntryNotFoundError" in text:
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
