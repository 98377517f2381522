"""Importance of layers and of FFN neurons, from forward passes alone (paper section 3).

Both work on random training sequences. Layers: the mean squared error that leaving the layer out causes in the
activations before the LM head. Neurons: Minitron's rule (arXiv 2407.14679), the mean over the sequence and the L2 norm
over the batch of what the neuron gives to the second FFN matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from model.hybrid_lm import HybridLM

Progress = Callable[..., None]


@torch.no_grad()
def layer_errors(model: HybridLM, sequences: Tensor, batch_size: int, progress: Progress) -> Tensor:
    """Error before the LM head when one layer is left out, per layer and sequence.

    Args:
        model: the parent.
        sequences: (samples, sequence) int64 token ids.

    Returns:
        (layers, samples) float64, squared error averaged over tokens and channels. The layer's importance is the mean
        over samples; the spread over samples says how well it is known.
    """
    layers, norm = model.backbone.layers, model.backbone.norm_f
    errors = torch.empty(len(layers), len(sequences), dtype=torch.float64)
    for start in range(0, len(sequences), batch_size):
        ids = sequences[start : start + batch_size].to(model.lm_head.weight.device)
        inputs = [model.backbone.embeddings(ids)]
        for layer in layers:
            inputs.append(layer(inputs[-1]))
        reference = norm(inputs[-1])
        for left_out in range(len(layers)):
            hidden = inputs[left_out]           # what the layer got is what its successor gets
            for layer in layers[left_out + 1 :]:
                hidden = layer(hidden)
            error = (norm(hidden) - reference).double().square().mean(dim=(1, 2))
            errors[left_out, start : start + len(ids)] = error.cpu()
        progress(start + len(ids), len(sequences))
    return errors


@torch.no_grad()
def neuron_importance(
    model: HybridLM, sequences: Tensor, batch_size: int, progress: Progress
) -> dict[int, Tensor]:
    """Importance of every FFN neuron: sqrt(sum over sequences of (mean over tokens of its activation)^2).

    The activation is the neuron's squared ReLU, the input of down_proj.

    Returns:
        layer index -> (ffn_hidden_size,) float64.
    """
    squares: dict[int, Tensor] = {}

    def add(index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean = inputs[0].double().mean(dim=1)
        squares[index] = squares.get(index, torch.zeros((), dtype=torch.float64)) + mean.square().sum(dim=0).cpu()

    handles = [
        model.get_submodule(f"backbone.layers.{index}.mixer.down_proj").register_forward_pre_hook(partial(add, index))
        for index, symbol in enumerate(model.config.pattern)
        if symbol == "-"
    ]
    try:
        for start in range(0, len(sequences), batch_size):
            ids = sequences[start : start + batch_size].to(model.lm_head.weight.device)
            model.backbone(ids)
            progress(start + len(ids), len(sequences))
    finally:
        for handle in handles:
            handle.remove()
    return {index: total.sqrt() for index, total in squares.items()}


def kept_share(importance: Tensor, width: int) -> float:
    """Share of a layer's summed neuron importance that its `width` most important neurons hold."""
    kept = importance[top_neurons(importance, width)].sum()
    return float(kept / importance.sum()) if kept else 0.0


def top_neurons(importance: Tensor, width: int) -> Tensor:
    """Indices of the `width` most important neurons, ascending; of equals the earlier one is kept."""
    return importance.argsort(descending=True, stable=True)[:width].sort().values


def split_half_correlation(errors: Tensor) -> float:
    """Spearman's rank correlation between layer importances of the even and of the odd samples.

    Args:
        errors: (layers, samples), at least two layers and two samples.
    """
    ranks = torch.stack([errors[:, half::2].mean(dim=1).argsort().argsort().double() for half in (0, 1)])
    return float(torch.corrcoef(ranks)[0, 1])
