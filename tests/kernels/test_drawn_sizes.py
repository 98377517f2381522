"""Whatever sizes, strides, documents and states an operation accepts: values and every gradient are float64's.

Under Triton's interpreter a few draws of small sizes; on a GPU many, of the kernels as they are launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_device import DEVICE, PRECISIONS

# isort: split
from kernels.causal_conv1d import causal_conv1d
from kernels.causal_conv1d import triton as causal_conv1d_triton
from kernels.cross_entropy import cross_entropy
from kernels.gated_norm import gated_rms_norm
from kernels.gated_norm import triton as gated_norm_triton
from kernels.mixer import MixerWeights, mix
from kernels.mixer import triton as mixer_triton
from kernels.ssd import chunk_scan
from kernels.ssd import triton as ssd_triton
from kernels.state_update import ssd_state_update
from kernels.state_update import triton as state_update_triton

ON_GPU = DEVICE == "cuda"
GPU_MARKS = [pytest.mark.gpu] if ON_GPU else []
pytestmark = [*GPU_MARKS, pytest.mark.timeout(600)]
SIZES = [16, 32, 64, 128, 256] if ON_GPU else [16, 32]
LONGEST = 700 if ON_GPU else 40
REPEATS = 20 if ON_GPU else 0
DTYPE, TOLERANCE = PRECISIONS[0][0], 1e-2 if ON_GPU else 2e-4
LAYOUTS = ("contiguous", "gaps", "part", "transposed", "expanded")
Result = tuple[Tensor, ...]


def drawn(gpu_examples: int, examples: int) -> Callable:
    """No shrinking: sizes are small, and the interpreter takes minutes for it."""
    return settings(max_examples=gpu_examples if ON_GPU else examples, deadline=None, derandomize=True,
                    phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles that a short sequence fills several of, where the interpreter runs."""
    if ON_GPU:
        yield
        return
    with patch.multiple(
        ssd_triton, CHUNK=16, LEAST_WIDTH=16,
        SHARED_GRADIENTS=ssd_triton.SHARED_GRADIENTS._replace(size=16),
        STATE_WALK=ssd_triton.STATE_WALK._replace(size=16), GRADIENT_WALK=ssd_triton.GRADIENT_WALK._replace(size=16),
    ), patch.multiple(
        causal_conv1d_triton, FORWARD=causal_conv1d_triton.FORWARD._replace(channels=64, tokens=16),
        BACKWARD=causal_conv1d_triton.BACKWARD._replace(channels=64, tokens=16),
    ):
        yield


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place; "expanded" repeats the first row."""
    if layout == "gaps":
        return torch.stack([tensor, tensor * 2], -1)[..., 0]
    if layout == "part":
        return torch.cat([tensor, tensor * 2], -1)[..., : tensor.shape[-1]]
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def compare(
    ours: Callable[..., Result], exact: Callable[..., Result], inputs: list[Tensor], layouts: list[str], dy_layout: str,
    convert_exact: Callable[[Tensor], Tensor] = Tensor.double,
) -> None:
    """Values and gradients of every input, each laid out as drawn, against those in float64; on a GPU also the same
    bits each time: what threads that race get wrong is rare, and may be within the tolerance."""

    def results(run: Callable[..., Result], convert: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        leaves = [lay_out(convert(tensor).detach(), layout).requires_grad_()
                  for tensor, layout in zip(inputs, layouts, strict=True)]
        values = run(*leaves)
        generator = torch.Generator().manual_seed(1)
        gradients = [
            lay_out(torch.randn(value.shape, generator=generator).to(DTYPE).to(value), dy_layout) for value in values
        ]
        return [*values, *torch.autograd.grad(values, leaves, gradients, allow_unused=True)]

    found = results(ours, lambda tensor: tensor.to(DEVICE))
    for _ in range(REPEATS):
        for k, (mine, again) in enumerate(zip(found, results(ours, lambda tensor: tensor.to(DEVICE)), strict=True)):
            assert mine is again or torch.equal(mine, again), k
    for k, (mine, true) in enumerate(zip(found, results(exact, convert_exact), strict=True)):
        assert (mine is None) == (true is None)
        if mine is not None:
            mine, true = (tensor.detach().double().cpu() for tensor in (mine, true))
            error = ((mine - true).norm() / true.norm().clamp_min(1e-2)).item()
            assert error < TOLERANCE, (k, error)


@st.composite
def documents(draw: st.DrawFn, batch: int, length: int) -> Tensor | None:
    """None, or each token's document; in the layouts in which callers hold them."""
    if draw(st.booleans()):
        return None
    rows = [torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length))).int().cumsum(0).int()
            for _ in range(batch)]
    seq_idx = torch.stack(rows)
    layout = draw(st.sampled_from(LAYOUTS))
    return lay_out(seq_idx, layout).to(DEVICE) if layout != "expanded" else seq_idx[:1].to(DEVICE).expand(batch, -1)


def layouts(count: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(LAYOUTS), min_size=count, max_size=count)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(*shape, generator=generator).to(dtype)


@drawn(60, 4)
@given(st.data())
def test_scan(data: st.DataObject) -> None:
    batch, groups, ratio = (data.draw(st.integers(1, most), name) for name, most in
                            (("batch", 2), ("groups", 3), ("heads of a group", 3)))
    length = data.draw(st.integers(1, LONGEST), "length")
    head_dim, state_dim = data.draw(st.sampled_from(SIZES), "head_dim"), data.draw(st.sampled_from(SIZES), "state_dim")
    heads, seq_idx, laid_out = groups * ratio, data.draw(documents(batch, length)), data.draw(layouts(8))
    has_initial, dy_layout = data.draw(st.booleans(), "initial state"), data.draw(st.sampled_from(LAYOUTS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    single = {"dtype": torch.float32}
    inputs = [
        normal(generator, batch, length, heads, head_dim), normal(generator, batch, length, heads) - 1,
        -1 - 8 * torch.rand(heads, generator=generator), normal(generator, batch, length, groups, state_dim),
        normal(generator, batch, length, groups, state_dim), normal(generator, heads, **single),
        normal(generator, heads, **single) - 1, normal(generator, batch, heads, head_dim, state_dim, **single),
    ]

    def ours(*tensors: Tensor) -> Result:
        initial = tensors[7] if has_initial else None
        if ON_GPU:
            return chunk_scan(*tensors[:7], 64, initial, seq_idx)
        y, final, *_ = ssd_triton.scan(*ssd_triton.prepared(*tensors[:7], initial, seq_idx))
        return y, final.transpose(2, 3)

    def exact(*tensors: Tensor) -> Result:
        before = None if seq_idx is None else seq_idx.cpu()
        return chunk_scan(*tensors[:7], 16, tensors[7] if has_initial else None, before)

    with small_tiles():
        compare(ours, exact, inputs, laid_out, dy_layout)


@drawn(60, 4)
@given(st.data())
def test_convolution(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 3), "batch")
    channels = data.draw(st.integers(1, 300 if ON_GPU else 70), "channels")
    length, has_first = data.draw(st.integers(1, LONGEST), "length"), data.draw(st.booleans(), "initial state")
    seq_idx, laid_out = data.draw(documents(batch, length)), data.draw(layouts(4))
    dy_layout, generator = data.draw(st.sampled_from(LAYOUTS)), torch.Generator().manual_seed(2)
    inputs = [normal(generator, *shape) for shape in (
        (batch, length, channels), (channels, 4), (channels,), (batch, 3, channels))]

    def ours(*tensors: Tensor) -> Result:
        first = tensors[3] if has_first else None
        if ON_GPU:
            return (causal_conv1d(*tensors[:3], first, seq_idx),)
        return (causal_conv1d_triton.convolve(*causal_conv1d_triton.prepared(*tensors[:3], first, seq_idx)),)

    def exact(*tensors: Tensor) -> Result:
        before = None if seq_idx is None else seq_idx.cpu()
        return (causal_conv1d(*tensors[:3], tensors[3] if has_first else None, before),)

    with small_tiles():
        compare(ours, exact, inputs, laid_out, dy_layout)


@drawn(60, 5)
@given(st.data())
def test_gated_norm(data: st.DataObject) -> None:
    rows, groups, size = (data.draw(st.integers(1, most)) for most in (50, 7, 70))
    laid_out, dy_layout = data.draw(layouts(3)), data.draw(st.sampled_from(LAYOUTS))
    generator = torch.Generator().manual_seed(3)
    inputs = [normal(generator, *shape) for shape in ((rows, groups * size), (rows, groups * size), (groups * size,))]

    def ours(*tensors: Tensor) -> Result:
        if ON_GPU:
            return (gated_rms_norm(*tensors, groups, 1e-5),)
        return (gated_norm_triton.normalise(*gated_norm_triton.prepared(*tensors), groups, 1e-5),)

    compare(ours, lambda *tensors: (gated_rms_norm(*tensors, groups, 1e-5),), inputs, laid_out, dy_layout)


@drawn(40, 8)
@given(st.data())
def test_state_update(data: st.DataObject) -> None:
    batch, groups, ratio, head_dim, state_dim = (data.draw(st.integers(1, most)) for most in (3, 3, 3, 40, 40))
    generator, laid_out = torch.Generator().manual_seed(4), data.draw(layouts(7))
    heads = groups * ratio
    state = normal(generator, batch, heads, head_dim, state_dim, dtype=torch.float32)
    inputs = [normal(generator, *shape, dtype=dtype) for shape, dtype in (
        ((batch, heads, head_dim), DTYPE), ((batch, heads), DTYPE), ((heads,), torch.float32),
        ((batch, groups, state_dim), DTYPE), ((batch, groups, state_dim), DTYPE), ((heads,), torch.float32),
        ((heads,), torch.float32))]
    values = [lay_out(tensor.to(DEVICE), layout) for tensor, layout in zip(inputs, laid_out, strict=True)]
    mine, exact = state.to(DEVICE, copy=True), state.double()
    if ON_GPU:
        y = ssd_state_update(mine, *values)
    else:
        y = state_update_triton.advance_scan(mine, *state_update_triton.prepared_scan(*values))
    expected = ssd_state_update(exact, *(tensor.double().cpu() for tensor in values))
    for ours, true in ((y, expected), (mine, exact)):
        assert ((ours.double().cpu() - true).norm() / true.norm().clamp_min(1e-2)).item() < TOLERANCE


@pytest.mark.skipif(not ON_GPU, reason="minutes under the interpreter")
@drawn(40, 1)
@given(st.data())
def test_mixer(data: st.DataObject) -> None:
    """Against the three operations run apart: what is rounded between them the norm's gradient, orthogonal to its
    input, enlarges without bound, so that no tolerance holds against float64."""
    batch, groups = (data.draw(st.integers(1, 3)) for _ in range(2))
    ratio = data.draw(st.integers(2, 3))            # of one head's only token the norm leaves dt and A no gradient
    length = data.draw(st.integers(1, LONGEST))
    head_dim, state_dim = (data.draw(st.sampled_from(SIZES[:4])) for _ in range(2))
    heads, inner = groups * ratio, groups * ratio * head_dim
    channels, generator = inner + 2 * groups * state_dim, torch.Generator().manual_seed(5)
    seq_idx, laid_out = data.draw(documents(batch, length)), data.draw(layouts(7))
    inputs = [
        normal(generator, batch, length, inner + channels + heads), 0.5 * normal(generator, channels, 4),
        normal(generator, channels), normal(generator, heads, dtype=torch.float32) - 2,
        normal(generator, heads, dtype=torch.float32), normal(generator, heads, dtype=torch.float32),
        normal(generator, inner),
    ]

    def run(projected: Tensor, *weights: Tensor) -> Result:
        return (mix(projected, MixerWeights(*weights), groups, state_dim, 64, 1e-5, seq_idx),)

    def apart(*tensors: Tensor) -> Result:
        with patch.object(mixer_triton, "supports", return_value=False):
            return run(*tensors)

    compare(run, apart, inputs, laid_out, data.draw(st.sampled_from(LAYOUTS)), lambda tensor: tensor.to(DEVICE))


@pytest.mark.skipif(not ON_GPU, reason="elsewhere a CPU's own code runs")
@drawn(40, 1)
@given(st.integers(1, 40), st.integers(1, 3000), layouts(1), st.sampled_from(LAYOUTS), st.booleans())
def test_cross_entropy(rows: int, vocab: int, laid_out: list[str], dy_layout: str, some_ignored: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    labels = torch.randint(vocab, (rows,), generator=generator)
    if some_ignored:
        labels[::3] = -100

    def exact(logits: Tensor) -> Result:
        return (torch.nn.functional.cross_entropy(logits, labels, reduction="none"),)

    compare(lambda logits: (cross_entropy(logits * 1, labels.to(DEVICE)),), exact,
            [normal(generator, rows, vocab)], laid_out, dy_layout)
