"""What each kind of layer keeps of the tokens it has seen, and how it goes on from there.

Caches are allocated once and written in place: a captured CUDA graph goes on reading them where they lie.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from kernels.cached_attention import prompt_attention, token_attention
from kernels.causal_conv1d import causal_conv1d, final_conv_state
from kernels.squared_relu import squared_relu
from kernels.ssd import chunk_scan
from kernels.state_update import conv_state_update, ssd_state_update
from model.hybrid_lm import Attention, FeedForward, HybridLM, Layer, Mamba2, rotary_factors, rotate


class CacheShape(NamedTuple):
    """Of caches: sequences, tokens, element types, and where they are."""

    batch: int
    max_length: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    device: torch.device


class CachedMamba2:
    """Of a fixed size: the last inputs of the convolution (batch, kernel - 1, channels), the SSM state (batch, heads,
    head_dim, state_dim)."""

    def __init__(self, mixer: Mamba2, shape: CacheShape):
        config = mixer.config
        self.mixer = mixer
        self.conv = torch.zeros(shape.batch, config.conv_kernel - 1, config.conv_channels, dtype=shape.dtype,
                                device=shape.device)
        self.state = torch.zeros(shape.batch, config.mamba_num_heads, config.mamba_head_dim, config.mamba_state_dim,
                                 dtype=shape.state_dtype, device=shape.device)
        self.fixed, self.growing = [self.conv, self.state], list[Tensor]()
        self.A = mixer.decay_rates().detach()

    def prefill(
        self, x: Tensor, rows: slice, start: int, rotation: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """x (rows, tokens, hidden), the tokens from `start` on of sequences `rows` -> the same shape; caches go on.

        With `lengths` (rows,) int64, each at least 1, what stands behind a row's own tokens is padding: the caches go
        on from the row's last token. `rotation`: the rotary factors of these tokens, for attention.
        """
        gate, inputs, dt = self.mixer.project(x)
        before = self.conv[rows]
        if lengths is None:
            conv_state = final_conv_state(inputs, self.mixer.config.conv_kernel, before)
        else:
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
            dt = dt.masked_fill(padding[..., None], -torch.inf)         # a step of softplus(-inf) = 0: the state stays
            last = lengths[:, None] + torch.arange(before.shape[1], device=x.device)
            conv_state = torch.cat([before, inputs], 1).take_along_dim(last[..., None], 1)
        xBC = causal_conv1d(inputs, *self.mixer.conv_weights(), before)
        self.conv[rows] = conv_state
        scan_inputs = self.mixer.scan_inputs(xBC, dt)
        y, state = chunk_scan(*scan_inputs, self.mixer.config.chunk_size, self.state[rows])
        self.state[rows] = state
        return self.mixer.finish(y, gate)

    def step(self, x: Tensor, positions: Tensor, rotation: Tensor | None = None) -> Tensor:
        """x (rows, hidden), tokens of the first sequences at their `positions` (rows,) int64 -> the same shape; caches
        go on. `rotation`: the rotary factors there, for attention."""
        gate, xBC, dt = self.mixer.project(x)
        xBC = conv_state_update(self.conv[: len(x)], xBC, *self.mixer.conv_weights())
        heads, B, C = self.mixer.split_heads(xBC)
        y = ssd_state_update(self.state[: len(x)], heads, dt, self.A, B, C, self.mixer.D, self.mixer.dt_bias)
        return self.mixer.finish(y, gate)


class CachedAttention:
    """Growing with the tokens: keys and values (batch, query groups, max_length, head_dim)."""

    def __init__(self, mixer: Attention, shape: CacheShape):
        config = mixer.config
        self.mixer = mixer
        self.keys = torch.zeros(shape.batch, config.num_query_groups, shape.max_length, config.head_dim,
                                dtype=shape.dtype, device=shape.device)
        self.values = torch.zeros_like(self.keys)
        self.fixed, self.growing = list[Tensor](), [self.keys, self.values]

    def prefill(
        self, x: Tensor, rows: slice, start: int, rotation: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """As `CachedMamba2.prefill`. Attention is causal, and keys of padding are written over before they are seen."""
        end = start + x.shape[1]
        q, k, v = self.mixer.project(x, rotation)
        self.keys[rows, :, start:end] = k
        self.values[rows, :, start:end] = v
        y = prompt_attention(q, self.keys[rows, :, :end], self.values[rows, :, :end])
        return self.mixer.o_proj(y.transpose(1, 2).flatten(-2))

    def step(self, x: Tensor, positions: Tensor, rotation: Tensor | None = None) -> Tensor:
        """As `CachedMamba2.step`."""
        q, k, v = self.mixer.project(x[:, None], None)
        if rotation is not None:        # together: of one token a launch costs more than a copy
            q, k = rotate(torch.cat([q, k], 1), rotation).split([q.shape[1], k.shape[1]], 1)
        keys, values, at = self.keys[: len(x)], self.values[: len(x)], positions[:, None, None, None].expand_as(k)
        keys.scatter_(2, at, k)
        values.scatter_(2, at, v)
        return self.mixer.o_proj(token_attention(q[:, :, 0], keys, values, positions).flatten(1))


class CachedFeedForward:
    """No caches."""

    def __init__(self, mixer: FeedForward):
        self.mixer = mixer
        self.fixed, self.growing = list[Tensor](), list[Tensor]()

    def prefill(
        self, x: Tensor, rows: slice, start: int, rotation: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """As `CachedMamba2.prefill`."""
        return self.mixer.down_proj(squared_relu(self.mixer.up_proj(x)))

    def step(self, x: Tensor, positions: Tensor, rotation: Tensor | None = None) -> Tensor:
        """As `CachedMamba2.step`."""
        return self.mixer.down_proj(squared_relu(self.mixer.up_proj(x)))


Cached = CachedMamba2 | CachedAttention | CachedFeedForward


def cached(mixer: Mamba2 | Attention | FeedForward, shape: CacheShape) -> Cached:
    """`mixer` with caches of `shape`."""
    match mixer:
        case Mamba2():
            return CachedMamba2(mixer, shape)
        case Attention():
            return CachedAttention(mixer, shape)
        case FeedForward():
            return CachedFeedForward(mixer)


class ModelCaches:
    """A model and its layers' caches of `batch` sequences of at most `max_length` tokens, in the model's dtype."""

    def __init__(self, model: HybridLM, max_length: int, batch: int, state_dtype: torch.dtype):
        embeddings = model.backbone.embeddings.weight
        self.model, self.max_length, self.batch = model, max_length, batch
        self.dtype, self.state_dtype, self.device = embeddings.dtype, state_dtype, embeddings.device
        shape = CacheShape(batch, max_length, self.dtype, state_dtype, self.device)
        self._layers = [(layer, cached(layer.mixer, shape)) for layer in cast("list[Layer]", model.backbone.layers)]
        self.rotation = rotary_factors(model.config, max_length, self.dtype, self.device)       # of every layer

    @property
    def caches(self) -> list[Tensor]:
        """All keys, values, convolution and SSM states, layer by layer."""
        return [cache for _, layer in self._layers for cache in layer.fixed + layer.growing]

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self.caches)

    def states(self, row: int) -> list[Tensor]:
        """Views of what the Mamba-2 layers hold of sequence `row`: all of what they know of its tokens so far."""
        return [cache[row] for _, layer in self._layers for cache in layer.fixed]

    def forget(self, rows: slice) -> None:
        """Make the caches of sequences `rows` those of no token. Keys and values are written before they are read."""
        for _, layer in self._layers:
            for cache in layer.fixed:
                cache[rows].zero_()

    def read_rows(self, ids: Tensor, rows: slice, start: int, lengths: Tensor | None = None) -> Tensor:
        """The tokens from `start` on of sequences `rows`, ids (rows, tokens) -> (rows, tokens, hidden), before the last
        norm; with `lengths` (rows,) int64 padded behind as many of each row's own tokens, one at least."""
        x = self.model.backbone.embeddings(ids)
        rotation = None if self.rotation is None else self.rotation[:, start : start + ids.shape[1]]
        for layer, cache in self._layers:
            x = x + cache.prefill(layer.norm(x), rows, start, rotation, lengths)
        return x

    def keys_values(self, row: int, start: int, end: int) -> list[Tensor]:
        """Views of the keys and values (query groups, tokens, head_dim) of sequence `row`'s tokens [start, end)."""
        return [cache[row, :, start:end] for _, layer in self._layers for cache in layer.growing]


class PrefixReader(ModelCaches):
    """A model that reads `batch` sequences of at most `max_length` tokens in pieces, and goes on from one in several.

    Nothing is decoded, so there is no graph to capture: `model.inference.decoder.Decoder` has that.
    """

    def __init__(self, model: HybridLM, max_length: int, batch: int):
        super().__init__(model, max_length, batch, torch.float32)
        self.position = 0           # tokens read

    def read(self, ids: Tensor) -> Tensor:
        """The next tokens (rows, tokens) of the first rows -> (rows, tokens, hidden), before the head."""
        x = self.read_rows(ids, slice(len(ids)), self.position)
        self.position += ids.shape[1]
        return self.model.backbone.norm_f(x)

    def fork(self, sources: Tensor) -> None:
        """Row i goes on from what row `sources[i]` has read; sources (batch,) int64."""
        for tensor in self.caches:
            tensor.copy_(tensor[sources])
