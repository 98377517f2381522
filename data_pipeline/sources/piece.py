"""What every source gives: documents and refusals, by pieces that a worker reads one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import xxhash

T = TypeVar("T")


class Document(NamedTuple):
    """A text and where it is from."""

    text: str           # valid Unicode: it can be encoded as UTF-8
    source: str         # distribution, site, data set or file: the unit of holding out
    path: str           # within the source
    domain: str
    license: str        # SPDX expression, or "unknown"


class Refusal(NamedTuple):
    """Input that gave no document, or not the whole of one."""

    domain: str
    reason: str
    where: str          # file or address, and the place in it where known


class PassedOver(NamedTuple):
    """Something that is not read, for it is of no kind that holds documents, or does not say which files it has."""

    unit: str           # "files", "packages", or records of an archive: "WARC records"
    what: str           # its suffix or type
    where: str


Item = Document | Refusal | PassedOver


class Piece(ABC):
    """A part of a source that is read in one go. Pieces are small and are pickled to worker processes."""

    @abstractmethod
    def read(self) -> Iterator[Item]:
        """Documents and the rest in a fixed order, holding one record or one batch of them at a time.

        Raises DataError for what a user must mend: a column that is not there, an address that does not answer.
        """


@dataclass(frozen=True)
class PassedOverPiece(Piece):
    """What is known not to be read before anything is."""

    entries: tuple[PassedOver, ...]

    def read(self) -> Iterator[Item]:
        yield from self.entries


def checked(text: object, source: str, path: str, domain: str, license: str) -> Document | Refusal:
    """The document of a record's text, a string or UTF-8, or why there is none."""
    where = f"{source}, {path}" if path else source
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            return Refusal(domain, "invalid UTF-8", where)
    if not isinstance(text, str):
        return Refusal(domain, "no text", where)
    if not text.strip():
        return Refusal(domain, "empty", where)
    try:
        text.encode()
    except UnicodeEncodeError:              # which JSON may spell and UTF-8 may not
        return Refusal(domain, "half a surrogate pair", where)
    return Document(text, source, path, domain, license)


def seeded(names: Iterable[T], seed: int) -> list[T]:
    """`names` in an order that depends on their text and on `seed` alone, so that a cap on size takes a fair sample."""
    return sorted(
        names,
        key=lambda name: (xxhash.xxh3_64_intdigest(str(name).encode(errors="surrogateescape"), seed & (2**64 - 1)),
                          str(name)),
    )


def batches(items: Iterable[tuple[T, int]], size: int) -> Iterator[list[T]]:
    """Neighbouring items, given with their sizes, in groups of at least `size`; the last may be smaller."""
    group: list[T] = []
    total = 0
    for item, item_size in items:
        group.append(item)
        total += item_size
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group
