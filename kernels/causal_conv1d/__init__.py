"""Causal depthwise convolution along the sequence, then SiLU: Mamba-2's short filter over x, B and C."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import check_any, check_shapes, warn_of_slowness
from kernels.operation import once_differentiable, outside_autocast


@outside_autocast
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> Tensor:
    """y_t = SiLU(bias + sum_k weight_k x_{t - K + 1 + k}): the last tap meets the current token.

    Differentiable once; float32 inside. Floor: one read of x and one write of y; 2 K operations an element.

    Args:
        x: (batch, sequence, channels) float64, float32 or bfloat16.
        weight: (channels, K).
        bias: (channels,).
        initial_state: (batch, K - 1, channels), the inputs before the first token; zeros when None.
        seq_idx: (batch, sequence) int32, the number of the document a token belongs to, never falling along a sequence:
            taps meet zeros where another document stands. `initial_state` is the first document's. One when None.

    Returns:
        y like x. What follows has the initial state `final_conv_state`.

    Raises:
        ArgumentError: shapes or devices disagree, or there is no token.
    """
    taps = weight.shape[-1]
    check_shapes("causal_conv1d", x=(x, "batch sequence channels"), weight=(weight, "channels K"),
                 bias=(bias, "channels"), initial_state=(initial_state, f"batch {taps - 1} channels"),
                 seq_idx=(seq_idx, "batch sequence"))
    check_any("causal_conv1d", x=x)
    if x.is_cuda:
        from kernels.causal_conv1d import triton as causal_conv1d_triton

        if causal_conv1d_triton.supports(x, weight):
            y: Tensor = causal_conv1d_triton.convolve(
                *causal_conv1d_triton.prepared(x, weight, bias, initial_state, seq_idx)
            )
            return y
        warn_of_slowness("causal_conv1d", causal_conv1d_triton.TAKES, x.dtype, f"{taps} taps")
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    if seq_idx is not None:
        return _by_document(x, weight, bias, initial_state.to(x.dtype), seq_idx)
    return _Convolution.apply(x, initial_state, weight, bias)


def _by_document(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, seq_idx: Tensor
) -> Tensor:
    """All documents of the batch one after another, each behind K - 1 rows of zeros or of its initial state."""
    batch, length, channels = x.shape
    reach = weight.shape[1] - 1
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    document = starts.flatten().cumsum(0)                               # from 1, over the whole batch
    position = torch.arange(batch * length, device=x.device) + reach * document
    before = position.view(batch, length)[:, :1] + torch.arange(-reach, 0, device=x.device)
    rows = x.new_zeros(batch * length + reach * int(document[-1]), channels)
    rows = rows.index_copy(0, position, x.flatten(0, 1)).index_copy(0, before.flatten(), initial_state.flatten(0, 1))
    y = _Convolution.apply(rows[None, reach:], rows[None, :reach], weight, bias)[0]
    return y[position - reach].view_as(x)


def final_conv_state(x: Tensor, taps: int, initial_state: Tensor) -> Tensor:
    """The initial state (batch, taps - 1, channels) of what follows x (batch, sequence, channels): its last inputs,
    with `initial_state` before them. Errors: `causal_conv1d`'s."""
    count = taps - 1
    check_shapes("final_conv_state", x=(x, "batch sequence channels"),
                 initial_state=(initial_state, f"batch {count} channels"))
    check_any("final_conv_state", x=x)
    if x.shape[1] >= count:
        return x[:, x.shape[1] - count:].clone()
    return torch.cat([initial_state.to(x.dtype), x], 1)[:, -count:]


class _Convolution(torch.autograd.Function):
    """PyTorch's depthwise convolution over an image one pixel high whose channels are last in memory: oneDNN then reads
    and writes rows as they lie. `F.conv1d` would have them turned over first, and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, initial_state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(batch, sequence, channels) after (batch, K - 1, channels) -> (batch, sequence, channels)."""
        precise, reach = torch.promote_types(x.dtype, torch.float32), initial_state.shape[1]
        inputs = x.new_empty(x.shape[0], reach + x.shape[1], x.shape[2], dtype=precise)
        inputs[:, :reach], inputs[:, reach:] = initial_state, x             # joined and converted in one pass
        sums = F.conv2d(_image(inputs), _kernel(weight.to(precise)), bias.to(precise), groups=len(bias))
        before_silu = sums.squeeze(2).transpose(1, 2).contiguous()
        ctx.save_for_backward(inputs, before_silu, weight, bias)
        return F.silu(before_silu).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        inputs, before_silu, weight, bias = ctx.saved_tensors
        dsums = torch.ops.aten.silu_backward(dy.to(inputs.dtype), before_silu).contiguous()

        def gradient(*wanted: bool) -> list[Tensor]:
            return torch.ops.aten.convolution_backward(
                _image(dsums), _image(inputs), _kernel(weight.to(inputs.dtype)), None, (1, 1), (0, 0), (1, 1), False,
                (0, 0), len(bias), wanted,
            )

        dinputs = gradient(True, False, False)[0].squeeze(2).transpose(1, 2).to(dy.dtype)
        dweight = gradient(False, True, False)[1].squeeze(2).squeeze(1)
        reach = inputs.shape[1] - dy.shape[1]
        return (dinputs[:, reach:], dinputs[:, :reach], dweight.to(weight.dtype),
                dsums.sum((0, 1)).to(bias.dtype))


def _image(rows: Tensor) -> Tensor:
    """(batch, width, channels) seen as (batch, channels, 1, width)."""
    return rows.transpose(1, 2).unsqueeze(2)


def _kernel(weight: Tensor) -> Tensor:
    """(channels, K) seen as (channels, 1, 1, K)."""
    return weight[:, None, None, :]
