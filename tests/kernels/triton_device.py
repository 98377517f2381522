"""Where the Triton kernels are tested: compiled on a GPU, else under Triton's interpreter on the CPU (conftest.py).

The interpreter's matrix products of bfloat16 are wrong, so it gets float32; on a GPU both half precisions are run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="`make test` installs Triton")

from triton import language
from triton.runtime import interpreter

from tests.closeness import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)] if DEVICE == "cuda" else [(torch.float32, 1e-4)]
replace = interpreter._patch_lang


def replace_once(function: Callable[..., Any]) -> interpreter._LangPatchScope:
    """The interpreter looks through all of the language for what to replace, at every function that a kernel calls: a
    quarter of its time. What the kernel has replaced already needs no second look."""
    languages = [value for value in function.__globals__.values() if value is language or value is language.core]
    if languages and not any(language.core.is_builtin(found.load) for found in languages):
        return interpreter._LangPatchScope()
    return replace(function)


interpreter._patch_lang = replace_once
# Of no effect without `debug`: sums of integers are computed once more in 64 bits, and nobody is told.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def compare(
    y: torch.Tensor, expected: torch.Tensor, ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor],
    tolerance: float,
) -> None:
    """Values, and the gradients of what they are made of, against those in float64."""
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    mine, true = torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, exact, dy.to(expected))
    for a, b in zip((y, *mine), (expected, *true), strict=True):
        assert relative_error(a, b) < tolerance
