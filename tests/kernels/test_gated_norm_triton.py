"""The CUDA kernels of the gated norm against transformers' own in float64."""

import pytest
import torch
from triton_device import DEVICE, PRECISIONS, compare

# isort: split
from test_gated_norm import EPSILON, reference

from kernels.gated_norm import triton as kernel


def tensors(dtype: torch.dtype, channels: int = 48) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(23, 2 * channels + 5, generator=generator).to(DEVICE, dtype)
    x = torch.randn(23, channels, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(channels, generator=generator).to(DEVICE, dtype)
    return [x.requires_grad_(), wide[:, 5 : 5 + channels].requires_grad_(), weight.requires_grad_()]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("programs, elements", [(132, 1), (8, 32)])
def test_values_and_gradients_equal_transformers(dtype, tolerance, groups, programs, elements, monkeypatch):
    monkeypatch.setattr(kernel, "FORWARD", kernel.FORWARD._replace(elements=elements))
    monkeypatch.setattr(kernel, "BACKWARD", kernel.BACKWARD._replace(elements=elements, programs=programs))
    ours = tensors(dtype)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in ours]
    compare(kernel.normalise(*ours, groups, EPSILON), reference(*exact, groups), ours, exact, tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("channels", [kernel.WIDEST_AHEAD, kernel.WIDEST_AHEAD + 8])
def test_rows_of_any_width(dtype, tolerance, channels, monkeypatch):
    """Too wide for several to be on their way; many tiles a program."""
    monkeypatch.setattr(kernel, "BACKWARD", kernel.BACKWARD._replace(programs=4))
    ours = tensors(dtype, channels)
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in ours]
    compare(kernel.normalise(*ours, 1, EPSILON), reference(*exact, 1), ours, exact, tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_without_a_gate_it_is_rms_norm(dtype, tolerance):
    x, _, weight = tensors(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    y = kernel.normalise(x, None, weight, 1, EPSILON)
    expected = torch.nn.functional.rms_norm(exact[0], (48,), exact[1], EPSILON)
    compare(y, expected, (x, weight), exact, tolerance)


@pytest.mark.parametrize("dtype, _", PRECISIONS)
def test_the_operator_is_well_registered(dtype, _):
    arguments = (*tensors(dtype), 2, EPSILON)
    torch.library.opcheck(kernel.normalise.registered, arguments, test_utils=("test_schema", "test_faketensor"))
