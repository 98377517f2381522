"""What candidates are ranked by on held-out tokens: closeness to the parent, and a task.

Closeness is KL divergence and agreement of the greedy token. The task asks which of four continuations is the true one:
an item is a stretch of text and what follows it, beside three stretches of equal length from elsewhere; the likeliest
is the model's answer, as in HellaSwag. Chance is a quarter. All models answer the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kernels.forward_kl import row_sums
from model.compression.layerwise import Kept, Layerwise
from model.config import ModelError

ROWS = {"cpu": 256, "cuda": 8192}       # tokens whose distributions are in float32 at one time
CHOICES = 4
ITEM_TOKENS = 64        # of an item, at most; the last quarter are the continuation
Name = TypeVar("Name", str, int)


class Closeness(NamedTuple):
    """Means per token. kl: KL(parent || model), nats; agreement: share of tokens on which both are most certain of the
    same one; accuracy: share on which the model's is the true one; loss: nats."""

    kl: float
    agreement: float
    accuracy: float
    loss: float


@torch.no_grad()
def compare(
    parent: Layerwise, models: Mapping[Name, Kept | Layerwise], sequences: Tensor, batch_size: int,
    progress: Callable[..., None],
) -> dict[Name, Closeness]:
    """Closeness of every model to the parent, whose distributions are computed once a batch.

    Args:
        models: masks on the parent, or other models in its layout; the parent itself may be among them.
        sequences: (n, sequence_length + 1) int64, inputs and targets shifted by one. Data-parallel copies share them.
    """
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=parent.device)
    rows = ROWS[parent.device.type]
    for chosen in parent.batches(sequences, batch_size):
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


def task_items(sequences: Tensor, count: int, seed: int) -> Tensor:
    """(count, CHOICES, tokens of an item) int64, the true continuation first.

    Args:
        sequences: (n, length) int64 of held-out text, cut into as many stretches as they hold.

    Raises:
        ModelError: fewer than CHOICES stretches, or than items asked for.
    """
    size = min(sequences.shape[1], ITEM_TOKENS)
    context = size - size // 4
    stretches = sequences.unfold(1, size, size).flatten(0, 1)
    if len(stretches) < max(count, CHOICES):
        raise ModelError(
            f"compress.task_items: {count} items of {size} tokens are more than the {len(stretches)} in "
            "the held-out sequences.\nLower it, or raise compress.validation_samples."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(stretches), generator=generator)[:count]
    others = torch.randint(1, len(stretches), (count, CHOICES - 1), generator=generator)
    others = (chosen[:, None] + others) % len(stretches)            # any stretch but the item's own
    ends = torch.cat([stretches[chosen, None, context:], stretches[others][..., context:]], 1)
    starts = stretches[chosen, None, :context].expand(-1, CHOICES, -1)
    return torch.cat([starts, ends], -1)


@torch.no_grad()
def task_accuracy(
    parent: Layerwise, models: Mapping[Name, Kept | Layerwise], asked: Tensor, batch_size: int,
    progress: Callable[..., None],
) -> dict[Name, float]:
    """Share of items each model answers rightly; a distractor as likely as the truth counts as wrong.

    Args:
        models: masks on the parent, or other models in its layout.
        asked: what `task_items` gives. Data-parallel copies share them.
        batch_size: items at a time.
    """
    length = asked.shape[-1] // 4
    right = torch.zeros(len(models), dtype=torch.int64, device=parent.device)
    for chosen in parent.batches(asked, batch_size):
        rows = asked[chosen].flatten(0, 1).to(parent.device)
        states = parent.states(models, rows[:, :-1])
        next(states)                                                    # the whole parent's
        for number, (model, hidden) in enumerate(zip(models.values(), states, strict=True)):
            if hidden is not None:
                judge = model if isinstance(model, Layerwise) else parent
                logs = judge.log_softmax(hidden[:, -length:].flatten(0, 1))
                likelihood = parent.at(logs, rows[:, -length:].flatten()).view(-1, CHOICES, length).sum(-1)
                right[number] += (likelihood[:, :1] > likelihood[:, 1:]).all(1).sum()
        progress(int(chosen[-1]) + 1, len(asked))
    shares = (parent.total(right) / len(asked)).tolist()
    return dict(zip(models, shares, strict=True))
