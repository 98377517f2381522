"""The plain engine run layer by layer on one process: the referee of Megatron's, and quicker on a CPU."""

from __future__ import annotations

from torch import Tensor

from model.compression.layerwise import Layerwise
from model.hybrid_lm import HybridLM


class PlainLayerwise(Layerwise):
    """`HybridLM`, on one process."""

    def __init__(self, model: HybridLM):
        name = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}
        contractions = {index: layer.mixer.get_submodule(name[layer.symbol])
                        for index, layer in enumerate(model.backbone.layers)}
        weight = model.lm_head.weight
        super().__init__(model.config, contractions, weight.device, weight.dtype, batch_first=True)
        self.model = model

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.backbone.embeddings(ids)

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        return self.model.backbone.layers[index](hidden)

    def finish(self, hidden: Tensor) -> Tensor:
        return self.model.backbone.norm_f(hidden)

    def head(self) -> Tensor:
        return self.model.lm_head.weight
