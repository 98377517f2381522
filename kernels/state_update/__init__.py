"""One token of a Mamba-2 mixer: the recurrent form of `kernels.causal_conv1d` and `kernels.ssd`, states in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import ArgumentError, check_any, check_multiple, check_shapes, warn_of_slowness
from kernels.operation import outside_autocast


@outside_autocast
def ssd_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> Tensor:
    """state <- exp(dt A) state + dt x B^T in place; y = state C + D x, of the state before it is rounded.

    Mamba-2's recurrence (Dao and Gu 2024, equation 1; mamba_ssm's `selective_state_update`). Inside is float32, or
    float64 for a float64 state; the new state is rounded once. x, dt, B and C are read where they lie. Floor: one
    read and one write of the state (2 h p n elements a sequence); 5 h p n operations.

    Args:
        state: (batch, heads, head_dim, state_dim) float64, float32 or bfloat16, overwritten.
        x: (batch, heads, head_dim).
        dt: (batch, heads), before bias and softplus.
        A, D, dt_bias: (heads,) float32, A negative.
        B, C: (batch, groups, state_dim).

    Returns:
        y (batch, heads, head_dim) in x's dtype.

    Raises:
        ArgumentError: shapes or devices disagree, heads are no multiple of groups, or the state is not contiguous.
    """
    sizes = check_shapes(
        "ssd_state_update", state=(state, "batch heads head_dim state_dim"), x=(x, "batch heads head_dim"),
        dt=(dt, "batch heads"), A=(A, "heads"), B=(B, "batch groups state_dim"), C=(C, "batch groups state_dim"),
        D=(D, "heads"), dt_bias=(dt_bias, "heads"),
    )
    check_any("ssd_state_update", state=state)
    check_multiple("ssd_state_update", "heads", sizes["heads"], "groups", sizes["groups"])
    if not state.is_contiguous():
        raise ArgumentError("ssd_state_update: the state is not contiguous, and is updated in place.\n"
                            "Give a contiguous one: a slice of the batch, say.")
    if state.is_cuda:
        from kernels.state_update import triton as state_update_triton

        if state_update_triton.supports_scan(state, x, dt, B, C):
            return state_update_triton.advance_scan(
                state, *state_update_triton.prepared_scan(x, dt, A, B, C, D, dt_bias)
            )
        warn_of_slowness("ssd_state_update", state_update_triton.TAKES, state.dtype)
    batch, heads, head_dim, state_dim = state.shape
    groups = B.shape[1]
    precise = torch.promote_types(state.dtype, torch.float32)
    step = F.softplus(dt.to(precise) + dt_bias)
    exact = state.to(precise)                                                      # the state itself unless bfloat16
    grouped = exact.view(batch, groups, heads // groups * head_dim, state_dim)     # a group's heads share B, C
    xs = x.to(precise)
    exact.mul_((step * A).exp()[..., None, None])
    grouped.addcmul_((xs * step[..., None]).reshape(batch, groups, -1, 1), B.to(precise)[:, :, None])
    y = torch.matmul(grouped, C.to(precise)[..., None]).view(batch, heads, head_dim)
    if exact is not state:
        state.copy_(exact)
    return y.addcmul_(xs, D[:, None]).to(x.dtype)


def conv_state_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(bias + the K taps over the last K - 1 inputs and x); x takes the oldest input's place in `state`.

    Floor: one read and one write of the state and of one token; 2 K operations a channel.

    Args:
        state: (batch, K - 1, channels), overwritten; `causal_conv1d`'s final state.
        x: (batch, channels).
        weight: (channels, K).
        bias: (channels,).

    Returns:
        y (batch, channels) in x's dtype.

    Raises:
        ArgumentError: shapes or devices disagree.
    """
    check_shapes("conv_state_update", x=(x, "batch channels"), weight=(weight, "channels K"), bias=(bias, "channels"),
                 state=(state, f"batch {weight.shape[1] - 1} channels"))
    check_any("conv_state_update", x=x)
    if state.is_cuda:
        from kernels.state_update import triton as state_update_triton

        if state_update_triton.supports_conv(state, x, weight):
            rows = x if x.stride(1) == 1 else x.contiguous()
            return state_update_triton.advance_conv(state, rows, weight.contiguous(), bias.contiguous())
        warn_of_slowness("conv_state_update", state_update_triton.TAKES, x.dtype,
                         f"{weight.shape[1]} taps, channels side by side: {not state.stride(2) > 1}")
    precise = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state, x[:, None].to(state.dtype)], 1)
    state.copy_(window[:, 1:])
    y = (window.to(precise) * weight.to(precise).T).sum(1) + bias.to(precise)
    return F.silu(y).to(x.dtype)
