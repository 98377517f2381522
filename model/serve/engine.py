"""Continuous batching: texts of unlike length are decoded together, and join and leave between steps (Orca, OSDI 2022).

Running texts have the first rows of one decoder, and a step takes all of them. Prompts that wait are read together in
the next free rows, padded behind to the longest of a group. One of which more is to be read than a piece fills the
device alone: it is read in a row of its own, a piece between two steps, and what it leaves is copied into the next free
row. Not more than two pieces of tokens are read between two steps. The last row moves into the place of one that is
done.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from model.hybrid_lm import HybridLM
from model.inference.caches import ModelCaches
from model.inference.decoder import Decoder
from model.inference.sampling import Sampling, checked, choose, likeliest
from model.inference.text import Characters, Vocabulary
from model.serve.prefix_cache import CachedPiece, PrefixCache

COUNTED = ("prompt_tokens", "cached_tokens", "generated_tokens", "finished_stop", "finished_length", "cancelled",
           "failed", "refused")

GPU_WIDTHS = 128        # tokens; `Engine._width`


class Limits(NamedTuple):
    """Of an engine: tokens of a text with its prompt, texts decoded together, texts that wait, tokens that are read at
    once, and bytes of prompts that are kept."""

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
        self.characters = Characters(vocabulary, self.ids)
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
        held = 0 if finish else max((size for stop in self.stops for size in range(1, min(len(stop), len(whole) + 1))
                                     if whole.endswith(stop[:size])), default=0)
        text, self.held = whole[: len(whole) - held], whole[len(whole) - held :]
        if text or finish:
            self.emit(Event(text, finish))
        return finish


class Prompt:
    """Of a text that waits: the `pieces` that have been read before, and the ids that are `left`."""

    def __init__(self, text: Text, pieces: list[CachedPiece]):
        self.text, self.pieces = text, pieces
        self.start = pieces[-1].end if pieces else 0
        self.left = text.ids[self.start :]


class Engine:
    """A model that writes texts. `run` is its thread's; `submit`, `close` and `figures` are for all threads."""

    def __init__(
        self, model: HybridLM, vocabulary: Vocabulary, limits: Limits, state_dtype: torch.dtype = torch.float32
    ):
        self.vocabulary, self.limits = vocabulary, limits
        self.decoder = Decoder(model, limits.max_length, limits.rows, state_dtype)
        self.reader = ModelCaches(model, limits.max_length, 1, state_dtype)
        self.prefixes = PrefixCache(limits.piece_tokens, limits.prefix_bytes)
        self.counts = Counter(dict.fromkeys(COUNTED, 0))
        self.waiting: deque[Text] = deque()
        self.running: list[Text] = []           # by row
        self.reading: Text | None = None        # in the reader
        self.position = 0                       # tokens of it that have been read
        self._pieces: list[CachedPiece] = []          # of it, as far as they are kept
        self._on_gpu = self.decoder.device.type == "cuda"
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
                with contextlib.suppress(OSError):      # a full disk, a pipe nobody reads: this thread lives on
                    traceback.print_exc()
                self._fail(self._under_way(), f"The model failed: {type(error).__name__}.")

    @torch.inference_mode()
    def turn(self) -> None:
        """Read what may be read between two steps, then take one of all running texts."""
        self._drop_cancelled()
        self._read()
        if self.running:
            ids = torch.tensor([text.tokens[-1] for text in self.running], device=self.decoder.device)
            self._write(0, self.decoder.decode_rows(ids, [_held(text) for text in self.running]))

    def _read(self) -> None:
        """A piece of a long prompt, and groups of short ones."""
        piece = self.limits.piece_tokens
        if not self.reading and (long := next((one for one in self._next() if len(one.left) > piece), None)):
            self.reader.forget(slice(1))
            self.reading, self.position, self._pieces = long.text, long.start, long.pieces
            self._begin(long, self.reader, 0)
        left = 2 * piece - (self._read_piece(self.reading) if self.reading else 0)
        while group := self._alike([one for one in self._next() if len(one.left) <= piece], min(piece, left)):
            left -= self._read_group(group)

    def _next(self) -> list[Prompt]:
        """Those that have waited longest, as many as there are rows for."""
        with self._changed:
            texts = list(islice(self.waiting, self.limits.rows - len(self.running) - bool(self.reading)))
        return [Prompt(text, self.prefixes.find(text.ids)) for text in texts]

    def _alike(self, prompts: list[Prompt], most: int) -> list[Prompt]:
        """The first of `prompts` and others that start where it does and are about as long, in `most` tokens.

        A row is padded by an eighth of a piece at most: on a CPU, about what a read costs beside its tokens. Of two
        that are the same one waits until it can find the other. Those of which nothing is left are a group of their
        own: none of their tokens is read, and what the last of them left was kept.
        """
        group: list[Prompt] = []
        for prompt in sorted((one for one in prompts
                              if one.start == prompts[0].start and bool(one.left) == bool(prompts[0].left)),
                             key=lambda one: abs(len(one.left) - len(prompts[0].left))):
            sizes = [len(other.left) for other in (*group, prompt)]
            alike = 8 * (max(sizes) - min(sizes)) <= self.limits.piece_tokens
            twin = self.prefixes.most_bytes and any(prompt.left == other.left for other in group)
            if alike and not twin and len(sizes) * self._width(max(sizes), prompt.start) <= most:
                group.append(prompt)
        return group[: 1 << len(group).bit_length() - 1] if self._on_gpu and group else group

    def _width(self, longest: int, start: int) -> int:
        """Tokens to which rows are padded. There, and in rows by powers of 2, a GPU sees few shapes: for each new one
        cuDNN makes a plan, which takes longer than reading (pytorch PR 155958)."""
        if not self._on_gpu:
            return longest
        return min(-(-longest // GPU_WIDTHS) * GPU_WIDTHS, self.limits.piece_tokens, self.limits.max_length - start)

    def _begin(self, prompt: Prompt, caches: ModelCaches, row: int) -> None:
        """Take a text from those that wait, and copy what is kept of its prompt into `row`, which holds nothing."""
        text, start = prompt.text, 0
        with self._changed:
            self.waiting.remove(text)
        text.start(self.vocabulary, self.decoder.device)
        text.cached = prompt.start
        self.counts["prompt_tokens"] += len(text.ids)
        self.counts["cached_tokens"] += text.cached
        for piece in prompt.pieces:
            _copy(caches.keys_values(row, start, piece.end), piece.keys_values)
            start = piece.end
        if prompt.pieces:
            _copy(caches.states(row), prompt.pieces[-1].states)

    def _read_group(self, prompts: list[Prompt]) -> int:
        """Read prompts that start at the same place into the next rows, and their texts join; tokens read, padding too.
        """
        first, start, sizes = len(self.running), prompts[0].start, [len(prompt.left) for prompt in prompts]
        rows, width, device = slice(first, first + len(prompts)), self._width(max(sizes), start), self.decoder.device
        self.decoder.forget(rows)
        for row, prompt in enumerate(prompts, first):
            self.running.append(prompt.text)
            self._begin(prompt, self.decoder, row)
        if width:
            ids = torch.tensor([prompt.left + [0] * (width - len(prompt.left)) for prompt in prompts], device=device)
            lengths = torch.tensor(sizes, device=device)
            x = self.decoder.read_rows(ids, rows, start, lengths if min(sizes) < width else None)
            hidden = x[torch.arange(len(prompts), device=device), lengths - 1]
            for row, (prompt, last) in enumerate(zip(prompts, hidden, strict=True), first):
                self.prefixes.keep(prompt.pieces, prompt.text.ids, self.decoder.states(row),
                                   self.decoder.keys_values(row, start, len(prompt.text.ids)), last)
        else:
            hidden = torch.stack([prompt.pieces[-1].hidden for prompt in prompts])
        self._write(first, self.decoder.logits(hidden))
        return len(prompts) * width

    def _read_piece(self, text: Text) -> int:
        """Read the next piece of a long prompt, and after its last the text joins; tokens read."""
        start = self.position
        ids = text.ids[start : start + self.limits.piece_tokens]
        hidden = self.reader.read_rows(torch.tensor([ids], device=self.decoder.device), slice(0, 1), start)[:, -1]
        self.position += len(ids)
        if (self._pieces[-1].end if self._pieces else 0) == start:
            kept = self.prefixes.keep(self._pieces, text.ids, self.reader.states(0),
                                      self.reader.keys_values(0, start, self.position), hidden[0])
            self._pieces += [kept] if kept else []
        if self.position == len(text.ids):
            row = len(self.running)
            _copy(self.decoder.states(row), self.reader.states(0))
            _copy(self.decoder.keys_values(row, 0, self.position), self.reader.keys_values(0, 0, self.position))
            self.running.append(text)
            self.reading = None
            self._write(row, self.decoder.logits(hidden))
        return len(ids)

    def _write(self, first: int, logits: Tensor) -> None:
        """The next token of the running texts from row `first` on; logits (texts, vocab)."""
        ids = [checked(token) for token in likeliest(logits).tolist()]
        texts = self.running[first:]
        for row, text in enumerate(texts):
            if text.sampling.temperature:
                ids[row] = int(choose(logits[row, None], text.sampling, text.generator))
        goes_on = [self._add(text, token) for text, token in zip(texts, ids, strict=True)]
        self._leave([row for row, more in enumerate(goes_on, first) if not more])

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
        with self._changed:         # meanwhile others come
            stay = deque(text for text in self.waiting if not text.cancelled)
            self.counts["cancelled"] += len(self.waiting) - len(stay)
            self.waiting = stay
        if self.reading and self.reading.cancelled:
            self.counts["cancelled"] += 1
            self.reading = None
        rows = [row for row, text in enumerate(self.running) if text.cancelled]
        self.counts["cancelled"] += len(rows)
        self._leave(rows)

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
