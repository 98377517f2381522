"""AdamW with FP32 master weights and a schedule of the learning rate, both megatron-core's (paper section 2.4).

On a GPU with Transformer Engine the update is its FusedAdam, alone or within Megatron's DistributedOptimizer, which
spreads master weights and moments over the data-parallel processes. On a CPU the distributed optimizer is off: without
FusedAdam megatron-core 0.16.1 restores its Adam step wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from model.megatron.compat import TRANSFORMER_ENGINE, accumulate_in_products, parameter_places  # before Megatron

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from model.config import PretrainConfig


def uses_distributed_optimizer(recipe: PretrainConfig) -> bool:
    """Whether the recipe's distributed optimizer runs here: on GPUs with Transformer Engine's FusedAdam."""
    return recipe.distributed_optimizer and torch.cuda.is_available() and TRANSFORMER_ENGINE


def data_parallel(recipe: PretrainConfig, model: Any, replicas: int) -> DistributedDataParallel:
    """`model` with gradients that travel between `replicas` while the backward goes on, and weights that the
    distributed optimizer spreads while the forward does: `gather_weights` before they are read elsewhere."""
    spread, overlaps = uses_distributed_optimizer(recipe), recipe.overlaps_gradients(replicas)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.grad_reduce_in_fp32, use_distributed_optimizer=spread, overlap_grad_reduce=overlaps,
        overlap_param_gather=spread and overlaps,
    ), model)
    if torch.cuda.is_available():
        accumulate_in_products(model)
    if overlaps:                # as Megatron's own loop: nothing leaves before the last micro-batch
        model.config.no_sync_func = ddp.no_sync
    if ddp.ddp_config.overlap_param_gather:
        # Megatron waits for a module's weights as that module is called; our layers read those of modules they do not.
        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(partial(_wait_for_weights, ddp), prepend=True)
    return ddp


def _wait_for_weights(ddp: DistributedDataParallel, layer: nn.Module, _: Any) -> None:
    for parameter in layer.parameters():
        ddp.param_to_bucket_group[parameter].finish_param_sync()


def gather_weights(ddp: DistributedDataParallel) -> None:
    """Let every process have all weights as of the last update."""
    if ddp.ddp_config.overlap_param_gather:
        ddp.start_param_sync(force_sync=True)


def build_optimizer(recipe: PretrainConfig, model: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW over `model`; norms, biases, A_log, D and dt_bias (all one-dimensional) do not decay."""
    dtype = model.config.params_dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=recipe.learning_rate, min_lr=recipe.min_learning_rate,
            weight_decay=recipe.weight_decay, adam_beta1=recipe.adam_betas[0], adam_beta2=recipe.adam_betas[1],
            clip_grad=recipe.clip_grad, params_dtype=dtype, bf16=dtype is torch.bfloat16,
            use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
            overlap_param_gather=model.ddp_config.overlap_param_gather,
        ),
        [model],
    )
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            part.model_param_group_index_map = parameter_places(part.model_fp32_groups, part.model_float16_groups)
    if not TRANSFORMER_ENGINE:
        for group in optimizer.param_groups:
            group["fused"] = True           # PyTorch's one-pass AdamW; Megatron has no argument for it
    return optimizer


@torch.no_grad()
def update(optimizer: MegatronOptimizer, clip_grad: float, accept: Callable[[float], bool]) -> None:
    """Megatron's optimizer step, except that `accept`, given the gradient norm, decides whether it takes place.

    The norm is the one value a step waits for: everything queued before it is then done.
    """
    optimizer.prepare_grads()
    grad_norm = optimizer.get_grad_norm()
    if not accept(float(grad_norm)):
        return
    clip_grad_by_total_norm_fp32(optimizer.get_parameters(), clip_grad, grad_norm)
    optimizer.step_with_ready_grads()


def build_schedule(recipe: PretrainConfig, optimizer: MegatronOptimizer, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then down to the least rate at step `steps`: by a cosine, or after a stable rate (WSD). Of
    few steps the last is none of the warm-up, and one at least of the decay."""
    decay = recipe.decay_fraction
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=recipe.learning_rate,
        min_lr=recipe.min_learning_rate,
        lr_warmup_steps=min(round(recipe.warmup_fraction * steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style=recipe.decay_style if decay is None else "WSD",
        wsd_decay_steps=None if decay is None else max(1, round(decay * steps)),
        lr_wsd_decay_style=None if decay is None else recipe.decay_style,
        start_wd=recipe.weight_decay,
        end_wd=recipe.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )
