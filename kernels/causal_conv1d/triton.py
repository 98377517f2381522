"""The causal convolution with SiLU on CUDA: `kernels.causal_conv1d` for bfloat16 and float16, forward and backward.

Both walk down a stretch of tokens with their channels' last K - 1 inputs in registers, the backward with the gradients
still open too: every element is read and converted once, and SiLU's exponential taken once. Four tokens' loads come
together, so that enough bytes are on their way.

Documents: with their numbers a tap that meets another document's token meets zero.

Bytes an element: forward 4 (one read, one write), backward 6 (x, dy, dx).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import cdiv, grid, program
from kernels.operation import operation

TAPS = 4


class ConvTiles(NamedTuple):
    """Channels and tokens a program of the convolution holds, and its warps."""

    channels: int
    tokens: int
    warps: int


@triton.jit
def _document(documents, b, t, length):
    """Document of token t; of the first one before the sequence."""
    return tl.load(documents + b * length + tl.minimum(tl.maximum(t, 0), length - 1))


@triton.jit
def _program(REVERSED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's channels, its stretch of tokens and its sequence, in 64 bits."""
    b, block, stretch = program(REVERSED)
    return block * CHANNELS + tl.arange(0, CHANNELS), stretch, b.to(tl.int64)


@triton.jit
def _parameters(weight, bias, c, here):
    """The four taps' weights and the bias of channels c, as float32."""
    w0, w1 = tl.load(weight + c * 4, here, 0.0).to(tl.float32), tl.load(weight + c * 4 + 1, here, 0.0).to(tl.float32)
    w2, w3 = (tl.load(weight + c * 4 + 2, here, 0.0).to(tl.float32),
              tl.load(weight + c * 4 + 3, here, 0.0).to(tl.float32))
    return w0, w1, w2, w3, tl.load(bias + c, here, 0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    x, weight, bias, first, documents, y, batch_stride, time_stride, y_batch, y_time, length, channels,
    HAS_FIRST: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, REVERSED: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    c, stretch, b = _program(REVERSED, TOKENS, CHANNELS)
    start = stretch * TOKENS
    here = c < channels
    w0, w1, w2, w3, shift = _parameters(weight, bias, c, here)
    x += b * batch_stride
    y += b * y_batch + c
    x0 = _row(x, b, start - 3, length, c, channels, time_stride, first, HAS_FIRST)
    x1 = _row(x, b, start - 2, length, c, channels, time_stride, first, HAS_FIRST)
    x2 = _row(x, b, start - 1, length, c, channels, time_stride, first, HAS_FIRST)
    for done in range(0, TOKENS, 4):
        t = start + done
        # All loads before any store, which the compiler would not move them over.
        x3, x4 = (_row(x, b, t, length, c, channels, time_stride, first, False),
                  _row(x, b, t + 1, length, c, channels, time_stride, first, False))
        x5, x6 = (_row(x, b, t + 2, length, c, channels, time_stride, first, False),
                  _row(x, b, t + 3, length, c, channels, time_stride, first, False))
        y3 = _token(w0, w1, w2, w3, shift, x0, x1, x2, x3, documents, b, t, length, HAS_DOCUMENTS)
        y4 = _token(w0, w1, w2, w3, shift, x1, x2, x3, x4, documents, b, t + 1, length, HAS_DOCUMENTS)
        y5 = _token(w0, w1, w2, w3, shift, x2, x3, x4, x5, documents, b, t + 2, length, HAS_DOCUMENTS)
        y6 = _token(w0, w1, w2, w3, shift, x3, x4, x5, x6, documents, b, t + 3, length, HAS_DOCUMENTS)
        out = y + t.to(tl.int64) * y_time
        tl.store(out, y3.to(y.dtype.element_ty), here & (t < length))
        tl.store(out + y_time, y4.to(y.dtype.element_ty), here & (t + 1 < length))
        tl.store(out + 2 * y_time, y5.to(y.dtype.element_ty), here & (t + 2 < length))
        tl.store(out + 3 * y_time, y6.to(y.dtype.element_ty), here & (t + 3 < length))
        x0, x1, x2 = x4, x5, x6


@triton.jit
def _token(w0, w1, w2, w3, shift, x0, x1, x2, x3, documents, b, t, length, HAS_DOCUMENTS: tl.constexpr):
    """Token t's output, with x0 .. x3 the inputs under its taps."""
    if HAS_DOCUMENTS:
        x0, x1, x2 = _met(x0, x1, x2, documents, b, t, length)
    z = shift + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    return z * tl.sigmoid(z)


@triton.jit
def _met(x0, x1, x2, documents, b, t, length):
    """The inputs of the three tokens before t, zero where they are of another document."""
    own = _document(documents, b, t, length)
    x0 = tl.where(_document(documents, b, t - 3, length) == own, x0, 0.0)
    x1 = tl.where(_document(documents, b, t - 2, length) == own, x1, 0.0)
    x2 = tl.where(_document(documents, b, t - 1, length) == own, x2, 0.0)
    return x0, x1, x2


@triton.jit
def _row(tensor, batch, t, length, c, channels, time_stride, first, HAS_FIRST: tl.constexpr):
    """Row t of a sequence as float32: before the first token what `first` (batch, 3, channels) holds, or zeros."""
    inside = (c < channels) & (t < length)
    row = tl.load(tensor + t.to(tl.int64) * time_stride + c, inside & (t >= 0), 0.0).to(tl.float32)
    if HAS_FIRST:
        earlier = first + (batch * 3 + t + 3) * channels + c
        row += tl.load(earlier, inside & (t < 0) & (t >= -3), 0.0).to(tl.float32)
    return row


@triton.jit
def _token_gradient(
    w0, w1, w2, w3, shift, x0, x1, x2, x3, dy, open0, open1, open2, documents, b, t, length,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Of token t, with x0 .. x3 those under its taps: the gradient before SiLU, the inputs as they were met, the
    gradient of x0, now complete, and those of x1, x2 and x3, still open."""
    if HAS_DOCUMENTS:
        x0, x1, x2 = _met(x0, x1, x2, documents, b, t, length)
    z = shift + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    gate = tl.sigmoid(z)
    dz = dy * gate * (1.0 + z * (1.0 - gate))
    d0, d1, d2 = dz, dz, dz
    if HAS_DOCUMENTS:
        d0, d1, d2 = _met(dz, dz, dz, documents, b, t, length)
    return dz, x0, x1, x2, open0 + w0 * d0, open1 + w1 * d1, open2 + w2 * d2, w3 * dz


@triton.jit
def _add(dw0, dw1, dw2, dw3, db, dz, x0, x1, x2, x3):
    """The gradients of the taps' weights and the bias, with a token's added."""
    return dw0 + dz * x0, dw1 + dz * x1, dw2 + dz * x2, dw3 + dz * x3, db + dz


@triton.jit
def _backward_kernel(
    x, dy, weight, bias, first, documents, dx, dfirst, partial, batch_stride, time_stride, dy_batch, dy_time, dx_batch,
    dx_time, length, channels, HAS_FIRST: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, REVERSED: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):
    """dx of tokens start - 3 .. start + TOKENS - 4 and, of sequences' first programs, that of the inputs before them;
    the last program goes 3 further. `partial` (batch, programs, 5, channels): dweight and dbias."""
    c, stretch, b = _program(REVERSED, TOKENS, CHANNELS)
    start = stretch * TOKENS
    here = c < channels
    w0, w1, w2, w3, shift = _parameters(weight, bias, c, here)
    x += b * batch_stride
    dy += b * dy_batch
    dx += b * dx_batch + c
    zero = tl.zeros((CHANNELS,), tl.float32)
    dw0, dw1, dw2, dw3, db, open0, open1, open2 = zero, zero, zero, zero, zero, zero, zero, zero
    x0 = _row(x, b, start - 6, length, c, channels, time_stride, first, HAS_FIRST)
    x1 = _row(x, b, start - 5, length, c, channels, time_stride, first, HAS_FIRST)
    x2 = _row(x, b, start - 4, length, c, channels, time_stride, first, HAS_FIRST)
    for before in tl.static_range(3):           # gradients that reach back over the start of the stretch
        t = start - 3 + before
        x3 = _row(x, b, t, length, c, channels, time_stride, first, HAS_FIRST)
        dys = tl.load(dy + t.to(tl.int64) * dy_time + c, here & (t >= 0) & (t < length), 0.0).to(tl.float32)
        _, m0, m1, m2, _, open0, open1, open2 = _token_gradient(
            w0, w1, w2, w3, shift, x0, x1, x2, x3, dys, open0, open1, open2, documents, b, t, length, HAS_DOCUMENTS
        )
        x0, x1, x2 = x1, x2, x3
    for done in tl.range(0, TOKENS, 4, num_stages=3):        # the next tokens are on their way
        t = start + done
        # All loads before any store, which the compiler would not move them over.
        x3, x4 = (_row(x, b, t, length, c, channels, time_stride, first, False),
                  _row(x, b, t + 1, length, c, channels, time_stride, first, False))
        x5, x6 = (_row(x, b, t + 2, length, c, channels, time_stride, first, False),
                  _row(x, b, t + 3, length, c, channels, time_stride, first, False))
        dy3, dy4 = (_row(dy, b, t, length, c, channels, dy_time, first, False),
                    _row(dy, b, t + 1, length, c, channels, dy_time, first, False))
        dy5, dy6 = (_row(dy, b, t + 2, length, c, channels, dy_time, first, False),
                    _row(dy, b, t + 3, length, c, channels, dy_time, first, False))
        dz, m0, m1, m2, complete3, open0, open1, open2 = _token_gradient(
            w0, w1, w2, w3, shift, x0, x1, x2, x3, dy3, open0, open1, open2, documents, b, t, length, HAS_DOCUMENTS
        )
        dw0, dw1, dw2, dw3, db = _add(dw0, dw1, dw2, dw3, db, dz, m0, m1, m2, x3)
        dz, m0, m1, m2, complete4, open0, open1, open2 = _token_gradient(
            w0, w1, w2, w3, shift, x1, x2, x3, x4, dy4, open0, open1, open2, documents, b, t + 1, length, HAS_DOCUMENTS
        )
        dw0, dw1, dw2, dw3, db = _add(dw0, dw1, dw2, dw3, db, dz, m0, m1, m2, x4)
        dz, m0, m1, m2, complete5, open0, open1, open2 = _token_gradient(
            w0, w1, w2, w3, shift, x2, x3, x4, x5, dy5, open0, open1, open2, documents, b, t + 2, length, HAS_DOCUMENTS
        )
        dw0, dw1, dw2, dw3, db = _add(dw0, dw1, dw2, dw3, db, dz, m0, m1, m2, x5)
        dz, m0, m1, m2, complete6, open0, open1, open2 = _token_gradient(
            w0, w1, w2, w3, shift, x3, x4, x5, x6, dy6, open0, open1, open2, documents, b, t + 3, length, HAS_DOCUMENTS
        )
        dw0, dw1, dw2, dw3, db = _add(dw0, dw1, dw2, dw3, db, dz, m0, m1, m2, x6)
        out = dx + (t - 3).to(tl.int64) * dx_time
        tl.store(out, complete3.to(dx.dtype.element_ty), here & (t >= 3) & (t < length + 3))
        tl.store(out + dx_time, complete4.to(dx.dtype.element_ty), here & (t >= 2) & (t < length + 2))
        tl.store(out + 2 * dx_time, complete5.to(dx.dtype.element_ty), here & (t >= 1) & (t < length + 1))
        tl.store(out + 3 * dx_time, complete6.to(dx.dtype.element_ty), here & (t < length))
        if HAS_FIRST:
            earlier = dfirst + (b * 3 + t) * channels + c
            tl.store(earlier, complete3, here & (t < 3))
            tl.store(earlier + channels, complete4, here & (t < 2))
            tl.store(earlier + 2 * channels, complete5, here & (t < 1))
        x0, x1, x2 = x4, x5, x6
    if start + TOKENS >= length:
        for after in tl.static_range(3):
            due = start + TOKENS - 3 + after
            tl.store(dx + due.to(tl.int64) * dx_time, open0.to(dx.dtype.element_ty), here & (due >= 0) & (due < length))
            if HAS_FIRST:
                tl.store(dfirst + (b * 3 + due + 3) * channels + c, open0, here & (due < 0))
            open0, open1, open2 = open1, open2, zero
    partial += (b * tl.cdiv(length, TOKENS) + stretch) * 5 * channels + c
    tl.store(partial, dw0, here)
    tl.store(partial + channels, dw1, here)
    tl.store(partial + 2 * channels, dw2, here)
    tl.store(partial + 3 * channels, dw3, here)
    tl.store(partial + 4 * channels, db, here)


# Fastest on an H200 at 8B width, or nearly, and at 64 x 2,048 tokens of 1,536 channels.
FORWARD = ConvTiles(channels=128, tokens=32, warps=1)
BACKWARD = ConvTiles(channels=128, tokens=128, warps=1)


TAKES = f"bfloat16 or float16 and {TAPS} taps"


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take these inputs: on a GPU, as `TAKES` says."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and weight.shape[1] == TAPS


def prepared(
    x: Tensor, weight: Tensor, bias: Tensor, first: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments of `convolve`, copied where they do not lie as the kernels read them."""
    return (x if x.stride(2) == 1 else x.contiguous(), weight.contiguous(), bias.contiguous(),
            None if first is None else first.contiguous(),
            None if documents is None else documents.to(torch.int32).contiguous())


def run_forward(
    x: Tensor, weight: Tensor, bias: Tensor, first: Tensor | None, documents: Tensor | None, y: Tensor
) -> None:
    """Write y, of any strides whose channels lie side by side."""
    b, t, channels = x.shape
    programs, is_reversed = grid(b, cdiv(channels, FORWARD.channels), cdiv(t, FORWARD.tokens))
    _forward_kernel[programs](
        x, weight, bias, x if first is None else first, x if documents is None else documents, y,
        *x.stride()[:2], *y.stride()[:2], t, channels, HAS_FIRST=first is not None, HAS_DOCUMENTS=documents is not None,
        REVERSED=is_reversed, TOKENS=FORWARD.tokens, CHANNELS=FORWARD.channels, num_warps=FORWARD.warps,
    )


def run_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, first: Tensor | None, documents: Tensor | None, dx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx, of any strides whose channels lie side by side. Returns the other gradients of `convolve_backward`."""
    b, t, channels = x.shape
    stretches = cdiv(t, BACKWARD.tokens)
    programs, is_reversed = grid(b, cdiv(channels, BACKWARD.channels), stretches)
    dfirst = x.new_empty(b, TAPS - 1, channels, dtype=torch.float32)
    partial = x.new_empty(b * stretches, TAPS + 1, channels, dtype=torch.float32)
    _backward_kernel[programs](
        x, dy, weight, bias, x if first is None else first, x if documents is None else documents, dx,
        dfirst, partial, *x.stride()[:2], *dy.stride()[:2], *dx.stride()[:2], t, channels, HAS_FIRST=first is not None,
        HAS_DOCUMENTS=documents is not None, REVERSED=is_reversed, TOKENS=BACKWARD.tokens, CHANNELS=BACKWARD.channels,
        num_warps=BACKWARD.warps,
    )
    total = partial.sum(0)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    return dweight.copy_(total[:TAPS].T), dbias.copy_(total[TAPS]), dfirst


@operation("nemotron_h::causal_conv1d")
def convolve(x: Tensor, weight: Tensor, bias: Tensor, first: Tensor | None, documents: Tensor | None) -> Tensor:
    """y (batch, sequence, channels), contiguous. Arguments as `causal_conv1d`, `first` its initial state."""
    y = x.new_empty(x.shape)
    run_forward(x, weight, bias, first, documents, y)
    return y


@convolve.register_fake
def _like(x: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@operation("nemotron_h::causal_conv1d_backward")
def convolve_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, first: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, and of the inputs before the first token (float32)."""
    dx = x.new_empty(x.shape)
    return dx, *run_backward(dy, x, weight, bias, first, documents, dx)


@convolve_backward.register_fake
def _gradients_like(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dfirst = x.new_empty(x.shape[0], TAPS - 1, x.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias), dfirst


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, first, documents = ctx.saved_tensors
    if dy.stride(2) != 1:
        dy = dy.contiguous()
    dx, dweight, dbias, dfirst = convolve_backward(dy, x, weight, bias, first, documents)
    return dx, dweight, dbias, None if first is None else dfirst.to(first.dtype), None


convolve.register_autograd(_differentiate, setup_context=_keep)
