"""How close models come to the parent on held-out tokens: KL divergence and agreement of the greedy token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.hybrid_lm import HybridLM


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
        inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1, 1)
        expected = parent(inputs).flatten(0, 1).float().log_softmax(dim=-1)
        greedy, chance = expected.argmax(dim=-1), expected.exp()
        for name, model in models.items():
            logs = expected if model is parent else model(inputs).flatten(0, 1).float().log_softmax(dim=-1)
            loss = -logs.gather(1, targets).double().sum()
            agreeing = (logs.argmax(dim=-1) == greedy).double().sum()
            kl = torch.linalg.vecdot(chance, expected - logs).double().sum()
            sums[name] += torch.stack([kl, agreeing, loss]).cpu()
        progress(start + len(batch), len(sequences))
    tokens = sequences[:, 1:].numel()
    return {name: Closeness(*(total / tokens).tolist()) for name, total in sums.items()}
