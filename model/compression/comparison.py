"""How close models come to the parent on held-out tokens: KL divergence and agreement of the greedy token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.hybrid_lm import HybridLM

ROWS = {"cpu": 256, "cuda": 8192}       # tokens whose distributions are in float32 at one time


class Closeness(NamedTuple):
    """Means per token. kl: KL(parent || model), nats; agreement: share of tokens on which both are most certain of the
    same one; accuracy: share on which the model's is the true one; loss: nats."""

    kl: float
    agreement: float
    accuracy: float
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
    device = parent.lm_head.weight.device
    sums = {name: torch.zeros(4, dtype=torch.float64, device=device) for name in models}
    rows = ROWS[device.type]
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size].to(device)
        inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
        expected = parent(inputs).flatten(0, 1)
        for name, model in models.items():
            logits = expected if model is parent else model(inputs).flatten(0, 1)
            for part in zip(expected.split(rows), logits.split(rows), targets.split(rows), strict=True):
                sums[name] += _sums(*part)
        progress(start + len(batch), len(sequences))
    tokens = sequences[:, 1:].numel()
    return {name: Closeness(*(total / tokens).tolist()) for name, total in sums.items()}


def _sums(expected: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over tokens of KL, agreement, accuracy and loss, float64; logits (tokens, vocab), targets (tokens,)."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    truth, logs = expected.to(exact).log_softmax(dim=-1), logits.to(exact).log_softmax(dim=-1)
    greedy = logs.argmax(dim=-1)
    loss = -logs.gather(1, targets[:, None])
    kl = torch.linalg.vecdot(truth.exp(), truth - logs)
    parts = (kl, truth.argmax(dim=-1) == greedy, greedy == targets, loss)
    return torch.stack([part.double().sum() for part in parts])
