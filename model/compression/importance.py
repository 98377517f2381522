"""Importance of layers (paper section 3.1 and three later rules), and how well a number of samples knows it.

All work on random training sequences and need forward passes alone. Widths: `model.compression.width_importance`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from kernels.forward_kl import forward_kl
from model.config import ModelError
from model.hybrid_lm import HybridLM, Layer

Progress = Callable[..., None]
Kind = Literal["mse", "nmse", "kl", "influence"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@torch.no_grad()
def layer_importance(
    model: HybridLM, sequences: Tensor, batch_size: int, progress: Progress, kinds: Sequence[Kind] = ("mse",)
) -> dict[Kind, Tensor]:
    """Importance of each layer by each rule, per sequence; the layer's importance is the mean over sequences.

    What a layer got is what its successor gets when it is left out, so only the layers behind it run again.

        mse        MiniPuzzle: squared error before the LM head when the layer is left out, mean over tokens, channels
        nmse       Nemotron Elastic: squared error of the logits over their sum of squares
        kl         KL(whole || without) of the next token, nats, mean over tokens
        influence  ModelOpt, ShortGPT: 1 - cosine of the layer's input and output, mean over tokens; leaves nothing out

    Args:
        model: the parent.
        sequences: (samples, sequence) int64 token ids.

    Returns:
        kind -> (layers, samples) float64 on the CPU.

    Raises:
        ModelError: fewer than two samples, or a score that is not finite.
    """
    check_samples(sequences)
    layers = _layers(model)
    device = model.lm_head.weight.device
    scores = {kind: torch.zeros(len(layers), len(sequences), dtype=torch.float64, device=device) for kind in kinds}
    ablated = [kind for kind in kinds if kind != "influence"]
    for start in range(0, len(sequences), batch_size):
        ids = sequences[start : start + batch_size].to(device)
        columns = slice(start, start + len(ids))
        inputs = [model.backbone.embeddings(ids)]
        for layer in layers:
            inputs.append(layer(inputs[-1]))
        if "influence" in kinds:
            for index, (before, after) in enumerate(pairwise(inputs)):
                cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)
                scores["influence"][index, columns] = 1 - cosine.mean(1).double()
        if ablated:
            whole = _Ends(model, inputs[-1], ablated)
            for left_out in range(len(layers)):
                hidden = inputs[left_out]
                for layer in layers[left_out + 1 :]:
                    hidden = layer(hidden)
                for kind, values in whole.errors(hidden).items():
                    scores[kind][left_out, columns] = values
        progress(start + len(ids), len(sequences))
    found = {kind: values.cpu() for kind, values in scores.items()}
    for kind, values in found.items():
        _check_finite(values, model.config.pattern, f"importance ({kind})")
    return found


@torch.no_grad()
def iterative_importance(
    model: HybridLM, sequences: Tensor, batch_size: int, progress: Progress, kind: Kind = "mse"
) -> list[float]:
    """Importance by taking out the least important layer, scoring the rest anew, and so on to the last of each type.

    About L^3 / 6 passes through a layer for L layers, where one round takes L^2 / 2. A layer's importance is the error
    against the whole model once it and all before it are gone, made to rise along the removals; the last layers of a
    type, which never go, share the largest.

    Raises:
        ModelError: `kind` is influence, which compares nothing with the whole model; or as `layer_importance`.
    """
    if kind == "influence":
        raise ModelError("importance: influence cannot be iterative.\nChoose mse, nmse or kl, or the mode single.")
    check_samples(sequences)
    layers, pattern = _layers(model), model.config.pattern
    batches = [batch.to(model.lm_head.weight.device) for batch in sequences.split(batch_size)]
    ends = [_Ends(model, _run(layers, model.backbone.embeddings(ids)), [kind]) for ids in batches]
    left = list(range(len(layers)))
    importance = [math.nan] * len(layers)
    rounds, reached = len(layers) - len(set(pattern)), 0.0
    for done in range(rounds):
        errors = dict.fromkeys((i for i in left if sum(pattern[j] == pattern[i] for j in left) > 1), 0.0)
        for ids, whole in zip(batches, ends, strict=True):
            inputs = [model.backbone.embeddings(ids)]
            for index in left:
                inputs.append(layers[index](inputs[-1]))
            for index in errors:
                at = left.index(index)
                hidden = _run([layers[i] for i in left[at + 1 :]], inputs[at])
                errors[index] += float(whole.errors(hidden)[kind].sum()) / len(sequences)
        least = min(errors, key=lambda index: errors[index])
        reached = max(reached, errors[least])
        importance[least] = reached
        left.remove(least)
        progress(done + 1, rounds)
    largest = max((value for value in importance if not math.isnan(value)), default=1.0)
    found = [largest if math.isnan(value) else value for value in importance]
    _check_finite(torch.tensor(found), pattern, f"importance ({kind})")
    return found


class _Ends:
    """What the whole model gives for a batch, to be compared with what is left of it.

    Args:
        hidden: (batch, sequence, hidden), after the last layer.
    """

    def __init__(self, model: HybridLM, hidden: Tensor, kinds: Sequence[Kind]):
        self.model, self.kinds = model, kinds
        self.normed = model.backbone.norm_f(hidden)
        self.logits = model.lm_head(self.normed) if {"nmse", "kl"} & set(kinds) else None

    def errors(self, hidden: Tensor) -> dict[Kind, Tensor]:
        """Kind -> (batch,) float64."""
        normed = self.model.backbone.norm_f(hidden)
        found: dict[Kind, Tensor] = {}
        if "mse" in self.kinds:
            found["mse"] = _square(normed - self.normed).mean(1) / normed.shape[-1]
        if self.logits is not None:
            logits = self.model.lm_head(normed)
            if "nmse" in self.kinds:
                found["nmse"] = _square(logits - self.logits).sum(1) / _square(self.logits).sum(1)
            if "kl" in self.kinds:
                pairs = zip(logits, self.logits, strict=True)
                found["kl"] = torch.stack([forward_kl(one, other).double() for one, other in pairs])
        return found


def _square(x: Tensor) -> Tensor:
    """Sum of squares over the last dimension, float64."""
    precise = x.double() if x.device.type == "cpu" else x.float()
    return torch.linalg.vecdot(precise, precise).double()


def _layers(model: HybridLM) -> list[Layer]:
    return list(model.backbone.layers)      # type: ignore[arg-type]


def _run(layers: Sequence[Layer], hidden: Tensor) -> Tensor:
    for layer in layers:
        hidden = layer(hidden)
    return hidden


def check_samples(sequences: Tensor) -> None:
    """Raise ModelError unless there are two samples, which a comparison of halves needs."""
    if len(sequences) < 2:
        raise ModelError(
            f"compress: importance from {len(sequences)} sample says nothing of its own error.\n"
            "Give at least 2 (the paper takes 128 for layers and 1,024 for neurons)."
        )


def _check_finite(scores: Tensor, pattern: str, what: str) -> None:
    for index, values in enumerate(scores.reshape(len(pattern), -1)):
        if not values.isfinite().all():
            raise ModelError(
                f"{what} of layer {index} (`{pattern[index]}`) is {values.sum().item()}: activations overflow.\n"
                "Check the weights, and that the calibration tokens are of the model's own tokenizer."
            )


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
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, which, count = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[which]
