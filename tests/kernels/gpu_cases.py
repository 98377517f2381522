"""The cases in which a kernel once was wrong, against float64 or the same work done in smaller pieces.

    compute-sanitizer --tool memcheck python -m tests.kernels.gpu_cases

runs every kernel once at its smallest sizes; `test_cases_gpu` asks the cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d
from kernels.cross_entropy import cross_entropy
from kernels.forward_kl import forward_kl
from kernels.gated_norm import gated_rms_norm, rms_norm
from kernels.mixer import MixerWeights, mix
from kernels.ssd import chunk_scan
from kernels.state_update import conv_state_update, ssd_state_update

EPSILON = 1e-5
ARGUMENTS = ("x", "dt", "A", "B", "C", "D", "dt_bias")
NAMES = ("y", "final", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias")


class Case(NamedTuple):
    name: str
    run: Callable[[], dict[str, float] | str]       # errors by name, or how the arguments were refused
    gib: int = 2                                    # of the GPU's memory, at most


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype) if torch.Size(shape).numel() < 2**28 else (
        torch.empty(*shape, device="cuda", dtype=dtype).normal_())


def scan_inputs(batch: int, length: int, heads: int, groups: int, head_dim: int, state: int) -> list[Tensor]:
    """x, dt, A, B, C, D, dt_bias with step sizes as at initialisation."""
    step = torch.exp(torch.empty(heads, device="cuda").uniform_(-6.9, -2.3))
    return [normal(batch, length, heads, head_dim), 0.5 * normal(batch, length, heads),
            -torch.empty(heads, device="cuda").uniform_(1, 16), normal(batch, length, groups, state),
            normal(batch, length, groups, state), normal(heads, dtype=torch.float32),
            step + torch.log(-torch.expm1(-step))]


def error(ours: Tensor, theirs: Tensor) -> float:
    """Relative; absolute where the true value is nothing."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-3))


def differentiate(inputs: list[Tensor], dy: Tensor, seq_idx: Tensor | None = None) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y, final = chunk_scan(*leaves, chunk_size=64, seq_idx=seq_idx)
    return [y.detach(), final.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def against_float64(inputs: list[Tensor], seq_idx: Tensor | None = None) -> dict[str, float]:
    dy = torch.randn_like(inputs[0])
    mine = differentiate(inputs, dy, seq_idx)
    theirs = differentiate([tensor.double() for tensor in inputs], dy, seq_idx)
    return {name: error(a, b) for name, a, b in zip(NAMES, mine, theirs, strict=True)}


def geometry(heads: int, groups: int, head_dim: int, state: int, batch: int = 2, length: int = 1024) -> Case:
    name = f"scan {batch} x {length}, heads {heads}, groups {groups}, head_dim {head_dim}, state {state}"
    return Case(name, lambda: against_float64(scan_inputs(batch, length, heads, groups, head_dim, state)))


def scaled(dt: float, A: float, bias: float) -> dict[str, float]:
    inputs = scan_inputs(2, 1024, 16, 4, 64, 64)
    inputs[1], inputs[2], inputs[6] = inputs[1] * dt, inputs[2] * A, inputs[6] + bias
    return against_float64(inputs)


def strided(name: str) -> dict[str, float]:
    """One argument laid out anew: the same values must come out as from a contiguous one, to the bit."""
    inputs, seq_idx = scan_inputs(2, 300, 16, 4, 64, 64), None
    dy, lay = torch.randn_like(inputs[0]), lambda tensor: torch.stack([tensor, tensor + 1], -1)[..., 0]
    other = list(inputs)
    if name == "seq_idx":
        seq_idx = (torch.arange(300, device="cuda") // 70).int().expand(2, -1)
    else:
        at = ARGUMENTS.index(name)
        other[at] = lay(inputs[at])
    theirs = differentiate(inputs, dy, None if seq_idx is None else seq_idx.contiguous())
    return {key: error(a, b) for key, a, b in zip(NAMES, differentiate(other, dy, seq_idx), theirs, strict=True)}


def last_sequence(batch: int, length: int) -> dict[str, float]:
    inputs = scan_inputs(batch, length, 128, 8, 64, 128)
    dy = torch.randn_like(inputs[0])
    whole = differentiate(inputs, dy)
    alone = differentiate([t[-1:].contiguous() if t.dim() > 1 else t for t in inputs], dy[-1:])
    return {name: error(a[-1:], b) for name, a, b in zip(NAMES, whole, alone, strict=True) if a.dim() > 1}


def last_group(length: int) -> dict[str, float]:
    inputs = scan_inputs(1, length, 128, 8, 64, 128)
    dy = torch.randn_like(inputs[0])
    whole = differentiate(inputs, dy)
    cut = [t[:, :, -(16 if t.shape[2] == 128 else 1):].contiguous() if t.dim() > 1 else t[-16:] for t in inputs]
    alone = differentiate(cut, dy[:, :, -16:])
    return {name: error(a[:, -16:] if name == "final" else a[-16:] if a.dim() == 1 else a[:, :, -b.shape[2]:], b)
            for name, a, b in zip(NAMES, whole, alone, strict=True)}


def mixer_inputs(batch: int, length: int, heads: int, groups: int, head_dim: int, state: int) -> list[Tensor]:
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    step = torch.exp(torch.empty(heads, device="cuda").uniform_(-6.9, -2.3))
    return [normal(batch, length, inner + channels + heads), 0.5 * normal(channels, 4), normal(channels),
            step + torch.log(-torch.expm1(-step)), torch.empty(heads, device="cuda").uniform_(1, 16).log(),
            normal(heads, dtype=torch.float32), normal(inner)]


def differentiate_mixer(inputs: list[Tensor], dy: Tensor, groups: int, state: int) -> list[Tensor]:
    projected = inputs[0].detach().requires_grad_()
    y = mix(projected, MixerWeights(*inputs[1:]), groups, state, 64, EPSILON)
    return [y.detach(), *torch.autograd.grad(y, [projected], dy.to(y.dtype))]


def mixer_last_sequence(batch: int, length: int) -> dict[str, float]:
    inputs = mixer_inputs(batch, length, 128, 8, 64, 128)
    dy = normal(batch, length, 8192)
    whole = differentiate_mixer(inputs, dy, 8, 128)
    alone = differentiate_mixer([inputs[0][-1:].contiguous(), *inputs[1:]], dy[-1:], 8, 128)
    return {name: error(a[-1:], b) for name, a, b in zip(("y", "dprojected"), whole, alone, strict=True)}


def mixer_last_group(length: int) -> dict[str, float]:
    inputs = mixer_inputs(1, length, 128, 8, 64, 128)
    dy = normal(1, length, 8192)
    whole = differentiate_mixer(inputs, dy, 8, 128)
    gate, x, B, C, dt = torch.arange(18560, device="cuda").split([8192, 8192, 1024, 1024, 128])
    columns = torch.cat([gate[-1024:], x[-1024:], B[-128:], C[-128:], dt[-16:]])
    channels = torch.cat([x[-1024:], B[-128:], C[-128:]]) - 8192
    cut = [inputs[0][..., columns], inputs[1][channels], inputs[2][channels], *(t[-16:] for t in inputs[3:6]),
           inputs[6][-1024:]]
    alone = differentiate_mixer(cut, dy[..., -1024:], 1, 128)
    mine = [whole[0][..., -1024:], whole[1][..., columns]]
    return {name: error(a, b) for name, a, b in zip(("y", "dprojected"), mine, alone, strict=True)}


def mixer_end(length: int, kept: int) -> dict[str, float]:
    """The last of the tokens beside those alone: what came long before has decayed."""
    inputs, dy = mixer_inputs(1, length, 1, 1, 16, 16), normal(1, length, 16)
    whole = differentiate_mixer(inputs, dy, 1, 16)
    alone = differentiate_mixer([inputs[0][:, -kept:].contiguous(), *inputs[1:]], dy[:, -kept:], 1, 16)
    return {name: error(a[:, -kept // 2 :], b[:, -kept // 2 :])
            for name, a, b in zip(("y", "dprojected"), whole, alone, strict=True)}


def refused(run: Callable[[], object]) -> str:
    """What became of arguments that no kernel can take."""
    try:
        run()
        torch.cuda.synchronize()
    except ValueError as reason:
        return "refused: " + str(reason).replace("\n", " ")
    except Exception as reason:
        return f"WRONG {type(reason).__name__}: {str(reason)[:80]!r}"
    return "WRONG: accepted"


def cross_entropy_ignores() -> dict[str, float]:
    logits, labels = normal(64, 1000), torch.randint(1000, (64,), device="cuda")
    labels[::3] = -100
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours = cross_entropy(leaf * 1, labels)
    theirs = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    dy = torch.randn_like(ours)
    mine, true = torch.autograd.grad(ours, leaf, dy)[0], torch.autograd.grad(theirs, exact, dy.double())[0]
    return {"losses": error(ours, theirs), "dlogits": error(mine, true)}


def many_sequences(batch: int) -> dict[str, float]:
    """More sequences than a grid's second and third axes have room for."""
    mixer, dy = mixer_inputs(batch, 3, 2, 1, 16, 16), normal(1, 3, 32)
    whole = differentiate_mixer(mixer, dy.expand(batch, -1, -1), 1, 16)
    alone = differentiate_mixer([mixer[0][-1:].contiguous(), *mixer[1:]], dy, 1, 16)
    token = [normal(batch, 2, 16), normal(batch, 2), -torch.ones(2, device="cuda"), normal(batch, 1, 16),
             normal(batch, 1, 16), torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")]
    state = normal(batch, 2, 16, 16)
    last = state[-1:].clone()
    y = ssd_state_update(state, *token)
    y_last = ssd_state_update(last, *(t[-1:] if t.shape[0] == batch else t for t in token))
    return {"y": error(whole[0][-1:], alone[0]), "dprojected": error(whole[1][-1:], alone[1]),
            "token y": error(y[-1:], y_last), "state": error(state[-1:], last)}


def cases() -> Iterator[Case]:
    for heads, groups in ((16, 4), (16, 2), (32, 4), (8, 8)):
        for state in (64, 128):
            yield geometry(heads, groups, 32, state)
    for sizes in ((16, 4, 32, 32), (8, 8, 16, 16), (8, 8, 16, 64), (8, 2, 16, 128), (8, 2, 64, 16), (8, 8, 64, 32),
                  (16, 4, 64, 64), (4, 2, 64, 256), (32, 1, 64, 256), (1, 1, 64, 128), (4, 2, 32, 256),
                  (4, 2, 128, 64), (4, 2, 128, 128), (4, 4, 128, 128), (4, 2, 128, 256), (4, 2, 256, 64),
                  (4, 2, 256, 128), (4, 2, 256, 16)):
        yield geometry(*sizes)
    yield geometry(2, 1, 16, 256, 2, 300)
    yield geometry(2, 1, 16, 256, 2, 1)
    yield geometry(256 // 8, 1, 64, 256, 1, 4096)           # the 56B model's share at a tensor-parallel size of 8
    yield Case("dt x 30, A x 16", lambda: scaled(30, 16, 0))
    yield Case("dt_bias about -14", lambda: scaled(1, 1, -10))
    for name in (*ARGUMENTS, "seq_idx"):
        yield Case(f"scan, strided {name}", lambda name=name: strided(name))
    yield Case("cross-entropy, labels of -100", cross_entropy_ignores)
    yield Case("batch 65,537", lambda: many_sequences(65_537), 8)
    yield Case("scan 8 x 32,768, last sequence", lambda: last_sequence(8, 32_768), 64)
    yield Case("scan 1 x 262,144, last group", lambda: last_group(262_144), 64)
    yield Case("mix 16 x 8,192, last sequence", lambda: mixer_last_sequence(16, 8192), 48)
    yield Case("mix 1 x 131,072, last group", lambda: mixer_last_group(131_072), 48)
    yield Case("mix 1 x 8,400,000, last 32,768", lambda: mixer_end(8_400_000, 65_536), 16)
    yield Case("scan, 5 heads in 2 groups", lambda: refused(lambda: chunk_scan(
        *scan_inputs(1, 64, 5, 2, 64, 64), chunk_size=64)))
    yield Case("norm, 100 channels in 3 groups", lambda: refused(lambda: gated_rms_norm(
        normal(8, 100), normal(8, 100), normal(100), 3, EPSILON)))
    yield Case("scan, B of another dtype", lambda: refused(lambda: chunk_scan(
        *(t.float() if k == 3 else t for k, t in enumerate(scan_inputs(1, 64, 4, 2, 64, 64))), chunk_size=64)))


def run_smallest() -> None:
    """Every kernel once, at sizes that fill no tile; the norms' gradients also where a program takes three tiles."""
    for sizes in ((2, 1, 16, 256), (4, 2, 32, 64), (2, 2, 32, 64), (1, 1, 64, 128), (2, 1, 64, 256), (2, 1, 128, 128)):
        inputs = scan_inputs(1, 150, *sizes)
        differentiate(inputs, torch.randn_like(inputs[0]))
    inputs = mixer_inputs(2, 37, 4, 2, 64, 64)
    documents = torch.tensor([0] * 20 + [1] * 17, dtype=torch.int32, device="cuda").expand(2, -1)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    mix(leaves[0], MixerWeights(*leaves[1:]), 2, 64, 64, EPSILON, documents).sum().backward()
    convolved = [tensor.requires_grad_() for tensor in (normal(2, 9, 45), normal(45, 4), normal(45), normal(2, 3, 45))]
    causal_conv1d(*convolved).sum().backward()
    for rows in (5, 20_000):
        x, weight = normal(rows, 40).requires_grad_(), normal(40).requires_grad_()
        rms_norm(x, weight, EPSILON).sum().backward()
        gated_rms_norm(x, normal(rows, 40).requires_grad_(), weight, 2, EPSILON).sum().backward()
    logits = normal(9, 50).requires_grad_()
    labels = torch.arange(9, device="cuda")
    cross_entropy(logits * 1, labels.masked_fill(labels == 0, -100)).sum().backward()
    forward_kl(normal(9, 50).requires_grad_(), normal(9, 50)).backward()
    ssd_state_update(normal(3, 2, 12, 20), normal(3, 2, 12), normal(3, 2), -torch.ones(2, device="cuda"),
                     normal(3, 1, 20), normal(3, 1, 20), torch.ones(2, device="cuda"), torch.ones(2, device="cuda"))
    conv_state_update(normal(3, 3, 45), normal(3, 45), normal(45, 4), normal(45))
    torch.cuda.synchronize()


if __name__ == "__main__":
    run_smallest()
