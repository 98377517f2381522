"""How long a decode step of a model takes, from a table of layers measured on the machine that is to run it.

    seconds(model) = sum over layers of table[type, widths] + overhead

A layer's entry is what one more such layer costs a model of the parent's depth, where weights and caches no longer fit
into the processor's own memory: the difference that MORE extra layers make, over their number. The overhead (embedding,
head, launch) is the mean of what whole models take beyond the sum, least squares for a constant. NVIDIA's Puzzle adds
layers up alike and reports 5.4 s where 5 were asked for (modelopt): so the error on models that neither table nor
overhead has seen is part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from model.benchmark.decode import decode_seconds
from model.compression.config import LatencyBudget
from model.config import ModelConfig, ModelError

Key = tuple[str, int, int, int]     # type of layer, its widths, the hidden size
MORE = 16                           # extra layers of a kind
LARGEST_ERROR = 0.1                 # of a whole model's step, where layers add up and nothing else computes beside them


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of a decode step of the whole batch.

    Attributes:
        layers: by type and widths.
        overhead: of everything but the layers, for models of one hidden size and vocabulary.
    """

    layers: dict[Key, float]
    overhead: float

    def seconds(self, config: ModelConfig) -> float:
        """The predicted step. Raises ModelError for a layer that the table does not have."""
        return self.overhead + _sum(self.layers, config)

    def record(self) -> dict[str, Any]:
        """Plain values, milliseconds."""
        return {
            "layers": [{"symbol": key[0], "widths": list(key[1:]), "milliseconds": 1e3 * value}
                       for key, value in self.layers.items()],
            "overhead_milliseconds": 1e3 * self.overhead,
        }


def layer_key(config: ModelConfig, symbol: str) -> Key:
    """What a layer's time depends on within one workload."""
    widths = {"M": (config.mamba_num_heads, config.mamba_head_dim), "-": (config.ffn_hidden_size, 0),
              "*": (config.num_attention_heads, config.num_query_groups)}[symbol]
    return (symbol, *widths, config.hidden_size)


def measure_table(
    parent: ModelConfig, geometries: Sequence[ModelConfig], whole: Sequence[ModelConfig], workload: LatencyBudget,
    seed: int, progress: Callable[..., None],
) -> LatencyTable:
    """The table for every layer of `geometries` (any order of layers, hidden size and vocabulary as the parent's).

    Args:
        whole: at least five models to fit the overhead by.

    Raises:
        ModelError: fewer than five whole models, or a table that misses one of them by more than LARGEST_ERROR.
    """
    if len(whole) < 5:
        raise ModelError(f"latency: an overhead from {len(whole)} models is no fit.\nGive at least 5.")
    models: dict[str, ModelConfig] = {}
    pairs: dict[Key, tuple[str, str]] = {}              # without and with the extra layers
    for config in (parent, *geometries):
        for symbol in dict.fromkeys(parent.pattern):
            key = layer_key(config, symbol)
            if key not in pairs:
                without = config.model_copy(update={"pattern": parent.pattern})
                name = without.model_dump_json()
                pairs[key] = name, f"{name} {symbol}"
                models[name] = without
                models[f"{name} {symbol}"] = without.model_copy(update={"pattern": parent.pattern + symbol * MORE})
    seconds = step_seconds(models, workload, seed, progress)
    layers = {key: max(0.0, (seconds[more] - seconds[without]) / MORE) for key, (without, more) in pairs.items()}
    _make_monotonic(layers)
    measured = step_seconds({str(number): config for number, config in enumerate(whole)}, workload, seed, progress)
    left = [measured[str(number)] - _sum(layers, config) for number, config in enumerate(whole)]
    table = LatencyTable(layers, fmean(left))
    for number, config in enumerate(whole):
        step, predicted = measured[str(number)], table.seconds(config)
        if abs(predicted / step - 1) > LARGEST_ERROR:
            raise ModelError(
                f"compress.latency: a step of {config.pattern} takes {1e3 * step:.3g} ms, by the table of its layers' "
                f"times {1e3 * predicted:.3g}.\nCompress again with nothing beside it on this device; or, if they do "
                "not add up here, leave latency out."
            )
    return table


def step_seconds(
    configs: Mapping[str, ModelConfig], workload: LatencyBudget, seed: int, progress: Callable[..., None]
) -> dict[str, float]:
    """Measured seconds of a decode step of each model in BF16, one in memory at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, float] = {}
    for number, (name, config) in enumerate(configs.items(), start=1):
        found[name] = decode_seconds(
            config, workload.batch, workload.context, device, workload.decode_tokens, workload.repeats, seed)
        progress(number, len(configs), milliseconds=1e3 * found[name])
    return found


def _sum(layers: Mapping[Key, float], config: ModelConfig) -> float:
    total = 0.0
    for symbol in set(config.pattern):
        key = layer_key(config, symbol)
        if key not in layers:
            raise ModelError(
                f"latency: the table has no layer {key}.\nMeasure it: give `measure_table` a geometry with this layer."
            )
        total += config.pattern.count(symbol) * layers[key]
    return total


def _make_monotonic(layers: dict[Key, float]) -> None:
    """Make each entry at least that of every layer that is no wider, as the search takes for granted; noise breaks it.
    """
    for key in layers:
        narrower = [value for other, value in layers.items()
                    if other[0] == key[0] and all(a <= b for a, b in zip(other[1:], key[1:], strict=True))]
        layers[key] = max(narrower)
