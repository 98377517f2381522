"""Candidates for compression: every largest combination of layer counts and FFN width that fits the memory budget.

The paper's grid (section 3): how many Mamba-2, attention and FFN layers to keep and one FFN width for all; within a
type the most important layers stay. A combination that could still grow in one direction is dominated by the grown
one, so only maximal ones are candidates; Nemotron-H-47B is such a point of the 56B model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from model import costs
from model.compression.config import MemoryBudget
from model.compression.importance import kept_share
from model.config import ModelConfig, ModelError


class Cell(NamedTuple):
    """A point of the grid: layers kept of each type, and the FFN width they share."""

    mamba: int
    attention: int
    ffn: int
    ffn_hidden_size: int

    @property
    def counts(self) -> dict[str, int]:
        return {"M": self.mamba, "*": self.attention, "-": self.ffn}


class Candidate(NamedTuple):
    """A cell made concrete.

    Attributes:
        layers: the parent's layers that are kept, ascending.
        importance: share of the parent's summed layer importance that is kept; an FFN layer counts with the share of
            neuron importance left in it.
    """

    config: ModelConfig
    layers: list[int]
    parameters: int
    memory: costs.Memory
    importance: float


def maximal_cells(
    parent: ModelConfig, widths: Sequence[int], min_attention_layers: int, deployment: MemoryBudget, budget_bytes: int
) -> list[Cell]:
    """All cells within `budget_bytes` that cannot grow by a layer or a width and stay within, in ascending order.

    At least one layer of every type the parent has is kept, and `min_attention_layers` of attention.

    Raises:
        ModelError: a width is not one the parent can be cut to, or nothing fits.
    """
    widths = _checked_widths(parent, widths)
    count = parent.pattern.count
    most = Cell(count("M"), count("*"), count("-"), widths[-1])
    least = Cell(min(1, most.mamba), min(max(1, min_attention_layers), most.attention), min(1, most.ffn), widths[0])

    def size(cell: Cell) -> int:
        pattern = "".join(symbol * count for symbol, count in cell.counts.items())
        changes = {"pattern": pattern, "ffn_hidden_size": cell.ffn_hidden_size}
        return costs.memory(parent.model_copy(update=changes), deployment).total

    if size(least) > budget_bytes:
        share = size(least) / costs.memory(parent, deployment).total
        raise ModelError(
            f"compress.memory.budget_fraction: the smallest model the grid has ({least.mamba} Mamba-2, "
            f"{least.attention} attention, {least.ffn} FFN layers of width {least.ffn_hidden_size}) takes "
            f"{size(least):,} bytes, the budget is {budget_bytes:,}.\n"
            f"Raise it above {share:.3f}, shorten compress.memory.context or add smaller ffn_widths."
        )
    return sorted(_maximal(least, most, widths, lambda cell: size(cell) <= budget_bytes))


def _checked_widths(parent: ModelConfig, widths: Sequence[int]) -> list[int]:
    if too_wide := [width for width in widths if not 1 <= width <= parent.ffn_hidden_size]:
        raise ModelError(
            f"compress.ffn_widths: {too_wide} cannot be cut from the parent's width {parent.ffn_hidden_size}.\n"
            "Give widths between 1 and the parent's."
        )
    return sorted(set(widths)) if "-" in parent.pattern else [parent.ffn_hidden_size]


def _maximal(least: Cell, most: Cell, widths: list[int], fits: Callable[[Cell], bool]) -> Iterator[Cell]:
    """Cells that fit while no single step up from them does; memory grows with every step, so one step is enough."""
    wider = dict(pairwise(widths))
    for mamba in range(least.mamba, most.mamba + 1):
        for attention in range(least.attention, most.attention + 1):
            for width in widths:
                cell = _deepest(Cell(mamba, attention, least.ffn, width), most.ffn, fits)
                if cell is None:
                    break                                      # wider ones do not fit either
                steps = [
                    cell._replace(mamba=mamba + 1),
                    cell._replace(attention=attention + 1),
                    cell._replace(ffn_hidden_size=wider.get(width, width)),
                ]
                steps = [step for step in steps if step != cell and step.mamba <= most.mamba
                         and step.attention <= most.attention]
                if not any(map(fits, steps)):
                    yield cell


def _deepest(cell: Cell, most_ffn: int, fits: Callable[[Cell], bool]) -> Cell | None:
    """`cell` with as many FFN layers as fit, by bisection; None when it does not fit as it is."""
    if not fits(cell):
        return None
    fitting, beyond = cell.ffn, most_ffn + 1
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        if fits(cell._replace(ffn=middle)):
            fitting = middle
        else:
            beyond = middle
    return cell._replace(ffn=fitting)


def keep_top_layers(pattern: str, importance: Sequence[float], counts: Mapping[str, int]) -> list[int]:
    """The `counts[symbol]` most important layers of each type, ascending; of equals the earlier one is kept."""
    kept: list[int] = []
    for symbol, count in counts.items():
        layers = [index for index, other in enumerate(pattern) if other == symbol]
        kept += sorted(layers, key=lambda index: -importance[index])[:count]
    return sorted(kept)


def realise(
    parent: ModelConfig, cell: Cell, layers: Sequence[float], neurons: Mapping[int, Tensor], deployment: MemoryBudget
) -> Candidate:
    """The candidate of a cell.

    Args:
        layers: importance of each of the parent's layers.
        neurons: importance of each neuron, by index of the FFN layer.
    """
    kept = keep_top_layers(parent.pattern, layers, cell.counts)
    pattern = "".join(parent.pattern[index] for index in kept)
    config = parent.model_copy(update={"pattern": pattern, "ffn_hidden_size": cell.ffn_hidden_size})
    shares = {index: kept_share(neurons[index], cell.ffn_hidden_size) for index in kept if index in neurons}
    left = sum(layers[index] * shares.get(index, 1.0) for index in kept)
    return Candidate(config, kept, costs.parameters(config), costs.memory(config, deployment), left / sum(layers))
