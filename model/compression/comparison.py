"""How close models come to the parent on held-out tokens: KL divergence and agreement of the greedy token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.hybrid_lm import HybridLM

ROWS = 256                      # tokens whose distributions are in float32 at one time


class Closeness(NamedTuple):
    """Means per token. kl: KL(parent || model), nats; agreement: share of equal greedy tokens; loss: nats."""

    kl: float
    agreement: float
    loss: float


@torch.no_grad()
def compare(
    parent: HybridLM, models: Mapping[str, HybridLM], sequences: Tensor, batch_size: int, progress: Callable[..., None]
) -> dict[str, Closeness]:
    """Closeness of every model to the parent; the parent's logits are computed once a batch.

    Args:
        models: on the parent's device; the parent itself may be among them.
        sequences: (n, sequence_length + 1) int64, inputs and targets shifted by one.
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    device = parent.lm_head.weight.device
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size].to(device)
        inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
        expected = parent(inputs).flatten(0, 1)
        for name, model in models.items():
            logits = expected if model is parent else model(inputs).flatten(0, 1)
            for rows in zip(expected.split(ROWS), logits.split(ROWS), targets.split(ROWS), strict=True):
                sums[name] += _sums(*rows).cpu()
        progress(start + len(batch), len(sequences))
    tokens = sequences[:, 1:].numel()
    return {name: Closeness(*(total / tokens).tolist()) for name, total in sums.items()}


def _sums(expected: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over tokens of KL, agreement and loss, float64; logits (tokens, vocab), targets (tokens,)."""
    truth, logs = expected.float().log_softmax(dim=-1), logits.float().log_softmax(dim=-1)
    agreeing = truth.argmax(dim=-1) == logs.argmax(dim=-1)
    loss = -logs.gather(1, targets[:, None])
    kl = torch.linalg.vecdot(truth.exp(), truth - logs)
    return torch.stack([part.double().sum() for part in (kl, agreeing, loss)])
