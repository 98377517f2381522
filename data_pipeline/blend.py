"""Weights of the token files in each phase of training (paper section 2.2.3: four phases, each with its own blend)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.config import DataError, Phase


def phase_weights(phases: Sequence[Phase], tokens: Mapping[str, int]) -> list[dict[str, Any]]:
    """The `phases` of blend.json: `[{"until": share of training, "weights": {"train/code-high": weight}}]`.

    A phase gives a domain a weight and draws it from some quality labels: the domain's weight is divided among the
    files of those labels by their tokens, so that within a domain a phase passes once over all it may read before it
    repeats any. The weights of a phase sum to 1.

    Args:
        phases: what params.yaml says.
        tokens: tokens of each file, by the names of tokens.json (`train/DOMAIN-LABEL`).

    Raises:
        DataError: a phase weighs a domain that has no tokens in the phase's labels, or weighs nothing.
    """
    result = []
    for number, phase in enumerate(phases):
        total = sum(phase.weights.values())
        if min(phase.weights.values(), default=0.0) < 0 or total <= 0:
            raise DataError(
                f"tokenize.phases[{number}].weights: must not be negative and not all zero, got {phase.weights}.\n"
                "Give at least one domain a positive weight."
            )
        weights: dict[str, float] = {}
        for domain, weight in phase.weights.items():
            if weight == 0:
                continue
            names = [f"train/{domain}-{label}" for label in phase.labels]
            available = {name: tokens[name] for name in names if tokens.get(name)}
            if not available:
                raise DataError(
                    f"tokenize.phases[{number}] (until {phase.until}): domain `{domain}` has no tokens in the labels "
                    f"{', '.join(phase.labels)}.\nTake the domain out of this phase, add labels to it, or curate more."
                )
            share = weight / total / sum(available.values())
            weights |= {name: share * count for name, count in available.items()}
        result.append({"until": phase.until, "weights": weights})
    return result
