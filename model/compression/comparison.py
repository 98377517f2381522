"""How close models come to the parent on held-out tokens: KL divergence and agreement of the greedy token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.forward_kl import row_sums
from model.compression.layerwise import Layerwise, Mask

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
    parent: Layerwise, models: Mapping[str, Mask | Layerwise], sequences: Tensor, batch_size: int,
    progress: Callable[..., None],
) -> dict[str, Closeness]:
    """Closeness of every model to the parent, whose distributions are computed once a batch.

    Args:
        models: masks on the parent, or other models in its layout; the parent itself may be among them.
        sequences: (n, sequence_length + 1) int64, inputs and targets shifted by one. Data-parallel copies share them.
    """
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=parent.device)
    rows = ROWS[parent.device.type]
    for chosen in parent.share(sequences).split(batch_size):
        batch = sequences[chosen].to(parent.device)
        inputs, targets = batch[:, :-1], batch[:, 1:].reshape(-1)
        states = parent.states(models, inputs)
        whole = next(states)
        if whole is not None:
            truth = parent.log_softmax(whole.flatten(0, 1))
            chance, certain = truth.exp(), parent.likeliest(truth)
        for number, (model, hidden) in enumerate(zip(models.values(), states, strict=True)):
            if hidden is None:
                continue
            judge = model if isinstance(model, Layerwise) else parent
            for first in range(0, len(targets), rows):
                some = slice(first, first + rows)
                logs = truth[some] if model is parent else judge.log_softmax(hidden.flatten(0, 1)[some])
                sums[number] += _sums(parent, chance[some], truth[some], certain[some], logs, targets[some])
        progress(int(chosen[-1]) + 1, len(sequences))
    means = (parent.total(sums) / sequences[:, 1:].numel()).tolist()
    return {name: Closeness(*values) for name, values in zip(models, means, strict=True)}


def _sums(
    parent: Layerwise, chance: Tensor, truth: Tensor, certain: Tensor, logs: Tensor, targets: Tensor
) -> Tensor:
    """Sums over tokens of KL, agreement, accuracy and loss, float64.

    Args:
        chance, truth, logs: (tokens, this process's vocabulary), the parent's probabilities and log-probabilities, the
            model's.
        certain, targets: (tokens,), the parent's most certain token and the true one.
    """
    divergence = parent.over_tensor_ranks(row_sums(chance, truth, logs))
    greedy = parent.likeliest(logs)
    parts = (divergence, certain == greedy, greedy == targets, -parent.at(logs, targets))
    return torch.stack([part.double().sum() for part in parts])
