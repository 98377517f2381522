"""Importance of layers (paper section 3.1), and how well a number of samples knows it.

It works on random training sequences and needs forward passes alone. Widths: `model.compression.width_importance`.
"""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor

from model.compression.layerwise import Kept, Layerwise, Progress
from model.config import ModelError


@torch.no_grad()
def layer_importance(model: Layerwise, sequences: Tensor, batch_size: int, progress: Progress) -> Tensor:
    """Squared error before the LM head when a layer is left out, mean over tokens and channels, of each sequence.

    What a layer got is what its successor gets when it is left out, so only the layers behind it run again: L^2 / 2
    passes through a layer for L layers. Data-parallel copies share the sequences.

    Args:
        model: the parent.
        sequences: (samples, sequence) int64 token ids.

    Returns:
        (layers, samples) float64 on the CPU.

    Raises:
        ModelError: fewer than two samples, or a score that is not finite.
    """
    check_samples(sequences)
    pattern = model.config.pattern
    masks = [Kept(frozenset([layer])) for layer in range(len(pattern))]
    scores = torch.zeros(len(pattern), len(sequences), dtype=torch.float64, device=model.device)
    for samples in model.batches(sequences, batch_size):
        rows = samples.to(model.device)
        states = model.hidden(sequences[samples], masks)
        whole = next(states)
        for layer, hidden in enumerate(states):
            if hidden is not None and whole is not None:
                squares = _square(hidden - whole).mean(1)
                scores[layer, rows] = squares / hidden.shape[-1]
        progress(int(samples[-1]) + 1, len(sequences))
    scores = model.total(scores).cpu()
    for index, values in enumerate(scores):
        check_finite(f"layer {index} (`{pattern[index]}`)", values)
    return scores


def _square(x: Tensor) -> Tensor:
    """Sum of squares over the last dimension, float64."""
    precise = x.double() if x.device.type == "cpu" else x.float()
    return torch.linalg.vecdot(precise, precise).double()


def check_samples(sequences: Tensor) -> None:
    """Raise ModelError unless there are two samples, which a comparison of halves needs."""
    if len(sequences) < 2:
        raise ModelError(
            f"compress: importance from {len(sequences)} sample says nothing of its own error.\n"
            "Give at least 2 (the paper takes 128 for layers and 1,024 for neurons)."
        )


def check_finite(what: str, scores: Tensor) -> None:
    """Raise ModelError where a score of `what` is not finite."""
    if not scores.isfinite().all():
        raise ModelError(f"importance of {what}: an activation is not finite.\n"
                         "Check the weights, and that the calibration tokens are of the model's own tokenizer.")


def mean_ranks(scores: Tensor) -> Tensor:
    """A layer's place among all of them, 1 the least important, mean over samples: the paper averages rankings, where
    one sample with large errors counts no more than another.

    Args:
        scores: (layers, samples).

    Returns:
        (layers,) float64.
    """
    return torch.from_numpy(rankdata(scores.numpy(), axis=0).mean(axis=1))


def split_half_correlation(scores: Tensor) -> float:
    """Spearman's rank correlation between importances from the even and from the odd samples.

    Args:
        scores: (units, samples), at least two of both; units may be layers, neurons, heads, channels.
    """
    return rank_correlation(*(scores[:, half::2].mean(dim=1) for half in (0, 1)))


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's, of (units,) each; equal values share the mean of their ranks."""
    ranks = rankdata(torch.stack([one, other]).numpy(), axis=1)
    return float(torch.corrcoef(torch.from_numpy(ranks))[0, 1])
