"""What the public operations refuse, on every device in the same words, before a kernel reads a wrong address; and what
they warn of."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


class ArgumentError(ValueError):
    """Two lines: which argument of which operation, and what it must be."""


def check_shapes(operation: str, **arguments: tuple[Tensor | None, str]) -> dict[str, int]:
    """Raise ArgumentError where shapes or devices disagree: `check_shapes("scan", x=(x, "b t h p"), A=(A, "h"))`.

    An axis is named by a word or is a number; axes of one name have one size, that of the first argument which has it.

    Returns:
        The size of each axis by its name.
    """
    sizes: dict[str, int] = {}
    device = None
    for name, (tensor, letters) in arguments.items():
        if tensor is None:
            continue
        axes = letters.split()
        shape = tensor.shape
        if len(shape) == len(axes):
            for axis, size in zip(axes, shape, strict=True):
                if sizes.setdefault(axis, int(axis) if axis.isdigit() else size) != size:
                    break
            else:
                device = device or tensor.device
                if tensor.device == device:
                    continue
                raise ArgumentError(f"{operation}: {name} is on {tensor.device}, other arguments are on {device}.\n"
                                    f"Move them to one device.")
        expected = ", ".join(f"{axis} = {sizes[axis]}" if axis in sizes and not axis.isdigit() else axis
                             for axis in axes)
        raise ArgumentError(f"{operation}: {name} has the shape {tuple(shape)}.\nIt must be ({expected}).")
    return sizes


def check_dtypes(operation: str, **tensors: Tensor | None) -> None:
    """Raise ArgumentError unless all have the dtype of the first."""
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and like is not None and tensor.dtype != like.dtype:
            raise ArgumentError(f"{operation}: {name} is {tensor.dtype}, {first} is {like.dtype}.\n"
                                f"Convert {name} to {first}'s.")


def check_multiple(operation: str, name: str, size: int, of: str, divisor: int) -> None:
    """Raise ArgumentError unless `size` is a multiple of `divisor`, both at least 1."""
    if divisor < 1 or size < 1 or size % divisor:
        raise ArgumentError(f"{operation}: {name} ({size}) cannot be divided among {of} ({divisor}).\n"
                            f"Make {name} a multiple of {of}, both at least 1.")


def check_any(operation: str, **tensors: Tensor) -> None:
    """Raise ArgumentError where a tensor has no element."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise ArgumentError(f"{operation}: {name}, of the shape {tuple(tensor.shape)}, is empty.\n"
                                f"Every axis must be at least 1 long.")


def warn_of_slowness(operation: str, takes: str, dtype: torch.dtype, *given: str) -> None:
    """UserWarning, by Python's default once of an operation and what was given: PyTorch's operations run on a GPU where
    the CUDA kernels `take` something else. Not for float64, which is asked for as a referee. A compiler formats no
    symbolic size: give sizes of the model, and of others what holds of them."""
    if dtype != torch.float64:
        warnings.warn(f"{operation}: the CUDA kernels do not take {', '.join([str(dtype), *given])}; PyTorch's "
                      f"slower operations run.\nThe kernels take {takes}.", UserWarning, stacklevel=2)


# What torch.compiler.assume_constant_result does, which imports the compiler (two seconds): the warning would break its
# graph.
warn_of_slowness._dynamo_marked_constant = True     # type: ignore[attr-defined]
