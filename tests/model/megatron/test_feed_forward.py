"""The feed-forward layer in FP8 as one operation against its parts."""

import torch

from kernels.squared_relu import squared_relu
from kernels.squared_relu_fp8 import quantize_transpose
from model.megatron.feed_forward import FP8FeedForward
from model.megatron.precision import FP8Product, Precision

SEQUENCE, BATCH, HIDDEN, FFN = 16, 2, 64, 96
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors() -> list[torch.Tensor]:
    """x, up, down and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = (SEQUENCE, BATCH, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN), (SEQUENCE, BATCH, HIDDEN)
    return [torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16) for shape in shapes]


def run(function) -> list[torch.Tensor]:
    x, up, down, dy = tensors()
    leaves = [tensor.requires_grad_() for tensor in (x, up, down)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def fused(x, up, down):
    weights = (quantize_transpose(weight.detach(), "e4m3") for weight in (up, down))
    return FP8FeedForward.apply(x, up, down, *weights)


def parts(x, up, down):
    precision = Precision("fp8", emulated=True)
    return FP8Product.apply(squared_relu(FP8Product.apply(x, up, precision)), down, precision)


def test_value_and_gradients_are_those_of_the_parts():
    """The parts round sums to BF16 before they scale them, so that a few values of the second product's factors fall
    on the other side of an FP8 boundary."""
    for ours, expected in zip(run(fused), run(parts), strict=True):
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        assert (ours - expected).float().norm() < 0.02 * expected.float().norm()


def test_it_quantises():
    exact = run(lambda x, up, down: squared_relu(x @ up.t()) @ down.t())
    for ours, unquantised in zip(run(fused), exact, strict=True):
        assert 0.01 < (ours - unquantised).float().norm() / unquantised.float().norm() < 0.2
