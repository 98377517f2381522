"""Beginnings of prompts that have been read, so that none is read twice.

A Mamba-2 state cannot be cut back to fewer tokens as keys and values can: it is kept as it was after each piece of a
prompt, with the piece's own keys and values. Prompts are always cut at the same places (multiples of the piece, and the
end), and what was kept is what the same kernels made of the same numbers: a prompt that is read alone leaves the same
bits as without. Read with others, it may be rounded otherwise.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

Key = tuple[int, tuple[int, ...]]       # number of the piece before, 0 for none; own tokens, compared one by one


class CachedPiece(NamedTuple):
    """What a model holds after the tokens of a piece: `states` of all tokens up to its `end`, `keys_values` of its own
    tokens, `hidden` (hidden,) of its last token before the last norm."""

    number: int
    key: Key
    end: int
    states: list[Tensor]
    keys_values: list[Tensor]
    hidden: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in (*self.states, *self.keys_values, self.hidden))


class PrefixCache:
    """Pieces by what stands before them; those that were not used for longest go when they are more than `most_bytes`.

    A piece is never older than those that follow it, so that none stays which cannot be found.
    """

    def __init__(self, piece_tokens: int, most_bytes: int):
        self.piece_tokens, self.most_bytes, self.nbytes = piece_tokens, most_bytes, 0
        self._kept: OrderedDict[Key, CachedPiece] = OrderedDict()
        self._numbers = 0

    def find(self, ids: list[int]) -> list[CachedPiece]:
        """The pieces that the prompt `ids` begins with, one after the other."""
        found: list[CachedPiece] = []
        while piece := self._kept.get(self._key(found, ids)):
            found.append(piece)
        self._use(found)
        return found

    def keep(
        self, before: list[CachedPiece], ids: list[int], states: list[Tensor], keys_values: list[Tensor], hidden: Tensor
    ) -> CachedPiece | None:
        """Copy what the model holds after the piece of `ids` that follows `before`, unless it is kept; None where there
        is no room for it, or the one before it is gone."""
        size = sum(tensor.nbytes for tensor in (*states, *keys_values, hidden))
        if size > self.most_bytes or (before and self._kept.get(before[-1].key) is not before[-1]):
            return None
        key = self._key(before, ids)
        if kept := self._kept.get(key):         # another text read it meanwhile
            self._use([*before, kept])
            return kept
        self._numbers += 1
        piece = CachedPiece(self._numbers, key, (before[-1].end if before else 0) + len(key[1]),
                      [tensor.clone() for tensor in states], [tensor.clone() for tensor in keys_values], hidden.clone())
        self._kept[key] = piece
        self._use(before)
        self.nbytes += size
        while self.nbytes > self.most_bytes:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return piece if key in self._kept else None

    def _key(self, before: list[CachedPiece], ids: list[int]) -> Key:
        number, end = (before[-1].number, before[-1].end) if before else (0, 0)
        return number, tuple(ids[end : end + self.piece_tokens])

    def _use(self, pieces: list[CachedPiece]) -> None:
        for piece in reversed(pieces):
            self._kept.move_to_end(piece.key)
