"""Generation with caches: prefill once, then one token at a time.

A Mamba-2 layer carries a state of fixed size; an attention layer a key and a value for every token so far. That is why
a hybrid's decoding hardly slows with the context (paper section 1, Figure 1).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.ssd import chunk_scan
from kernels.state_update import conv_state_update, ssd_state_update
from model.config import ModelError
from model.hybrid_lm import Attention, FeedForward, HybridLM, Layer, Mamba2


class Decoder:
    """A model with the caches of `batch` sequences, allocated once.

    Args:
        model: its weights' dtype and device are the caches'; the SSM state is float32.
        max_length: tokens a sequence may reach, prompt included.
        batch: sequences decoded together.

    Attributes:
        position: tokens in the caches; the next token's index.
    """

    def __init__(self, model: HybridLM, max_length: int, batch: int = 1):
        self.model, self.max_length, self.batch = model, max_length, batch
        layers = cast("list[Layer]", model.backbone.layers)
        self._layers = [(layer, _cached(layer.mixer, batch, max_length)) for layer in layers]
        self.position = 0

    @property
    def caches(self) -> list[Tensor]:
        """All keys, values, convolution and SSM states, layer by layer."""
        return [cache for _, cached in self._layers for cache in cached.caches]

    @property
    def cache_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        """Start new sequences with the prompts `ids` (batch, sequence); logits (batch, vocab) of what follows."""
        length = ids.shape[1]
        self._check_room(0, length)
        x = self.model.backbone.embeddings(ids)
        for layer, cached in self._layers:
            x = x + cached.prefill(layer.norm(x))
        self.position = length
        return self._logits(x[:, -1])

    @torch.inference_mode()
    def decode(self, ids: Tensor) -> Tensor:
        """Append one token a sequence, `ids` (batch,); logits (batch, vocab) of what follows."""
        self._check_room(self.position, 1)
        x = self.model.backbone.embeddings(ids)
        for layer, cached in self._layers:
            x = x + cached.step(layer.norm(x), self.position)
        self.position += 1
        return self._logits(x)

    def generate(
        self, ids: Tensor, tokens: int, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """`tokens` tokens after the prompts `ids` (batch, sequence) -> (batch, tokens).

        Takes the likeliest token at temperature 0, else draws from softmax(logits / temperature).
        """
        self._check_room(0, ids.shape[1] + tokens - 1)
        chosen = [_choose(self.prefill(ids), temperature, generator)]
        while len(chosen) < tokens:
            chosen.append(_choose(self.decode(chosen[-1]), temperature, generator))
        return torch.stack(chosen, 1)

    def _logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.backbone.norm_f(x))

    def _check_room(self, position: int, tokens: int) -> None:
        if position + tokens > self.max_length:
            raise ModelError(
                f"max_length: {position} + {tokens} tokens do not fit a decoder made for {self.max_length}.\n"
                "Make the Decoder with a larger max_length, or shorten the prompt."
            )


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Token ids (batch,) from logits (batch, vocab)."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]


class _CachedMamba2:
    """Caches: the last inputs of the convolution (batch, kernel - 1, channels), the SSM state (batch, heads, head_dim,
    state_dim) float32."""

    def __init__(self, mixer: Mamba2, batch: int):
        config, weight = mixer.config, mixer.in_proj.weight
        self.mixer = mixer
        self.conv = weight.new_zeros(batch, config.conv_kernel - 1, config.conv_channels)
        self.state = torch.zeros(batch, config.mamba_num_heads, config.mamba_head_dim, config.mamba_state_dim,
                                 device=weight.device)
        self.caches = [self.conv, self.state]

    def prefill(self, x: Tensor) -> Tensor:
        gate, xBC, dt = self.mixer.project(x)
        xBC, last_inputs = causal_conv1d(xBC, *self.mixer.conv_weights())
        y, state = chunk_scan(*self.mixer.scan_inputs(xBC, dt), self.mixer.config.chunk_size)
        self.conv.copy_(last_inputs)
        self.state.copy_(state)
        return self.mixer.finish(y, gate)

    def step(self, x: Tensor, position: int) -> Tensor:
        gate, xBC, dt = self.mixer.project(x)
        xBC = conv_state_update(self.conv, xBC, *self.mixer.conv_weights())
        y = ssd_state_update(self.state, *self.mixer.scan_inputs(xBC, dt))
        return self.mixer.finish(y, gate)


class _CachedAttention:
    """Caches: keys and values (batch, query groups, max_length, head_dim)."""

    def __init__(self, mixer: Attention, batch: int, max_length: int):
        config, weight = mixer.config, mixer.k_proj.weight
        self.mixer = mixer
        self.keys = weight.new_zeros(batch, config.num_query_groups, max_length, config.head_dim)
        self.values = torch.zeros_like(self.keys)
        self.caches = [self.keys, self.values]
        self.rotation = mixer.rotation(max_length, weight.device)

    def prefill(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x, 0)
        self.keys[:, :, : x.shape[1]] = k
        self.values[:, :, : x.shape[1]] = v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.mixer.o_proj(y.transpose(1, 2).flatten(-2))

    def step(self, x: Tensor, position: int) -> Tensor:
        q, k, v = self._project(x[:, None], position)
        self.keys[:, :, position] = k[:, :, 0]
        self.values[:, :, position] = v[:, :, 0]
        # the query heads of a group stand as that many queries of one head: its keys are read once, not copied
        q = q.reshape(q.shape[0], self.keys.shape[1], -1, q.shape[-1])
        y = F.scaled_dot_product_attention(q, self.keys[:, :, : position + 1], self.values[:, :, : position + 1])
        return self.mixer.o_proj(y.flatten(1))

    def _project(self, x: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        rotation = None if self.rotation is None else self.rotation[:, position : position + x.shape[1]]
        return self.mixer.project(x, rotation)


class _CachedFeedForward:
    """No caches."""

    def __init__(self, mixer: FeedForward):
        self.mixer = mixer
        self.caches: list[Tensor] = []

    def prefill(self, x: Tensor) -> Tensor:
        return self.mixer(x)

    def step(self, x: Tensor, position: int) -> Tensor:
        return self.mixer(x)


def _cached(
    mixer: Mamba2 | Attention | FeedForward, batch: int, max_length: int
) -> _CachedMamba2 | _CachedAttention | _CachedFeedForward:
    match mixer:
        case Mamba2():
            return _CachedMamba2(mixer, batch)
        case Attention():
            return _CachedAttention(mixer, batch, max_length)
        case FeedForward():
            return _CachedFeedForward(mixer)
