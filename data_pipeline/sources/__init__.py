"""Where text comes from: installed packages, files, the Hugging Face Hub, web archives.

A source is cut into pieces, which workers read. Neither the order of the documents nor what is in them depends on where
the cuts are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from data_pipeline.config import FilesSource, HubSource, InstalledSource, Source, WebSource
from data_pipeline.sources.piece import Document, Item, PassedOver, Piece, Refusal

__all__ = ["Document", "Item", "PassedOver", "Piece", "Refusal", "digest", "pieces"]


def pieces(source: Source, seed: int, shard_bytes: int) -> list[Piece]:
    """The pieces of `source`, in a seeded order, of about `shard_bytes` of input where it can be cut.

    Raises DataError for a source that is not there.
    """
    # Each reader is imported where it is needed: a worker that reads files has no use for the Hub's client.
    match source:
        case InstalledSource():
            from data_pipeline.sources.installed import installed_pieces
            return installed_pieces(source, seed, shard_bytes)
        case FilesSource():
            from data_pipeline.sources.files import file_pieces
            return file_pieces(source, seed, shard_bytes)
        case HubSource():
            from data_pipeline.sources.hub import hub_pieces
            return hub_pieces(source, seed)
        case WebSource():
            from data_pipeline.sources.files import web_pieces
            return web_pieces(source, seed, shard_bytes)


def digest(found: Sequence[Piece]) -> str:
    """SHA-256 over what the pieces refer to: names, sizes, versions. It changes when a file does."""
    return hashlib.sha256("\n".join(map(repr, found)).encode()).hexdigest()
