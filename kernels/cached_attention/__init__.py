"""Attention over a cache of keys and values: the tokens of a prompt's next piece, and one new token a sequence."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import ArgumentError, check_dtypes, check_multiple, check_shapes, warn_of_slowness
from kernels.operation import outside_autocast


@outside_autocast
def prompt_attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of the last tokens of a sequence, those of `q`, over all of it.

    On a Hopper GPU in two parts, since only the part among the new tokens is causal: cuDNN's kernels, the fastest
    there, know only a mask whose first query sees the first key. Each part gives the logarithm of its sum of
    exponentials, by which the two are weighed. Floor: 4 head_dim operations a head and pair that sees each other.

    Args:
        q: (batch, heads, new tokens, head_dim).
        keys, values: (batch, groups, tokens, head_dim), the new tokens' last; head i uses group i // (heads / groups).

    Returns:
        (batch, heads, new tokens, head_dim).

    Raises:
        ArgumentError: shapes, devices or dtypes disagree, heads are no multiple of groups, or there are more new tokens
            than tokens.
    """
    sizes = check_shapes("prompt_attention", q=(q, "batch heads new head_dim"),
                         keys=(keys, "batch groups tokens head_dim"), values=(values, "batch groups tokens head_dim"))
    check_dtypes("prompt_attention", q=q, keys=keys, values=values)
    check_multiple("prompt_attention", "heads", sizes["heads"], "groups", sizes["groups"])
    new, length = q.shape[2], keys.shape[2]
    if new > length:
        raise ArgumentError(f"prompt_attention: q has {new} new tokens, keys have {length} in all.\n"
                            "Give keys and values of the new tokens, too.")
    if not _has_cudnn_kernel(q):
        whole = new == length
        seen = None if whole else torch.ones(new, length, dtype=torch.bool, device=q.device).tril(length - new)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, is_causal=whole, enable_gqa=True)
    own, own_sum = _cudnn_attention(q, keys[:, :, length - new :], values[:, :, length - new :], causal=True)
    if new == length:
        return own
    past, past_sum = _cudnn_attention(q, keys[:, :, : length - new], values[:, :, : length - new], causal=False)
    return torch.lerp(past, own, torch.sigmoid(own_sum - past_sum).to(q.dtype))


@outside_autocast
def token_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """Attention of one token a sequence over the cached tokens up to its own, which stands at its `positions`.

    Positions are read on the device, so that a captured CUDA graph serves every length, of each sequence its own.
    Floor: one read of those keys and values; 4 head_dim operations a head and token.

    Args:
        q: (batch, heads, head_dim).
        keys, values: (batch, groups, max_length, head_dim); head i uses group i // (heads / groups).
        positions: (batch,) int64, on the device of the others.

    Returns:
        (batch, heads, head_dim).

    Raises:
        ArgumentError: shapes, devices or dtypes disagree, or heads are no multiple of groups.
    """
    sizes = check_shapes("token_attention", q=(q, "batch heads head_dim"),
                         keys=(keys, "batch groups tokens head_dim"), values=(values, "batch groups tokens head_dim"),
                         positions=(positions, "batch"))
    check_dtypes("token_attention", q=q, keys=keys, values=values)
    check_multiple("token_attention", "heads", sizes["heads"], "groups", sizes["groups"])
    if q.is_cuda:
        from kernels.cached_attention import triton as cached_attention_triton

        if cached_attention_triton.supports(q, keys, values):
            return cached_attention_triton.attend(q, keys, values, positions)
        warn_of_slowness("token_attention", cached_attention_triton.TAKES, q.dtype, f"head_dim {q.shape[2]}")
    # the query heads of a group stand as that many queries of one head: its keys are read once, not copied
    grouped = q.unflatten(1, (keys.shape[1], -1))
    length = keys.shape[2] if q.is_cuda else int(positions.max()) + 1       # a captured step has one for all lengths
    seen = None
    if q.is_cuda or int(positions.min()) + 1 < length:
        reached = torch.arange(length, device=q.device) <= positions[:, None]
        seen = reached[:, None, None].expand(*grouped.shape[:3], -1)
    return F.scaled_dot_product_attention(grouped, keys[:, :, :length], values[:, :, :length], seen).flatten(1, 2)


def _has_cudnn_kernel(q: Tensor) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16)
    return (q.is_cuda and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
            and torch.cuda.get_device_capability(q.device)[0] >= 9)


def _cudnn_attention(q: Tensor, keys: Tensor, values: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log of the sum of exponentials (batch, heads, tokens, 1) float32."""
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, keys, values, None, True, 0.0, causal, scale=1 / math.sqrt(q.shape[-1])
    )
    return out, log_sum.reshape(*q.shape[:3], 1)
