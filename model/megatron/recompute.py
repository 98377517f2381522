"""Activation recomputation: a layer keeps its input only, and its backward runs the forward again.

megatron-core 0.16.1's MambaStack does not read `recompute_granularity`. Here the unit is a layer, and which layers is
said by their symbols, since they differ in what they keep: a feed-forward layer's two wide tensors come back for two
matrix products, attention's for more of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer import TransformerConfig


def recompute_layers(layers: Iterable[Any], pattern: str, symbols: str) -> None:
    """Make those of this process's Megatron layers recompute whose symbol in `pattern` is one of `symbols`."""
    for layer in layers:
        if pattern[layer.layer_number - 1] in symbols:
            forward = partial(_recomputed, layer.forward, layer.config, layer.layer_number - 1)
            setattr(layer, "forward", forward)  # noqa: B010


def _recomputed(forward: Any, config: TransformerConfig, index: int, hidden_states: Tensor, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(hidden_states, **options)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The stack has set Transformer Engine's number format for the first pass, but is gone by the second."""
        return nullcontext(), get_fp8_context(config, index)

    # No random state to bring back: there is no dropout.
    return checkpoint(partial(forward, **options), hidden_states, use_reentrant=False, preserve_rng_state=False,
                      context_fn=contexts)
