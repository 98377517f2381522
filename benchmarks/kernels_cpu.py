"""The CPU kernels beside what they replace, at the default profile's shapes: milliseconds, forward and backward.

    OMP_NUM_THREADS=1 python -m benchmarks.kernels_cpu [--repeats 20]

One row an operation: ours, the other, their ratio, and how far the two results differ in norm. The two take turns in
each repeat; the time is processor time in the fastest repeat, so that other programs count least.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.fp8_quantize import quantize
from kernels.gated_norm import gated_rms_norm
from kernels.ssd import chunk_scan

BATCH, LENGTH, HEADS, HEAD_DIM, GROUPS, STATE_DIM, CHUNK, FFN = 8, 256, 8, 32, 2, 32, 32, 384
INNER = HEADS * HEAD_DIM
CHANNELS = INNER + 2 * GROUPS * STATE_DIM
TRANSFORMERS_CHUNK = 128         # NemotronHConfig's default
EPSILON = 1e-5

Operation = Callable[..., Tensor]


class Comparison(NamedTuple):
    """Two ways to compute one thing; `inputs` are differentiated unless `backward` is False."""

    name: str
    other_name: str
    ours: Operation
    other: Operation
    inputs: tuple[Tensor, ...]
    backward: bool = True


def comparisons(dtype: torch.dtype) -> list[Comparison]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sequence = (BATCH, LENGTH)
    A = -torch.empty(HEADS).uniform_(1, 16, generator=generator)
    scan_inputs = (normal(*sequence, HEADS, HEAD_DIM).to(dtype), normal(*sequence, HEADS).to(dtype), A,
                   normal(*sequence, GROUPS, STATE_DIM).to(dtype), normal(*sequence, GROUPS, STATE_DIM).to(dtype),
                   normal(HEADS), normal(HEADS) - 4)
    conv = (normal(*sequence, CHANNELS).to(dtype), normal(CHANNELS, 4).to(dtype), normal(CHANNELS).to(dtype))
    norm = (normal(*sequence, INNER).to(dtype), normal(*sequence, INNER).to(dtype), normal(INNER).to(dtype))
    return [
        Comparison("SSD scan", f"transformers, chunk {TRANSFORMERS_CHUNK}", scan,
                   partial(transformers_scan, chunk=TRANSFORMERS_CHUNK), scan_inputs),
        Comparison("SSD scan", f"transformers, chunk {CHUNK}", scan, partial(transformers_scan, chunk=CHUNK),
                   scan_inputs),
        Comparison("convolution + SiLU", "F.conv1d", lambda *values: causal_conv1d(*values)[0], conv1d, conv),
        Comparison("gated norm", "PyTorch operations", partial(gated_rms_norm, groups=GROUPS, epsilon=EPSILON),
                   plain_gated_norm, norm),
        Comparison("FP8 rounding, E4M3", "float8_e4m3fn conversion", lambda x: quantize(x, "e4m3")[0],
                   lambda x: converted(x, torch.float8_e4m3fn), (normal(BATCH * LENGTH, FFN).to(dtype),), False),
        Comparison("FP8 rounding, E5M2", "float8_e5m2 conversion", lambda x: quantize(x, "e5m2")[0],
                   lambda x: converted(x, torch.float8_e5m2), (normal(BATCH * LENGTH, FFN).to(dtype),), False),
    ]


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


def plain_gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """As transformers' `Zamba2RMSNormGated` has it."""
    gated = (x.float() * F.silu(gate.float())).unflatten(-1, (GROUPS, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + EPSILON)
    return (weight * normed.flatten(-2)).to(x.dtype)


def converted(x: Tensor, float8: torch.dtype) -> Tensor:
    """Scaled to the format's range and through PyTorch's conversion, as bfloat16."""
    scale = torch.finfo(float8).max / x.abs().amax().float()
    return (x.float() * scale).to(float8).to(torch.bfloat16)


def milliseconds(operation: Operation, inputs: tuple[Tensor, ...], dy: Tensor | None) -> float:
    """Processor time of one call, with its backward pass where `dy` is given."""
    leaves = [tensor.detach().requires_grad_(dy is not None) for tensor in inputs]
    started = time.process_time()
    y = operation(*leaves)
    if dy is not None:
        y.backward(dy)
    return 1e3 * (time.process_time() - started)


def compare(case: Comparison, repeats: int) -> tuple[float, float, float]:
    """Milliseconds of ours and of the other, and the relative difference of their results."""
    with torch.no_grad():
        ours, other = case.ours(*case.inputs).float(), case.other(*case.inputs).float()
    dy = torch.randn_like(ours).to(case.inputs[0].dtype) if case.backward else None
    times = [[milliseconds(operation, case.inputs, dy) for operation in (case.ours, case.other)]
             for _ in range(repeats + 1)][1:]                           # the first warms up
    fastest = [min(column) for column in zip(*times, strict=True)]
    return fastest[0], fastest[1], ((ours - other).norm() / other.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"batch {BATCH} x {LENGTH} tokens, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{'operation':22} {'dtype':9} {'ours ms':>8} {'other ms':>9} {'ratio':>6} {'differ':>8}  other")
    for dtype in (torch.float32, torch.bfloat16):
        for case in comparisons(dtype):
            ours, other, difference = compare(case, options.repeats)
            print(f"{case.name:22} {str(dtype).removeprefix('torch.'):9} {ours:8.2f} {other:9.2f} {other / ours:5.1f}x "
                  f"{difference:8.1e}  {case.other_name}", flush=True)


if __name__ == "__main__":
    main()
