"""How long a decode step of a model takes, from a table of layers measured on the machine that is to run it.

    seconds(model) = sum over layers of table[type, widths] + overhead

A layer's entry is the difference between a deep and a shallow stack of such layers over the difference in depth: what
one more layer costs where weights and caches no longer fit into the processor's own memory. The overhead (embedding,
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

from model.compression.config import Workload
from model.config import ModelConfig, ModelError
from model.decode_benchmark import measure

Key = tuple[str, int, int, int]     # type of layer, its widths, the hidden size
Seconds = Mapping[str, float]
SHALLOW, DEEP = 8, 24               # layers of a stack


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
    parent: ModelConfig, geometries: Sequence[ModelConfig], whole: Sequence[ModelConfig], workload: Workload,
    seed: int, progress: Callable[..., None],
) -> LatencyTable:
    """The table for every layer of `geometries` (any order of layers, hidden size and vocabulary as the parent's).

    Args:
        whole: at least five models to fit the overhead by.

    Raises:
        ModelError: fewer than five whole models.
    """
    if len(whole) < 5:
        raise ModelError(f"latency: an overhead from {len(whole)} models is no fit.\nGive at least 5.")
    stacks: dict[str, ModelConfig] = {}
    keys: dict[str, Key] = {}
    for config in (parent, *geometries):
        for symbol in sorted(set(config.pattern)):
            key = layer_key(config, symbol)
            if key not in keys.values():
                name = " ".join(map(str, key))
                keys[name] = key
                stacks |= {f"{name} x {depth}": config.model_copy(update={"pattern": symbol * depth})
                           for depth in (SHALLOW, DEEP)}
    seconds = step_seconds(stacks, workload, seed, progress)
    layers = {key: max(0.0, (seconds[f"{name} x {DEEP}"] - seconds[f"{name} x {SHALLOW}"]) / (DEEP - SHALLOW))
              for name, key in keys.items()}
    _rise_with_width(layers)
    measured = step_seconds({str(number): config for number, config in enumerate(whole)}, workload, seed, progress)
    left = [measured[str(number)] - _sum(layers, config) for number, config in enumerate(whole)]
    return LatencyTable(layers, fmean(left))


def step_seconds(
    configs: Mapping[str, ModelConfig], workload: Workload, seed: int, progress: Callable[..., None]
) -> dict[str, float]:
    """Measured seconds of a decode step of each model, one model in memory at a time."""
    found: dict[str, float] = {}
    for number, (name, config) in enumerate(configs.items(), start=1):
        (speed,) = measure({name: config}, [workload.context], workload.batch, workload.decode_tokens,
                           workload.repeats, seed, torch.bfloat16, lambda *_, **__: None)
        found[name] = workload.batch / speed.tokens_per_second
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


def _rise_with_width(layers: dict[Key, float]) -> None:
    """Make each entry at least that of every layer that is no wider, as the search takes for granted; noise breaks it.
    """
    for key in sorted(layers):
        narrower = [value for other, value in layers.items()
                    if other[0] == key[0] and all(a <= b for a, b in zip(other[1:], key[1:], strict=True))]
        layers[key] = max(narrower)
