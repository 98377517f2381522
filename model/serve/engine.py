"""Continuous batching: texts of unlike length are decoded together, and join and leave between steps (Orca, OSDI 2022).

Running texts have the first rows of one decoder, and a step takes all of them. Prompts are read one after another in a
row of their own, a piece between two steps, so that a long one holds up the others by a piece at most; what it leaves
is copied into the next free row. The last row moves into the place of one that is done.
"""

from __future__ import annotations

import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model.hybrid_lm import HybridLM
from model.inference.caches import PrefixReader
from model.inference.decoder import Decoder
from model.inference.sampling import Sampling, choose
from model.inference.text import Characters, Vocabulary
from model.serve.prefix_cache import Piece, PrefixCache

COUNTED = ("prompt_tokens", "cached_tokens", "generated_tokens", "finished_stop", "finished_length", "cancelled",
           "failed", "refused")


class Limits(NamedTuple):
    """Of an engine: tokens of a text with its prompt, texts decoded together, texts that wait, tokens of a prompt that
    are read between two steps, and bytes of prompts that are kept."""

    max_length: int
    rows: int
    queue: int
    piece_tokens: int
    prefix_bytes: int


class Event(NamedTuple):
    """What became of a text: a piece of it, or its end: "stop", "length", or an `error`."""

    text: str = ""
    finish: str | None = None
    error: str | None = None


class Busy(Exception):
    """Too many texts wait, or the engine ends; nothing was taken."""


@dataclass(eq=False)
class Text:
    """A text that is asked for.

    Attributes:
        ids: its prompt's.
        stops: strings any of which ends it, and is not in it.
        end_ids: tokens any of which ends it.
        emit: called by the engine's thread with what becomes of it.
        tokens: chosen so far, an end's too.
        cached: tokens of the prompt that were not read again.
        cancelled: nobody waits for it any more; set by anyone. Its row is free before the next step.
    """

    ids: list[int]
    max_tokens: int
    sampling: Sampling
    seed: int
    stops: list[str]
    end_ids: list[int]
    emit: Callable[[Event], None]
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    cancelled: bool = False
    held: str = ""          # may be the beginning of a stop

    def start(self, vocabulary: Vocabulary, device: torch.device) -> None:
        """Make what choosing tokens needs."""
        self.characters = Characters(vocabulary)
        self.generator = torch.Generator(device).manual_seed(self.seed)

    def add(self, token: int) -> str | None:
        """Take the next token; why the text ends with it, if it does."""
        self.tokens.append(token)
        ended = token in self.end_ids
        whole = self.held + (self.characters.rest() if ended else self.characters.add(token))
        finish = "stop" if ended else "length" if len(self.tokens) == self.max_tokens else None
        if finish == "length":
            whole += self.characters.rest()
        found = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if found:
            finish, whole = "stop", whole[: min(found)]
        held = 0 if finish else max((size for stop in self.stops for size in range(1, len(stop))
                                     if whole.endswith(stop[:size])), default=0)
        text, self.held = whole[: len(whole) - held], whole[len(whole) - held :]
        if text or finish:
            self.emit(Event(text, finish))
        return finish


class Engine:
    """A model that writes texts. `run` is its thread's; `submit`, `close` and `figures` are for all threads."""

    def __init__(
        self, model: HybridLM, vocabulary: Vocabulary, limits: Limits, state_dtype: torch.dtype = torch.float32
    ):
        self.vocabulary, self.limits = vocabulary, limits
        self.decoder = Decoder(model, limits.max_length, limits.rows, state_dtype)
        self.reader = PrefixReader(model, limits.max_length, 1, state_dtype)
        self.prefixes = PrefixCache(limits.piece_tokens, limits.prefix_bytes)
        self.counts = Counter(dict.fromkeys(COUNTED, 0))
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []           # by row
        self.reading: Text | None = None
        self._pieces: list[Piece] = []          # of the prompt that is read, as far as they are kept
        self._hidden = torch.empty(0)           # (hidden,) of the last token read
        self.closing = False
        self._changed = threading.Condition()

    def submit(self, text: Text) -> None:
        """Have a text written. Raises Busy."""
        with self._changed:
            if self.closing:
                raise Busy("The server ends.")
            if len(self.waiting) >= self.limits.queue:
                self.counts["refused"] += 1
                raise Busy(f"{len(self.waiting)} texts wait, and no more may.")
            self.waiting.append(text)
            self._changed.notify()

    def figures(self) -> dict[str, int]:
        """Counts since the start, and what there is now."""
        return {f"{name}_total": count for name, count in sorted(self.counts.items())} | {
            "texts_waiting": len(self.waiting), "texts_running": len(self.running),
            "prefix_cache_bytes": self.prefixes.nbytes}

    def close(self) -> None:
        """End: texts under way are told."""
        with self._changed:
            self.closing = True
            self._changed.notify()

    def run(self) -> None:
        """Write texts until `close`. A failure ends those under way, which are told; those that wait are written."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.closing or self.waiting or self.reading or self.running)
                if self.closing:
                    return self._fail([*self._under_way(), *self.waiting], "The server ends.")
            try:
                self.turn()
            except Exception as error:
                traceback.print_exc()
                self._fail(self._under_way(), f"The model failed: {type(error).__name__}.")

    @torch.inference_mode()
    def turn(self) -> None:
        """Read a piece of a prompt, or several short prompts, then take one step of all running texts."""
        self._drop_cancelled()
        budget = self.limits.piece_tokens
        while budget > 0 and (self.reading or self._begin()):
            budget -= self._read()
        if self.running:
            self._step()

    def _begin(self) -> bool:
        """Take the next prompt to read, if there is one and a row for it."""
        with self._changed:
            if not self.waiting or len(self.running) == self.limits.rows:
                return False
            text = self.reading = self.waiting.popleft()
        text.start(self.vocabulary, self.decoder.device)
        self.reader.forget()
        self._pieces = self.prefixes.find(text.ids)
        for piece in self._pieces:
            start = self.reader.position
            _copy(self.reader.keys_values(0, start, piece.end), piece.keys_values)
            self.reader.position = piece.end
        if self._pieces:
            _copy(self.reader.states(0), self._pieces[-1].states)
            self._hidden = self._pieces[-1].hidden
        text.cached = self.reader.position
        self.counts["prompt_tokens"] += len(text.ids)
        self.counts["cached_tokens"] += text.cached
        return True

    def _read(self) -> int:
        """Read the next piece of the prompt, and after its last the text joins; tokens read."""
        text, start = self.reading, self.reader.position
        assert text
        piece = text.ids[start : start + self.limits.piece_tokens]
        if piece:
            self._hidden = self.reader.read(torch.tensor([piece], device=self.decoder.device))[0, -1]
            if (self._pieces[-1].end if self._pieces else 0) == start:
                kept = self.prefixes.keep(self._pieces, text.ids, self.reader.states(0),
                                          self.reader.keys_values(0, start, self.reader.position), self._hidden)
                self._pieces += [kept] if kept else []
        if self.reader.position == len(text.ids):
            logits = self.decoder.model.lm_head(self._hidden[None])
            if self._add(text, int(choose(logits, text.sampling, text.generator))):
                row = len(self.running)
                _copy(self.decoder.states(row), self.reader.states(0))
                _copy(self.decoder.keys_values(row, 0, len(text.ids)), self.reader.keys_values(0, 0, len(text.ids)))
                self.running.append(text)
            self.reading = None
        return len(piece)

    def _step(self) -> None:
        """The next token of all running texts."""
        ids = torch.tensor([text.tokens[-1] for text in self.running], device=self.decoder.device)
        logits = self.decoder.decode_rows(ids, [_held(text) for text in self.running])
        likeliest: list[int] = logits.argmax(-1).tolist()
        goes_on = [
            self._add(text, int(choose(logits[row, None], text.sampling, text.generator))
                      if text.sampling.temperature else likeliest[row])
            for row, text in enumerate(self.running)
        ]
        self._leave([row for row, more in enumerate(goes_on) if not more])

    def _add(self, text: Text, token: int) -> bool:
        """Give `text` its next token; whether it goes on."""
        finish = text.add(token)
        self.counts["generated_tokens"] += 1
        if finish:
            self.counts[f"finished_{finish}"] += 1
        return finish is None

    def _leave(self, rows: list[int]) -> None:
        """Free `rows`, in rising order: the last row moves into the place of each."""
        for row in reversed(rows):
            last = self.running.pop()
            if row < (end := len(self.running)):
                _copy(self.decoder.states(row), self.decoder.states(end))
                tokens = _held(last)
                _copy(self.decoder.keys_values(row, 0, tokens), self.decoder.keys_values(end, 0, tokens))
                self.running[row] = last

    def _drop_cancelled(self) -> None:
        before = len(self.waiting) + len(self.running) + bool(self.reading)
        with self._changed:
            self.waiting = deque(text for text in self.waiting if not text.cancelled)
        if self.reading and self.reading.cancelled:
            self.reading = None
        self._leave([row for row, text in enumerate(self.running) if text.cancelled])
        self.counts["cancelled"] += before - len(self.waiting) - len(self.running) - bool(self.reading)

    def _under_way(self) -> list[Text]:
        return [*self.running, *([self.reading] if self.reading else [])]

    def _fail(self, texts: list[Text], error: str) -> None:
        self.running, self.reading = [], None
        self.counts["failed"] += len(texts)
        for text in texts:
            text.emit(Event(error=error))


def _held(text: Text) -> int:
    """Tokens of a running text that are in the caches: all but the last."""
    return len(text.ids) + len(text.tokens) - 1


def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for tensor, other in zip(to, source, strict=True):
        tensor.copy_(other)
