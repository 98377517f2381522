"""Steps that must not change the weights, and steps worth a look: non-finite and unusually large gradients."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Literal

from model.config import ModelError

Verdict = Literal["update", "spike", "skip"]

WINDOW = 128                    # applied updates whose gradient norms the median is over
WARM = 16                       # of them, before the median means anything


class SpikeGuard:
    """Checks each step by its loss and gradient norm, both the same on every process, and counts.

    A step whose loss or gradient norm is not finite is skipped: weights and moments stay, data and schedule go on. A
    spike, a norm above `spike_factor` times the median of the last updates, is applied (clipped, as every update) and
    reported.

    Attributes:
        skipped: steps skipped so far.
        spikes: spikes so far.
    """

    def __init__(self, spike_factor: float, max_skipped_steps: int):
        self.spike_factor, self.max_skipped_steps = spike_factor, max_skipped_steps
        self.skipped, self.skipped_in_a_row, self.spikes = 0, 0, 0
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def check(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """What to do with step `step`.

        Raises:
            ModelError: more than `max_skipped_steps` steps in a row would be skipped.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > self.max_skipped_steps:
                raise ModelError(
                    f"training diverged: up to step {step}, {self.skipped_in_a_row} steps in a row had a loss or a "
                    f"gradient that is not finite (loss {loss}, gradient norm {grad_norm}).\nLower "
                    "pretrain.learning_rate, or raise pretrain.warmup_fraction or pretrain.max_skipped_steps."
                )
            return "skip"
        self.skipped_in_a_row = 0
        spike = len(self.norms) >= WARM and grad_norm > self.spike_factor * statistics.median(self.norms)
        self.spikes += spike
        self.norms.append(grad_norm)
        return "spike" if spike else "update"

    def state_dict(self) -> dict[str, Any]:
        """Counts and norms, as plain values for a resume state."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row, "spikes": self.spikes,
                "norms": list(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.skipped, self.skipped_in_a_row, self.spikes = (
            state["skipped"], state["skipped_in_a_row"], state["spikes"])
        self.norms = deque(state["norms"], maxlen=WINDOW)
