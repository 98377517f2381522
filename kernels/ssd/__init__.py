"""Mamba-2's state-space duality (SSD) scan in chunks (arXiv 2405.21060, section 6 and listing 1).

    state_t = exp(dt_t A) state_{t-1} + dt_t x_t B_t^T          y_t = state_t C_t + D x_t

Inside a chunk this is attention with a decaying causal mask, M = (C B^T) * exp(decay from j to i) * dt_j; between
chunks one state of (head_dim, state_dim) a head is handed on. Everything heavy is a batched matrix product; decays stay
float32.

Letters: b batch, t sequence, h heads, p head_dim, g groups, r heads per group, n state_dim, c chunks, q chunk size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import ArgumentError, check_any, check_dtypes, check_multiple, check_shapes, warn_of_slowness
from kernels.operation import once_differentiable, outside_autocast

# exp(-50) = 2e-22 is nothing beside 1, but keeps products of decays out of the denormal range, where a CPU crawls.
_LEAST_LOG_DECAY = -50.0
# What the CUDA kernels take: head_dim and state_dim, and the elements of a head's state, which shared memory must hold.
KERNEL_SIZES = (16, 32, 64, 128, 256)
LARGEST_STATE = 256 * 128


@outside_autocast
def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a sequence; differentiable once in every tensor.

    The step size is softplus(dt + dt_bias), without a clamp. Sequences need not be multiples of the chunk. Floor a
    token: 2hp + 2gn + h elements moved and 2 (q (gn + hp) + 2 hpn) floating-point operations. The chunk states
    take h p n / q floats a token and their hand-over a (c, c) matrix a head: long sequences want larger chunks.

    Args:
        x: (b, t, h, p) float64, float32 or bfloat16.
        dt: (b, t, h), before bias and softplus.
        A: (h,) negative, float32.
        B, C: (b, t, g, n); head i uses group i // (h / g).
        D, dt_bias: (h,) float32.
        chunk_size: q, tokens a chunk. The CUDA kernels (`kernels.ssd.triton`) take the one they were tuned for.
        initial_state: (b, h, p, n) before the first token; zeros when None.
        seq_idx: (b, t) int32, the number of the document a token belongs to, never falling along a sequence: the state
            starts from zero wherever it changes. `initial_state` is the first document's. One document when None.

    Returns:
        y (b, t, h, p) in x's dtype and the state after the last token, (b, h, p, n) float32 (float64 for float64 x).

    Raises:
        ArgumentError: shapes, devices or the dtypes of x, B and C disagree, heads are no multiple of groups, or there
            is no token or chunk.
    """
    sizes = check_shapes(
        "chunk_scan", x=(x, "b t h p"), dt=(dt, "b t h"), A=(A, "h"), B=(B, "b t g n"), C=(C, "b t g n"), D=(D, "h"),
        dt_bias=(dt_bias, "h"), initial_state=(initial_state, "b h p n"), seq_idx=(seq_idx, "b t"),
    )
    check_dtypes("chunk_scan", x=x, B=B, C=C)
    check_multiple("chunk_scan", "heads", sizes["h"], "groups", sizes["g"])
    check_any("chunk_scan", x=x, B=B)
    if chunk_size < 1:
        raise ArgumentError(f"chunk_scan: chunk_size is {chunk_size}.\nIt must be at least 1.")
    if x.is_cuda:
        from kernels.ssd import triton as ssd_triton

        if ssd_triton.supports(x, B):
            y, final, *_ = ssd_triton.scan(*ssd_triton.prepared(x, dt, A, B, C, D, dt_bias, initial_state, seq_idx))
            return y, final.transpose(2, 3)
        warn_of_slowness("chunk_scan", ssd_triton.TAKES, x.dtype, f"head_dim {sizes['p']}, state_dim {sizes['n']}")
    batch, length, heads, head_dim = x.shape
    precise = torch.promote_types(x.dtype, torch.float32)
    step = F.softplus(dt.to(precise) + dt_bias.to(precise))
    if initial_state is None:
        initial_state = x.new_zeros(batch, heads, head_dim, B.shape[-1], dtype=precise)
    before = initial_state.to(precise).contiguous()
    chunk = min(chunk_size, length)
    if padding := -length % chunk:
        x, B, C = (F.pad(tensor, (0, 0, 0, 0, 0, padding)) for tensor in (x, B, C))
        step = F.pad(step, (0, 0, 0, padding))          # a step of 0 leaves the state as it is
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], 1)
    y, state = _ChunkScan.apply(x, step, A.to(precise), B, C, D.to(precise), before, chunk, seq_idx)
    return y[:, :length], state


class _ChunkScan(torch.autograd.Function):
    """Forward and backward written out: half the time of autograd's own backward, which sums every broadcast apart.

    The gradient of the log decay needs no (q, q) sums: with a_t = dt_t A and X the input of the matrix products,
    da = reversed cumulative sum over the chunk of (<dy, y> - <dX, X>) + <d state, state> at the chunk's end.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor, chunk: int,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        b, t, h, p = x.shape
        g, n = B.shape[2:]
        r, c, q = h // g, t // chunk, chunk
        X = _heads_first(x, step.dtype).view(-1, q, p)
        Bq = _heads_first(B, step.dtype).view(b, g, 1, c, q, n)
        Cq = _heads_first(C, step.dtype).view(b, g, 1, c, q, n)
        dt = step.transpose(1, 2).reshape(b, h, c, q)
        log_decay = (dt * A[:, None, None]).cumsum(-1)                  # from the chunk's start, this token included

        scores = (Cq @ Bq.transpose(-1, -2)).tril_()                    # b g 1 c q q, once a group
        decay = (log_decay[..., :, None] - log_decay[..., None, :]).clamp_(_LEAST_LOG_DECAY, 0).exp_()
        decay = decay.mul_(dt[..., None, :]).view(b, g, r, c, q, q)     # `scores` is 0 above the diagonal
        to_end = (log_decay[..., -1:] - log_decay).clamp_(min=_LEAST_LOG_DECAY).exp_().mul_(dt).view(b, g, r, c, q, 1)
        from_start = log_decay.clamp(min=_LEAST_LOG_DECAY).exp_().view(b, g, r, c, q, 1)
        passing = _chunk_passing(log_decay[..., -1])                    # b h c+1 c+1
        if seq_idx is not None:
            _stay_in_document(seq_idx, decay, to_end, from_start, passing)
        mask = (decay * scores).view(-1, q, q)
        B_end = (Bq * to_end).view(-1, q, n)
        C_start = (Cq * from_start).view(-1, q, n)

        added = torch.bmm(X.transpose(1, 2), B_end).view(b, h, c, p * n)
        incoming = torch.matmul(passing[:, :, :-1, 1:], added)
        incoming.addcmul_(passing[:, :, :-1, :1], initial.view(b, h, 1, p * n))
        final = torch.matmul(passing[:, :, -1:, 1:], added) + passing[:, :, -1:, :1] * initial.view(b, h, 1, p * n)

        y = torch.bmm(mask, X).baddbmm_(C_start, incoming.view(-1, p, n).transpose(1, 2))
        ctx.save_for_backward(x, dt, A, D, X, Bq, Cq, decay, mask, to_end, from_start, B_end, C_start, passing,
                              incoming, final, y)
        y = torch.addcmul(y.view(b, h, t, p).transpose(1, 2), x, D[:, None])
        return y.to(x.dtype), final.view(b, h, p, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        (x, dt, A, D, X, Bq, Cq, decay, mask, to_end, from_start, B_end, C_start, passing,
         incoming, final, y) = ctx.saved_tensors
        b, g, r, c, q, _ = decay.shape
        h, t, p, n = g * r, c * q, X.shape[-1], Bq.shape[-1]
        dY = _heads_first(dy, X.dtype).view(-1, q, p)

        # states: what each chunk took in, then what each chunk added
        dfinal = dfinal.reshape(b, h, 1, p * n)
        dincoming = torch.bmm(dY.transpose(1, 2), C_start).view(b, h, c, p * n)
        dadded = torch.matmul(passing[:, :, :-1, 1:].transpose(-1, -2), dincoming)
        dadded.addcmul_(passing[:, :, -1, 1:, None], dfinal)
        dinitial = torch.matmul(passing[:, :, :-1, :1].transpose(-1, -2), dincoming) + passing[:, :, -1:, :1] * dfinal
        dS = dadded.view(-1, p, n)

        # inside the chunk
        dmask = torch.bmm(dY, X.transpose(1, 2))
        dD = dmask.diagonal(dim1=1, dim2=2).reshape(b, h, t).sum((0, 2))
        dX = torch.bmm(mask.transpose(1, 2), dY).baddbmm_(B_end, dS.transpose(1, 2))
        dscores = dmask.view_as(decay).mul_(decay).sum(2, keepdim=True).tril_()
        dC = torch.bmm(dY, incoming.view(-1, p, n)).view(b, g, r, c, q, n).mul_(from_start).sum(2, keepdim=True)
        dB = torch.bmm(X, dS).view(b, g, r, c, q, n).mul_(to_end).sum(2, keepdim=True)
        dC += dscores @ Bq
        dB += dscores.transpose(-1, -2) @ Cq

        # the log decay, and through it dt and A
        out = dY.mul_(y).sum(-1).view(b, h, c, q)                       # dY is free by now
        into = torch.mul(dX, X, out=dY).sum(-1).view(b, h, c, q)
        at_end = torch.cat([(dadded[:, :, :-1] * incoming[:, :, 1:]).sum(-1), (dfinal * final).sum(-1)], -1)
        da = (out - into).flip(-1).cumsum(-1).flip(-1) + at_end[..., None]
        ddt = into / dt.clamp_min(torch.finfo(dt.dtype).tiny) + da * A[:, None, None]
        dA = (da * dt).sum((0, 2, 3))
        dx = torch.addcmul(dX.view(b, h, t, p).transpose(1, 2), dy, D[:, None])
        return (
            dx.to(x.dtype), ddt.view(b, h, t).transpose(1, 2), dA,
            dB.view(b, g, t, n).transpose(1, 2).to(x.dtype), dC.view(b, g, t, n).transpose(1, 2).to(x.dtype),
            dD, dinitial.view(b, h, p, n), None, None,
        )


def _heads_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, t, heads, k) -> contiguous (b, heads, t, k), copied and converted in one pass."""
    b, t, heads, k = tensor.shape
    return torch.empty(b, heads, t, k, dtype=dtype, device=tensor.device).copy_(tensor.transpose(1, 2))


def _stay_in_document(seq_idx: Tensor, decay: Tensor, to_end: Tensor, from_start: Tensor, passing: Tensor) -> None:
    """Set to 0, in place, the decays of `_ChunkScan.forward` that lead from one document into another.

    A state at the start of a chunk, and at the end of the last, is that of the document of the token before it.
    """
    b, c, q = len(seq_idx), decay.shape[3], decay.shape[4]
    tokens = seq_idx.reshape(b, 1, 1, c, q)
    states = torch.cat([seq_idx[:, :1], tokens[..., -1].reshape(b, c)], 1)
    decay *= tokens[..., :, None] == tokens[..., None, :]
    to_end *= (tokens == states[:, 1:].view(b, 1, 1, c, 1))[..., None]
    from_start *= (tokens == states[:, :-1].view(b, 1, 1, c, 1))[..., None]
    passing *= (states[:, :, None] == states[:, None, :])[:, None]


def _chunk_passing(log_decay: Tensor) -> Tensor:
    """Log decay over each chunk, (b, h, c) -> (b, h, c+1, c+1): what is left at the start of chunk i (row c: at the
    end) of column 0, the initial state, and of column k + 1, what chunk k added."""
    total = F.pad(log_decay, (1, 0)).double().cumsum(-1)            # thousands of chunks: float32 would round them away
    passed = (total[..., :, None] - total[..., None, :]).clamp_(_LEAST_LOG_DECAY, 0)
    return passed.to(log_decay.dtype).exp_().tril_()
