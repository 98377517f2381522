"""Small histograms of what a corpus measures, with the thresholds of the cut: panels of the data part of the report.

A panel is bars alone, stretched to the width it gets; its words are text of the page, as large on a telephone as on a
screen. Bars have one width and the height of the logarithm of their documents, so that the few beyond a threshold are
seen beside the many; a scale with wide and narrow bins, as for lengths, is logarithmic that way.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from stages.records import LABELS, Histogram

WIDTH, HEIGHT = 10, 60              # of a bar, of the tallest


@dataclass(frozen=True)
class Panel:
    """One small histogram: `axis` texts from its left end to its right, `key` (class of the style sheet, text)."""

    title: str
    svg: str
    axis: list[str]
    key: list[tuple[str, str]]
    notes: list[str]


def threshold_panel(histogram: Histogram, reasons: Mapping[str, int]) -> Panel:
    """What a rule leaves and what it takes.

    Args:
        reasons: documents of the domain that went, by reason.
    """
    low, high = histogram.low, histogram.high
    regions, lines = [(0.0, "keep")], []
    if low is not None:
        lines.append(place(histogram, low))
        regions = [(0.0, "cut"), (lines[-1], "keep")]
    if high is not None:
        lines.append(place(histogram, high, inclusive=True))
        regions.append((lines[-1], "cut"))
    limits = [f"{sign} {figure(value)}" for sign, value in (("<", low), (">", high)) if value is not None]
    went = sum(count for reason, count in reasons.items() if is_about(reason, histogram.measure))
    key = [("cut", f"{' or '.join(limits)}: {f'{went:,} went' if went else 'none went'}")] if limits else []
    return Panel(histogram.measure.replace("_", " "), bars(histogram, regions, lines), axis(histogram), key,
                 [histogram.source])


def score_panel(histogram: Histogram) -> Panel:
    """The scores of a quality scorer, in the colours of the labels they give."""
    found = [(name, histogram.labels[name]) for name in reversed(LABELS) if name in histogram.labels]
    lowest = next(name for name in reversed(LABELS) if name not in histogram.labels)
    places = [place(histogram, value) for _, value in found]
    regions = [(0.0, lowest), *((where, name) for where, (name, _) in zip(places, found, strict=True))]
    key = [(name, f"{name} ≥ {figure(value)}") for name, value in reversed(found)]
    return Panel(f"{histogram.domain}: {histogram.measure}", bars(histogram, regions, places), axis(histogram),
                 [*key, (lowest, lowest)], [])


def is_about(reason: str, measure: str) -> bool:
    """Whether documents that went for `reason` went for this measure: "digits > 0.2" for digits."""
    if measure == "language_share":
        return reason.startswith("share of ")
    return reason == measure or reason.startswith((f"{measure} < ", f"{measure} > "))


def place(histogram: Histogram, value: float, inclusive: bool = False) -> float:
    """Where `value` stands, in bars from the left and within the ends.

    Args:
        inclusive: behind the bar that `value` itself is in, where that begins with it: most documents may have it.
    """
    edges = histogram.edges
    index = min(max(bisect_right(edges, value) - 1, 0), len(edges) - 2)
    low, high = edges[index], edges[index + 1]
    if inclusive and value == low:
        return index + 1.0
    return index + min(max((value - low) / (high - low), 0.0), 1.0)


def bars(histogram: Histogram, regions: Sequence[tuple[float, str]], lines: Sequence[float]) -> str:
    """The picture: bars in the colours of the regions they stand in (a region begins where the one before ends)."""
    count = len(histogram.counts)
    tallest = math.log1p(max(histogram.counts)) or 1.0
    ends = [*(start for start, _ in regions), float(count)]
    paths = []
    for (begin, end), (_, name) in zip(pairwise(ends), regions, strict=True):
        path = ""
        for index in range(int(begin), math.ceil(end)):
            left, right = max(begin, index), min(end, index + 1)
            if histogram.counts[index] and right > left:
                height = max(1.5, HEIGHT * math.log1p(histogram.counts[index]) / tallest)
                gap = 1 if right == index + 1 else 0
                path += (f"M{_short(left * WIDTH)} {HEIGHT}V{_short(HEIGHT - height)}"
                         f"H{_short(right * WIDTH - gap)}V{HEIGHT}z")
        if path:
            paths.append(f'<path class="{name}" d="{path}"/>')
    marks = [f'<path class="limit" d="M{_short(where * WIDTH)} 0V{HEIGHT}"/>' for where in lines if 0 < where < count]
    words = (f"{histogram.measure} of {histogram.domain}: documents by value, from {histogram.edges[0]:g} to "
             f"{histogram.edges[-1]:g}")
    return (f'<svg viewBox="0 0 {count * WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="{words}">{"".join([*paths, *marks])}</svg>')


def _short(length: float) -> str:
    return f"{abs(length):.1f}".removesuffix(".0")      # not -0


def axis(histogram: Histogram) -> list[str]:
    edges = histogram.edges
    return [figure(edges[0]), figure(edges[len(edges) // 2]), figure(edges[-1])]


def figure(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e8 else f"{value:.3g}"
