"""How far a stage's work on shards has come."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[..., None]          # progress(step, total, **figures)


class Meter:
    """Where all the work stands: its share done, what is under way, documents a second of it."""

    def __init__(self, progress: Progress, weights: dict[str, int]):
        self.progress, self.weights = progress, weights
        self.work = ""
        self.documents = 0
        self.started = time.monotonic()

    def __call__(self, work: str, share: float, documents: int) -> None:
        """`share` of `work` is done, `documents` of it since the last call."""
        now = time.monotonic()
        if work != self.work:
            self.work, self.documents, self.started = work, 0, now
        self.documents += documents
        names = list(self.weights)
        before = sum(self.weights[name] for name in names[: names.index(work)])
        rate = self.documents / max(now - self.started, 1e-3)
        self.progress(round(100 * (before + share * self.weights[work])), 100 * sum(self.weights.values()),
                      work=work.replace(" ", "-"), **{"documents/s": rate})
