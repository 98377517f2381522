"""Where the Triton kernels are tested: compiled on a GPU, else under Triton's interpreter on the CPU (conftest.py).

The interpreter's matrix products of bfloat16 are wrong, so it gets float32; on a GPU both half precisions are run.
"""

import importlib
from collections.abc import Sequence

import pytest
import torch

pytest.importorskip("triton", reason="`make test` installs Triton")

from tests.closeness import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)] if DEVICE == "cuda" else [(torch.float32, 1e-4)]
if DEVICE == "cpu":
    importlib.import_module("quick_interpreter")


def compare(
    y: torch.Tensor, expected: torch.Tensor, ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor],
    tolerance: float,
) -> None:
    """Values, and the gradients of what they are made of, against those in float64."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    mine, true = torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, exact, dy.to(expected))
    for a, b in zip((y, *mine), (expected, *true), strict=True):
        assert relative_error(a, b) < tolerance
