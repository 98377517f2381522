"""No kernel reads or writes an element outside the tensors it was given: Triton's interpreter, every address checked.

On a GPU such an access mostly meets a neighbour and goes unnoticed; sizes here fill no tile.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_device import DEVICE

# isort: split
from kernels.causal_conv1d import triton as causal_conv1d_triton
from kernels.cross_entropy import triton as cross_entropy_triton
from kernels.forward_kl import triton as forward_kl_triton
from kernels.gated_norm import triton as gated_norm_triton
from kernels.mixer import triton as mixer_triton
from kernels.squared_relu import triton as squared_relu_triton
from kernels.ssd import triton as ssd_triton
from kernels.state_update import triton as state_update_triton

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="checks the interpreter's addresses")


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of kernels that touched memory outside the tensors of their launch."""
    from triton.runtime import interpreter

    found: list[str] = []
    extents: list[tuple[int, int]] = []
    builder, executor = type(interpreter.interpreter_builder), interpreter.GridExecutor
    load, store, launch = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    def check(addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        touched = addresses[np.broadcast_to(np.asarray(mask), addresses.shape).astype(bool)]
        within = np.zeros(touched.shape, bool)
        for first, end in extents:
            within |= (touched >= first) & (touched + size <= end)
        if not within.all():
            frames = [frame for frame in traceback.extract_stack()
                      if "/kernels/" in frame.filename and frame.filename.endswith("/triton.py")]
            found.append(f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}")

    def checked_launch(self, arguments, options):
        arguments, options = launch(self, arguments, options)
        tensors = [getattr(value, "base", value) for value in [*arguments, *options.values()]]     # a descriptor's
        extents[:] = [extent(value) for value in tensors if isinstance(value, Tensor)]
        return arguments, options

    def checked_load(self, pointers, mask, *rest, **hints):
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        check(pointers.data, mask.data, size)
        return load(self, pointers, mask, *rest, **hints)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers.data, mask.data, value.data.dtype.itemsize)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(executor, "_init_args_hst", checked_launch)
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)      # the tensors were on the CPU already
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    return found


def extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of its first element and behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size() * bool(tensor.numel())


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def mixer(length: int, documents: Tensor | None) -> Tensor:
    heads, head_dim, groups, state = 4, 16, 2, 16
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    return mixer_triton.mix(
        normal(length, 2, inner + channels + heads).transpose(0, 1), normal(channels, 4), normal(channels),
        normal(heads), normal(heads), normal(heads), normal(inner), groups, state, 1e-5, documents,
    )[0]


def test_the_check_finds_an_element_too_many(outside):
    short = normal(10).detach()[:7]
    squared_relu_triton._forward_kernel[(1,)](short, short, 8, BLOCK=8, num_warps=1)
    assert len(outside) == 2 and "tl.load" in outside[0] and "tl.store" in outside[1]


@pytest.mark.parametrize("run", [
    lambda: mixer(16, None),
    lambda: mixer(37, torch.tensor([0] * 20 + [1] * 17, dtype=torch.int32).expand(2, -1).contiguous()),
    lambda: gated_norm_triton.normalise(normal(33, 24), normal(33, 24), normal(24), 2, 1e-5),
    lambda: gated_norm_triton.normalise(normal(5, 40), None, normal(40), 1, 1e-5),
    lambda: squared_relu_triton.activate(normal(33, 7)),
    lambda: cross_entropy_triton.losses(normal(9, 50) * 1, torch.arange(9))[0],
], ids=["mixer", "mixer-documents", "gated-norm", "norm", "squared-relu", "cross-entropy"])
def test_forward_and_backward(run: Callable[[], Tensor], outside: list[str]) -> None:
    y = run()
    y.backward(torch.ones_like(y))
    assert not outside


def test_without_gradients(outside):
    student, teacher = normal(9, 50).detach(), normal(9, 50).detach() + 1
    forward_kl_triton.divergences(student, teacher, torch.empty_like(student))
    state, x, dt = normal(2, 4, 8, 16).detach(), normal(2, 4, 8).detach(), normal(2, 4).detach()
    shared, one = normal(2, 2, 16).detach(), normal(4).detach()
    state_update_triton.advance_scan(state, x, dt, -one.exp(), shared, shared, one, one)
    state_update_triton.advance_conv(normal(2, 20, 4).detach(), normal(2, 20).detach(), normal(20, 4).detach(),
                                     normal(20).detach())
    assert not outside


# Sequences, tokens of each, and the strides of both, in elements.
FAR = {"sequences": (3, 17, (2**30 + 64, 256)), "tokens": (1, 37, (256, 2**26))}


def far_apart(strides: tuple[int, int], *shape: int) -> Tensor:
    """Rows over more than 2^31 elements. Nobody touches the memory between them, and so it takes none."""
    assert Tensor.numel(torch.empty(shape[2:], device="meta")) <= 256
    within = torch.empty(shape[2:], device="meta").stride()
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=False)) + 256
    assert span > 2**31
    return torch.empty(span, dtype=torch.float16).as_strided(shape, (*strides, *within))


@pytest.mark.parametrize(("batch", "length", "strides"), FAR.values(), ids=FAR)
def test_offsets_beyond_31_bits(batch, length, strides, outside, monkeypatch):
    """A sum in 32 bits would wrap around and point in front of the tensor, or elsewhere into it."""
    monkeypatch.setattr(ssd_triton, "CHUNK", 16)
    monkeypatch.setattr(ssd_triton, "SHARED_GRADIENTS", ssd_triton.SHARED_GRADIENTS._replace(size=16))
    single = {"dtype": torch.float32}
    x, dt, B, C, y, dy, dx, ddt, dB, dC = (
        far_apart(strides, batch, length, *shape) for shape in (
            (2, 16), (2,), (1, 16), (1, 16), (2, 16), (2, 16), (2, 16), (2,), (1, 16), (1, 16)))
    A, D = -torch.ones(2, **single), torch.ones(2, **single)
    for row, tensor in enumerate((x, dt, B, C, dy)):
        tensor[-1, -1] = row + 1                                        # the far end, where it counts
    _, step, decay, states = ssd_triton.run_forward(x, dt, A, B, C, D, D, None, None, y)
    ssd_triton.run_backward(dy, None, x, A, B, C, D, step, decay, states, None, dx, ddt, dB, dC)
    near = [tensor.contiguous() for tensor in (x, dt, B, C, dy)]
    near_y, *near_gradients = (tensor.clone().contiguous() for tensor in (y, dx, ddt, dB, dC))
    _, step, decay, states = ssd_triton.run_forward(near[0], near[1], A, near[2], near[3], D, D, None, None, near_y)
    gradients = [torch.empty_like(tensor) for tensor in near_gradients]
    ssd_triton.run_backward(near[4], None, near[0], A, near[2], near[3], D, step, decay, states, None, *gradients)
    assert all(torch.equal(a, b) for a, b in zip((y, dx, ddt, dB, dC), (near_y, *gradients), strict=True))
    assert y[-1, -1].abs().sum() > 0 and dx[-1, -1].abs().sum() > 0
    rows, out, weight = far_apart(strides, batch, length, 45), far_apart(strides, batch, length, 45), torch.ones(45, 4)
    causal_conv1d_triton.run_forward(rows, weight, weight[:, 0].contiguous(), None, None, out)
    causal_conv1d_triton.run_backward(out, rows, weight, weight[:, 0].contiguous(), None, None, out)
    token = far_apart(strides, batch, length, 2, 16)[:, -1], far_apart(strides, batch, length, 2)[:, -1]
    state_update_triton.advance_scan(torch.zeros(batch, 2, 16, 16), *token, A, C[:, -1], C[:, -1], D, D)
    assert not outside
