"""The hybrid language model in plain PyTorch: Mamba-2, attention and feed-forward layers in the order of a pattern.

Parameters are named as on the Hub (`backbone.layers.0.mixer.in_proj.weight`, transformers' `NemotronH`), so a state is
a checkpoint. The Transformer baseline is the same model with another pattern and rotary positions. Evaluation and
inference use it; training and compression build the same model from megatron-core (`model.megatron.spec`).

    x += mixer(RMSNorm(x)) for every layer, then RMSNorm, then the untied head; no bias but the convolution's and dt's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernels.gated_norm import gated_rms_norm, rms_norm
from kernels.mixer import MixerWeights, mix
from kernels.squared_relu import squared_relu
from model.config import ModelConfig, ModelError
from model.lazy_state import skeleton

Shape = tuple[int, ...]
FLOAT32_PARAMETERS = ("A_log", "D", "dt_bias")      # small, and exponents of the decay: kept precise in any model


class HybridLM(nn.Module):
    """Logits from token ids.

    Args:
        config: geometry. Fresh weights are drawn from torch's global generator as megatron-core draws them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._initialise()

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, sequence) int64 -> logits (batch, sequence, vocab) in the weights' dtype."""
        return self.lm_head(self.backbone(input_ids))

    @classmethod
    def skeleton(cls, config: ModelConfig, dtype: torch.dtype = torch.float32) -> HybridLM:
        """A model without weights, on the meta device: names and shapes, to be filled; A_log, D and dt_bias float32."""
        with torch.device("meta"), _NothingDrawn():
            model = cls(config)
        for name, parameter in model.named_parameters():
            if not name.endswith(FLOAT32_PARAMETERS):
                parameter.data = parameter.data.to(dtype)
        return model

    @classmethod
    def from_state(
        cls, config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> HybridLM:
        """A model with copies of `state`'s tensors in `dtype`; A_log, D and dt_bias stay float32.

        Raises ModelError when names or shapes are not those of `config`.
        """
        model = cls.skeleton(config)
        check_shapes(config, {name: tuple(tensor.shape) for name, tensor in skeleton(state).items()}, "The weights")
        copies = {
            name: tensor.detach().to(torch.float32 if name.endswith(FLOAT32_PARAMETERS) else dtype, copy=True)
            for name, tensor in state.items()
        }
        model.load_state_dict(copies, assign=True)
        return model.requires_grad_()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights with the config's deviation, divided by sqrt(layers) where a layer writes to the residual."""
        deviation = self.config.init_method_std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                writes_residual = name.endswith(("out_proj", "o_proj", "down_proj"))
                module.weight.normal_(0.0, deviation / (math.sqrt(len(self.config.pattern)) if writes_residual else 1))


class _NothingDrawn(TorchFunctionMode):
    """A block in which PyTorch's modules draw no weights. On the meta device there is nothing to fill, and PyTorch
    imports its compiler to do so: a second and a half of every process."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else options["tensor"]
        return function(*args, **options)


def check_shapes(config: ModelConfig, shapes: Mapping[str, Shape], what: str) -> None:
    """Raise ModelError, naming the tensors, unless `shapes` has exactly the names and shapes of HybridLM(config)."""
    expected = {name: tuple(tensor.shape) for name, tensor in HybridLM.skeleton(config).state_dict().items()}
    compare_shapes(expected, shapes, f"{what}: not the weights of pattern {config.pattern}",
                   "Use the configuration that was written with these weights.")


def compare_shapes(expected: Mapping[str, Shape], shapes: Mapping[str, Shape], wrong: str, cure: str) -> None:
    """Raise ModelError, `wrong` with the tensors and then `cure`, unless names and shapes are those expected."""
    problems = [f"missing {name}" for name in expected if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(f"{wrong}: {shown}.\n{cure}")


class Backbone(nn.Module):
    """Embedding, layers and final norm: token ids -> (batch, sequence, hidden)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, symbol) for symbol in config.pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.norm_epsilon)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids (batch, sequence) int64 -> hidden states after the last norm (batch, sequence, hidden)."""
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)


class Layer(nn.Module):
    """One pattern symbol with its norm and residual."""

    def __init__(self, config: ModelConfig, symbol: str):
        super().__init__()
        self.symbol = symbol
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mixer: Mamba2 | Attention | FeedForward = _MIXERS[symbol](config)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, sequence, hidden) -> the same shape."""
        return x + self.mixer(self.norm(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, float32 inside."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.epsilon)


class Mamba2(nn.Module):
    """Mamba-2 mixer (arXiv 2405.21060): projection to z, x, B, C and dt; short convolution; SSD scan; gated norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        inner, heads = config.mamba_inner_size, config.mamba_num_heads
        self.in_proj = nn.Linear(config.hidden_size, config.in_proj_size, bias=False)
        self.conv1d = ConvWeights(config.conv_channels, config.conv_kernel)
        self.dt_bias, self.A_log = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        if not self.A_log.is_meta:
            self._draw_steps_and_decays()
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = NormWeight(inner)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    @torch.no_grad()
    def _draw_steps_and_decays(self) -> None:
        step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))               # softplus(dt_bias) = step
        self.A_log.uniform_(1, 16).log_()

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, sequence, hidden) -> the same shape."""
        config = self.config
        weights = MixerWeights(*self.conv_weights(), self.dt_bias, self.A_log, self.D, self.norm.weight)
        return self.out_proj(mix(self.in_proj(x), weights, config.mamba_num_groups, config.mamba_state_dim,
                                 config.chunk_size, config.norm_epsilon))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., hidden) -> gate z (..., inner), convolution input (..., channels), dt (..., heads)."""
        config = self.config
        return self.in_proj(x).split([config.mamba_inner_size, config.conv_channels, config.mamba_num_heads], -1)

    def conv_weights(self) -> tuple[Tensor, Tensor]:
        """(channels, kernel) taps and (channels,) bias."""
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def scan_inputs(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The convolution's output (..., channels) and dt as x, dt, A, B, C, D, dt_bias of `kernels.ssd`."""
        x, B, C = self.split_heads(xBC)
        return x, dt, self.decay_rates(), B, C, self.D, self.dt_bias

    def split_heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., channels) -> x (..., heads, head_dim), B and C (..., groups, state_dim)."""
        config = self.config
        states = config.mamba_num_groups * config.mamba_state_dim
        x, B, C = xBC.split([config.mamba_inner_size, states, states], -1)
        groups = (config.mamba_num_groups, config.mamba_state_dim)
        x = x.unflatten(-1, (config.mamba_num_heads, config.mamba_head_dim))
        return x, B.unflatten(-1, groups), C.unflatten(-1, groups)

    def decay_rates(self) -> Tensor:
        """A (heads,) float32, negative."""
        return -self.A_log.float().exp()

    def finish(self, y: Tensor, gate: Tensor) -> Tensor:
        """Scan output (..., heads, head_dim) and gate (..., inner) -> (..., hidden)."""
        config = self.config
        normed = gated_rms_norm(y.flatten(-2), gate, self.norm.weight, config.mamba_num_groups, config.norm_epsilon)
        return self.out_proj(normed)


class ConvWeights(nn.Module):
    """Weights of the depthwise convolution in the Hub's layout, (channels, 1, kernel); last tap: the current token."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        bound = 1 / math.sqrt(kernel)
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))


class NormWeight(nn.Module):
    """Weight of the gated norm."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Attention(nn.Module):
    """Causal grouped-query attention, without positions or with rotary ones (the two halves of a head rotated)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.attention_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_size, bias=False)
        self.o_proj = nn.Linear(config.attention_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, sequence, hidden) -> the same shape."""
        q, k, v = self.project(x, rotary_factors(self.config, x.shape[1], x.dtype, x.device))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))

    def project(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, sequence, hidden) and the rotary factors of these positions -> q, k, v (batch, heads, sequence,
        head_dim)."""
        q, k, v = (projection(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
                   for projection in (self.q_proj, self.k_proj, self.v_proj))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v


def rotary_factors(config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Rotary factors (2, length, head_dim / 2), cosine and sine of position * theta^(-2i / head_dim) from position 0 on
    (arXiv 2104.09864), computed in float32; None for a model without positions."""
    if config.position_embedding == "none":
        return None
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** -(pairs / config.head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn channels i and i + head_dim / 2 of (..., sequence, head_dim) by their angle, as in Llama. `rotation` in the
    dtype of x: three launches, as each costs a small decoding step as much as a large kernel's start."""
    cos, sin = rotation
    halves = x.unflatten(-1, (2, -1))
    turned = halves * cos[..., None, :]
    turned[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-1)
    turned[..., 1, :].addcmul_(halves[..., 0, :], sin)
    return turned.flatten(-2)


class FeedForward(nn.Module):
    """Two projections around a squared ReLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> the same shape."""
        return self.down_proj(squared_relu(self.up_proj(x)))


_MIXERS: dict[str, type[Mamba2 | Attention | FeedForward]] = {"M": Mamba2, "*": Attention, "-": FeedForward}
