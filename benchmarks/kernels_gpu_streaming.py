"""The second table of `benchmarks.kernels_gpu`: state update, decode attention, squared ReLU to FP8, cross-entropy.

Each of these is one pass or two over large tensors (a matrix product too, for the fused cross-entropy), so a row is one
time against one floor. State update and FP8 are timed within a CUDA graph, as a decoder and a captured step run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import extra_gib, graph_milliseconds, milliseconds
from kernels.cached_attention import token_attention
from kernels.cross_entropy import cross_entropy
from kernels.fp8_quantize import quantize
from kernels.squared_relu_fp8 import DTYPES, quantize_transpose, squared_relu_backward_quantize, squared_relu_quantize
from kernels.state_update import ssd_state_update

HEADS, HEAD_DIM, GROUPS, STATE = 128, 64, 8, 128
INNER, CHANNELS = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE
IN_PROJ = INNER + CHANNELS + HEADS
VOCAB, TOKENS = 131_072, 8192
QUERY_HEADS, KV_HEADS, ATTENTION_HEAD_DIM, CONTEXT = 32, 8, 128, 65_536


class Row(NamedTuple):
    op: str
    shape: str
    kernel: str
    milliseconds: float
    floor_share: float
    extra_gib: float | None
    errors: list[float]         # relative, against float64; for FP8 the share of values unlike quantize's


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def state_inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """state, x, dt, A, B, C, D, dt_bias; the tokens are slices of wider rows."""
    xBC = torch.randn(batch, CHANNELS, device="cuda", dtype=torch.bfloat16)
    x, B, C = xBC.split([INNER, GROUPS * STATE, GROUPS * STATE], -1)
    dt = torch.randn(batch, IN_PROJ, device="cuda", dtype=torch.bfloat16)[:, -HEADS:]
    A = -torch.empty(HEADS, device="cuda").uniform_(1, 16)
    state = torch.randn(batch, HEADS, HEAD_DIM, STATE, device="cuda").to(dtype)
    return (state, x.unflatten(-1, (HEADS, HEAD_DIM)), dt, A, B.unflatten(-1, (GROUPS, STATE)),
            C.unflatten(-1, (GROUPS, STATE)), torch.ones(HEADS, device="cuda"), torch.randn(HEADS, device="cuda") - 4)


def state_update_rows(bandwidth: float) -> Iterator[Row]:
    kernels: dict[str, Callable[..., Tensor]] = {"ours": ssd_state_update}
    if find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        def peer(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                 bias: Tensor) -> Tensor:
            wide = [t[..., None].expand(*t.shape, HEAD_DIM) for t in (dt, D, bias)]
            return selective_state_update(state, x, wide[0], A[:, None, None].expand(HEADS, HEAD_DIM, STATE), B, C,
                                          wide[1], dt_bias=wide[2], dt_softplus=True)

        kernels["mamba_ssm"] = peer
    for batch in (32, 256):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = state_inputs(batch, dtype)
            state, *token = inputs
            true = [tensor.double() for tensor in inputs]
            exact = [ssd_state_update(*true), true[0]]
            del true
            for name, run in kernels.items():
                states = [state.clone() for _ in range(3)]
                y = run(states[0], *token)
                errors = [relative_error(a, b) for a, b in zip((y, states[0]), exact, strict=True)]
                time = graph_milliseconds([lambda run=run, s=s, token=token: run(s, *token) for s in states])
                yield Row("state", f"{batch} {str(dtype)[6:]}", name, time, 2 * state.nbytes / bandwidth * 1e3 / time,
                          None, errors)


def token_attention_rows(bandwidth: float) -> Iterator[Row]:
    """One token over caches of 65,536, beside PyTorch's flash attention, which learns the length at its launch."""
    for batch in (1, 6, 48):
        q = torch.randn(batch, QUERY_HEADS, ATTENTION_HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        keys, values = (torch.randn(batch, KV_HEADS, CONTEXT, ATTENTION_HEAD_DIM, device="cuda", dtype=torch.bfloat16)
                        for _ in range(2))
        at = torch.full((batch,), CONTEXT - 1, device="cuda")
        grouped = q.unflatten(1, (KV_HEADS, -1))
        exact = F.scaled_dot_product_attention(*(tensor[:1].double() for tensor in (grouped, keys, values)))

        def ours(q: Any = q, keys: Any = keys, values: Any = values, at: Any = at) -> Tensor:
            return token_attention(q, keys, values, at)

        def flash(grouped: Any = grouped, keys: Any = keys, values: Any = values) -> Tensor:
            return F.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2)

        for name, run in (("ours", ours), ("torch flash", flash)):
            error = relative_error(run()[:1], exact.flatten(1, 2))
            time = graph_milliseconds([run])
            yield Row("attention", f"{batch}x{CONTEXT}", name, time, 2 * keys.nbytes / bandwidth * 1e3 / time, None,
                      [error])
        del q, keys, values, grouped, exact, ours, flash


def composed(values: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 values, their transpose and the inverse scale, of PyTorch's own operations."""
    largest = torch.finfo(DTYPES[format]).max
    scale = largest / values.abs().amax().float()
    rounded = (values.float() * scale).clamp(-largest, largest).to(DTYPES[format])
    return rounded, rounded.t().contiguous(), scale.reciprocal()


def fp8_rows(bandwidth: float) -> Iterator[Row]:
    """Forward, gradient and plain; the compiled peer is the composition."""
    ops: list[tuple[str, str, Callable[..., Any], Callable[..., Tensor], int]] = [
        ("relu2 fp8", "e4m3", lambda h, dy: squared_relu_quantize(h), lambda h, dy: F.relu(h).square(), 6),
        ("drelu2 fp8", "e5m2", lambda h, dy: squared_relu_backward_quantize(dy, h),
         lambda h, dy: (dy * F.relu(h)).mul_(2), 10),
        ("fp8", "e4m3", lambda h, dy: quantize_transpose(h, "e4m3"), lambda h, dy: h, 6),
    ]
    for channels in (21_504, 4096):
        pairs = [torch.randn(2, TOKENS, channels, device="cuda", dtype=torch.bfloat16).unbind() for _ in range(3)]
        for op, format, ours, activation, size in ops:
            expected, _inverse = quantize(activation(*pairs[0]), format)

            def steps(h: Tensor, dy: Tensor, activation: Any = activation, format: str = format) -> Any:
                return composed(activation(h, dy), format)

            for name, run in {"ours": ours, "torch.compile": torch.compile(steps, dynamic=False)}.items():
                values, transposed, _inverse = run(*pairs[0])
                wrong = max(float((result.bfloat16() != expected).double().mean())
                            for result in (values, transposed.t()))
                del values, transposed
                time = graph_milliseconds([lambda run=run, pair=pair: run(*pair) for pair in pairs])
                floor = size * TOKENS * channels / bandwidth * 1e3
                yield Row(op, f"{TOKENS}x{channels}", name, time, floor / time, None, [wrong])


def cross_entropy_rows(bandwidth: float) -> Iterator[Row]:
    """Of given logits, forward and backward; peak memory beyond the logits and, for PyTorch, their gradient."""
    logits = torch.randn(TOKENS, VOCAB, device="cuda", dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,), device="cuda")
    dlosses = torch.rand(TOKENS, device="cuda")
    few = 256
    exact = logits[:few].detach().double().requires_grad_()
    expected = F.cross_entropy(exact, labels[:few], reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected, exact, dlosses[:few].double())

    def reference(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    for name, run, kept in (("torch", reference, logits.nbytes),
                            ("torch.compile", torch.compile(reference, dynamic=False), logits.nbytes),
                            ("ours", cross_entropy, 0)):                                        # overwrites them
        leaf = logits[:few].detach().clone().requires_grad_()
        losses = run(leaf, labels[:few])
        errors = [relative_error(losses.detach(), expected.detach())]
        errors.append(relative_error(torch.autograd.grad(losses, leaf, dlosses[:few])[0], expected_gradient))

        def both(run: Any = run) -> Any:
            return torch.autograd.grad(run(logits, labels), logits, dlosses)

        time, extra = milliseconds(both), extra_gib(both, kept)
        yield Row("entropy", f"{TOKENS}x{VOCAB}", name, time, 3 * logits.nbytes / bandwidth * 1e3 / time, extra, errors)


OPS = {"state": state_update_rows, "attention": token_attention_rows, "fp8": fp8_rows, "entropy": cross_entropy_rows}


def measure(only: set[str], bandwidth: float) -> list[dict[str, Any]]:
    """Rows of the ops asked for, printed as they come."""
    rows: list[dict[str, Any]] = []
    for op, run in OPS.items():
        if op not in only:
            continue
        for row in run(bandwidth):
            if not rows:
                print(f"\n{'op':10} {'shape':>12} {'kernel':18} {'ms':>8} {'floor':>6} {'extra GiB':>9}  errors")
            extra = "" if row.extra_gib is None else f"{row.extra_gib:.2f}"
            print(f"{row.op:10} {row.shape:>12} {row.kernel:18} {row.milliseconds:8.3f} {row.floor_share:6.2f} "
                  f"{extra:>9}  " + " ".join(f"{error:.1e}" for error in row.errors), flush=True)
            rows.append(row._asdict())
        torch.cuda.empty_cache()
    return rows
