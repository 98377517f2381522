"""Models of random weights, made where they will run: speed does not depend on their values."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.hybrid_lm import FLOAT32_PARAMETERS, HybridLM, Layer
from model.inference.fp8_weights import quantize_weights
from model.processes import ONE_PROCESS, TensorRanks
from model.tensor_parallel import connect, part_of


def random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", fp8: bool = False, seed: int = 0,
    ranks: TensorRanks = ONE_PROCESS,
) -> HybridLM:
    """Weights in `dtype` on `device`, the layers' projections in FP8 with `fp8`; of several `ranks` this one's part.

    Made a layer at a time, so that a model whose FP8 weights nearly fill a GPU can be made there. Step sizes and decays
    are as of a fresh Mamba-2. Raises ModelError where `ranks` cannot split the model.
    """
    generator = torch.Generator(device).manual_seed(seed)
    model = HybridLM.skeleton(part_of(config, ranks))
    for layer in cast("list[Layer]", model.backbone.layers):
        _fill(layer, config, dtype, generator)
        if fp8:
            quantize_weights(layer)
    _fill(model, config, dtype, generator)
    return connect(model, config, ranks)


def _fill(module: nn.Module, config: ModelConfig, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Replace the parameters that are still on the meta device."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, device=generator.device,
                                    dtype=torch.float32 if name in FLOAT32_PARAMETERS else dtype)
                setattr(part, name, nn.Parameter(draw(name, value, config, generator), requires_grad=False))


def draw(name: str, value: Tensor, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Fill `value`, any shape, as the parameter `name` (the last part of it) of a fresh model; `value`."""
    if name == "A_log":
        return value.uniform_(1, 16, generator=generator).log_()
    if name == "dt_bias":
        return value.uniform_(-7, -2, generator=generator)          # softplus: steps of about 1e-3 to 1e-1
    if value.dim() == 1:
        return value.fill_(1)
    return value.normal_(0, config.init_method_std if value.dim() == 2 else 0.5, generator=generator)
