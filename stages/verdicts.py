"""Rules of the report: how a verdict follows from figures in the records.

A comparison with a value that is not a number never holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from statistics import fmean

from stages.records import Curve, DecodePoint, Metrics, Records

TASKS = {"syntax_pairs": "syntax pairs", "cloze": "cloze", "signature": "signature", "recall": "recall"}
BITS_PER_BYTE_MARGIN = 0.01         # relative; of the order of the loss differences between architectures at this size
FP8_LIMIT = 0.001                   # relative gap the paper reports as its upper bound
PAPER_CONTEXT = 65_536
WINDOWS = 20                        # of a training run, over whose losses a gap is smoothed
BILLION = 1e9                       # parameters below which a speed says nothing about an 8B model's


class Verdict(StrEnum):
    HOLDS = "holds at this scale"
    FAILS = "does not hold at this scale"
    UNTESTED = "cannot be tested at this scale"


@dataclass(frozen=True)
class Measure:
    """A figure of two models; `difference` is positive where the candidate is the better one."""

    name: str
    candidate: float
    reference: float
    difference: float
    margin: float
    informative: bool = True


@dataclass(frozen=True)
class Control:
    """Whether a model learned anything: three figures and their thresholds."""

    model: str
    below_compressor: float         # share of the compressor's bits per byte saved
    drop_since_first: float         # validation bits per byte, since the first evaluation after the start
    syntax_accuracy: float

    @property
    def met(self) -> tuple[bool, bool, bool]:
        return self.below_compressor >= 0.25, self.drop_since_first >= 0.3, self.syntax_accuracy > 0.85


def controls(records: Records) -> list[Control]:
    """One row a pretrained model."""
    rows = []
    for name in records.params.variants:
        evaluated, trained = records.metrics("evaluate", name), records.metrics("pretrain", name)
        rows.append(Control(
            name,
            1 - evaluated["bits_per_byte"] / evaluated["bits_per_byte_compressor"],
            trained["validation_bits_per_byte_first"] - trained["validation_bits_per_byte"],
            evaluated["syntax_pairs_accuracy"],
        ))
    return rows


PARITY_RULE = (
    "Holds if nothing is worse by more than its margin. Bits per byte: 1 % or the spread over seeds, whichever is "
    "larger. Accuracies: twice the standard error of the difference or the spread over seeds. A task at which "
    "neither model beats a guess by two standard errors is shown and not counted."
)

PARITY_AGAIN = "Holds if nothing is worse by more than its margin, as in the first claim."


def seed_spread(records: Records, key: str) -> float | None:
    """Largest minus smallest value of an evaluation figure over the seeds; None with a single seed."""
    values = [records.metrics("evaluate", name)[key] for name in records.hybrid_seeds]
    return max(values) - min(values) if len(values) > 1 else None


def measures(records: Records, candidate: str, reference: str) -> list[Measure]:
    """Bits per byte and task accuracies of two evaluated models with the margin each is judged by."""
    ours, theirs = records.metrics("evaluate", candidate), records.metrics("evaluate", reference)
    spread = seed_spread(records, "bits_per_byte") or 0.0
    found = [Measure("bits per byte", ours["bits_per_byte"], theirs["bits_per_byte"],
                     theirs["bits_per_byte"] - ours["bits_per_byte"],
                     max(BITS_PER_BYTE_MARGIN * theirs["bits_per_byte"], spread))]
    for task, name in TASKS.items():
        key = f"{task}_accuracy"
        error = math.hypot(ours[f"{key}_stderr"], theirs[f"{key}_stderr"])
        margin = max(2 * error, seed_spread(records, key) or 0.0)
        found.append(Measure(name, ours[key], theirs[key], ours[key] - theirs[key], margin,
                             beats_a_guess(ours, key) or beats_a_guess(theirs, key)))
    return found


def beats_a_guess(metrics: Metrics, key: str) -> bool:
    """Whether an accuracy lies above chance by more than two standard errors."""
    return metrics[key] - metrics[f"{key}_chance"] > 2 * metrics[f"{key}_stderr"]


def parity(found: list[Measure]) -> tuple[Verdict, str]:
    """The verdict of PARITY_RULE."""
    worse = [item for item in found if item.informative and not item.difference >= -item.margin]
    if worse:
        return Verdict.FAILS, "; ".join(f"{item.name} worse by {number(-item.difference)}, margin {number(item.margin)}"
                                        for item in worse)
    silent = [item.name for item in found if not item.informative]
    counted = len(found) - len(silent)
    left_out = f"; {' and '.join(silent)} at a guess's level, not counted" if silent else ""
    return Verdict.HOLDS, f"{counted} of {len(found)} measures counted, all within their margins{left_out}"


def beats_compressor(metrics: Metrics) -> bool:
    return metrics["bits_per_byte"] < metrics["bits_per_byte_compressor"]


def decode_ratio(records: Records, prefix: str, model: str, other: str, context: int) -> tuple[float, float]:
    """Recorded decode ratio at `context` and its spread, from the relative spreads of both timings."""
    ratio = records.metrics("benchmark")[f"{prefix}_{context}"]
    relative = math.hypot(*(relative_spread(records.decode[name], context) for name in (model, other)))
    return ratio, ratio * relative


def relative_spread(points: list[DecodePoint], context: int) -> float:
    return next(point.seconds_per_token_spread * point.tokens_per_second for point in points
                if point.context == context)


def growth_verdict(shortest: tuple[float, float], longest: tuple[float, float], contexts: int) -> tuple[Verdict, str]:
    """Verdict on (ratio, spread) at the shortest and the longest of `contexts` contexts."""
    if contexts < 2:
        return Verdict.UNTESTED, "decoding was measured at one context only"
    low = longest[0] - longest[1]
    if low > 1 and low > shortest[0] + shortest[1]:
        return Verdict.HOLDS, f"at least {low:.2f} at the longest, at most {sum(shortest):.2f} at the shortest"
    return Verdict.FAILS, f"{longest[0]:.2f} ± {longest[1]:.2f} at the longest, {shortest[0]:.2f} at the shortest"


def speed_verdict(records: Records, pair: str, prefix: str, threshold: float) -> tuple[Verdict, str]:
    """Verdict on a speed ratio the paper measured with 8B and larger models on a GPU at 65,536 tokens.

    From the published models themselves where `pair` of them was measured, else from this profile's.
    """
    benchmark, key = records.metrics("benchmark"), f"{prefix}_{PAPER_CONTEXT}"
    if (served := f"output_ratio_{pair}") in benchmark:
        verdict = Verdict.HOLDS if benchmark[served] >= threshold else Verdict.FAILS
        return verdict, f"{benchmark[served]:.2f} times the output tokens/s at the published sizes; {threshold:g} asked"
    parameters = records.metrics("compress")["parent_parameters"]
    lacking = [text for missing, text in (
        (not records.accelerator, "on a CPU"),
        (key not in benchmark, f"up to {records.decode['hybrid'][-1].context:,} tokens"),
        (not parameters >= BILLION, f"with {parameters / 1e6:.3g} million parameters"),
    ) if missing]
    if lacking:
        return Verdict.UNTESTED, f"measured {', '.join(lacking)}"
    verdict = Verdict.HOLDS if benchmark[key] >= threshold else Verdict.FAILS
    return verdict, f"{benchmark[key]:.2f} times at {PAPER_CONTEXT:,} tokens; {threshold:g} asked"


def relative_gap(reference: Curve, other: Curve) -> list[tuple[float, float]]:
    """(tokens, (reference - other) / reference in bits per byte) wherever both were evaluated, after the start.

    The paper's sign: negative where `other` is the worse one.
    """
    others = dict(zip(other["tokens"], other["bits_per_byte"], strict=True))
    return [(tokens, (value - others[tokens]) / value)
            for tokens, value in zip(reference["tokens"], reference["bits_per_byte"], strict=True)
            if tokens > 0 and tokens in others]


def late_mean(gap: list[tuple[float, float]], absolute: bool = False) -> float:
    """Mean of a gap over the second half of training; not a number where there is none."""
    late = [abs(value) if absolute else value for tokens, value in gap if tokens > gap[-1][0] / 2]
    return fmean(late) if late else math.nan


def validation_gaps(records: Records) -> dict[str, list[tuple[float, float]]]:
    """Validation gap by variant: of each FP8 model to its BF16 twin, of every other BF16 seed to the first."""
    if not records.hybrid_seeds:
        return {}
    first, *others = records.hybrid_seeds
    twins = dict(records.fp8_pairs) | dict.fromkeys(others, first)
    return {name: relative_gap(records.validation[reference]["all"], records.validation[name]["all"])
            for name, reference in twins.items()}


def loss_gaps(records: Records) -> dict[str, list[tuple[float, float]]]:
    """Smoothed gap in training loss of each FP8 model to its BF16 twin, by FP8 variant.

    (tokens at the end of a window, (BF16 - FP8) / BF16 of its mean losses), a window being a twentieth of training.
    """
    return {fp8: _smoothed_gap(records.training[bf16], records.training[fp8]) for fp8, bf16 in records.fp8_pairs}


def _smoothed_gap(reference: Curve, other: Curve) -> list[tuple[float, float]]:
    steps = min(len(reference["loss"]), len(other["loss"]))
    ends = [round(steps * window / WINDOWS) for window in range(WINDOWS + 1)]
    gap = []
    for start, end in pairwise(ends):
        if start < end:
            mean = fmean(reference["loss"][start:end])
            gap.append((reference["tokens"][end - 1], (mean - fmean(other["loss"][start:end])) / mean))
    return gap


def half_range(values: list[float]) -> float | None:
    """Half the range over seeds; None for one."""
    return (max(values) - min(values)) / 2 if len(values) > 1 else None


def fp8_loss_verdict(worse: float, noise: float | None) -> tuple[Verdict, str]:
    """Verdict on FP8 being `worse` (relative) where two seeds differ by `noise`."""
    if noise is None:
        return Verdict.UNTESTED, "one seed only: no spread to judge by"
    found = f"{'better' if worse < 0 else 'worse'} by {percent(abs(worse))}"
    if not worse <= max(FP8_LIMIT, noise):
        return Verdict.FAILS, f"{found}; two seeds differ by {percent(noise)}"
    if not noise <= FP8_LIMIT:
        return Verdict.UNTESTED, f"{found}, but two seeds differ by {percent(noise)}, more than the 0.1 % in question"
    return Verdict.HOLDS, f"{found}; worse by 0.1 % at most is asked"


def number(value: float) -> str:
    """Three decimals, with a true minus sign."""
    return f"{value:.3f}".replace("-", "−")


def percent(value: float, digits: int = 2) -> str:
    """A share as a percentage, with a true minus sign."""
    return f"{100 * value:.{digits}f} %".replace("-", "−")
