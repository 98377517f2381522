"""What FP8 does to the tensors of every linear layer in one training step, as a diagnostic.

For input, weight and output gradient: the largest value, what the recipe's scale makes of the small and the large ones,
and the signal-to-noise ratio of the quantisation. Layers that compute in BF16, all of them in a BF16 run, are measured
too: as FP8 would treat them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.fp8_quantize import largest_magnitude, scale_of
from kernels.squared_relu_fp8 import DTYPES
from model.megatron import compat  # noqa: F401    # before Megatron

# isort: split
from megatron.core import parallel_state

from model.megatron.feed_forward import FusedMLP
from model.megatron.precision import Precision, Role
from model.training.run_log import Row


def statistics(x: Tensor, scale: Tensor, format: str) -> Tensor:
    """Of `x` times `scale` () rounded to an FP8 `format`, saturating: (amax, underflow, saturated, snr), float32.

    amax: largest absolute value of x. underflow: share of x's non-zero elements that become zero. saturated: share of
    elements beyond the format's range. snr: 10 log10 of x's energy over that of the error, in decibels.
    """
    exact = x.detach().float()
    limit = torch.finfo(DTYPES[format]).max
    scaled = exact * scale
    rounded = scaled.clamp(-limit, limit).to(DTYPES[format]).float() / scale
    nonzero = exact != 0
    lost = (nonzero & (rounded == 0)).sum() / nonzero.sum().clamp_min(1)
    saturated = (scaled.abs() > limit * (1 + 1e-6)).float().mean()      # not the value the scale was made for
    snr = 10 * (exact.square().sum() / (exact - rounded).square().sum()).log10()
    return torch.stack([exact.abs().max(), lost, saturated, snr])


@contextlib.contextmanager
def observe(layers: Any, pattern: str, precision: Precision) -> Iterator[list[Row]]:
    """Measure the first micro-batch that passes through `layers` (Megatron's, this process's) within the block.

    Yields the rows of fp8_statistics.csv, which are there when the block has ended: those of all pipeline stages; of
    the first tensor-parallel process's part of each tensor. The numbers of the training step are those without.
    """
    rows: list[Row] = []
    measured: dict[tuple[int, str, Role], Tensor] = {}
    linears = {
        (layer.layer_number - 1, name): module
        for layer in layers for name, module in layer.named_modules() if _is_linear(module)
    }
    fused = [module for module in layers.modules() if isinstance(module, FusedMLP) and module.quantized]
    hooks = [hook for place, module in linears.items() for hook in _attach(place, module, precision, measured)]
    for module in fused:
        module.quantized = False        # its parent: the same numbers by two linear layers, which can be observed
    try:
        yield rows
    finally:
        for module in fused:
            module.quantized = True
        for hook in hooks:
            hook.remove()
    for (layer, name, role), values in sorted(measured.items()):
        amax, underflow, saturated, snr = values.tolist()
        rows.append({
            "layer": layer, "kind": pattern[layer], "linear": name, "tensor": role, "format": precision.format(role),
            "in_fp8": int(precision.quantizes(layer, len(pattern))), "amax": amax, "underflow_share": underflow,
            "saturated_share": saturated, "snr_db": snr,
        })
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        parts: list[Any] = [None] * parallel_state.get_pipeline_model_parallel_world_size()
        dist.all_gather_object(parts, rows, group=parallel_state.get_pipeline_model_parallel_group())
        rows[:] = [row for part in parts for row in part]


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__.endswith("ParallelLinear")


def _attach(
    place: tuple[int, str], module: Any, precision: Precision, measured: dict[tuple[int, str, Role], Tensor]
) -> list[Any]:
    """Hooks that put the statistics of the tensors of linear layer `place` into `measured`, the first time."""

    def measure(role: Role, x: Tensor) -> None:
        if (*place, role) not in measured:
            with torch.no_grad():
                measured[*place, role] = statistics(x, _scale(precision, role, x), precision.format(role))

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        measure("input", arguments[0])
        measure("weight", module.weight)

    def after(_: nn.Module, __: Any, outputs: Any) -> None:
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        if output.requires_grad:
            output.register_hook(lambda gradient: measure("gradient", gradient))

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _scale(precision: Precision, role: Role, x: Tensor) -> Tensor:
    """The scale () the recipe gives this tensor."""
    if precision.scaling == "unscaled":
        return torch.ones((), device=x.device)
    return scale_of(largest_magnitude(x), precision.format(role))
