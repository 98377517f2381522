"""The parent with its matrix products in FP8: a cheaper teacher (the paper distils with its FP8 recipe, section 3.2).

As in pretraining the first and last two layers, embedding and head stay in BF16. Only forward passes are asked of a
teacher, so its weights are those of FP8 inference: E4M3 with a scale for every output and for every token of the input.
"""

from __future__ import annotations

import torch

from model.config import ModelError
from model.hybrid_lm import HybridLM
from model.inference.fp8_weights import quantize_weights

BF16_LAYERS = 2                 # at each end
LEAST_CAPABILITY = (8, 9)       # of a GPU, for FP8


def fp8_teacher(parent: HybridLM) -> HybridLM:
    """A copy of the parent in BF16, its inner layers in FP8, on the parent's device.

    Raises:
        ModelError: the GPU has no FP8, or a matrix has a size that FP8 products do not take.
    """
    device = parent.lm_head.weight.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise ModelError("compress.teacher_precision: this GPU has no FP8.\nChoose bf16.")
    teacher = HybridLM.from_state(parent.config, parent.state_dict(), torch.bfloat16).requires_grad_(False)
    layers = teacher.backbone.layers
    for layer in layers[BF16_LAYERS : len(layers) - BF16_LAYERS]:
        quantize_weights(layer)
    return teacher
