"""The distillation loss against PyTorch in float64, and its Triton kernel."""

import pytest
import torch
import torch.nn.functional as F
from triton_device import DEVICE

from kernels import forward_kl as reference
from kernels.forward_kl import forward_kl
from kernels.forward_kl import triton as forward_kl_triton


def random_logits(rows, vocab=37, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(rows)
    return [(scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


def expected_gradient(student, teacher):
    leaf = student.double().clone().requires_grad_()
    loss = F.kl_div(leaf.log_softmax(-1), teacher.double().log_softmax(-1), log_target=True, reduction="batchmean")
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("rows", [1, reference._ROWS, 2 * reference._ROWS + 3])
def test_the_loss_and_its_gradient_equal_pytorchs(rows):
    student, teacher = random_logits(rows)
    leaf = student.clone().requires_grad_()
    loss = forward_kl(leaf, teacher)
    (3 * loss).backward()
    expected, gradient = expected_gradient(student, teacher)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, 3 * gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_lower_precision_are_summed_in_float32(dtype):
    student, teacher = random_logits(50, dtype=dtype)
    exact = forward_kl(student.double(), teacher.double())
    loss = forward_kl(student.requires_grad_(), teacher)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert student.grad.dtype == dtype


def test_it_is_the_forward_divergence():
    """KL(teacher || student) punishes missing what the teacher allows, not the reverse."""
    sharp, flat = torch.tensor([[8.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    missing, spreading = forward_kl(sharp, flat), forward_kl(flat, sharp)
    assert missing > 3 > 0.7 > spreading > 0
    assert forward_kl(sharp, sharp) == 0
    torch.testing.assert_close(forward_kl(sharp + 5, flat - 7), missing)


def without_chances(dtype):
    """Tokens the teacher gives no chance, tokens neither gives any, rows of a single one, and plain rows.

    Returns logits of student and teacher, loss and gradient of the student in float64, 0 log 0 being 0."""
    student, teacher = random_logits(6, 37, dtype)
    teacher[0, 3:20] = teacher[1, 0] = teacher[3, :36] = -torch.inf
    student[0, 3:9] = student[3, :36] = -torch.inf
    student[2, 5] = -80                                                 # a chance of 0 is not a small one
    logs, target = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    chance = target.exp()
    loss = torch.where(chance > 0, chance * (target - logs), 0).sum() / 6
    return student, teacher, loss, (logs.exp() - chance) / 6


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3),
])
def test_a_token_without_a_chance_adds_nothing(dtype, tolerance):
    student, teacher, expected, gradient = without_chances(dtype)
    assert expected.isfinite() and gradient.isfinite().all()
    loss = forward_kl(student.requires_grad_(), teacher)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (student.grad.double() - gradient).norm() < tolerance * gradient.norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("whose", [0, 1])
def test_what_is_no_logit_is_seen(value, whose):
    """A student that gives no chance to what the teacher may say is infinitely far; NaN and infinity are errors."""
    logits = random_logits(2, 5)
    logits[whose][1, 2] = value
    assert forward_kl(*logits).isnan()
    logits = random_logits(2, 5)
    logits[0][1, 2] = -torch.inf
    assert forward_kl(*logits) == torch.inf


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_kernel_adds_nothing_without_a_chance(monkeypatch, dtype, tolerance):
    monkeypatch.setattr(forward_kl_triton, "ROW", forward_kl_triton.RowTiles(bytes=64, warps=1))
    student, teacher, expected, exact = without_chances(dtype)
    gradient = torch.empty_like(student.to(DEVICE))
    found = forward_kl_triton.divergences(student.to(DEVICE), teacher.to(DEVICE), gradient).mean().cpu()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient.cpu().double() - exact).norm() < tolerance * exact.norm()
    for whose in range(2):
        broken = [logits.to(DEVICE, copy=True) for logits in (student, teacher)]
        broken[whose][4, 7] = torch.nan
        assert forward_kl_triton.divergences(*broken, gradient)[4].isnan()


@pytest.mark.parametrize("vocab", [500, 24, 37])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_kernel_gives_the_same(monkeypatch, vocab, dtype, tolerance):
    """Rows of several tiles, the last one cut, and of less than one."""
    monkeypatch.setattr(forward_kl_triton, "ROW", forward_kl_triton.RowTiles(bytes=512, warps=2))
    student, teacher = (logits.to(DEVICE) for logits in random_logits(5, vocab, dtype, scale=8.0))
    gradient = torch.empty_like(student)
    found = forward_kl_triton.divergences(student, teacher, gradient).mean().cpu()
    expected, exact = expected_gradient(student.cpu(), teacher.cpu())
    assert abs(found - expected) < 1e-5 * expected
    assert (gradient.cpu().double() - exact).norm() < tolerance * exact.norm()
