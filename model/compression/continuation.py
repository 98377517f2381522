"""A task score from held-out tokens alone: which of four continuations is the true one?

An item is a stretch of text and what follows it, beside three stretches of equal length from elsewhere; the likeliest
is the model's answer, as in HellaSwag. Chance is a quarter. All models answer the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.compression.layerwise import Layerwise, Mask
from model.config import ModelError

CHOICES = 4
CONTEXT, LENGTH = 48, 16            # tokens; in shorter sequences three quarters and one quarter


def items(sequences: Tensor, count: int, seed: int) -> Tensor:
    """(count, CHOICES, context + length) int64, the true continuation first.

    Args:
        sequences: (n, length) int64 of held-out text, cut into as many stretches as they hold.

    Raises:
        ModelError: fewer than CHOICES stretches, or than items asked for.
    """
    context, length = (CONTEXT, LENGTH) if sequences.shape[1] >= CONTEXT + LENGTH else _quarters(sequences.shape[1])
    stretches = sequences.unfold(1, context + length, context + length).flatten(0, 1)
    if len(stretches) < max(count, CHOICES):
        raise ModelError(
            f"compress.task_items: {count} items of {context + length} tokens are more than the {len(stretches)} in "
            "the held-out sequences.\nLower it, or raise compress.validation_samples."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(stretches), generator=generator)[:count]
    others = torch.randint(1, len(stretches), (count, CHOICES - 1), generator=generator)
    others = (chosen[:, None] + others) % len(stretches)            # any stretch but the item's own
    ends = torch.cat([stretches[chosen, None, context:], stretches[others][..., context:]], 1)
    starts = stretches[chosen, None, :context].expand(-1, CHOICES, -1)
    return torch.cat([starts, ends], -1)


def _quarters(length: int) -> tuple[int, int]:
    return length - length // 4, length // 4


@torch.no_grad()
def accuracy(
    parent: Layerwise, models: Mapping[str, Mask | Layerwise], asked: Tensor, batch_size: int,
    progress: Callable[..., None],
) -> dict[str, float]:
    """Share of `items` each model answers rightly; a distractor as likely as the truth counts as wrong.

    Args:
        models: masks on the parent, or other models in its layout.
        asked: what `items` gives. Data-parallel copies share them.
        batch_size: items at a time.
    """
    length = LENGTH if asked.shape[-1] == CONTEXT + LENGTH else _quarters(asked.shape[-1])[1]
    right = torch.zeros(len(models), dtype=torch.int64, device=parent.device)
    for chosen in parent.share(asked).split(batch_size):
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
