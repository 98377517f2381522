"""The Mamba-2 mixer for Megatron's hybrid model, on this repository's kernels (paper Table 1; arXiv 2405.21060).

Same parameters, names, packing and tensor-parallel sharding as megatron.core.ssm.mamba_mixer.MambaMixer 0.16.1, which
needs the mamba_ssm CUDA extension. A_log, D and dt_bias stay float32 in a BF16 model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from kernels.mixer import MixerWeights, mix
from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from model.megatron.documents import PackedDocuments

_SMALLEST_STEP, _LARGEST_STEP, _STEP_FLOOR = 1e-3, 1e-1, 1e-4
_SMALLEST_DECAY, _LARGEST_DECAY = 1.0, 16.0


@dataclass
class MambaMixerSubmodules:
    """Linear layers that a spec gives the mixer: column- and row-parallel."""

    in_proj: Any = None
    out_proj: Any = None


class GatedNorm(nn.Module):
    """Weight of norm(x * silu(gate)), normalised within each of the mixer's groups."""

    def __init__(self, size: int, dtype: torch.dtype, tp_group: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))
        self.tp_group = tp_group

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The weight as shards of Megatron's checkpoints, split along the channels."""
        return _shard(self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets, metadata, self.tp_group)


class MambaMixer(MegatronModule):
    """in_proj -> causal convolution -> SSD scan -> gated norm -> out_proj.

    Each tensor-parallel rank holds whole groups: the rows of in_proj are [z | x | B | C | dt] of its own heads and
    groups, those of the convolution [x | B | C].
    """

    def __init__(
        self,
        config: Any,
        submodules: MambaMixerSubmodules,
        d_model: int,
        pg_collection: Any,
        conv_kernel: int,
        chunk_size: int,
        **_: Any,                       # layer_number, pp_layer_offset: used where there is inference state
    ):
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.rank, ranks = self.tp_group.rank(), self.tp_group.size()
        self.chunk_size = chunk_size
        self.head_dim, self.state_dim = config.mamba_head_dim, config.mamba_state_dim
        self.heads, self.groups = config.mamba_num_heads // ranks, config.mamba_num_groups // ranks
        self.inner = self.heads * self.head_dim
        group_states = self.groups * self.state_dim
        self.conv_sections = [self.inner, group_states, group_states]
        self.sections = [self.inner, *self.conv_sections, self.heads]

        linear = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj, d_model, sum(self.sections) * ranks, init_method=self._init_in_proj(config.init_method),
            gather_output=False, skip_bias_add=False, tp_comm_buffer_name="fc1", **linear,
        )
        self.conv1d = self._convolution(conv_kernel, ranks, config.params_dtype)
        self.A_log, self.D, self.dt_bias = self._scan_parameters(ranks)
        self.norm = GatedNorm(self.inner, config.params_dtype, self.tp_group)
        self.out_proj = build_module(
            submodules.out_proj, self.inner * ranks, d_model, init_method=config.output_layer_init_method,
            input_is_parallel=True, skip_bias_add=True, tp_comm_buffer_name="fc2", **linear,
        )
        for parameter in (*self.conv1d.parameters(), self.A_log, self.D, self.dt_bias, self.norm.weight):
            # Megatron reads it: every rank's gradient counts in the norm.
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010

    def _init_in_proj(self, init: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        """Draw the whole matrix as one process would, then order its rows so that Megatron's even split gives every
        rank its part of each section: the function computed does not depend on the number of ranks."""

        def initialise(weight: Tensor) -> Tensor:
            init(weight)
            ranks = weight.shape[0] // sum(self.sections)
            parts = [part.chunk(ranks) for part in weight.data.split([size * ranks for size in self.sections])]
            return weight.data.copy_(torch.cat([part[rank] for rank in range(ranks) for part in parts]))

        return initialise

    def _own_part(self, whole: Tensor, sections: list[int], ranks: int) -> Tensor:
        """This rank's rows of each section of `whole`."""
        return torch.cat([part.chunk(ranks)[self.rank] for part in whole.split([size * ranks for size in sections])])

    def _convolution(self, kernel: int, ranks: int, dtype: torch.dtype) -> nn.Conv1d:
        """Depthwise weights (channels, 1, kernel) and bias, drawn as PyTorch's Conv1d draws them."""
        channels = sum(self.conv_sections)
        whole = nn.Conv1d(channels * ranks, channels * ranks, kernel, groups=channels * ranks)
        own = skip_init(                                                # draws nothing
            nn.Conv1d, channels, channels, kernel, groups=channels, dtype=dtype, device=whole.weight.device
        )
        for parameter, source in zip(own.parameters(), whole.parameters(), strict=True):
            parameter.data.copy_(self._own_part(source.data, self.conv_sections, ranks))
        return own

    def _scan_parameters(self, ranks: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A_log, D and dt_bias, (heads,) float32: A uniform in [1, 16], D one, steps log-uniform in [0.001, 0.1]."""
        decay = torch.empty(self.heads * ranks).uniform_(_SMALLEST_DECAY, _LARGEST_DECAY)
        low, high = math.log(_SMALLEST_STEP), math.log(_LARGEST_STEP)
        step = torch.exp(torch.rand(self.heads * ranks) * (high - low) + low).clamp(min=_STEP_FLOOR)
        bias = step + torch.log(-torch.expm1(-step))                    # softplus(bias) = step
        own = slice(self.rank * self.heads, (self.rank + 1) * self.heads)
        return nn.Parameter(decay.log()[own].clone()), nn.Parameter(torch.ones(self.heads)), \
            nn.Parameter(bias[own].clone())

    def forward(
        self, hidden_states: Tensor, packed_seq_params: PackedDocuments | None = None, **__: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states (sequence, batch, hidden) -> the same shape, and no bias."""
        seq_idx = None if packed_seq_params is None else packed_seq_params.seq_idx
        projected = self.in_proj(hidden_states)[0].transpose(0, 1)
        assert self.conv1d.bias is not None
        weights = MixerWeights(
            self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, self.A_log, self.D, self.norm.weight
        )
        epsilon = self.config.layernorm_epsilon
        y = mix(projected, weights, self.groups, self.state_dim, self.chunk_size, epsilon, seq_idx)
        # Of one sequence `contiguous` would keep the strides, with which PyTorch's matmul without gradients takes a
        # batch of products: 66 ms on an H200 where its neighbours take 1 or 2.
        return self.out_proj(y.view(-1, 1, y.shape[-1]) if len(y) == 1 else y.transpose(0, 1).contiguous())

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Packed tensors are stored section by section, so that a checkpoint loads at any tensor-parallel size."""
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        shards = _shard(own, prefix, {"A_log": 0, "dt_bias": 0, "D": 0}, sharded_offsets, metadata, self.tp_group)
        shards |= _shard(self.conv1d.state_dict(keep_vars=True), f"{prefix}conv1d.", {"weight": 0, "bias": 0},
                         sharded_offsets, metadata, self.tp_group)
        for name in ("in_proj", "norm", "out_proj"):
            shards |= sharded_state_dict_default(
                getattr(self, name), f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        for name, sizes, sections in (
            ("in_proj.weight", self.sections, ("z", "x", "B", "C", "dt")),
            ("conv1d.weight", self.conv_sections, ("x", "B", "C")),
            ("conv1d.bias", self.conv_sections, ("x", "B", "C")),
        ):
            shards[prefix + name] = _split_by_section(shards[prefix + name], sizes, sections)
        return shards


def _shard(
    state: dict[str, Tensor], prefix: str, axes: dict[str, int], offsets: tuple, metadata: dict | None, tp_group: Any
) -> dict[str, Any]:
    groups = ensure_metadata_has_dp_cp_group(metadata)
    return make_sharded_tensors_for_checkpoint(
        state, prefix, axes, offsets, tp_group=tp_group, dp_cp_group=groups["dp_cp_group"]
    )


def _split_by_section(shard: ShardedTensor, sizes: list[int], names: tuple[str, ...]) -> ShardedTensorFactory:
    """`shard` as one tensor a section, named KEY.SECTION, split over the ranks each for itself.

    Follows megatron.core.ssm.mamba_mixer._split_tensor_factory, which is private and needs Triton to import.
    """
    base = shard.without_data()

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        whole = replace(base, key=key, data=tensor, dtype=tensor.dtype, replica_id=replica_id,
                        flattened_range=flattened_range)
        parts, start = [], 0
        for size, name in zip(sizes, names, strict=True):
            for part in whole.narrow(0, start, size):
                parts.append(replace(part, key=f"{part.key}.{name}"))
            start += size
        return parts

    return ShardedTensorFactory(shard.key, shard.data, build, torch.cat, shard.replica_id)
