"""Least-squares refit: after a cut, each layer's output projection is solved anew on the parent's activations.

    W = argmin |X W^T - Y|^2 + ridge |W - W_cut|^2

X is what the narrower mixer gives to its output projection on the parent's input of the layer, Y what the parent's
layer adds to the residual stream. One pass and no gradients: the training-free end of Puzzle's block-wise local
distillation (arXiv 2411.19146).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from model.compression.importance import Progress, _layers, check_samples
from model.compression.prune import Selection, State, residual_scale
from model.config import ModelConfig
from model.hybrid_lm import HybridLM

PROJECTIONS = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}
RIDGE = 1e-4                    # of the mean square of X


@torch.no_grad()
def refit(
    teacher: HybridLM, config: ModelConfig, state: State, selection: Selection, sequences: Tensor, batch_size: int,
    progress: Progress,
) -> State:
    """`state` with output projections refitted in every kept layer that lost width; the others stay as they are.

    Args:
        config, state: what `cut` made of the teacher and `selection`.
        sequences: (samples, sequence) int64 calibration tokens.

    Raises:
        ModelError: fewer than two samples.
    """
    check_samples(sequences)
    device, dtype = teacher.lm_head.weight.device, teacher.lm_head.weight.dtype
    student = HybridLM.from_state(config, state, dtype).to(device)
    hidden = None if selection.hidden is None else selection.hidden.to(device)
    scale = residual_scale(teacher.config, config)
    fits: dict[int, _Fit] = {}
    for new, old in enumerate(selection.layers):
        name = PROJECTIONS[config.pattern[new]]
        narrow = cast(nn.Linear, getattr(_layers(student)[new].mixer, name))
        wide = cast(nn.Linear, getattr(_layers(teacher)[old].mixer, name))
        if narrow.weight.shape != wide.weight.shape:
            fits[old] = _Fit(narrow)
    position = {old: new for new, old in enumerate(selection.layers)}
    done = 0
    for batch in sequences.split(batch_size):
        x = teacher.backbone.embeddings(batch.to(device))
        for index, layer in enumerate(_layers(teacher)):
            added = layer.mixer(layer.norm(x))
            if index in fits:
                seen, wanted = (x, added) if hidden is None else (x[..., hidden], added[..., hidden])
                twin = _layers(student)[position[index]]
                with fits[index].watching():
                    twin.mixer(twin.norm(seen * scale))
                fits[index].add(wanted * scale)
            x = x + added
        done += len(batch)
        progress(done, len(sequences))
    solved = {f"backbone.layers.{position[old]}.mixer.{PROJECTIONS[teacher.config.pattern[old]]}.weight": fit.solve()
              for old, fit in fits.items()}
    return {name: solved[name].to(tensor) if name in solved else tensor for name, tensor in state.items()}


class _Fit:
    """Normal equations of one projection; sums in float64 on a CPU, in float32 on a GPU."""

    def __init__(self, projection: nn.Linear):
        self.projection = projection
        self.precise = torch.float32 if projection.weight.is_cuda else torch.float64
        outputs, inputs = projection.weight.shape
        self.gram = projection.weight.new_zeros(inputs, inputs, dtype=self.precise)
        self.moment = projection.weight.new_zeros(inputs, outputs, dtype=self.precise)
        self.seen: Tensor | None = None

    def watching(self) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.seen = inputs[0]

        return self.projection.register_forward_pre_hook(keep)

    def add(self, wanted: Tensor) -> None:
        assert self.seen is not None
        x, y = self.seen.flatten(0, -2).to(self.precise), wanted.flatten(0, -2).to(self.precise)
        self.gram += x.T @ x
        self.moment += x.T @ y

    def solve(self) -> Tensor:
        """(outputs, inputs) float64."""
        gram, moment, cut = self.gram.double(), self.moment.double(), self.projection.weight.double().T
        gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        error = moment - self.gram.double() @ cut
        return (cut + torch.cholesky_solve(error, torch.linalg.cholesky(gram))).T
