"""Candidates for compression: every largest combination of layer counts and widths that fits the budgets.

The paper's grid (section 3.1): how many Mamba-2, attention and FFN layers to keep and one FFN width for all; within a
type the most important layers stay. A combination that could still grow in one direction is dominated by the grown
one, so only maximal ones are candidates; Nemotron-H-47B is such a point of the 56B model.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from model import costs
from model.compression.config import CompressConfig
from model.compression.prune import Selection
from model.compression.width_importance import WidthImportance, kept_share, select
from model.config import ModelConfig, ModelError


class Cell(NamedTuple):
    """A point of the grid: layers kept of each type, and the width of all FFN layers."""

    mamba: int
    attention: int
    ffn: int
    ffn_hidden_size: int

    @property
    def counts(self) -> dict[str, int]:
        """Layers by symbol."""
        return {"M": self.mamba, "*": self.attention, "-": self.ffn}

    def config(self, parent: ModelConfig) -> ModelConfig:
        """The geometry, its layers in the order of their types: costs do not depend on the order."""
        pattern = "".join(symbol * count for symbol, count in self.counts.items())
        return parent.model_copy(update={"pattern": pattern, "ffn_hidden_size": self.ffn_hidden_size})


class Budget(NamedTuple):
    """A limit on a cost that grows with every layer and width.

    Attributes:
        name: what is limited, with the unit of `limit`: "memory (bytes)".
        cost: of a geometry, whatever the order of its layers.
        field: of params.yaml, which gives the limit as a share of the parent's cost.
    """

    name: str
    limit: float
    cost: Callable[[ModelConfig], float]
    field: str

    def raised_to(self, cost: float, parent: ModelConfig) -> str:
        """What to do so that `cost` is within."""
        return f"Raise {self.field} above {math.ceil(1e4 * cost / self.cost(parent)) / 1e4:.4f}."


def share_budget(
    name: str, share: float, cost: Callable[[ModelConfig], float], parent: ModelConfig, field: str
) -> Budget:
    """At most `share` of what the parent costs."""
    return Budget(name, share * cost(parent), cost, field)


def closed_budgets(parent: ModelConfig, config: CompressConfig) -> list[Budget]:
    """The budgets that nothing needs to be measured for."""
    memory = config.memory
    budgets = [share_budget("memory (bytes)", memory.budget_fraction, lambda model: costs.memory(model, memory).total,
                            parent, "compress.memory.budget_fraction")]
    if config.parameters_fraction is not None:
        budgets.append(share_budget("parameters", config.parameters_fraction, costs.parameters, parent,
                                    "compress.parameters_fraction"))
    return budgets


class Candidate(NamedTuple):
    """A cell made concrete.

    Attributes:
        selection: the parent's layers and units that are kept.
        importance: share of the parent's summed layer importance that is kept; a layer counts with the share of its
            units' importance left in it.
    """

    config: ModelConfig
    selection: Selection
    parameters: int
    memory: costs.Memory
    importance: float

    @property
    def layers(self) -> list[int]:
        """The parent's layers that are kept, ascending."""
        return list(self.selection.layers)


def maximal_cells(
    parent: ModelConfig, ffn_widths: Sequence[int], min_attention_layers: int, budgets: Sequence[Budget]
) -> list[Cell]:
    """All cells within every budget that cannot grow by a layer or a width and stay within, in ascending order.

    At least one layer of every type the parent has is kept, and `min_attention_layers` of attention.

    Raises:
        ModelError: a width is not one the parent can be cut to, it has fewer layers of attention, or nothing fits:
            then it names every budget that the smallest cell breaks, and what would do.
    """
    axes = _axes(parent, ffn_widths, min_attention_layers)
    least = Cell(*(values[0] for values in axes))
    config = least.config(parent)
    if broken := [(budget, budget.cost(config)) for budget in budgets if budget.cost(config) > budget.limit]:
        wrong = "; ".join(f"{budget.name}: the smallest model of the grid takes {cost:,.6g}, the budget is "
                          f"{budget.limit:,.6g}" for budget, cost in broken)
        cure = " ".join(budget.raised_to(cost, parent) for budget, cost in broken)
        raise ModelError(
            f"compress: no candidate fits. {wrong} ({least.mamba} Mamba-2, {least.attention} attention, {least.ffn} "
            f"FFN layers of width {least.ffn_hidden_size}).\n{cure} Or add smaller widths."
        )

    @cache
    def fits(cell: Cell) -> bool:
        config = cell.config(parent)
        return all(budget.cost(config) <= budget.limit for budget in budgets)

    return sorted(_maximal(axes, fits))


def _axes(parent: ModelConfig, ffn_widths: Sequence[int], min_attention_layers: int) -> list[Sequence[int]]:
    """The ascending values of each field of a cell."""
    axes: list[Sequence[int]] = []
    if min_attention_layers > (held := parent.pattern.count("*")):
        raise ModelError(f"compress.min_attention_layers: {min_attention_layers} layers of attention cannot be kept, "
                         f"the parent has {held}.\nLower it.")
    for symbol in "M*-":
        most = parent.pattern.count(symbol)
        axes.append(range(min(max(1, min_attention_layers) if symbol == "*" else 1, most), most + 1))
    if bad := [width for width in ffn_widths if not 1 <= width <= parent.ffn_hidden_size]:
        raise ModelError(
            f"compress: ffn_hidden_size {bad} cannot be cut from the parent's {parent.ffn_hidden_size}.\n"
            "Give widths between 1 and the parent's."
        )
    axes.append(sorted(set(ffn_widths)) if "-" in parent.pattern else [parent.ffn_hidden_size])
    return axes


def _maximal(axes: Sequence[Sequence[int]], fits: Callable[[Cell], bool]) -> Iterator[Cell]:
    """Cells that fit while no single step up from them does; costs grow with every step, so one step is enough.

    FFN layers are filled up by bisection, all other axes are walked.
    """
    next_up = [dict(pairwise(values)) for values in axes]
    ffn = Cell._fields.index("ffn")
    walked = [values if axis != ffn else values[:1] for axis, values in enumerate(axes)]
    for point in product(*walked):
        cell = _deepest(Cell(*point), axes[ffn], fits)
        if cell is None:
            continue
        steps = (cell._replace(**{name: above[value]})
                 for name, value, above in zip(Cell._fields, cell, next_up, strict=True) if value in above)
        if not any(fits(step) for step in steps):
            yield cell


def _deepest(cell: Cell, counts: Sequence[int], fits: Callable[[Cell], bool]) -> Cell | None:
    """`cell` with as many FFN layers as fit, by bisection; None when it does not fit with the fewest."""
    fitting = bisect_left(counts, True, key=lambda count: not fits(cell._replace(ffn=count)))
    return cell._replace(ffn=counts[fitting - 1]) if fitting else None


def keep_top_layers(pattern: str, importance: Sequence[float], counts: Mapping[str, int]) -> list[int]:
    """The `counts[symbol]` most important layers of each type, ascending; of equals the earlier one is kept."""
    kept: list[int] = []
    for symbol, count in counts.items():
        layers = [index for index, other in enumerate(pattern) if other == symbol]
        kept += sorted(layers, key=lambda index: -importance[index])[:count]
    return sorted(kept)


def make_candidate(
    parent: ModelConfig, cell: Cell, layers: Sequence[float], widths: WidthImportance, deployment: costs.Deployment,
    order: Sequence[float] | None = None,
) -> Candidate:
    """The candidate of a cell.

    Args:
        layers: importance of each of the parent's layers.
        order: by which layers of a type stay, the largest first; their importance by default.
    """
    kept = keep_top_layers(parent.pattern, order or layers, cell.counts)
    changes = {"pattern": "".join(parent.pattern[index] for index in kept)}
    config = cell.config(parent).model_copy(update=changes)
    selection = select(parent, config, kept, widths)
    left = sum(layers[index] * (kept_share(widths.neurons[index], config.ffn_hidden_size)
                                if parent.pattern[index] == "-" else 1.0) for index in kept)
    return Candidate(config, selection, costs.parameters(config), costs.memory(config, deployment), left / sum(layers))


# --- Cuts to compare with: the same shape drawn at random, and the least important kept instead of the most -----------

def random_selection(parent: ModelConfig, shape: ModelConfig, generator: torch.Generator) -> Selection:
    """As many layers of each type and units of each axis as `shape` has, drawn at random."""
    layers: list[int] = []
    for symbol in "M*-":
        choice = torch.tensor([i for i, other in enumerate(parent.pattern) if other == symbol])
        layers += choice[_draw(len(choice), shape.pattern.count(symbol), generator)].tolist()
    layers.sort()
    of = {symbol: [index for index in layers if parent.pattern[index] == symbol] for symbol in "M*-"}
    per_group = parent.mamba_num_heads // parent.mamba_num_groups
    return Selection(
        layers,
        {index: _draw(parent.ffn_hidden_size, shape.ffn_hidden_size, generator) for index in of["-"]},
        {index: torch.cat([_draw(per_group, shape.mamba_num_heads // parent.mamba_num_groups, generator)
                           + group * per_group for group in range(parent.mamba_num_groups)]) for index in of["M"]},
        {index: _draw(parent.mamba_head_dim, shape.mamba_head_dim, generator) for index in of["M"]},
    )


def reverse_selection(
    parent: ModelConfig, shape: ModelConfig, layers: Sequence[float], widths: WidthImportance
) -> Selection:
    """The least important layers and units, as many as `shape` has."""
    counts = {symbol: shape.pattern.count(symbol) for symbol in "M*-"}
    kept = keep_top_layers(parent.pattern, [-value for value in layers], counts)
    return select(parent, shape, kept, WidthImportance(_reciprocals(widths.neurons), _reciprocals(widths.mamba), {}))


def _draw(whole: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(whole, generator=generator)[:count].sort().values


def _reciprocals(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    return {index: 1 / (values + 1e-30) for index, values in scores.items()}
