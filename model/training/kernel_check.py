"""Before a training or a compression on a GPU: do the kernels compute at this run's sizes what they should?

A kernel that is wrong at some size raises nothing: the loss stays high, and hours later one wonders about the recipe.
So values and gradients of the Mamba-2 mixer, of rotary positions and of the losses, at the sizes and in the dtype of
this run, are compared with the plain PyTorch reference in float64, and must have the same bits each time: threads that
race are wrong now and then, by less than any tolerance. It takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels import cross_entropy, forward_kl, mixer
from model.config import ModelConfig, ModelError
from model.hybrid_lm import rotate
from model.megatron import compat  # noqa: F401    # before Megatron
from model.megatron.distributed import ONE_COPY
from model.megatron.precision import Precision
from model.megatron.spec import transformer_config

# isort: split
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

LIMIT = 0.05            # relative error (Frobenius norm); right kernels reach 0.004 on an H200, wrong ones 0.08 up
TOKENS = 2048           # of each of the two sequences, at most
ROWS = 256              # of the losses
TIMES = 50              # that the same is computed: a race of ours showed in 10 of 300


def check_kernels(config: ModelConfig, tensor_parallel: int, device: torch.device, documents: bool = False) -> None:
    """Compare the kernels with their reference at this process's share of `config`; with `documents` as they run where
    layers restart at these. Within Megatron's process groups.

    Raises:
        ModelError: a value or a gradient is off by more than LIMIT of its norm, not finite, or not always the same.
    """
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    length = min(config.sequence_length, TOKENS)
    if "M" in config.pattern:
        heads, groups = config.mamba_num_heads // tensor_parallel, config.mamba_num_groups // tensor_parallel
        head_dim, state = config.mamba_head_dim, config.mamba_state_dim
        inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
        ends = torch.rand(2, length, generator=draw, device=device) < 4 / length
        seq_idx = ends.cumsum(1).int() if documents else None
        step = torch.exp(torch.rand(heads, generator=draw, device=device) * math.log(100) + math.log(0.001))
        inputs = {
            "projected": normal(2, length, inner + channels + heads).bfloat16(),
            "conv_weight": normal(channels, config.conv_kernel).bfloat16() / 2,
            "conv_bias": normal(channels).bfloat16() / 10,
            "dt_bias": step + torch.log(-torch.expm1(-step)),       # softplus of it is the step, as at initialisation
            "A_log": torch.log(1 + 15 * torch.rand(heads, generator=draw, device=device)),
            "D": 1 + normal(heads) / 10,
            "norm_weight": (1 + normal(inner) / 10).bfloat16(),
        }

        def mix(projected: Tensor, *weights: Tensor) -> Tensor:
            return mixer.mix(projected, mixer.MixerWeights(*weights), groups, state, config.chunk_size,
                             config.norm_epsilon, seq_idx)

        sizes = f"{heads} Mamba heads of {head_dim} in {groups} groups, state {state}"
        _compare("the Mamba-2 mixer", sizes, mix, inputs)
    if "*" in config.pattern and config.position_embedding == "rope":
        heads, head_dim = config.num_attention_heads // tensor_parallel, config.head_dim
        engine = transformer_config(config, Precision("bf16"), ONE_COPY)
        embedding = RotaryEmbedding(head_dim, 1.0, rotary_base=config.rope_theta, use_cpu_initialization=True)
        frequencies = config.rope_theta ** (-torch.arange(0, head_dim, 2, device=device).double() / head_dim)
        angles = torch.arange(length, device=device).double()[:, None] * frequencies

        def turn(queries: Tensor) -> Tensor:            # (sequence, batch, heads, head_dim)
            if queries.dtype == torch.float64:
                return rotate(queries.transpose(0, 2), torch.stack([angles.cos(), angles.sin()])).transpose(0, 2)
            return apply_rotary_pos_emb(queries, embedding(length), engine)

        _compare("rotary positions", f"{heads} heads of {head_dim}", turn,
                 {"queries": normal(length, 2, heads, head_dim).bfloat16()})
    labels = torch.randint(config.vocab_size, (ROWS,), generator=draw, device=device)
    logits = {"logits": normal(ROWS, config.vocab_size).bfloat16()}
    # A copy, because a kernel may write the gradient where the logits lie.
    _compare("the loss", f"a vocabulary of {config.vocab_size}",
             lambda logits: cross_entropy.cross_entropy(logits * 1, labels), logits)
    teacher = normal(ROWS, config.vocab_size).bfloat16()
    _compare("the loss of a distillation", f"a vocabulary of {config.vocab_size}",
             lambda student: forward_kl.forward_kl(student, teacher.to(student.dtype)), logits)


def _compare(what: str, sizes: str, operation: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> None:
    """`operation` on the inputs as they are, against the same on float64, which no kernel takes, and against itself."""
    def run(convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [convert(tensor.detach()).requires_grad_() for tensor in inputs.values()]
        value = operation(*leaves)
        towards = torch.linspace(-1, 1, value.numel(), device=value.device, dtype=torch.float64).view_as(value).cos()
        return [value.detach(), *torch.autograd.grad(value, leaves, towards.to(value.dtype))]

    names = ["values", *(f"gradient of {name}" for name in inputs)]
    ours = run(torch.Tensor.clone)
    for name, found, right in zip(names, ours, run(torch.Tensor.double), strict=True):
        error = float((found.double() - right).norm() / right.norm())
        if not error <= LIMIT:
            raise _wrong(f"{what} on this device: {name} off by {error:.2g} of the norm at {sizes}.")
    for time in range(2, TIMES + 1):
        for name, found, again in zip(names, ours, run(torch.Tensor.clone), strict=True):
            if not torch.equal(found, again):
                raise _wrong(f"{what} on this device: {name} not the same in run {time} of {TIMES}, at {sizes}.")


def _wrong(fault: str) -> ModelError:
    return ModelError(f"{fault}\nA model trained so would be wrong without a word: choose other sizes and report these "
                      "(pretrain.check_kernels: false trains all the same).")
