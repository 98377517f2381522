"""FP8 without scales on a GPU, for ablations: quantisers for Transformer Engine's CustomRecipe.

Megatron's TransformerConfig takes the name of one of these functions (`fp8_quantizer_factory`). Each tensor of a linear
layer is cast as it is: values beyond the format's range saturate, small ones are lost.
"""

from __future__ import annotations

from typing import Any

import torch


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
