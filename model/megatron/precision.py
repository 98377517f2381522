"""Number formats of training: BF16, and the paper's FP8 recipe (section 2.3).

FP8: per-tensor current scaling, E4M3 for weights and activations, E5M2 for gradients; the linear layers of FFN,
attention and Mamba only; the first and last layers, embedding and head in BF16; FP32 master weights and gradients.
Scaling, the gradients' format and the number of BF16 layers can be chosen otherwise, for ablations.
On a GPU Transformer Engine does it (`Float8CurrentScaling`). A CPU has no FP8 products, so there they are emulated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from kernels.fp8_quantize import Format, quantize
from model.megatron.compat import TRANSFORMER_ENGINE

# isort: split
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from model.config import ModelError
from model.megatron.feed_forward import FusedMLP

PrecisionName = Literal["float32", "bf16", "fp8"]
ScalingName = Literal["current", "unscaled"]
Role = Literal["input", "weight", "gradient"]           # of a tensor in a linear layer's three products


@dataclass(frozen=True)
class Precision:
    """One recipe object for both ways of computing FP8.

    Attributes:
        name: `bf16`, `fp8`, or `float32`, which parity checks use.
        bf16_layers_at_start: pattern symbols kept in BF16 at the start of the model (4 in the paper).
        bf16_layers_at_end: the same at its end.
        emulated: whether FP8 products are BF16 products of FP8 values.
        scaling: where scales come from: a tensor's `current` maximum, or nowhere (`unscaled`), a control.
        gradients: format of gradients; weights and activations are E4M3.
    """

    name: PrecisionName
    bf16_layers_at_start: int = 0
    bf16_layers_at_end: int = 0
    emulated: bool = False
    scaling: ScalingName = "current"
    gradients: Format = "e5m2"

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return torch.float32 if self.name == "float32" else torch.bfloat16

    def quantizes(self, layer: int, layers: int) -> bool:
        """Whether the linear layers of layer `layer` (from 0) of `layers` compute in FP8."""
        return self.name == "fp8" and self.bf16_layers_at_start <= layer < layers - self.bf16_layers_at_end

    def engine_options(self) -> dict[str, Any]:
        """Fields of Megatron's TransformerConfig. Emulation stays out of them: without Transformer Engine Megatron
        ignores `fp8` and trains unquantized."""
        options: dict[str, Any] = {
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": self.dtype is torch.bfloat16,
        }
        if self.name == "fp8" and not self.emulated:
            options |= {
                "fp8": "hybrid" if self.gradients == "e5m2" else "e4m3",        # hybrid: E4M3 forward, E5M2 gradients
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": self.bf16_layers_at_start,
                "num_layers_at_end_in_bf16": self.bf16_layers_at_end,
            }
            if self.scaling == "current":
                options |= {"fp8_recipe": "tensorwise"}         # Transformer Engine's Float8CurrentScaling
            else:
                factory = quantizer_e5m2_gradients if self.gradients == "e5m2" else quantizer_e4m3_gradients
                options |= {"fp8_recipe": "custom",
                            "fp8_quantizer_factory": f"{factory.__module__}.{factory.__name__}"}
        return options

    def format(self, role: Role) -> Format:
        """FP8 format of a tensor."""
        return self.gradients if role == "gradient" else "e4m3"

    def quantize(self, x: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        """FP8 values of `x` as bfloat16, and the inverse scale (), float32."""
        return quantize(x, self.format(role), torch.ones((), device=x.device) if self.scaling == "unscaled" else None)

    def fuses(self, tensor_parallel: int) -> bool:
        """Whether feed-forward layers compute in FP8 as one operation (`feed_forward`): by the paper's recipe."""
        paper = self.scaling == "current" and self.gradients == "e5m2"
        return self.name == "fp8" and not self.emulated and paper and tensor_parallel == 1

    def linear_layers(self) -> tuple[type[nn.Module], type[nn.Module]]:
        """Column- and row-parallel linear classes."""
        if self.name != "fp8":
            return ColumnParallelLinear, RowParallelLinear
        if self.emulated:
            return FP8ColumnParallelLinear, FP8RowParallelLinear
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return TEColumnParallelLinear, TERowParallelLinear


def choose_precision(
    name: PrecisionName, device: torch.device, bf16_layers_at_start: int = 0, bf16_layers_at_end: int = 0,
    scaling: ScalingName = "current", gradients: Format = "e5m2",
) -> Precision:
    """The recipe `name` as `device` can compute it.

    Raises:
        ModelError: FP8 on a GPU without FP8 products or Transformer Engine. Never BF16 in its place.
    """
    if name != "fp8":
        return Precision(name)
    if device.type == "cuda" and not TRANSFORMER_ENGINE:
        raise ModelError(
            "precision fp8: this GPU machine has no working Transformer Engine, and BF16 would not be FP8.\n"
            "Install the `gpu` extra (transformer-engine), or choose a bf16 variant."
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ModelError(
            f"precision fp8: {torch.cuda.get_device_name(device)} has no FP8 products, and BF16 would not be FP8.\n"
            "Use a GPU of the Ada, Hopper or a later generation, or choose a bf16 variant."
        )
    return Precision(name, bf16_layers_at_start, bf16_layers_at_end, device.type != "cuda", scaling, gradients)


class FP8Product(torch.autograd.Function):
    """y = x w^T and its two backward products, each of FP8 values.

    An FP8 value is exact in BF16, and the BF16 product accumulates in FP32: the three products are those of FP8
    hardware, but for one rounding of the sum to BF16 before the scales are applied.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: Precision) -> Tensor:
        """x (..., in), weight (out, in), both bfloat16 -> (..., out) bfloat16."""
        x8, x_scale = precision.quantize(x.flatten(0, -2), "input")
        weight8, weight_scale = precision.quantize(weight, "weight")
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        ctx.precision = precision
        return (x8 @ weight8.t()).mul_(x_scale * weight_scale).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """dy (..., out) bfloat16 -> gradients of x and weight, bfloat16."""
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        gradient8, scale = ctx.precision.quantize(gradients[0].flatten(0, -2), "gradient")
        dx = (gradient8 @ weight8).mul_(scale * weight_scale)
        dweight = (gradient8.t() @ x8).mul_(scale * x_scale)
        return dx.unflatten(0, gradients[0].shape[:-1]), dweight, None


class _EmulatesFP8:
    """A Megatron linear layer whose products run in emulated FP8 where `precision` is set."""

    precision: Precision | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        """Megatron's hook for the product: collectives as there, products in FP8."""
        if self.precision is None:
            return super()._forward_impl(input, weight, **options)  # type: ignore[misc]
        if options["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=options["tp_group"])
        elif options["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=options["tp_group"])
        return cast(Tensor, FP8Product.apply(input, weight, self.precision))


class FP8ColumnParallelLinear(_EmulatesFP8, ColumnParallelLinear):
    """Column-parallel linear layer with emulated FP8."""


class FP8RowParallelLinear(_EmulatesFP8, RowParallelLinear):
    """Row-parallel linear layer with emulated FP8."""


def mark_quantized_layers(layers: Iterable[Any], precision: Precision, num_layers: int) -> int:
    """Set which emulated linear and fused feed-forward layers compute in FP8. Returns how many of this process's do.

    Args:
        layers: Megatron layers, which count from 1 over the whole model.
        precision: the recipe.
        num_layers: layers of the whole model.
    """
    marked = 0
    for layer in layers:
        for module in layer.modules():
            if not isinstance(module, _EmulatesFP8 | FusedMLP):
                continue
            quantized = precision.quantizes(layer.layer_number - 1, num_layers)
            if isinstance(module, FusedMLP):
                module.quantized = quantized
            else:
                module.precision = precision if quantized else None
            marked += quantized
    return marked


# FP8 without scales on a GPU, a control: each tensor of a linear layer is cast as it is, values beyond the format's
# range saturate, small ones are lost. Megatron's TransformerConfig takes the name of one of these functions
# (`fp8_quantizer_factory`); Transformer Engine's CustomRecipe calls it for every role.

def quantizer_e5m2_gradients(role: str) -> Any:
    """E4M3 for weights and activations, E5M2 for gradients."""
    return _unscaled(role, "kFloat8E5M2")


def quantizer_e4m3_gradients(role: str) -> Any:
    """E4M3 for all."""
    return _unscaled(role, "kFloat8E4M3")


def _unscaled(role: str, gradients: str) -> Any:
    """Transformer Engine's quantiser for a tensor's role (`linear_input`, `linear_grad_output`, ...), its scale 1."""
    import transformer_engine_torch
    from transformer_engine.pytorch import Float8Quantizer

    format = gradients if role.startswith("linear_grad") else "kFloat8E4M3"
    return Float8Quantizer(
        scale=torch.ones(1, device="cuda"), amax=torch.zeros(1, device="cuda"),
        fp8_dtype=getattr(transformer_engine_torch.DType, format),
    )
