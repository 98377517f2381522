"""The short convolution against F.conv1d, and its one-token form against both."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d, final_conv_state
from kernels.state_update import conv_state_update


def tensors(dtype: torch.dtype, length: int = 20, taps: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, 6), (6, taps), (6,), (2, taps - 1, 6))
    x, weight, bias, state = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return x, weight, bias, state


def reference(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Tensor:
    padded = torch.cat([state, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[2])).transpose(1, 2)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("length, taps", [(20, 4), (1, 4), (2, 4), (9, 2)])
def test_values_and_gradients_equal_conv1d(dtype, tolerance, length, taps):
    ours = tensors(dtype, length, taps)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    y = causal_conv1d(*ours)
    expected = reference(*exact)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for mine, true in zip(torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, exact, dy.double()),
                          strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance * true.abs().max().item())


def test_gradcheck():
    values = tuple(tensor.detach().double().requires_grad_() for tensor in tensors(torch.float32, 5, 3))
    assert torch.autograd.gradcheck(causal_conv1d, values)


def test_without_state_starts_from_zero():
    x, weight, bias, state = (tensor.detach() for tensor in tensors(torch.float32))
    assert torch.equal(causal_conv1d(x, weight, bias), causal_conv1d(x, weight, bias, torch.zeros_like(state)))


def test_rows_of_any_stride():
    """The mixer hands over a slice of a transposed projection."""
    x, weight, bias, state = (tensor.detach() for tensor in tensors(torch.float32))
    wide = torch.randn(20, 2, 11)
    wide[..., 3:9] = x.transpose(0, 1)
    sliced = wide.transpose(0, 1)[..., 3:9]
    torch.testing.assert_close(causal_conv1d(sliced, weight, bias, state), causal_conv1d(x, weight, bias, state))


@pytest.mark.parametrize("cut", [1, 2, 7])        # shorter than the kernel's reach, and longer
def test_state_carries_over(cut):
    x, weight, bias, state = (tensor.detach() for tensor in tensors(torch.float32))
    whole, last = causal_conv1d(x, weight, bias, state), final_conv_state(x, 4, state)
    carried = final_conv_state(x[:, :cut], 4, state)
    torch.testing.assert_close(causal_conv1d(x[:, :cut], weight, bias, state), whole[:, :cut])
    torch.testing.assert_close(causal_conv1d(x[:, cut:], weight, bias, carried), whole[:, cut:])
    assert torch.equal(final_conv_state(x[:, cut:], 4, carried), last)
    steps = [conv_state_update(carried, x[:, t], weight, bias) for t in range(cut, 20)]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, cut:])
    assert torch.equal(carried, last)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_documents_are_conv1d_of_each(dtype, tolerance):
    """Documents shorter than the kernel's reach, and longer; the sequence's initial state is the first one's."""
    rows = [(1, 2, 3, 10, 4), (20,)]
    ours = tensors(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in ours]
    seq_idx = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]).int()
    y = causal_conv1d(*ours, seq_idx)
    x, weight, bias, state = exact
    expected = []
    for row, lengths in enumerate(rows):
        before = state[row : row + 1]
        pieces = []
        for document in x[row : row + 1].split(lengths, 1):
            pieces.append(reference(document, weight, bias, before))
            before = torch.zeros_like(before)
        expected.append(torch.cat(pieces, 1))
    y_exact = torch.cat(expected)
    torch.testing.assert_close(y.double(), y_exact, rtol=tolerance, atol=tolerance)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for mine, true in zip(torch.autograd.grad(y, ours, dy), torch.autograd.grad(y_exact, exact, dy.double()),
                          strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance * true.abs().max().item())
