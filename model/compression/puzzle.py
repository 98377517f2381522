"""Puzzle (arXiv 2411.19146): each layer may become another; a mixed-integer program picks one variant for each.

    min  sum_ij score_ij x_ij    over x_ij in {0, 1},  sum_j x_ij = 1
    s.t. sum_ij cost_ij x_ij <= limit          for each budget
         sum_ij x_ij y_ij <= similarity L      for each earlier solution y: the next ones differ

A variant is the layer with fewer units, or nothing. Its score is the KL divergence of the model in which it alone
replaces its layer; the sum of scores stands for the divergence of all replacements together, which holds as far as they
do not interact. MiniPuzzle's models have one width for all layers of a type, which every engine serves; Puzzle's do
not, and stay in this package.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack
from torch import Tensor, nn

from model.compression.importance import Progress, _Ends, _layers, _run
from model.compression.prune import State, cut
from model.compression.width_importance import WidthImportance, select
from model.config import ModelConfig, ModelError
from model.hybrid_lm import HybridLM, Layer

MOST_COMBINATIONS = 2_000_000       # that `brute_force` tries
WIDTH = {"M": "mamba_num_heads", "*": "num_attention_heads", "-": "ffn_hidden_size"}
_TOLERANCE = 1e-9


class Variant(NamedTuple):
    """What a layer may become: itself with `width` units (WIDTH names them), or nothing (None)."""

    layer: int
    width: int | None


class Limit(NamedTuple):
    """A budget: cost of each variant, by layer, in the unit of `limit`, which is what the layers alone may take."""

    name: str
    costs: Sequence[Sequence[float]]
    limit: float


def library(parent: ModelConfig, widths: Mapping[str, Sequence[int]]) -> list[list[Variant]]:
    """The variants of every layer: the parent's own first, narrower ones, nothing last.

    Args:
        widths: by symbol of a layer, the widths it may be cut to.
    """
    def narrower(symbol: str) -> list[int]:
        return sorted((width for width in set(widths.get(symbol, ())) if width < getattr(parent, WIDTH[symbol])),
                      reverse=True)

    return [[Variant(index, getattr(parent, WIDTH[symbol])), *(Variant(index, w) for w in narrower(symbol)),
             Variant(index, None)] for index, symbol in enumerate(parent.pattern)]


def geometry(parent: ModelConfig, variant: Variant) -> ModelConfig:
    """The parent's geometry with the variant's width: what `model.costs` counts for one of its layers."""
    assert variant.width is not None
    return parent.model_copy(update={WIDTH[parent.pattern[variant.layer]]: variant.width})


class Library:
    """Every variant as a module, with weights cut by importance and norms corrected."""

    def __init__(
        self, teacher: HybridLM, state: State, variants: Sequence[Sequence[Variant]], importance: WidthImportance
    ):
        self.teacher, self.variants = teacher, variants
        parent = teacher.config
        self.modules: dict[Variant, Layer] = {}
        for variant in itertools.chain(*variants):
            if variant.width is None:
                continue
            symbol = parent.pattern[variant.layer]
            if variant.width == getattr(parent, WIDTH[symbol]):
                self.modules[variant] = _layers(teacher)[variant.layer]
                continue
            selection = select(parent, geometry(parent, variant), [variant.layer], importance)
            config, cut_state = cut(parent, state, selection)
            self.modules[variant] = _like_the_parents(parent, config, cut_state, teacher)

    def assemble(self, choice: Sequence[int]) -> HybridLM:
        """The model of one variant a layer, its parts shared with the teacher and the library."""
        chosen = [options[index] for options, index in zip(self.variants, choice, strict=True)]
        model = HybridLM.skeleton(self.teacher.config)
        backbone = self.teacher.backbone
        model.backbone.embeddings, model.backbone.norm_f = backbone.embeddings, backbone.norm_f
        model.backbone.layers = nn.ModuleList(self.modules[variant] for variant in chosen if variant.width is not None)
        model.lm_head = self.teacher.lm_head
        return model

    @torch.no_grad()
    def scores(self, sequences: Tensor, batch_size: int, progress: Progress) -> list[list[float]]:
        """KL(teacher || teacher with the variant alone), nats a token, by layer and variant."""
        layers, device = _layers(self.teacher), self.teacher.lm_head.weight.device
        found = [[0.0] * len(options) for options in self.variants]
        done = 0
        for batch in sequences.split(batch_size):
            inputs = [self.teacher.backbone.embeddings(batch.to(device))]
            for layer in layers:
                inputs.append(layer(inputs[-1]))
            whole = _Ends(self.teacher, inputs[-1], ["kl"])
            for index, options in enumerate(self.variants):
                for number, variant in enumerate(options[1:], start=1):
                    hidden = inputs[index] if variant.width is None else self.modules[variant](inputs[index])
                    errors = whole.errors(_run(layers[index + 1 :], hidden))["kl"]
                    found[index][number] += float(errors.sum()) / len(sequences)
            done += len(batch)
            progress(done, len(sequences))
        return found


def _like_the_parents(parent: ModelConfig, config: ModelConfig, state: State, teacher: HybridLM) -> Layer:
    """The only layer of a cut model as it acts on the parent's residual stream, which `cut` may have scaled."""
    model = HybridLM.from_state(config, state, teacher.lm_head.weight.dtype).to(teacher.lm_head.weight.device)
    layer = _layers(model)[0]
    scale = (config.norm_epsilon / parent.norm_epsilon) ** 0.5
    if scale != 1:
        projection = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}[layer.symbol]
        cast(nn.Linear, getattr(layer.mixer, projection)).weight.data /= scale
        layer.norm.epsilon = parent.norm_epsilon
    return layer


def solve(
    pattern: str, scores: Sequence[Sequence[float]], limits: Sequence[Limit], least: Mapping[str, int] | None = None,
    earlier: Sequence[Sequence[int]] = (), similarity: float = 1.0,
) -> list[int]:
    """The variant of each layer with the smallest sum of scores within every limit.

    Args:
        scores: by layer and variant.
        least: by symbol, layers that must stay; a layer's last variant is nothing.
        earlier: solutions; the new one shares at most `similarity` of the layers' variants with each.

    Raises:
        ModelError: nothing fits; names the limits that bind and the nearest ones, scaled alike, that would do.
    """
    columns = [(layer, variant) for layer, options in enumerate(scores) for variant in range(len(options))]
    rows = _rows(pattern, scores, limits, least or {}, earlier, similarity, columns)
    found = _minimise(np.array([scores[i][j] for i, j in columns]), rows, len(columns))
    if found is None:
        raise _infeasible(pattern, limits, rows, columns)
    choice = [0] * len(scores)
    for (layer, variant), taken in zip(columns, found, strict=True):
        if taken > 0.5:
            choice[layer] = variant
    return choice


class _Rows(NamedTuple):
    """low <= matrix x <= high; the first `limits` rows are the budgets."""

    matrix: csr_array
    low: np.ndarray
    high: np.ndarray
    limits: int


def _rows(
    pattern: str, scores: Sequence[Sequence[float]], limits: Sequence[Limit], least: Mapping[str, int],
    earlier: Sequence[Sequence[int]], similarity: float, columns: list[tuple[int, int]],
) -> _Rows:
    layers = np.array([layer for layer, _ in columns])
    stays = np.array([variant < len(scores[layer]) - 1 for layer, variant in columns])
    symbols = np.array(list(pattern))[layers]
    # a limit is a row of numbers around 1, so that the solver's absolute tolerance means little
    scaled = [np.array([limit.costs[i][j] for i, j in columns]) / limit.limit for limit in limits]
    parts = [*scaled, *(layers == layer for layer in range(len(scores))),
             *((symbols == symbol) & stays for symbol in least),
             *(np.array([solution[i] == j for i, j in columns]) for solution in earlier)]
    low = [*(-np.inf for _ in limits), *(1.0 for _ in scores), *map(float, least.values()), *(-np.inf for _ in earlier)]
    most_alike = np.floor(similarity * len(scores) + _TOLERANCE)
    high = [*(1.0 for _ in limits), *(1.0 for _ in scores), *(np.inf for _ in least), *(most_alike for _ in earlier)]
    return _Rows(csr_array(np.array(parts, dtype=float)), np.array(low), np.array(high), len(limits))


def _minimise(objective: np.ndarray, rows: _Rows, binaries: int) -> np.ndarray | None:
    """The best binary vector, or None where there is none; columns after `binaries` are continuous from 0."""
    integral = np.arange(len(objective)) < binaries
    found = milp(
        objective, integrality=integral, bounds=Bounds(0, np.where(integral, 1.0, np.inf)),
        constraints=LinearConstraint(rows.matrix, rows.low, rows.high), options={"mip_rel_gap": 0.0},
    )
    return found.x


def _infeasible(pattern: str, limits: Sequence[Limit], rows: _Rows, columns: list[tuple[int, int]]) -> ModelError:
    """What the nearest feasible limits are: all of them times 1 + t, the least t."""
    slack = np.where(np.arange(rows.matrix.shape[0]) < rows.limits, -1.0, 0.0)[:, None]
    relaxed = rows._replace(matrix=csr_array(vstack([rows.matrix.T, csr_array(slack.T)]).T))
    found = _minimise(np.append(np.zeros(len(columns)), 1.0), relaxed, len(columns))
    if found is None:
        return ModelError(
            f"puzzle: no choice over {pattern} keeps the layers asked for and differs from the earlier solutions.\n"
            "Ask for fewer layers, fewer solutions or a larger similarity."
        )
    taken = rows.matrix[: rows.limits] @ found[:-1]
    binding = [(limit, share) for limit, share in zip(limits, taken, strict=True) if share > 1 + _TOLERANCE]
    wrong = "; ".join(f"{limit.name} {limit.limit:,.6g}" for limit, _ in binding)
    cure = ", ".join(f"{limit.name} {limit.limit * share:,.6g}" for limit, share in binding)
    return ModelError(f"puzzle: no choice of variants is within {wrong}.\nThe nearest that is needs {cure}.")


def pool(
    pattern: str, scores: Sequence[Sequence[float]], limits: Sequence[Limit], count: int, similarity: float,
    least: Mapping[str, int] | None = None,
) -> list[list[int]]:
    """The best solution and up to `count` - 1 more, each different enough from all before it, best first."""
    found = [solve(pattern, scores, limits, least)]
    while len(found) < count:
        try:
            found.append(solve(pattern, scores, limits, least, found, similarity))
        except ModelError:
            break
    return found


def brute_force(
    pattern: str, scores: Sequence[Sequence[float]], limits: Sequence[Limit], least: Mapping[str, int] | None = None
) -> list[int] | None:
    """`solve` by trying everything: the certificate on small spaces. None where nothing fits.

    Raises:
        ModelError: more than MOST_COMBINATIONS combinations.
    """
    total = int(np.prod([float(len(options)) for options in scores]))
    if total > MOST_COMBINATIONS:
        raise ModelError(f"puzzle: {total:,} combinations are too many to try.\nTake `solve`, or fewer variants.")
    best, value = None, np.inf
    for choice in itertools.product(*(range(len(options)) for options in scores)):
        score = sum(options[j] for options, j in zip(scores, choice, strict=True))
        if score >= value or any(_sum(limit.costs, choice) > limit.limit * (1 + _TOLERANCE) for limit in limits):
            continue
        kept = [symbol for symbol, options, j in zip(pattern, scores, choice, strict=True) if j < len(options) - 1]
        if all(kept.count(symbol) >= count for symbol, count in (least or {}).items()):
            best, value = list(choice), score
    return best


def _sum(costs: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    return sum(options[j] for options, j in zip(costs, choice, strict=True))
