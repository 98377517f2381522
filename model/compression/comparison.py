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
        hidden = {name: model.backbone(inputs).flatten(0, 1) for name, model in models.items()}
        expected = next((hidden[name] for name, model in models.items() if model is parent), None)
        expected = parent.backbone(inputs).flatten(0, 1) if expected is None else expected
        for first in range(0, len(targets), rows):
            some = slice(first, first + rows)
            truth = _log_softmax(parent, expected[some])
            chance, likeliest = truth.exp(), truth.max(dim=-1).indices      # a CPU's argmax takes thrice as long
            for name, model in models.items():
                logs = truth if model is parent else _log_softmax(model, hidden[name][some])
                sums[name] += _sums(truth, chance, likeliest, logs, targets[some])
        progress(start + len(batch), len(sequences))
    tokens = sequences[:, 1:].numel()
    return {name: Closeness(*(total / tokens).tolist()) for name, total in sums.items()}


def _log_softmax(model: HybridLM, hidden: Tensor) -> Tensor:
    """(tokens, vocab), float32 or better, from (tokens, hidden)."""
    logits = model.lm_head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _sums(truth: Tensor, chance: Tensor, likeliest: Tensor, logs: Tensor, targets: Tensor) -> Tensor:
    """Sums over tokens of KL, agreement, accuracy and loss, float64.

    Args:
        truth, chance, logs: (tokens, vocab), the parent's log-probabilities and probabilities, the model's.
        likeliest, targets: (tokens,), the parent's most certain token and the true one.
    """
    greedy = logs.max(dim=-1).indices
    loss = -logs.gather(1, targets[:, None])
    parts = (torch.linalg.vecdot(chance, truth - logs), likeliest == greedy, greedy == targets, loss)
    return torch.stack([part.double().sum() for part in parts])
