"""The CUDA kernels of the short convolution against F.conv1d."""

import pytest
import torch
from triton_device import DEVICE, PRECISIONS, compare

# isort: split
from test_causal_conv1d import reference

from kernels import launch
from kernels.causal_conv1d import triton as kernel


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles that a short sequence fills several of."""
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(kernel, name, getattr(kernel, name)._replace(channels=32, tokens=8))


def tensors(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, 45), (45, 4), (45,), (2, 3, 45))
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("length", [32, 21, 9, 1])
@pytest.mark.parametrize("has_first", [True, False])
def test_values_and_gradients_equal_conv1d(dtype, tolerance, length, has_first):
    ours = tensors(length, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    if not has_first:
        exact[3].data.zero_()
    y = kernel.convolve(*ours[:3], ours[3] if has_first else None, None)
    count = 4 if has_first else 3
    compare(y, reference(*exact), ours[:count], exact[:count], tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_a_sequence_of_more_stretches_than_an_axis_has_room_for(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(launch, "LARGEST_AXIS", 1)
    test_values_and_gradients_equal_conv1d(dtype, tolerance, 21, True)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_documents_are_convolved_each_alone(dtype, tolerance):
    lengths = [1, 9, 2, 3, 8, 4]
    x, weight, bias, _ = tensors(sum(lengths), dtype)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().expand(2, -1)
    y = kernel.convolve(x, weight, bias, None, documents.contiguous().to(DEVICE))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    alone = [reference(part, *exact[1:], part.new_zeros(2, 3, 45)) for part in exact[0].split(lengths, 1)]
    compare(y, torch.cat(alone, 1), (x, weight, bias), exact, tolerance)


@pytest.mark.parametrize("dtype, _", PRECISIONS)
def test_rows_of_any_stride(dtype, _):
    x, weight, bias, first = (tensor.detach() for tensor in tensors(20, dtype))
    wide = torch.randn(20, 2, 60, device=DEVICE).to(dtype)
    wide[..., 7:52] = x.transpose(0, 1)
    sliced = wide.transpose(0, 1)[..., 7:52]
    whole = kernel.convolve(x, weight, bias, first, None)
    assert torch.equal(kernel.convolve(sliced, weight, bias, first, None), whole)


@pytest.mark.parametrize("dtype, _", PRECISIONS)
def test_the_operator_is_well_registered(dtype, _):
    torch.library.opcheck(kernel.convolve.registered, (*tensors(5, dtype), None),
                          test_utils=("test_schema", "test_faketensor"))
