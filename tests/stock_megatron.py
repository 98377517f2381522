"""Checkpoints as a stock megatron-core 0.16.1 writes them: MambaModel of its own layers, saved by its own writer.

Its modules are Megatron's where those run without Transformer Engine. Of what is CUDA alone, mamba_ssm, the two
functions that the mixer calls stand here in plain float64, a token at a time (arXiv 2405.21060 section 2).
"""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.megatron.distributed import process_groups  # before Megatron
from tests.kernels.test_ssd import recurrence

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

# As pretrain_mamba.py's parser leaves them, as far as they say something of the model.
ARGS: dict[str, Any] = {
    "num_layers": 5, "hybrid_override_pattern": "M-M*-", "is_hybrid_model": True, "hidden_size": 48,
    "ffn_hidden_size": 80, "num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2,
    "kv_channels": 24, "mamba_state_dim": 16, "mamba_head_dim": 16, "mamba_num_groups": 2, "mamba_num_heads": None,
    "position_embedding_type": "none", "normalization": "RMSNorm", "norm_epsilon": 1e-5, "add_bias_linear": False,
    "add_qkv_bias": False, "squared_relu": True, "swiglu": False, "apply_layernorm_1p": False, "num_experts": None,
    "untie_embeddings_and_output_weights": True, "init_method_std": 0.2, "seq_length": 64, "vocab_size": 90,
    "padded_vocab_size": 128, "make_vocab_size_divisible_by": 128, "mtp_num_layers": None, "qk_layernorm": False,
    "params_dtype": torch.float32, "attention_backend": AttnBackend.auto, "window_size": None,
}


def _scan(zxBCdt: Tensor, taps: Tensor, bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, headdim: int,
          ngroups: int, **_: Any) -> Tensor:
    """mamba_split_conv1d_scan_combined without a norm: (batch, length, z x B C dt) -> (batch, length, inner)."""
    zxBCdt, taps, bias, dt_bias, A, D = (tensor.double() for tensor in (zxBCdt, taps, bias, dt_bias, A, D))
    heads, channels = len(A), len(taps)
    z, xBC, dt = zxBCdt.split([heads * headdim, channels, heads], -1)
    padded = F.pad(xBC.transpose(1, 2), (taps.shape[1] - 1, 0))
    xBC = F.silu(F.conv1d(padded, taps[:, None], bias, groups=channels)).transpose(1, 2)
    states = (channels - heads * headdim) // 2
    x, B, C = (each.unflatten(-1, (count, -1)) for each, count in zip(
        xBC.split([heads * headdim, states, states], -1), (heads, ngroups, ngroups), strict=True))
    y, _ = recurrence(x, dt, A, B, C, D, dt_bias, x.new_zeros(len(x), heads, headdim, states // ngroups))
    return (y.flatten(2) * F.silu(z)).float()


class _GatedNorm(nn.Module):
    """mamba_ssm's RMSNorm, of which the mixer has gated the input already: within each group."""

    def __init__(self, size: int, eps: float, group_size: int, **_: Any):
        super().__init__()
        self.weight, self.eps, self.group_size = nn.Parameter(torch.ones(size)), eps, group_size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group_size))
        return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


def _rearrange(tensor: Tensor, how: str) -> Tensor:
    """einops', as far as the mixer's training path needs it."""
    return tensor.squeeze(1) if how == "d 1 w -> d w" else {
        "l b d -> b l d": tensor.transpose(0, 1), "b l d -> l b d": tensor.transpose(0, 1)}[how]


@contextlib.contextmanager
def _cuda_packages() -> Iterator[type]:
    """The class of Megatron's mixer, imported beside stand-ins for mamba_ssm and einops."""
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.layernorm_gated",
             "mamba_ssm.ops.triton.ssd_combined", "einops")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules[names[3]].RMSNorm = _GatedNorm
    modules[names[4]].mamba_chunk_scan_combined = None
    modules[names[4]].mamba_split_conv1d_scan_combined = _scan
    modules["einops"].rearrange, modules["einops"].repeat = _rearrange, None
    mixers = ("megatron.core.ssm.mamba_mixer", "megatron.core.ssm.mamba_context_parallel")
    before = {name: sys.modules.pop(name, None) for name in (*modules, *mixers)}
    sys.modules.update(modules)
    try:
        from megatron.core.ssm.mamba_mixer import MambaMixer
        yield MambaMixer
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def spec(mixer: type, fused_names: bool) -> ModuleSpec:
    """Megatron's mamba_stack_spec of modules that need no Transformer Engine; on disk with its names of the norms, by
    the key maps that Megatron's local GPT spec has, or with their own."""
    from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules

    def names(own: str, fused: str) -> dict[str, str]:
        return {f"{own}.": f"{fused}.layer_norm_"} if fused_names else {}

    column, row, norm = ColumnParallelLinear, RowParallelLinear, WrappedTorchNorm
    return ModuleSpec(module=MambaStack, submodules=MambaStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules(
            norm=norm, mamba_bda=get_bias_dropout_add,
            mixer=ModuleSpec(module=mixer, submodules=MambaMixerSubmodules(in_proj=column, out_proj=row)),
            sharded_state_dict_keys_map=names("norm", "mixer.in_proj"))),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(
            input_layernorm=norm, self_attn_bda=get_bias_dropout_add,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=DotProductAttention, linear_proj=row)),
            sharded_state_dict_keys_map=names("input_layernorm", "self_attention.linear_qkv"))),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm, mlp_bda=get_bias_dropout_add,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            sharded_state_dict_keys_map=names("pre_mlp_layernorm", "mlp.linear_fc1"))),
    ))


@contextlib.contextmanager
def stock_model(fused_names: bool = True, **changes: Any) -> Iterator[MambaModel]:
    """Megatron's model of ARGS with `changes`, float32, its weights all drawn: gains, biases and D too."""
    args = Namespace(**(ARGS | changes))
    # Compiled as Megatron is imported, which needs a compiler.
    squared_relu = lambda x: F.relu(x).square()         # noqa: E731
    config = TransformerConfig(
        num_layers=args.num_layers, is_hybrid_model=True, hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size, num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups, kv_channels=args.kv_channels, mamba_num_heads=args.mamba_num_heads,
        mamba_state_dim=args.mamba_state_dim, mamba_head_dim=args.mamba_head_dim,
        mamba_num_groups=args.mamba_num_groups, normalization="RMSNorm", init_method_std=args.init_method_std,
        activation_func=squared_relu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        bias_dropout_fusion=False, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, use_cpu_initialization=True,
    )
    with _cuda_packages() as mixer, process_groups(), \
            patch("megatron.core.ssm.mamba_block.TENorm", WrappedTorchNorm):
        torch.manual_seed(5)
        model = MambaModel(
            config, spec(mixer, fused_names), vocab_size=args.padded_vocab_size, max_sequence_length=args.seq_length,
            hybrid_override_pattern=args.hybrid_override_pattern, position_embedding_type="none",
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and not name.endswith(("A_log", "dt_bias")):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        yield model.eval()


def save(directory: Path, model: MambaModel, iteration: int = 12, **changes: Any) -> Path:
    """Megatron-LM's save_checkpoint: args, weights, and a little of the training's state; the files' directory."""
    files = directory / f"iter_{iteration:07d}"
    files.mkdir(parents=True)
    dist_checkpointing.save({
        "args": Namespace(**(ARGS | changes)), "checkpoint_version": 3.0, "iteration": iteration,
        "opt_param_scheduler": {"num_steps": 3}, "model": model.sharded_state_dict(),
    }, str(files))
    (directory / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return files


def logits_of(model: MambaModel, ids: Tensor) -> Tensor:
    """(batch, length) -> (batch, length, padded vocabulary)."""
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1])[None].expand_as(ids), None)
