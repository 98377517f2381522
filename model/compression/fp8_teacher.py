"""The parent with its matrix products in FP8: a cheaper teacher (the paper distils with its FP8 recipe, section 3.2).

As in pretraining: one current scale a tensor, E4M3, the first and last two layers, embedding and head in BF16. On a GPU
with FP8 the products run in it; elsewhere both factors are rounded as it would and multiplied in BF16, an emulation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fp8_quantize import quantize_dequantize
from model.config import ModelError
from model.hybrid_lm import HybridLM

BF16_LAYERS = 2                 # at each end
LARGEST = 448.0                 # E4M3
MULTIPLE = 16                   # of both sizes of a product
LEAST_CAPABILITY = (8, 9)       # of a GPU, for FP8


def fp8_teacher(parent: HybridLM) -> HybridLM:
    """A copy of the parent, BF16 outside its FP8 products, on the parent's device.

    Raises:
        ModelError: the GPU has no FP8, or a matrix has a size that FP8 products do not take.
    """
    device = parent.lm_head.weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ModelError("compress.teacher_precision: this GPU has no FP8.\nChoose bf16.")
    teacher = HybridLM.from_state(parent.config, parent.state_dict(), torch.bfloat16).requires_grad_(False)
    layers = list(teacher.backbone.layers)
    for index, layer in enumerate(layers[BF16_LAYERS : len(layers) - BF16_LAYERS], start=BF16_LAYERS):
        for name, module in list(layer.mixer.named_children()):      # type: ignore[union-attr]
            if isinstance(module, nn.Linear):
                if any(size % MULTIPLE for size in module.weight.shape):
                    raise ModelError(
                        f"compress.teacher_precision: layer {index}'s {name} is {tuple(module.weight.shape)}, sizes "
                        f"are not multiples of {MULTIPLE}.\nChoose bf16."
                    )
                setattr(layer.mixer, name, _Float8Linear(module.weight))
    return teacher


class _Float8Linear(nn.Module):
    """x W^T of E4M3 values; (..., inputs) -> (..., outputs) in x's dtype."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.native = weight.is_cuda
        if self.native:
            values, inverse_scale = _quantize(weight)
            self.register_buffer("inverse_scale", inverse_scale)
        else:
            values = quantize_dequantize(weight, "e4m3")
        self.register_buffer("values", values)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.values                    # type: ignore[assignment]
        if not self.native:
            return F.linear(quantize_dequantize(x, "e4m3"), values)
        rows, inverse_scale = _quantize(x.flatten(0, -2))
        of_weight: Tensor = self.inverse_scale          # type: ignore[assignment]
        product = torch._scaled_mm(rows, values.t(), inverse_scale, of_weight, out_dtype=x.dtype)
        return product.unflatten(0, x.shape[:-1])


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and the inverse scale (), float32, without waiting for the device."""
    largest = x.abs().amax().float()
    scale = torch.where(largest > 0, LARGEST / largest, 1.0)
    return (x.float() * scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale.reciprocal()
