"""One token of a Mamba-2 mixer: the recurrent form of `kernels.causal_conv1d` and `kernels.ssd`, states in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """state <- exp(dt A) state + dt x B^T in place; y = state C + D x.

    Floor: one read and one write of the state (2 h p n elements a sequence); 5 h p n operations.

    Args:
        state: (batch, heads, head_dim, state_dim) float32, overwritten.
        x: (batch, heads, head_dim).
        dt: (batch, heads), before bias and softplus.
        A, D, dt_bias: (heads,) float32, A negative.
        B, C: (batch, groups, state_dim).

    Returns:
        y (batch, heads, head_dim) in x's dtype.
    """
    batch, heads, head_dim, state_dim = state.shape
    groups = B.shape[1]
    step = F.softplus(dt.to(state.dtype) + dt_bias)
    grouped = state.view(batch, groups, heads // groups * head_dim, state_dim)     # a group's heads share B, C
    xs = x.to(state.dtype)
    state.mul_((step * A).exp()[..., None, None])
    grouped.addcmul_((xs * step[..., None]).view(batch, groups, -1, 1), B.to(state.dtype)[:, :, None])
    y = torch.matmul(grouped, C.to(state.dtype)[..., None]).view(batch, heads, head_dim)
    return y.addcmul_(xs, D[:, None]).to(x.dtype)


def conv_state_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(bias + the K taps over the last K - 1 inputs and x); x takes the oldest input's place in `state`.

    Args:
        state: (batch, K - 1, channels), overwritten; `causal_conv1d`'s final state.
        x: (batch, channels).
        weight: (channels, K).
        bias: (channels,).

    Returns:
        y (batch, channels) in x's dtype.
    """
    precise = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state, x[:, None].to(state.dtype)], 1)
    state.copy_(window[:, 1:])
    y = (window.to(precise) * weight.to(precise).T).sum(1) + bias.to(precise)
    return F.silu(y).to(x.dtype)
