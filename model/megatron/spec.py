"""The hybrid model: megatron-core's MambaModel with our layers, one class for hybrids and the Transformer (paper 2.1).

`ModelConfig.pattern` says everything about the layers: `M` Mamba-2, `*` grouped-query attention, `-` feed-forward with
squared ReLU. Each is x + layer(RMSNorm(x)); no bias, no dropout, embedding and head untied.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from model.megatron import compat  # before Megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.mamba import MambaModel
from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from kernels.cross_entropy import cross_entropy
from kernels.gated_norm import rms_norm
from kernels.squared_relu import squared_relu
from model.checkpoint import check_names
from model.config import ModelConfig
from model.integrity import check_finite, check_sums
from model.megatron.distributed import Parallelism
from model.megatron.documents import PackedDocuments
from model.megatron.engine_checkpoint import load_model
from model.megatron.feed_forward import FusedMLP
from model.megatron.limits import check_model
from model.megatron.mamba_mixer import MambaMixer, MambaMixerSubmodules
from model.megatron.precision import Precision, mark_quantized_layers

# cuDNN's attention takes half of FlashAttention 2's time on Hopper. But with a mask its gradients are not finite at
# some lengths that 128 does not divide (pytorch/pytorch#196678).
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]
TILE_OF_CUDNN = 128


def build_model(
    config: ModelConfig, precision: Precision, parallelism: Parallelism, seed: int, recompute: str = "",
    start: Path | None = None,
) -> HybridModel:
    """This process's part of the model, on the CPU, its weights drawn from `seed` or read from the checkpoint `start`.

    The weights do not depend on the tensor- or data-parallel size. Layers with a symbol in `recompute` run their
    forward again in the backward, instead of keeping activations.

    Raises:
        ModelError: sizes that do not suit the layout, FP8 or this device (`model.megatron.limits`); `start` is damaged
            or not of this geometry.
    """
    check_model(config, precision, parallelism)
    torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    model = HybridModel(
        transformer_config(config, precision, parallelism, draw=start is None),
        hybrid_spec(config, precision, parallelism),
        vocab_size=config.vocab_size,
        max_sequence_length=config.sequence_length,
        hybrid_override_pattern=config.pattern,
        position_embedding_type=config.position_embedding,
        rotary_base=config.rope_theta,         # an int in Megatron's signature, a factor in its formula
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    mark_quantized_layers(model.decoder.layers, precision, len(config.pattern))
    if precision.scaling == "unscaled":
        compat.keep_quantized_inputs(model)
    _recompute_layers(model.decoder.layers, config.pattern, recompute)
    if start:
        check_sums(start, slice(dist.get_rank(), None, dist.get_world_size()))
        check_names(start, config)
        load_model(start, model)
        for name, parameter in model.named_parameters():
            check_finite(parameter, name, start)
    return model


def _recompute_layers(layers: Iterable[Any], pattern: str, symbols: str) -> None:
    """Make those layers recompute whose symbol in `pattern` is one of `symbols`: a layer keeps its input only, and its
    backward runs the forward again.

    megatron-core 0.16.1's MambaStack does not read `recompute_granularity`. Which layers is said by their symbols,
    since they differ in what they keep: a feed-forward layer's two wide tensors come back for two matrix products,
    attention's for more of them.
    """
    for layer in layers:
        if pattern[layer.layer_number - 1] in symbols:
            forward = partial(_recomputed, layer.forward, layer.config, layer.layer_number - 1)
            setattr(layer, "forward", forward)  # noqa: B010
            setattr(layer, "recomputes", True)  # noqa: B010


def _recomputed(forward: Any, config: TransformerConfig, index: int, hidden_states: Tensor, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(hidden_states, **options)

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The stack has set Transformer Engine's number format for the first pass, but is gone by the second."""
        return nullcontext(), get_fp8_context(config, index)

    # No random state to bring back: there is no dropout.
    return checkpoint(partial(forward, **options), hidden_states, use_reentrant=False, preserve_rng_state=False,
                      context_fn=contexts)


def transformer_config(
    config: ModelConfig, precision: Precision, parallelism: Parallelism, draw: bool = True
) -> TransformerConfig:
    """Megatron's configuration of `config`; without `draw` weights are left as the memory was, to be read."""
    return TransformerConfig(
        num_layers=len(config.pattern),
        is_hybrid_model=True,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        mamba_num_heads=config.mamba_num_heads or None,
        mamba_head_dim=config.mamba_head_dim or 1,
        mamba_state_dim=config.mamba_state_dim or 1,
        mamba_num_groups=config.mamba_num_groups,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_epsilon,
        init_method_std=config.init_method_std,
        activation_func=squared_relu,       # Megatron's own is compiled on import, which needs a C++ compiler
        gated_linear_unit=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Fusions of Megatron's that need CUDA extensions; that of gradients comes with DDP's buffers and without Apex
        # (`compat.accumulate_in_products`). Transformer Engine's turns queries and keys in one pass each, where
        # Megatron's own takes several.
        apply_rope_fusion=compat.TRANSFORMER_ENGINE,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **({} if draw else dict.fromkeys(("init_method", "output_layer_init_method"), _draw_nothing)),
        use_cpu_initialization=True,        # draw whole matrices, then split: the same weights at any size
        tensor_model_parallel_size=parallelism.tensor,
        pipeline_model_parallel_size=parallelism.pipeline,
        sequence_parallel=parallelism.sequence,
        finalize_model_grads_func=finalize_model_grads,
        **precision.engine_options(),
    )


def _draw_nothing(weight: Tensor) -> Tensor:
    """Not `perform_initialization=False`: it also leaves out the mark that a weight is split, and gradient norms would
    count one process's part of it only (0.16.1)."""
    return weight


def hybrid_spec(config: ModelConfig, precision: Precision, parallelism: Parallelism) -> ModuleSpec:
    """The three kinds of layer. The key maps give checkpoints the names of Megatron's own Transformer Engine spec."""
    column, row = precision.linear_layers()
    mixer = ModuleSpec(
        module=MambaMixer,
        params={"conv_kernel": config.conv_kernel, "chunk_size": config.chunk_size},
        submodules=MambaMixerSubmodules(in_proj=column, out_proj=row),
    )
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=CausalAttention, linear_proj=row),
    )
    feed_forward = ModuleSpec(
        module=FusedMLP if precision.fuses(parallelism.tensor) else MLP,
        submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row),
    )
    return ModuleSpec(module=HybridStack, submodules=MambaStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules(
            norm=MegatronRMSNorm, mixer=mixer, mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        )),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(
            input_layernorm=MegatronRMSNorm, self_attention=attention, self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        )),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=MegatronRMSNorm, mlp=feed_forward, mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        )),
    ))


class HybridModel(MambaModel):
    """MambaModel with this repository's cross-entropy: Megatron's goes over the float32 logits eight times."""

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels (batch, sequence), logits (sequence, batch, this rank's vocabulary) -> losses (batch, sequence)."""
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        return cross_entropy(logits, labels.t().contiguous()).t()


class HybridStack(MambaStack):
    """Megatron's stack of layers with our final norm: 0.16.1 hard-codes Transformer Engine's."""

    def __init__(self, config: TransformerConfig, submodules: MambaStackSubmodules, post_process: bool = True,
                 **options: Any):
        super().__init__(config, submodules, post_process=post_process, post_layer_norm=False, **options)
        self.post_layer_norm = True
        if post_process:
            self.final_norm = MegatronRMSNorm(config, config.hidden_size)


class MegatronRMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis, with the constructor a Megatron spec expects. The epsilon is the model's:
    Megatron's MambaLayer gives none (0.16.1)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_: Any):
        super().__init__(hidden_size, eps=config.layernorm_epsilon, dtype=config.params_dtype)
        # Megatron reads it: the gradient of this weight is then a sum over ranks.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """x (sequence, batch, hidden) -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps or 0.0)


class CausalAttention(MegatronModule):
    """softmax(q k^T / sqrt(head_dim)) v over earlier tokens, PyTorch's fused kernel."""

    def __init__(self, config: TransformerConfig, **_: Any):
        super().__init__(config)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        packed_seq_params: PackedDocuments | None = None, **_: Any,
    ) -> Tensor:
        """query (sequence, batch, heads, head_dim), key and value with one head a group -> (sequence, batch, size)."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mask = None if packed_seq_params is None else packed_seq_params.attention_mask
        suits_cudnn = mask is None or len(query) % TILE_OF_CUDNN == 0
        backends = FASTEST_FIRST if suits_cudnn else FASTEST_FIRST[1:]
        with sdpa_kernel(backends, set_priority=True):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: it has no weights."""
        return {}
