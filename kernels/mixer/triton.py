"""`kernels.mixer` on CUDA: the kernels of the convolution, the scan and the gated norm as one differentiable operation.

Nothing is joined or converted between them: each reads its part of its forerunner's output where it lies, and the
backward writes every part of the gradients of `projected` and of the convolution's output into one buffer.

Kept for the backward, elements a token: h p + 2 g n (convolved), h p (scanned), h p n / q (states), 2 h float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.causal_conv1d import triton as causal_conv1d_triton
from kernels.gated_norm import triton as gated_norm_triton
from kernels.operation import operation
from kernels.ssd import triton as ssd_triton


def supports(projected: Tensor, weights: Any, head_dim: int, state_dim: int) -> bool:
    """Whether the kernels take these inputs."""
    like = projected.new_empty(1, 1, 1, head_dim), projected.new_empty(1, 1, 1, state_dim)
    return causal_conv1d_triton.supports(projected, weights.conv_weight) and ssd_triton.supports(*like)


def prepared(projected: Tensor, weights: Any, documents: Tensor | None) -> tuple[Any, ...]:
    """The tensors of `mix`, copied where they do not lie as the kernels read them."""
    in_place = _is_packed(projected) and projected.stride(1) * ssd_triton.CHUNK < 2**31
    conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = (tensor.contiguous() for tensor in weights)
    return (projected if in_place else projected.contiguous(), conv_weight, conv_bias, dt_bias.float(), A_log.float(),
            D.float(), norm_weight, None if documents is None else documents.to(torch.int32).contiguous())


@operation("nemotron_h::mixer")
def mix(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, groups: int, state_dim: int, epsilon: float, documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and for the backward what was convolved, what was scanned, and the scan's step, decay and states."""
    heads, inner = len(D), len(norm_weight)
    gate, xBC, dt = projected.split([inner, len(conv_bias), heads], -1)
    y, convolved, scanned = (_rows_like(projected, size) for size in (inner, len(conv_bias), inner))
    causal_conv1d_triton.run_forward(xBC, conv_weight, conv_bias, None, documents, convolved)
    x, B, C = _heads(convolved, heads, inner, groups, state_dim)
    _, step, decay, states = ssd_triton.run_forward(
        x, dt, -torch.exp(A_log), B, C, D, dt_bias, None, documents, scanned.unflatten(-1, (heads, -1))
    )
    gated_norm_triton.run_forward(_flat(scanned), _flat(gate), norm_weight, groups, epsilon, _flat(y))
    return y, convolved, scanned, step, decay, states


@mix.register_fake
def _outputs_like(
    projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, groups: int, state_dim: int, epsilon: float, documents: Tensor | None,
) -> tuple[Tensor, ...]:
    y, convolved, scanned = (_rows_like(projected, len(like)) for like in (norm_weight, conv_bias, norm_weight))
    _, step, decay, states = ssd_triton.kept_like(scanned.unflatten(-1, (len(D), -1)), state_dim)
    return y, convolved, scanned, step, decay, states


@operation("nemotron_h::mixer_backward")
def mix_backward(
    dy: Tensor, projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, convolved: Tensor, scanned: Tensor, step: Tensor, decay: Tensor, states: Tensor, groups: int,
    epsilon: float, documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projected, conv_weight, conv_bias, dt_bias, A_log, D and norm_weight (the last four float32)."""
    heads, inner, state_dim = len(D), len(norm_weight), states.shape[3]
    widths = [inner, len(conv_bias), heads]
    gate, xBC, _ = projected.split(widths, -1)
    dprojected, dconvolved = _rows_like(projected, sum(widths)), _rows_like(projected, len(conv_bias))
    dgate, dxBC, ddt = dprojected.split(widths, -1)
    dscanned = _rows_like(projected, inner)
    dnorm_weight = gated_norm_triton.run_backward(
        _flat(dy), _flat(scanned), _flat(gate), norm_weight, groups, epsilon, _flat(dscanned), _flat(dgate)
    )
    x, B, C = _heads(convolved, heads, inner, groups, state_dim)
    dx, dB, dC = _heads(dconvolved, heads, inner, groups, state_dim)
    A = -torch.exp(A_log)
    dA, dD, ddt_bias, _ = ssd_triton.run_backward(
        dscanned.unflatten(-1, (heads, -1)), None, x, A, B, C, D, step, decay, states, documents, dx, ddt, dB, dC
    )
    dconv_weight, dconv_bias, _ = causal_conv1d_triton.run_backward(
        dconvolved, xBC, conv_weight, conv_bias, None, documents, dxBC
    )
    return dprojected, dconv_weight, dconv_bias, ddt_bias.clone(), dA * A, dD.clone(), dnorm_weight


@mix_backward.register_fake
def _gradients_like(
    dy: Tensor, projected: Tensor, conv_weight: Tensor, conv_bias: Tensor, A_log: Tensor, D: Tensor,
    norm_weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return (_rows_like(projected, projected.shape[2]), torch.empty_like(conv_weight), torch.empty_like(conv_bias),
            *(torch.empty_like(tensor, dtype=torch.float32) for tensor in (D, A_log, D, norm_weight)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, ctx.groups, _, ctx.epsilon, documents = inputs
    ctx.save_for_backward(
        projected, conv_weight, conv_bias, A_log, D, norm_weight, *output[1:], documents, dt_bias
    )
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, documents, dt_bias = ctx.saved_tensors
    projected, conv_weight, conv_bias, A_log, D, norm_weight, *_kept = tensors
    if not _is_packed(dy) or dy.stride() != _rows_like(projected, dy.shape[2]).stride():
        dy = _rows_like(projected, dy.shape[2]).copy_(dy)
    dprojected, *gradients = mix_backward(dy, *tensors, ctx.groups, ctx.epsilon, documents)
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    converted = (gradient.to(like.dtype) for gradient, like in zip(gradients, parameters, strict=True))
    return dprojected, *converted, None, None, None, None


mix.register_autograd(_differentiate, setup_context=_keep)


def _heads(convolved: Tensor, heads: int, inner: int, groups: int, state_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (b, t, h, p), B and C (b, t, g, n): views."""
    x, B, C = convolved.split([inner, groups * state_dim, groups * state_dim], -1)
    return x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))


def _rows_like(projected: Tensor, channels: int) -> Tensor:
    """Empty (b, t, channels) whose rows lie in memory in the order of `projected`'s."""
    b, t, _ = projected.shape
    if projected.stride(0) < projected.stride(1):
        return projected.new_empty(t, b, channels).transpose(0, 1)
    return projected.new_empty(b, t, channels)


def _flat(rows: Tensor) -> Tensor:
    """(b, t, channels) -> (rows, channels), in the order of memory, a view."""
    if rows.stride(0) < rows.stride(1):
        rows = rows.transpose(0, 1)
    return rows.view(-1, rows.shape[2])


def _is_packed(rows: Tensor) -> bool:
    """Whether (b, t, channels) is made of rows one stride apart, either index first."""
    b, t, _ = rows.shape
    (outer, outer_size), (inner, inner_size) = sorted(
        ((rows.stride(0), b), (rows.stride(1), t)), reverse=True
    )
    return rows.stride(2) == 1 and (outer_size == 1 or outer == inner * inner_size)
