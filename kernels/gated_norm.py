"""RMSNorm of a gated input by groups: what stands between Mamba-2's scan and its output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """RMSNorm(x * SiLU(gate)) over each of `groups` equal parts of the channels, then times weight; float32 inside.

    The gate comes first and the mean square is taken by group, as in Mamba-2's `norm_before_gate=False` (mamba_ssm,
    Megatron-LM, vLLM). Floor: two reads and one write an element.

    Args:
        x, gate: (..., channels), float32 or bfloat16.
        weight: (channels,).

    Returns:
        (..., channels) in x's dtype.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    gated = (x.to(precise) * F.silu(gate.to(precise))).unflatten(-1, (groups, -1))
    normed = F.rms_norm(gated, gated.shape[-1:], eps=epsilon).flatten(-2)
    return (normed * weight.to(precise)).to(x.dtype)
