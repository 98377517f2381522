"""Generation with caches: read the prompt in pieces, then one token at a time.

A Mamba-2 layer carries a state of fixed size; an attention layer a key and a value for every token so far. That is why
a hybrid's decoding hardly slows with the context (paper section 1, Figure 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.config import ModelError
from model.hybrid_lm import HybridLM
from model.inference.caches import ModelCaches
from model.inference.sampling import Sampling, checked, choose

GREEDY = Sampling()


def piece_tokens(device: torch.device) -> int:
    """Tokens of a prompt read at once: enough to fill the device, few enough for their activations to be small."""
    return 8192 if device.type == "cuda" else 1024


class Decoder(ModelCaches):
    """A model with the caches of `batch` sequences, allocated once; on a GPU a decoding step is one CUDA graph.

    Args:
        model: its embeddings' dtype and device are the caches'. Its weights must stay as they are.
        max_length: tokens a sequence may reach, prompt included.
        batch: sequences decoded together.
        state_dtype: of the SSM states; bfloat16 halves what a step reads and writes of them.
        prefill_tokens: tokens of a prompt, or of several, that pass through the layers together; None: as the device
            likes it.

    Raises:
        ModelError: no sequence, or no token.
    """

    def __init__(
        self, model: HybridLM, max_length: int, batch: int = 1, state_dtype: torch.dtype = torch.float32,
        prefill_tokens: int | None = None,
    ):
        if max_length < 1 or batch < 1:
            raise ModelError(f"A decoder of {batch} sequences of {max_length} tokens.\nAsk for one or more of both.")
        super().__init__(model, max_length, batch, state_dtype)
        self.prefill_tokens = prefill_tokens or piece_tokens(self.device)
        self._at = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self._length: int | None = 0
        self._begun = object()          # changes with the sequences
        if self.device.type == "cuda":
            self._capture()

    @property
    def position(self) -> int:
        """Tokens in the caches; the next token's index. Raises ModelError where that is none of all sequences: after
        `decode_rows`, or a `prefill` that failed."""
        if self._length is None:
            raise ModelError("The decoder's sequences are of unlike length.\nBegin new ones with `prefill`.")
        return self._length

    def claim(self, position: int) -> None:
        """Take the caches, whatever is in them, for those of `position` tokens: for measuring. Raises ModelError for a
        position that they do not have."""
        self._check_room(position, 0)
        self._length = position
        self._at.fill_(position)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Start new sequences with the prompts `ids` (batch, sequence); logits (batch, vocab) of what follows.

        Raises:
            ModelError: another number of prompts than sequences, an empty prompt, an id beyond the vocabulary, or no
                room.
        """
        if ids.ndim != 2 or len(ids) != self.batch or not ids.numel():
            raise ModelError(
                f"Prompts of the shape {tuple(ids.shape)}, and the decoder's caches are of {self.batch} sequences.\n"
                "Give (batch, sequence) ids, at least one a sequence, or make the decoder with that `batch`."
            )
        vocabulary = self.model.config.vocab_size
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ModelError(
                f"Prompts with ids from {int(ids.min())} to {int(ids.max())}, and the vocabulary has {vocabulary}.\n"
                "Encode them with the model's own tokenizer."
            )
        length = ids.shape[1]
        self._check_room(0, length)
        self._length, self._begun = None, object()
        together = max(1, self.prefill_tokens // length)
        rows = [slice(first, min(first + together, self.batch)) for first in range(0, self.batch, together)]
        logits = torch.cat([self.prefill_rows(ids[some], some) for some in rows])
        self.claim(length)
        return logits

    @torch.inference_mode()
    def prefill_rows(self, ids: Tensor, rows: slice) -> Tensor:
        """`prefill` for the sequences `rows` alone, ids (rows, sequence); leaves `position` as it is."""
        self.forget(rows)
        for start in range(0, ids.shape[1], self.prefill_tokens):
            x = self.read_rows(ids[:, start : start + self.prefill_tokens], rows, start)
        return self.logits(x[:, -1])

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Append one token a sequence, `ids` (batch,); logits (batch, vocab) of what follows, on a GPU in a tensor that
        the next call overwrites. Raises ModelError for another shape, where there is no room, and as `position`."""
        if ids.shape != (self.batch,):
            raise ModelError(f"Tokens of the shape {tuple(ids.shape)}, and the caches are of {self.batch} sequences.\n"
                             "Give one id a sequence.")
        self._check_room(held := self.position, 1)
        self._length = held + 1
        return self._advance(ids)

    @torch.inference_mode()
    def decode_rows(self, ids: Tensor, positions: Sequence[int]) -> Tensor:
        """Append `ids` (rows,) to the first sequences, each of its own length; logits (rows, vocab), as of `decode`.

        What the other sequences hold is lost on a GPU, where all are stepped. The sequences have no common `position`
        any more, until the next `prefill`.

        Args:
            positions: tokens that are in the caches of each of these sequences.

        Raises:
            ModelError: more ids than sequences, not a position each, or no room.
        """
        if not 0 < len(ids) == len(positions) <= self.batch:
            raise ModelError(f"{len(ids)} tokens at {len(positions)} positions, and the caches are of {self.batch} "
                             "sequences.\nGive one of both for each of the first sequences.")
        for position in (min(positions), max(positions)):
            self._check_room(position, 1)
        self._length, self._begun = None, object()
        self._at.zero_()
        self._at[: len(ids)] = torch.tensor(positions)
        return self._advance(ids)

    def stream(
        self, ids: Tensor, tokens: int, sampling: Sampling = GREEDY, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        """Up to `tokens` tokens (batch,) after the prompts `ids` (batch, sequence), each as soon as it is chosen: -1
        where a sequence's logits are not finite, and no sense in it from there (`sampling.checked`).

        Raises:
            ModelError: as `prefill`; or the decoder has taken up something else between two tokens.
        """
        sampling.check()
        self._check_room(0, ids.shape[1] + tokens - 1)
        logits, begun = self.prefill(ids), self._begun
        for written in range(1, tokens + 1):
            chosen = choose(logits, sampling, generator)
            yield chosen
            if written < tokens:
                if (self._begun, self._length) != (begun, ids.shape[1] + written - 1):
                    raise ModelError("The decoder has other sequences, or other tokens of these, than this stream's.\n"
                                     "Have a Decoder for each stream.")
                logits = self.decode(chosen.clamp_min(0))

    def generate(
        self, ids: Tensor, tokens: int, sampling: Sampling = GREEDY, generator: torch.Generator | None = None
    ) -> Tensor:
        """`tokens` tokens after the prompts `ids` (batch, sequence) -> (batch, tokens).

        Raises ModelError as `stream`, and where logits are not finite.
        """
        chosen = torch.stack(list(self.stream(ids, tokens, sampling, generator)), 1)
        checked(int(chosen.min()))
        return chosen

    def _advance(self, ids: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return self._step(ids)
        self._ids[: len(ids)] = ids
        self._graph.replay()
        return self._next_logits[: len(ids)]

    def _step(self, ids: Tensor) -> Tensor:
        x, at = self.model.backbone.embeddings(ids), self._at[: len(ids)]
        rotation = None if self.rotation is None else self.rotation[:, at, None, None]
        for layer, layer_cache in self._layers:
            x += layer_cache.step(layer.norm(x), at, rotation)
        self._at += 1
        return self.logits(x)

    @torch.no_grad()
    def _capture(self) -> None:
        """Record `_step` on fixed tensors. What these steps leave in the caches is forgotten."""
        self._ids = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):             # compiles kernels and chooses those of the matrix products
            for _ in range(2):
                self._step(self._ids)
                self._at.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's watchdog among them, may go on asking the GPU.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._next_logits = self._step(self._ids)
        self.forget(slice(self.batch))

    def logits(self, x: Tensor) -> Tensor:
        """(..., hidden) of the last layer -> (..., vocab)."""
        return self.model.lm_head(self.model.backbone.norm_f(x))

    def _check_room(self, position: int, tokens: int) -> None:
        if not 0 <= position <= self.max_length - tokens:
            raise ModelError(
                f"max_length: {position} + {tokens} tokens do not fit a decoder made for {self.max_length}.\n"
                "Make the Decoder with a larger max_length, or shorten the prompt."
            )
