"""The mixer as one CUDA operation against the three operations it is made of, in float64."""

import pytest
import torch
from triton_device import DEVICE, PRECISIONS

from tests.closeness import relative_error

# isort: split
from kernels.causal_conv1d import triton as causal_conv1d_triton
from kernels.mixer import MixerWeights, mix
from kernels.mixer import triton as mixer_triton
from kernels.ssd import triton as ssd_triton

HEADS, HEAD_DIM, GROUPS, STATE, EPSILON = 4, 16, 2, 32, 1e-5
INNER, CHANNELS = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that a short sequence fills several of."""
    monkeypatch.setattr(ssd_triton, "CHUNK", 32)
    for name, size in {"SHARED_GRADIENTS": 16, "STATE_WALK": 16, "GRADIENT_WALK": 16}.items():
        monkeypatch.setattr(ssd_triton, name, getattr(ssd_triton, name)._replace(size=size))
    for name in ("FORWARD", "BACKWARD"):
        tiles = getattr(causal_conv1d_triton, name)._replace(channels=64, tokens=16)
        monkeypatch.setattr(causal_conv1d_triton, name, tiles)


def tensors(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """projected and the six parameters, in `mix`'s order."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    half = [normal(length, 2, INNER + CHANNELS + HEADS), normal(CHANNELS, 4), normal(CHANNELS), normal(INNER)]
    projected, conv_weight, conv_bias, norm_weight = (tensor.to(DEVICE, dtype) for tensor in half)
    single = [normal(HEADS) - 1, torch.rand(HEADS, generator=generator) * 2, normal(HEADS)]
    return [projected, conv_weight, conv_bias, *(tensor.to(DEVICE) for tensor in single), norm_weight]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("time_first, length, documents", [(True, 41, None), (False, 37, [1, 9, 20, 2, 5])])
def test_values_and_gradients_equal_the_parts(dtype, tolerance, time_first, length, documents):
    ours = tensors(length, dtype)
    if not time_first:
        ours[0] = ours[0].transpose(0, 1).contiguous().transpose(0, 1)
    exact = [tensor.double().cpu().requires_grad_() for tensor in ours]
    for tensor in ours:
        tensor.requires_grad_()
    seq_idx = None
    if documents:
        seq_idx = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).int()
        seq_idx = seq_idx.expand(2, -1).contiguous()
    in_place = None if seq_idx is None else seq_idx.to(DEVICE)
    y = mixer_triton.mix(ours[0].transpose(0, 1), *ours[1:], GROUPS, STATE, EPSILON, in_place)[0]
    expected = mix(exact[0].transpose(0, 1), MixerWeights(*exact[1:]), GROUPS, STATE, 16, EPSILON, seq_idx)
    assert y.stride() == ours[0].transpose(0, 1)[..., :INNER].contiguous().stride() or time_first
    assert relative_error(y.cpu(), expected) < tolerance
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = torch.autograd.grad(y, ours, dy.to(DEVICE))
    true = torch.autograd.grad(expected, exact, dy.double())
    for name, a, b in zip(("projected", *MixerWeights._fields), mine, true, strict=True):
        # dt_bias' gradient is the sum of dt's, whose errors it keeps where they themselves cancel.
        terms = true[0][..., -HEADS:] if name == "dt_bias" else b
        assert relative_error(a.cpu(), b) < 2 * tolerance * max(1.0, (terms.norm() / b.norm()).item()), name


def test_the_operator_is_well_registered():
    values = tensors(5, PRECISIONS[0][0])
    values[0] = values[0].transpose(0, 1)
    arguments = (*values, GROUPS, STATE, EPSILON, None)
    torch.library.opcheck(mixer_triton.mix.registered, arguments, test_utils=("test_schema", "test_faketensor"))
