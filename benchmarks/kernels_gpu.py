"""Kernels on a GPU beside their peers, in one run: time, share of the floor, error against float64.

    python -m benchmarks.kernels_gpu [--only scan,state,...] [--host] [--out FILE.json]

Shapes are Nemotron-H-8B's. Peers are measured where they are installed: mamba_ssm (scan, gated norm, the whole mixer
after in_proj, state update) and causal-conv1d; torch.compile and PyTorch's own operations always. Times are medians of
a CUDA graph's replays, everyone's: launched from Python, some of these wait for it more than for the GPU. A floor is
the larger of bytes over the bandwidth of a copy and operations over the rate of a BF16 matrix product, both measured
first. The second table is `benchmarks.kernels_gpu_streaming`'s. `--host` gives instead, of few tokens, the time of a
call from Python (eager) and within a graph: the difference is the host's, part of it PyTorch's own ("no kernel").
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from benchmarks import kernels_gpu_streaming as streaming
from benchmarks.gpu_timing import ceilings, eager_milliseconds, graph_milliseconds, parallel_compilation
from benchmarks.kernels_gpu_streaming import CHANNELS, GROUPS, HEAD_DIM, HEADS, IN_PROJ, INNER, STATE
from kernels.causal_conv1d import causal_conv1d
from kernels.gated_norm import gated_rms_norm
from kernels.mixer import MixerWeights, mix
from kernels.ssd import chunk_scan
from stages.frame.common import out_file

TAPS, HIDDEN = 4, 4096
EPSILON = 1e-5
DRAWS = 8
Inputs = list[Tensor]
Op = Callable[..., Tensor]


def projected(batch: int, length: int) -> Tensor:
    """What in_proj gives: the ops below read slices of it in place."""
    return torch.randn(batch, length, IN_PROJ, device="cuda", dtype=torch.bfloat16)


def scan_inputs(batch: int, length: int) -> Inputs:
    """x, dt, A, B, C, D, dt_bias as after the convolution; step sizes as at initialisation."""
    xBC = torch.randn(batch, length, CHANNELS, device="cuda", dtype=torch.bfloat16)
    x, B, C = xBC.split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
    dt = 0.5 * torch.randn(batch, length, HEADS, device="cuda", dtype=torch.bfloat16)
    step = torch.exp(torch.empty(HEADS, device="cuda").uniform_(-6.9, -2.3))
    A = -torch.empty(HEADS, device="cuda").uniform_(1, 16)
    bias = step + torch.log(-torch.expm1(-step))
    return [x.unflatten(-1, (HEADS, HEAD_DIM)), dt, A, B.unflatten(-1, (GROUPS, STATE)),
            C.unflatten(-1, (GROUPS, STATE)), torch.ones(HEADS, device="cuda"), bias]


def our_scan(*inputs: Tensor) -> Tensor:
    return chunk_scan(*inputs, chunk_size=128)[0]


def exact_scan(*inputs: Tensor) -> Tensor:
    return chunk_scan(*inputs, chunk_size=64)[0]


def conv_inputs(batch: int, length: int) -> Inputs:
    x = projected(batch, length)[..., INNER : INNER + CHANNELS]
    return [x, torch.randn(CHANNELS, TAPS, device="cuda", dtype=torch.bfloat16),
            torch.randn(CHANNELS, device="cuda", dtype=torch.bfloat16)]


def our_conv(*inputs: Tensor) -> Tensor:
    return causal_conv1d(*inputs)


def exact_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (TAPS - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[2])).transpose(1, 2)


def norm_inputs(batch: int, length: int) -> Inputs:
    x = torch.randn(batch * length, INNER, device="cuda", dtype=torch.bfloat16)
    return [x, projected(1, batch * length)[0, :, :INNER], torch.randn(INNER, device="cuda", dtype=torch.bfloat16)]


def our_norm(*inputs: Tensor) -> Tensor:
    return gated_rms_norm(*inputs, GROUPS, EPSILON)


def exact_norm(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    gated = (x * F.silu(gate)).unflatten(-1, (GROUPS, -1))
    return (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + EPSILON)).flatten(-2) * weight


def mixer_inputs(batch: int, length: int) -> Inputs:
    """`projected`, the six parameters of `MixerWeights` in their order, and out_proj's weight."""
    _, _, A, _, _, D, dt_bias = scan_inputs(1, 1)
    half = [0.5 * torch.randn(CHANNELS, TAPS, device="cuda"), torch.randn(CHANNELS, device="cuda"),
            torch.randn(INNER, device="cuda"), 0.02 * torch.randn(HIDDEN, INNER, device="cuda")]
    conv_weight, conv_bias, norm_weight, out_weight = (tensor.bfloat16() for tensor in half)
    return [projected(batch, length), conv_weight, conv_bias, dt_bias, (-A).log(), D, norm_weight, out_weight]


def our_mixer(inputs: Tensor, *weights: Tensor, chunk: int = 128) -> Tensor:
    return F.linear(mix(inputs, MixerWeights(*weights[:6]), GROUPS, STATE, chunk, EPSILON), weights[6])


def exact_mixer(*inputs: Tensor) -> Tensor:
    return our_mixer(*inputs, chunk=64)


def peers() -> dict[str, dict[str, Op]]:
    """Op -> name of an installed peer -> the same op there."""
    found: dict[str, dict[str, Op]] = {"scan": {}, "conv": {}, "norm": {}, "mixer": {}}
    if find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

        for chunk in (128, 256):
            def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor,
                     chunk: int = chunk) -> Tensor:
                return mamba_chunk_scan_combined(x, dt, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True)

            def mixer(inputs: Tensor, conv_weight: Tensor, conv_bias: Tensor, dt_bias: Tensor, A_log: Tensor,
                      D: Tensor, norm_weight: Tensor, out_weight: Tensor, chunk: int = chunk) -> Tensor:
                return mamba_split_conv1d_scan_combined(
                    inputs, conv_weight, conv_bias, dt_bias, -torch.exp(A_log), D, chunk, rmsnorm_weight=norm_weight,
                    rmsnorm_eps=EPSILON, outproj_weight=out_weight, headdim=HEAD_DIM, ngroups=GROUPS,
                    norm_before_gate=False,
                )

            found["scan"][f"mamba_ssm, chunk {chunk}"] = scan
            if find_spec("causal_conv1d"):
                found["mixer"][f"mamba_ssm, chunk {chunk}"] = mixer
        found["norm"]["mamba_ssm"] = lambda x, gate, weight: rmsnorm_fn(
            x, weight, None, z=gate, eps=EPSILON, group_size=INNER // GROUPS, norm_before_gate=False
        )
    if find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        found["conv"]["causal-conv1d"] = lambda x, weight, bias: causal_conv1d_fn(
            x.transpose(1, 2), weight, bias, activation="silu"
        ).transpose(1, 2)
    return found


def floors(op: str, tokens: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(bytes, operations) of the forward, and of forward and backward."""
    work = 2 * (128 * (GROUPS * STATE + INNER) + 2 * INNER * STATE)
    if op == "scan":
        row = 2 * (2 * INNER + 2 * GROUPS * STATE + HEADS)
        return (tokens * row, tokens * work), (tokens * 5 * row // 2, tokens * 10 * work // 3)
    if op == "mixer":
        row, out_proj = 2 * (IN_PROJ + HIDDEN), 2 * INNER * HIDDEN
        return (tokens * row, tokens * (work + out_proj)), (3 * tokens * row, tokens * (10 * work // 3 + 3 * out_proj))
    width, forward, both = (CHANNELS, 4, 10) if op == "conv" else (INNER, 6, 16)
    return (tokens * width * forward, 0), (tokens * width * both, 0)


def errors(run: Op, exact: Op, make: Callable[[int, int], Inputs]) -> list[float]:
    """Root mean square over `DRAWS` draws of `_errors`: of a sum that cancels, such as A's gradient, one draw's says
    little."""
    squares = torch.zeros(())
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        squares = squares + torch.tensor(_errors(run, exact, make(1, 2048))).square()
    return [float(error) for error in (squares / DRAWS).sqrt()]


def _errors(run: Op, exact: Op, inputs: Inputs) -> list[float]:
    """Relative errors of y and of every input's gradient, in order, against `exact` in float64."""
    rounded = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    true = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y, expected = run(*rounded), exact(*true)
    dy = torch.randn_like(y)
    mine = [y, *torch.autograd.grad(y, rounded, dy)]
    theirs = [expected, *torch.autograd.grad(expected, true, dy.double())]
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, theirs, strict=True)]


def in_a_graph(run: Callable[[], Any]) -> float:
    return graph_milliseconds([run])


def times(run: Op, inputs: Inputs, measured: Callable[[Callable[[], Any]], float] = in_a_graph) -> tuple[float, float]:
    """Milliseconds of the forward, and of forward and backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    dy = torch.randn_like(run(*inputs))
    with torch.no_grad():
        forward = measured(lambda: run(*inputs))
    return forward, measured(lambda: torch.autograd.grad(run(*leaves), leaves, dy))


OPS: dict[str, tuple[Callable[[int, int], Inputs], Op, Op, list[tuple[int, int]]]] = {
    "scan": (scan_inputs, our_scan, exact_scan, [(1, 8192), (4, 8192), (1, 65536)]),
    "conv": (conv_inputs, our_conv, exact_conv, [(1, 8192), (4, 8192)]),
    "norm": (norm_inputs, our_norm, exact_norm, [(1, 8192), (4, 8192)]),
    "mixer": (mixer_inputs, our_mixer, exact_mixer, [(1, 8192), (4, 8192)]),
}


def measure(only: set[str], bandwidth: float, rate: float) -> list[dict[str, Any]]:
    """Rows of the ops asked for, printed as they come."""
    if only:
        print(f"{'op':5} {'shape':>8} {'kernel':22} {'fwd ms':>8} {'floor':>6} {'fwd+bwd':>8} {'floor':>6}  "
              "errors: y, gradients")
    rows: list[dict[str, Any]] = []
    for op, (make, ours, exact, shapes) in OPS.items():
        if op not in only:
            continue
        for batch, length in shapes:
            for name, run in {"ours": ours, **peers()[op]}.items():
                torch.manual_seed(0)
                try:
                    forward, both = times(run, make(batch, length))
                except RuntimeError as error:           # of a peer, say one that does not fit in memory
                    if name == "ours":
                        raise
                    print(f"{op:5} {batch:2}x{length:5} {name:22} failed: {str(error).splitlines()[0]}", flush=True)
                    continue
                found = errors(run, exact, make) if (batch, length) == shapes[0] else []
                shares = [max(size / bandwidth, work / rate) * 1e3 / ms
                          for (size, work), ms in zip(floors(op, batch * length), (forward, both), strict=True)]
                rows.append({"op": op, "batch": batch, "length": length, "kernel": name, "forward_ms": forward,
                             "forward_backward_ms": both, "floor_share": shares, "errors": found})
                print(f"{op:5} {batch:2}x{length:5} {name:22} {forward:8.3f} {shares[0]:6.2f} {both:8.3f} "
                      f"{shares[1]:6.2f}  " + " ".join(f"{error:.1e}" for error in found), flush=True)
    return rows


class _Nothing(torch.autograd.Function):
    """The norm without a kernel: what PyTorch itself takes of a differentiable call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def measure_host(only: set[str]) -> list[dict[str, Any]]:
    """Microseconds a call of 1 x 128 tokens, ours and the peers', from Python and in a graph."""
    print(f"{'op':5} {'kernel':22} {'eager fwd us':>13} {'fwd+bwd':>8} {'graph fwd us':>13} {'fwd+bwd':>8}")
    rows: list[dict[str, Any]] = []
    for op, (make, ours, *_) in OPS.items():
        if op not in only:
            continue
        nothing = {"no kernel": _Nothing.apply} if op == "norm" else {}
        for name, run in {"ours": ours, **peers()[op], **nothing}.items():
            inputs = make(1, 128)
            graph, eager = (times(run, inputs, measured) for measured in (in_a_graph, eager_milliseconds))
            rows.append({"op": op, "kernel": name, "eager_ms": eager, "graph_ms": graph})
            print(f"{op:5} {name:22} {eager[0] * 1e3:13.1f} {eager[1] * 1e3:8.1f} {graph[0] * 1e3:13.1f} "
                  f"{graph[1] * 1e3:8.1f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="write the figures as JSON")
    parser.add_argument("--host", action="store_true", help="of few tokens, what a call takes from Python")
    parser.add_argument("--only", default=",".join([*OPS, *streaming.OPS]), help="ops, by comma (default: %(default)s)")
    arguments = parser.parse_args()
    only = set(arguments.only.split(","))
    if unknown := only - {*OPS, *streaming.OPS}:
        parser.error(f"--only: no such op: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        raise SystemExit("No GPU was found.\nbenchmarks.kernels_cpu measures the same operations on a CPU.")
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{machine}, Python {platform.python_version()}")
    if arguments.host:
        with parallel_compilation():
            rows = measure_host(only)
        if arguments.out:
            arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        return
    bandwidth, rate = ceilings()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, BF16 matrix product {rate / 1e12:.0f} TFLOP/s\n")
    with parallel_compilation():
        rows = measure(only & set(OPS), bandwidth, rate)
        streamed = streaming.measure(only, bandwidth)
    if arguments.out:
        figures = {"machine": machine, "copy_bytes_per_second": bandwidth, "bf16_flops_per_second": rate,
                   "rows": rows, "streaming": streamed}
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
