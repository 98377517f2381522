"""A Megatron model run layer by layer over all processes (`model.compression.layerwise`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from model.compression.layerwise import Layerwise
from model.config import ModelConfig
from model.megatron.distributed import device
from model.megatron.documents import PackedDocuments, find_documents
from model.megatron.spec import HybridModel


class MegatronLayerwise(Layerwise):
    """This process's part of a Megatron model.

    Args:
        model: in BF16 or float32; FP8 layers compute in the format of their weights here.
        config: the whole model's geometry.
        eod_id: the end-of-document token after which layers restart, if the model was trained so.
    """

    def __init__(self, model: HybridModel, config: ModelConfig, eod_id: int | None = None):
        self.layers = {layer.layer_number - 1: layer for layer in model.decoder.layers}
        path = {"M": "mixer.out_proj", "*": "self_attention.linear_proj", "-": "mlp.linear_fc2"}
        contractions = {index: layer.get_submodule(path[config.pattern[index]]) for index, layer in self.layers.items()}
        super().__init__(config, contractions, device(), model.config.params_dtype, batch_first=False)
        self.model, self.eod_id = model.eval(), eod_id
        self.sequence_parallel = model.config.sequence_parallel
        self.replica, self.replicas = (parallel_state.get_data_parallel_rank(),
                                       parallel_state.get_data_parallel_world_size())
        self.split_over(parallel_state.get_tensor_model_parallel_group())
        self.stages = parallel_state.get_pipeline_model_parallel_group()
        self.has_head = parallel_state.is_pipeline_last_stage()
        self._length = 0                # of the sequences under way, without what pads them
        self._rotation: Tensor | None = None
        self._documents: PackedDocuments | None = None

    def embed(self, ids: Tensor) -> Tensor:
        """As the base class."""
        ids = self._begin(ids)
        return self.model.embedding(input_ids=ids, position_ids=None)

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """As the base class; hidden (sequence, batch, hidden), with sequence parallelism a part of the sequence."""
        options: dict[str, Any] = {"attention_mask": None, "rotary_pos_emb": self._rotation,
                                   "packed_seq_params": self._documents}
        out = self.layers[index](hidden, **options)
        return out[0] if isinstance(out, tuple) else out

    def finish(self, hidden: Tensor) -> Tensor:
        """As the base class."""
        normed = self.model.decoder.final_norm(hidden)
        if self.sequence_parallel:
            normed = gather_from_sequence_parallel_region(normed, group=self.tensor_group)
        return normed[: self._length].transpose(0, 1)

    def head(self) -> Tensor:
        """As the base class."""
        return self.model.output_layer.weight

    def total(self, sums: Tensor) -> Tensor:
        """As the base class."""
        dist.all_reduce(self.over_replicas(sums), group=self.stages)
        return sums

    def over_replicas(self, sums: Tensor) -> Tensor:
        """As the base class."""
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        return sums

    def from_all_stages(self, found: dict[Any, Tensor]) -> dict[Any, Tensor]:
        """As the base class."""
        everything: list[Any] = [None] * self.stages.size()
        dist.all_gather_object(everything, found, group=self.stages)
        return {key: value for part in everything for key, value in part.items()}

    def _begin(self, ids: Tensor) -> Tensor:
        """`ids` with their length made a multiple of the processes that split it; nothing before them sees it."""
        self._length = ids.shape[1]
        if self.sequence_parallel:
            ids = F.pad(ids, (0, -ids.shape[1] % self.tensor_ranks))
        if self.config.position_embedding == "rope":
            self._rotation = self.model.rotary_pos_emb(ids.shape[1])
        if self.eod_id is not None:
            self._documents = find_documents(ids, self.eod_id)
        return ids

    def _receive(self, ids: Tensor) -> Tensor:
        batch, length = self._begin(ids).shape
        length //= self.tensor_ranks if self.sequence_parallel else 1
        hidden = torch.empty(length, batch, self.config.hidden_size, device=self.device, dtype=self.dtype)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank(), group=self.stages)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=self.stages)
