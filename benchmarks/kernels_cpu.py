"""The CPU kernels beside what they replace: milliseconds, forward and backward.

    OMP_NUM_THREADS=1 python -m benchmarks.kernels_cpu [--shapes default | wide] [--repeats 20]

One row an operation: ours, the other, their ratio, its quartiles over the repeats, and how far the two results differ
in norm. Shapes are those of the default profile, or wider and longer ones. The two take turns in each repeat; the time
is processor time in the fastest repeat, so that other programs count least.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.fp8_quantize import quantize
from kernels.gated_norm import gated_rms_norm
from kernels.ssd import chunk_scan
from model.config import ModelConfig
from model.hybrid_lm import FLOAT32_PARAMETERS, Mamba2

CHUNK = 32
TRANSFORMERS_CHUNK = 128         # NemotronHConfig's default
EPSILON = 1e-5

Operation = Callable[..., Tensor]


class Shapes(NamedTuple):
    batch: int
    length: int
    hidden: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    ffn: int


SHAPES = {"default": Shapes(8, 256, 128, 8, 32, 2, 32, 384), "wide": Shapes(8, 512, 256, 8, 64, 1, 64, 768)}


class Comparison(NamedTuple):
    """Two ways to compute one thing; `inputs` are differentiated unless `backward` is False."""

    name: str
    other_name: str
    ours: Operation
    other: Operation
    inputs: tuple[Tensor, ...]
    backward: bool = True


def comparisons(dtype: torch.dtype, shapes: Shapes) -> list[Comparison]:
    batch, length, hidden, heads, head_dim, groups, state_dim, ffn = shapes
    inner = heads * head_dim
    channels = inner + 2 * groups * state_dim
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sequence = (batch, length)
    A = -torch.empty(heads).uniform_(1, 16, generator=generator)
    scan_inputs = (normal(*sequence, heads, head_dim).to(dtype), normal(*sequence, heads).to(dtype), A,
                   normal(*sequence, groups, state_dim).to(dtype), normal(*sequence, groups, state_dim).to(dtype),
                   normal(heads), normal(heads) - 4)
    conv = (normal(*sequence, channels).to(dtype), normal(channels, 4).to(dtype), normal(channels).to(dtype))
    norm = (normal(*sequence, inner).to(dtype), normal(*sequence, inner).to(dtype), normal(inner).to(dtype))
    return [
        Comparison("SSD scan", f"transformers, chunk {TRANSFORMERS_CHUNK}", scan,
                   partial(transformers_scan, chunk=TRANSFORMERS_CHUNK), scan_inputs),
        Comparison("SSD scan", f"transformers, chunk {CHUNK}", scan, partial(transformers_scan, chunk=CHUNK),
                   scan_inputs),
        *(mixers(dtype, shapes, chunk, normal(*sequence, hidden).to(dtype)) for chunk in (TRANSFORMERS_CHUNK, CHUNK)),
        Comparison("convolution + SiLU", "F.conv1d", causal_conv1d, conv1d, conv),
        Comparison("gated norm", "PyTorch operations", partial(gated_rms_norm, groups=groups, epsilon=EPSILON),
                   partial(plain_gated_norm, groups=groups), norm),
        Comparison("FP8 rounding, E4M3", "float8_e4m3fn conversion", lambda x: quantize(x, "e4m3")[0],
                   lambda x: converted(x, torch.float8_e4m3fn), (normal(batch * length, ffn).to(dtype),), False),
        Comparison("FP8 rounding, E5M2", "float8_e5m2 conversion", lambda x: quantize(x, "e5m2")[0],
                   lambda x: converted(x, torch.float8_e5m2), (normal(batch * length, ffn).to(dtype),), False),
    ]


def mixers(dtype: torch.dtype, shapes: Shapes, chunk: int, x: Tensor) -> Comparison:
    """The whole mixer, projections too, with the same weights; transformers' in chunks of `chunk`."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    config = ModelConfig(
        pattern="M", hidden_size=shapes.hidden, ffn_hidden_size=shapes.ffn, num_attention_heads=1, num_query_groups=1,
        head_dim=32, mamba_num_heads=shapes.heads, mamba_head_dim=shapes.head_dim, mamba_state_dim=shapes.state_dim,
        mamba_num_groups=shapes.groups, chunk_size=CHUNK, sequence_length=shapes.length, vocab_size=16,
    )
    torch.manual_seed(0)
    ours = Mamba2(config)
    options: dict[str, Any] = {
        "hybrid_override_pattern": "M", "hidden_size": shapes.hidden, "mamba_num_heads": shapes.heads,
        "mamba_head_dim": shapes.head_dim, "ssm_state_size": shapes.state_dim, "n_groups": shapes.groups,
        "chunk_size": chunk, "layer_norm_epsilon": EPSILON,
        "time_step_min": 1e-9,                  # no clamp of the step, as in Nemotron-H
    }
    theirs = NemotronHMamba2Mixer(NemotronHConfig(**options), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    for mixer in (ours, theirs):
        for name, parameter in mixer.named_parameters():
            if name not in FLOAT32_PARAMETERS:
                parameter.data = parameter.data.to(dtype)
    return Comparison("whole mixer", f"transformers, chunk {chunk}", ours, theirs, (x,))


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    return chunk_scan(x, dt, A, B, C, D, dt_bias, CHUNK)[0]


def transformers_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, chunk: int
) -> Tensor:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=chunk, D=D, dt_bias=dt_bias, dt_softplus=True).to(x.dtype)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As transformers' torch path has it."""
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def plain_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, groups: int) -> Tensor:
    """As transformers' `Zamba2RMSNormGated` has it."""
    gated = (x.float() * F.silu(gate.float())).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + EPSILON)
    return (weight * normed.flatten(-2)).to(x.dtype)


def converted(x: Tensor, fp8: torch.dtype) -> Tensor:
    """Scaled to the format's range and through PyTorch's conversion, as bfloat16."""
    scale = torch.finfo(fp8).max / x.abs().amax().float()
    return (x.float() * scale).to(fp8).to(torch.bfloat16)


def milliseconds(operation: Operation, inputs: tuple[Tensor, ...], dy: Tensor | None) -> float:
    """Processor time of one call, with its backward pass where `dy` is given."""
    leaves = [tensor.detach().requires_grad_(dy is not None) for tensor in inputs]
    started = time.process_time()
    y = operation(*leaves)
    if dy is not None:
        y.backward(dy)
    return 1e3 * (time.process_time() - started)


def compare(case: Comparison, repeats: int) -> tuple[list[float], list[float], float]:
    """Milliseconds of ours and of the other in each repeat, and the relative difference of their results."""
    with torch.no_grad():
        ours, other = case.ours(*case.inputs).float(), case.other(*case.inputs).float()
    dy = torch.randn_like(ours).to(case.inputs[0].dtype) if case.backward else None
    times = [[milliseconds(operation, case.inputs, dy) for operation in (case.ours, case.other)]
             for _ in range(repeats + 1)][1:]                           # the first warms up
    ours_times, other_times = map(list, zip(*times, strict=True))
    return ours_times, other_times, ((ours - other).norm() / other.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="default")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    shapes = SHAPES[options.shapes]
    print(f"{shapes}\ntorch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.get_num_threads()} thread(s)")
    print(f"{'operation':18} {'dtype':8} {'ours ms':>8} {'other ms':>9} {'ratio':>6} {'quartiles':>12} {'differ':>8}  "
          "other")
    for dtype in (torch.float32, torch.bfloat16):
        for case in comparisons(dtype, shapes):
            ours, other, difference = compare(case, options.repeats)
            ratios = sorted(theirs / mine for mine, theirs in zip(ours, other, strict=True))
            low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.75))
            print(f"{case.name:18} {str(dtype).removeprefix('torch.'):8} {min(ours):8.2f} {min(other):9.2f} "
                  f"{min(other) / min(ours):5.1f}x {f'{low:.1f}-{high:.1f}':>12} {difference:8.1e}  {case.other_name}",
                  flush=True)


if __name__ == "__main__":
    main()
