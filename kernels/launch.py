"""Grids of programs, whichever of batch and sequence is long; and sizes of them without `triton.cdiv`, a function for
kernels too, which takes 10 us of the host's time."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LARGEST_AXIS = 65_535           # programs on a grid's second and third axis; the first has room for 2^31 - 1


class RowTiles(NamedTuple):
    """How a kernel that goes along rows is launched: bytes of a row a program holds at a time, and its warps."""

    bytes: int
    warps: int


def cdiv(size: int, block: int) -> int:
    """Blocks of `block` that cover `size`."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least that is not below `size`."""
    return 1 << (size - 1).bit_length()


def grid(sequences: int, others: int, stretches: int) -> tuple[tuple[int, int, int], bool]:
    """Sequences, others and stretches of tokens as the axes of a grid, and whether they come in the opposite order:
    sequences lie on the first axis unless there are more stretches than another has room for."""
    if stretches > LARGEST_AXIS:
        return (stretches, others, sequences), True
    return (sequences, others, stretches), False


@triton.jit
def program(REVERSED: tl.constexpr) -> Any:
    """A program's place on the axes of `grid`. Several numbers divided out of one axis would take registers of every
    thread, and with them all addresses."""
    if REVERSED:
        b, at = tl.program_id(2), tl.program_id(0)
    else:
        b, at = tl.program_id(0), tl.program_id(2)
    return b, tl.program_id(1), at
