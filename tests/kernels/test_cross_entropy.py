"""Cross-entropy against PyTorch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_device import DEVICE

from kernels import cross_entropy
from kernels.cross_entropy import triton as cross_entropy_triton
from tests.closeness import relative_error

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def triton_losses(logits: Tensor, labels: Tensor) -> Tensor:
    rows, targets = logits.to(DEVICE).flatten(0, -2), labels.to(DEVICE).flatten()
    return cross_entropy_triton.losses(rows, targets)[0].view(labels.shape).cpu()


@pytest.fixture
def small_tiles(monkeypatch):
    for name in ("LOSSES", "GRADIENT"):
        monkeypatch.setattr(cross_entropy_triton, name, cross_entropy_triton.RowTiles(bytes=512, warps=2))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("run", [cross_entropy.cross_entropy, triton_losses])
@pytest.mark.parametrize("vocab", [500, 24])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_losses_and_gradient_are_pytorchs(run, dtype, vocab, scale):
    """Rows of several tiles, the last one cut, and of less than one; gradients that differ by row, zero among them."""
    generator = torch.Generator().manual_seed(0)
    leaf = (scale * torch.randn(3, 5, vocab, generator=generator)).to(dtype).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    labels = torch.randint(0, vocab, (3, 5), generator=generator)
    dlosses = torch.linspace(-1, 1, 15).view(3, 5)
    losses = run(leaf.clone(), labels)
    expected = F.cross_entropy(exact.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
    assert losses.dtype == torch.float32 and relative_error(losses, expected) < 1e-5
    mine, theirs = torch.autograd.grad(losses, leaf, dlosses)[0], torch.autograd.grad(expected, exact, dlosses)[0]
    assert relative_error(mine, theirs) < TOLERANCE[dtype]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("run", [cross_entropy.cross_entropy, triton_losses])
def test_impossible_labels_and_excluded_tokens_are_finite(run):
    leaf = torch.tensor([[0.0, 500.0], [500.0, 0.0], [0.0, -torch.inf]], requires_grad=True)
    losses = run(leaf.clone(), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(losses, torch.tensor([500.0, 0.0, 0.0]))
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), leaf)[0],
                               torch.tensor([[-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("run", [cross_entropy.cross_entropy, triton_losses])
def test_a_second_derivative_is_refused(run):
    """PyTorch would take it for zero, since the gradient of a loss needs none."""
    logits = torch.randn(4, 40, requires_grad=True)
    losses = run(logits.clone(), torch.arange(4))
    with pytest.raises(RuntimeError, match="differentiable once: create_graph"):
        torch.autograd.grad(losses.sum(), logits, create_graph=True)


@pytest.mark.usefixtures("small_tiles")
def test_the_gradient_takes_the_place_of_the_logits():
    """Autograd notices who uses the logits afterwards."""
    logits = torch.randn(4, 40, device=DEVICE, requires_grad=True)
    copy = logits.clone()
    values = cross_entropy_triton.losses(copy, torch.arange(4, device=DEVICE))[0]
    before = copy.detach().clone()
    values.sum().backward(retain_graph=True)
    assert torch.equal(copy.detach(), logits.grad) and not torch.equal(copy.detach(), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@pytest.mark.usefixtures("small_tiles")
def test_the_operators_are_well_registered():
    logits, labels = torch.randn(4, 40, device=DEVICE), torch.arange(4, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(cross_entropy_triton.losses, (logits, labels), test_utils=checks)
    torch.library.opcheck(cross_entropy_triton.losses, (logits.requires_grad_(), labels),
                          test_utils=("test_autograd_registration",))
    logits = logits.detach()
    ones = torch.ones(4, device=DEVICE)
    torch.library.opcheck(cross_entropy_triton.backward, (logits, labels, ones, ones), test_utils=checks)


@pytest.mark.usefixtures("small_tiles")
def test_a_compiled_head_gives_the_same():
    hidden = torch.randn(3, 15, 32, device=DEVICE, requires_grad=True)
    weight = torch.randn(200, 32, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 200, (3, 15), device=DEVICE)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy_triton.losses((hidden @ weight.t()).flatten(0, 1), labels.flatten())[0].sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected)
