"""Cutting layers and FFN neurons out of a model's weights.

MiniPuzzle cuts nothing else (paper section 3): the residual stream, attention heads and Mamba heads keep their size, so
no RMSNorm loses channels and none needs rescaling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from model.config import ModelConfig

State = dict[str, Tensor]
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(.+)")


def cut(
    config: ModelConfig, state: Mapping[str, Tensor], layers: Sequence[int], neurons: Mapping[int, Tensor]
) -> tuple[ModelConfig, State]:
    """The model of the kept layers, each FFN with its kept neurons; `state` is left as it is.

    Args:
        state: Hub names -> tensors.
        layers: indices of the layers to keep, ascending.
        neurons: by index of a kept FFN layer, the neurons to keep, ascending; as many in every layer.

    Raises:
        ValueError: indices not ascending, or FFN layers of different width.
    """
    if list(layers) != sorted(set(layers)) or any((kept.diff() <= 0).any() for kept in neurons.values()):
        raise ValueError("indices of kept layers and neurons must ascend")
    widths = {len(neurons[index]) for index in layers if config.pattern[index] == "-"}
    if len(widths) > 1:
        raise ValueError(f"every FFN must keep as many neurons; got {sorted(widths)}")
    smaller: State = {}
    position = {old: new for new, old in enumerate(layers)}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            smaller[name] = tensor
            continue
        index, rest = int(match[1]), match[2]
        if index not in position:
            continue
        if rest == "mixer.up_proj.weight":
            tensor = tensor[neurons[index]]
        elif rest == "mixer.down_proj.weight":
            tensor = tensor[:, neurons[index]]
        smaller[f"backbone.layers.{position[index]}.{rest}"] = tensor.contiguous()
    pattern = "".join(config.pattern[index] for index in layers)
    width = widths.pop() if widths else config.ffn_hidden_size
    return config.model_copy(update={"pattern": pattern, "ffn_hidden_size": width}), smaller
