"""`HybridLM` over several processes: each has a part of every layer and of the vocabulary, for models beyond a device.

The split is Megatron-LM's (arXiv 1909.08053): a process has some of the heads and groups of attention and Mamba-2, some
of the FFN neurons and of the ids, all of the residual stream and its norms. Its part is thus a `HybridLM` of fewer of
them, and decoder, caches and kernels run it as any other; `connect` adds what travels. All processes take the same ids
in the same order, and have the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig, check_tensor_split
from model.hybrid_lm import HybridLM
from model.lazy_state import LazyState, Recipe, derive
from model.processes import TensorRanks

# Ends of the names of tensors that are split by outputs, and by inputs; all others every process has whole.
_WRITES_RESIDUAL = ("out_proj", "o_proj", "down_proj")
_BY_INPUTS = tuple(f"{name}.weight" for name in _WRITES_RESIDUAL)
_BY_OUTPUTS = ("embeddings.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight",
               "up_proj.weight", "in_proj.weight", "conv1d.weight", "conv1d.bias", ".A_log", ".D", ".dt_bias",
               "mixer.norm.weight")


def part_of(config: ModelConfig, ranks: TensorRanks) -> ModelConfig:
    """Geometry of a process's part. Raises ModelError where heads, groups, neurons or ids cannot be split so."""
    check_tensor_split(config, ranks.tensor_ranks)
    names = ["num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"]
    names += ["mamba_num_heads", "mamba_num_groups"] if "M" in config.pattern else []
    return config.model_copy(update={name: getattr(config, name) // ranks.tensor_ranks for name in names})


def own(config: ModelConfig, state: Mapping[str, Tensor], ranks: TensorRanks) -> LazyState:
    """This process's part of each tensor of the whole model's `state`, which is read when the part is asked for."""
    return derive(state, {name: _own(config, name, ranks) for name in state})


def _own(config: ModelConfig, name: str, ranks: TensorRanks) -> Recipe:
    states = config.mamba_num_groups * config.mamba_state_dim
    sections = [config.mamba_inner_size, states, states]                # x, B, C
    if name.endswith("in_proj.weight"):
        sections = [config.mamba_inner_size, *sections, config.mamba_num_heads]         # z before, dt behind

    def cut(get: Callable[[str], Tensor]) -> Tensor:
        tensor = get(name)
        if ranks.tensor_ranks == 1 or not name.endswith(_BY_OUTPUTS + _BY_INPUTS):
            return tensor
        dimension = int(name.endswith(_BY_INPUTS))
        fused = "in_proj." in name or "conv1d." in name
        pieces = tensor.split(sections if fused else tensor.shape[dimension], dimension)
        return torch.cat([piece.chunk(ranks.tensor_ranks, dimension)[ranks.tensor_rank] for piece in pieces], dimension)

    return cut


def load(
    config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str,
    ranks: TensorRanks,
) -> HybridLM:
    """This process's part of the model of `config` and `state`, on `device`, connected to the others; with lazy weights
    a process holds its own and one whole tensor at a time. Raises ModelError as `part_of` and `HybridLM.from_state`."""
    model = HybridLM.from_state(part_of(config, ranks), own(config, state, ranks), dtype)
    return connect(model.requires_grad_(False).to(device), config, ranks)


def connect(model: HybridLM, config: ModelConfig, ranks: TensorRanks) -> HybridLM:
    """Let `model`, this process's part of one of `config`, exchange sums and logits with the others. It has the whole
    model's `config` from then on, its mixers have that of their part."""
    model.config = config
    if ranks.tensor_ranks > 1:
        for name, module in model.named_modules():
            if name.endswith(_WRITES_RESIDUAL):
                module.register_forward_hook(_sum(ranks))
        model.backbone.embeddings = _EmbeddingPart(model.backbone.embeddings, ranks)
        model.lm_head.register_forward_hook(lambda _module, _inputs, logits: ranks.whole_units(logits))
    return model


def _sum(ranks: TensorRanks) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda _module, _inputs, output: ranks.over_tensor_ranks(output)


class _EmbeddingPart(nn.Embedding):
    """The rows of some of the ids; what others have is added."""

    def __init__(self, rows: nn.Embedding, ranks: TensorRanks):
        super().__init__(rows.num_embeddings, rows.embedding_dim, _weight=rows.weight.detach())
        self.requires_grad_(False)
        self.ranks = ranks

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Embedding, on all processes at once."""
        place = input - self.ranks.tensor_rank * self.num_embeddings
        here = (place >= 0) & (place < self.num_embeddings)
        rows = F.embedding(place.clamp(0, self.num_embeddings - 1), self.weight)
        return self.ranks.over_tensor_ranks(torch.where(here[..., None], rows, 0.0))
