"""A model run layer by layer, whatever layout it is spread over, with layers left out and FFN neurons masked.

That is all MiniPuzzle's scores and rankings ask for: a candidate is a mask on its parent. What is kept computes exactly
what the cut model would, so hundreds of candidates are compared without one of them in memory. The pretraining engine
runs so with tensor, sequence, pipeline and data parallel processes (`model.megatron.layerwise`).

Between pipeline stages each model's hidden states travel by themselves: while a stage runs one candidate, the stage
before it runs the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.compression.prune import Selection
from model.config import ModelConfig
from model.processes import TensorRanks

Progress = Callable[..., None]


@dataclass(frozen=True)
class Kept:
    """What of a model is kept.

    Attributes:
        left_out: layers of the pattern.
        neurons: ascending indices of those kept, by FFN layer; without an entry all are.
    """

    left_out: frozenset[int]
    neurons: Mapping[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ModelConfig, selection: Selection) -> Kept:
        """The mask that keeps what `selection` keeps of a model of `config`.

        Raises:
            ValueError: the selection cuts other widths than FFN neurons: its model must be cut to be run.
        """
        wholes = ((selection.mamba_heads, config.mamba_num_heads), (selection.mamba_channels, config.mamba_head_dim))
        if any(len(kept) < whole for by_layer, whole in wholes for kept in by_layer.values()):
            raise ValueError("a mask leaves out layers and FFN neurons only")
        everything = range(len(config.pattern))
        return cls(frozenset(everything) - frozenset(selection.layers), {
            layer: kept for layer, kept in selection.neurons.items() if len(kept) < config.ffn_hidden_size})

    @property
    def changes(self) -> frozenset[int]:
        """Layers that do not compute what the whole model's do."""
        return self.left_out | self.neurons.keys()


class Layerwise(TensorRanks):
    """This process's part of a model, to be run layer by layer without gradients.

    Attributes:
        config: geometry of the whole model.
        contractions: of this process's layers, by their place in the pattern, the module whose input is scored and
            masked: out_proj, o_proj or down_proj.
        batch_first: whether a module's activations are (batch, sequence, channels), else (sequence, batch, channels).
        device, dtype: of hidden states.
    """

    def __init__(self, config: ModelConfig, contractions: Mapping[int, nn.Module], device: torch.device,
                 dtype: torch.dtype, batch_first: bool):
        self.config, self.contractions, self.batch_first = config, contractions, batch_first
        self.device, self.dtype = device, dtype
        self._first, self._end = min(contractions), max(contractions) + 1

    # --- What the engines do each in their own way. One process has everything. ---------------------------------------

    replica, replicas = 0, 1                # of the data-parallel copies
    has_head = True

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, sequence) int64 -> hidden states before the first layer."""
        raise NotImplementedError

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """What layer `index` makes of hidden states."""
        raise NotImplementedError

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm's output (batch, sequence, hidden), whole on every tensor-parallel process."""
        raise NotImplementedError

    def head(self) -> Tensor:
        """(this process's part of the vocabulary, hidden)."""
        raise NotImplementedError

    def total(self, sums: Tensor) -> Tensor:
        """`sums` of this process's share of the samples -> of all; zero on all pipeline stages but one."""
        return sums

    def over_replicas(self, sums: Tensor) -> Tensor:
        """`sums` (changed) of this process's share of the samples -> of all."""
        return sums

    def from_all_stages(self, found: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """What every pipeline stage found, on each of them."""
        return found

    def _receive(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def _send(self, hidden: Tensor) -> None:
        raise NotImplementedError

    # --- The walk -----------------------------------------------------------------------------------------------------

    def batches(self, samples: Tensor, size: int) -> Sequence[Tensor]:
        """Indices of the samples that this data-parallel copy works on, at most `size` at a time; of fewer samples than
        copies some have none."""
        mine = torch.arange(len(samples))[self.replica :: self.replicas]
        return mine.split(size) if len(mine) else ()

    @torch.no_grad()
    def hidden(self, ids: Tensor, masks: Sequence[Kept] = ()) -> Iterator[Tensor | None]:
        """Output of the final norm (batch, sequence, hidden) of the whole model, then under each mask.

        A masked model runs from its first changed layer on: before it it is the whole one. Every process must exhaust
        the iterator; where the head is not, it yields None.

        Args:
            ids: (batch, sequence) int64.
        """
        ids = ids.to(self.device)
        firsts = {min(mask.changes, default=self._end) for mask in masks}
        inputs: dict[int, Tensor] = {}
        x = self.embed(ids) if self._first == 0 else self._receive(ids)
        for index in self.contractions:
            if index in firsts:
                inputs[index] = x
            x = self.layer(index, x)
        whole = self._done(x)
        yield whole
        for mask in masks:
            first = min(mask.changes, default=self._end)
            if first >= self._end:          # unchanged so far: the next stage has its own hidden states
                yield whole
                continue
            x = inputs[first] if first >= self._first else self._receive(ids)
            with self._only(mask):
                for index in range(max(first, self._first), self._end):
                    if index not in mask.left_out:
                        x = self.layer(index, x)
            yield self._done(x)

    def states(self, models: Mapping[Any, Kept | Layerwise], ids: Tensor) -> Iterator[Tensor | None]:
        """`hidden` of this model whole, then of `models` in their order: masks on it, itself, or others in its layout.
        """
        masked = self.hidden(ids, [model for model in models.values() if isinstance(model, Kept)])
        whole = next(masked)
        yield whole
        for model in models.values():
            if isinstance(model, Kept):
                yield next(masked)
            else:
                yield whole if model is self else next(model.hidden(ids))

    def _done(self, hidden: Tensor) -> Tensor | None:
        if self.has_head:
            return self.finish(hidden)
        self._send(hidden)
        return None

    @contextmanager
    def _only(self, mask: Kept) -> Iterator[None]:
        """A block in which activations of neurons that are not kept are zero."""
        size = self.config.ffn_hidden_size // self.tensor_ranks
        with ExitStack() as hooks:
            for index, kept in mask.neurons.items():
                if index in self.contractions:
                    whole = torch.zeros(self.config.ffn_hidden_size, device=self.device, dtype=self.dtype)
                    whole[kept.to(self.device)] = 1
                    mine = whole[self.tensor_rank * size :][:size]
                    hooks.enter_context(self.contractions[index].register_forward_pre_hook(partial(_multiply, mine)))
            yield

    def log_softmax(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) -> log-probabilities (tokens, this process's vocabulary), float32 or better."""
        return self.normalised(F.linear(hidden, self.head()))


def _multiply(factor: Tensor, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0] * factor, *inputs[1:]
