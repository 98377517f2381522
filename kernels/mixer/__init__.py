"""All of a Mamba-2 mixer between its projections: split, convolution, SSD scan, gated norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.arguments import check_any, check_multiple, check_shapes
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
    graph (`kernels.mixer.triton`), so that the gradient of `projected` is written once, each part where it belongs,
    where autograd would join five parts and convert dt's. Differentiable once.

    Args:
        projected: (batch, sequence, 2 heads head_dim + 2 groups state_dim + heads).
        groups, state_dim: of B and C, and the norm's.
        chunk_size: tokens a chunk of the scan.
        epsilon: of the norm.
        seq_idx: (batch, sequence) int32, each token's document, not decreasing; None: one document.

    Returns:
        (batch, sequence, heads head_dim), its tokens in memory in the order of `projected`'s.

    Raises:
        ArgumentError: shapes or devices disagree, or heads are no multiple of groups.
    """
    heads, inner = len(weights.D), len(weights.norm_weight)
    states = groups * state_dim
    check_multiple("mix", "channels of the norm", inner, "heads", heads)
    check_multiple("mix", "heads", heads, "groups", groups)
    check_shapes(
        "mix", projected=(projected, f"batch sequence {2 * inner + 2 * states + heads}"),
        conv_weight=(weights.conv_weight, f"{inner + 2 * states} K"),
        conv_bias=(weights.conv_bias, f"{inner + 2 * states}"), dt_bias=(weights.dt_bias, f"{heads}"),
        A_log=(weights.A_log, f"{heads}"), D=(weights.D, f"{heads}"), norm_weight=(weights.norm_weight, f"{inner}"),
        seq_idx=(seq_idx, "batch sequence"),
    )
    check_any("mix", projected=projected)
    if projected.is_cuda:
        from kernels.mixer import triton as mixer_triton

        if mixer_triton.supports(projected, weights, inner // heads, state_dim):
            prepared = mixer_triton.prepared(projected, weights, seq_idx)
            return mixer_triton.mix(*prepared[:-1], groups, state_dim, epsilon, prepared[-1])[0]
    gate, xBC, dt = projected.split([inner, inner + 2 * states, heads], -1)
    xBC = causal_conv1d(xBC, weights.conv_weight, weights.conv_bias, seq_idx=seq_idx)
    x, B, C = xBC.split([inner, states, states], -1)
    y, _ = chunk_scan(
        x.unflatten(-1, (heads, -1)), dt, -torch.exp(weights.A_log), B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)), weights.D, weights.dt_bias, chunk_size, seq_idx=seq_idx,
    )
    return gated_rms_norm(y.flatten(2), gate, weights.norm_weight, groups, epsilon)
