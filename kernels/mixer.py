"""All of a Mamba-2 mixer between its projections: split, convolution, SSD scan, gated norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.gated_norm import gated_rms_norm
from kernels.ssd import chunk_scan


class MixerWeights(NamedTuple):
    """Parameters between the projections; channels = heads head_dim + 2 groups state_dim.

    Attributes:
        conv_weight: (channels, K).
        conv_bias: (channels,).
        dt_bias, A_log, D: (heads,) float32; A = -exp(A_log).
        norm_weight: (heads head_dim,).
    """

    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor


def mix(
    projected: Tensor, weights: MixerWeights, groups: int, state_dim: int, chunk_size: int, epsilon: float,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """norm(scan(SiLU(conv(x | B | C)), dt) * SiLU(z)) of what in_proj gives, [z | x | B | C | dt].

    The three operations of `kernels.causal_conv1d`, `kernels.ssd` and `kernels.gated_norm`; on CUDA in one node of the
    graph (`kernels.mixer_triton`), so that the gradient of `projected` is written once, each part where it belongs,
    where autograd would join five parts and convert dt's. Differentiable once.

    Args:
        projected: (batch, sequence, 2 heads head_dim + 2 groups state_dim + heads).
        groups, state_dim: of B and C, and the norm's.
        chunk_size: tokens a chunk of the scan.
        epsilon: of the norm.
        seq_idx: (batch, sequence) int32, each token's document, not decreasing; None: one document.

    Returns:
        (batch, sequence, heads head_dim), its tokens in memory in the order of `projected`'s.
    """
    heads, inner = len(weights.D), len(weights.norm_weight)
    states = groups * state_dim
    if projected.is_cuda:
        from kernels import mixer_triton

        if mixer_triton.supports(projected, weights, inner // heads, state_dim):
            return mixer_triton.mix(projected, *weights, groups, state_dim, epsilon, seq_idx)[0]
    gate, xBC, dt = projected.split([inner, inner + 2 * states, heads], -1)
    xBC, _ = causal_conv1d(xBC, weights.conv_weight, weights.conv_bias, seq_idx=seq_idx)
    x, B, C = xBC.split([inner, states, states], -1)
    y, _ = chunk_scan(
        x.unflatten(-1, (heads, -1)), dt, -torch.exp(weights.A_log), B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)), weights.D, weights.dt_bias, chunk_size, seq_idx=seq_idx,
    )
    return gated_rms_norm(y.flatten(2), gate, weights.norm_weight, groups, epsilon)
