"""Causal depthwise convolution along the sequence, then SiLU: Mamba-2's short filter over x, B and C."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.arguments import check_any, check_shapes


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None = None, seq_idx: Tensor | None = None
) -> tuple[Tensor, Tensor]:
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
        y like x, and the last K - 1 inputs (batch, K - 1, channels): the initial state of what follows. With `seq_idx`
        those of the last document, zeros before it.

    Raises:
        ArgumentError: shapes or devices disagree, or there is no token.
    """
    taps = weight.shape[-1]
    check_shapes("causal_conv1d", x=(x, "batch sequence channels"), weight=(weight, "channels K"),
                 bias=(bias, "channels"), initial_state=(initial_state, f"batch {taps - 1} channels"),
                 seq_idx=(seq_idx, "batch sequence"))
    check_any("causal_conv1d", x=x)
    if x.is_cuda:
        from kernels import causal_conv1d_triton

        if causal_conv1d_triton.supports(x, weight):
            y = causal_conv1d_triton.convolve(
                *causal_conv1d_triton.prepared(x, weight, bias, initial_state, seq_idx)
            )
            return y, _last_inputs(x, taps - 1, initial_state, seq_idx)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    if seq_idx is not None:
        return _by_document(x, weight, bias, initial_state.to(x.dtype), seq_idx)
    inputs = torch.cat([initial_state.to(x.dtype), x], 1)
    return _ShiftedTaps.apply(inputs, weight, bias), inputs[:, x.shape[1] :]


def _by_document(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, seq_idx: Tensor
) -> tuple[Tensor, Tensor]:
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
    y = _ShiftedTaps.apply(rows[None], weight, bias)[0]
    after = position.view(batch, length)[:, -1:] + torch.arange(1 - reach, 1, device=x.device)
    return y[position - reach].view_as(x), rows[after]


def _last_inputs(x: Tensor, count: int, initial_state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The last `count` inputs of each sequence, those before it included, zero where not of the last document."""
    before = x.new_zeros(x.shape[0], count, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([before, x[:, -count:]], 1)[:, -count:]
    if seq_idx is None:
        return inputs
    documents = torch.cat([seq_idx[:, :1].expand(-1, count), seq_idx[:, -count:]], 1)[:, -count:]
    return inputs * (documents == documents[:, -1:])[..., None]


class _ShiftedTaps(torch.autograd.Function):
    """Shifted multiply-adds with channels last, one sequence at a time so that its rows stay in the cache.

    `F.conv1d` wants channels first, and PyTorch's CPU backward of a depthwise convolution takes most of its time.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(batch, K - 1 + sequence, channels) -> (batch, sequence, channels)."""
        precise = torch.promote_types(inputs.dtype, torch.float32)
        taps = weight.to(precise).T.contiguous()
        shift = bias.to(precise)
        batch, length, channels = inputs.shape[0], inputs.shape[1] - len(taps) + 1, inputs.shape[2]
        before_silu = inputs.new_empty(batch, length, channels, dtype=precise)
        y = inputs.new_empty(batch, length, channels)
        rows = taps.new_empty(inputs.shape[1:])
        for source, sums, out in zip(inputs, before_silu, y, strict=True):
            rows.copy_(source)
            torch.addcmul(shift, rows[:length], taps[0], out=sums)
            for k in range(1, len(taps)):
                sums.addcmul_(rows[k : k + length], taps[k])
            out.copy_(F.silu(sums))
        ctx.save_for_backward(inputs, before_silu, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, before_silu, weight, bias = ctx.saved_tensors
        taps = weight.to(before_silu.dtype).T.contiguous()
        reach, length, channels = len(taps) - 1, dy.shape[1], dy.shape[2]
        dinputs = torch.empty_like(inputs)
        dtaps, dbias = torch.zeros_like(taps), torch.zeros_like(taps[0])
        padded = taps.new_zeros(length + 2 * reach, channels)           # the sums' gradient between zeros
        dsums = padded[reach : reach + length]
        product, rows = torch.empty_like(dsums), taps.new_empty(inputs.shape[1:])
        total = torch.empty_like(rows)
        for source, sums, dout, out in zip(inputs, before_silu, dy, dinputs, strict=True):
            rows.copy_(source)
            dsums.copy_(torch.ops.aten.silu_backward(dout.to(taps.dtype), sums))
            dbias += dsums.sum(0)
            torch.mul(padded[reach:], taps[0], out=total)
            for k in range(len(taps)):
                dtaps[k] += torch.mul(dsums, rows[k : k + length], out=product).sum(0)
                if k:
                    total.addcmul_(padded[reach - k : reach - k + length + reach], taps[k])
            out.copy_(total)
        return dinputs, dtaps.T.to(weight.dtype), dbias.to(bias.dtype)
