"""The report's figures: matplotlib draws, the page's style sheet colours.

Words and frames take the CSS variables of the page, so that a figure is legible on a light and on a dark ground; a
file of its own follows the reader's setting. Text stays text. The same records give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

from data_pipeline.schema import Histogram
from stages.report.records import LABELS, Curve, DataRecords, Records, fp8_pairs, variants

# At least 3:1 against white and against the dark ground of style.css.
PALETTE = ("#c9561b", "#2f7dc1", "#1c8a63", "#8a66c9", "#9a7416", "#b8508f", "#5f7f96", "#c2494f")
INK, MUTED, GRID = "#010101", "#020202", "#030303"      # stand for what the style sheet says
VARIABLES = {INK: "var(--ink, #1f2933)", MUTED: "var(--muted, #5a6675)", GRID: "var(--line, #dfe4ea)"}
DARK = "@media (prefers-color-scheme: dark) { svg { --ink: #e4e8ee; --muted: #a0abb8; --line: #333c47; } }"
STYLE = Path(__file__).with_name("figures.mplstyle")
LABEL_COLOURS = dict(zip(LABELS, ("#2f7dc1", "#2a8a98", "#4f935f", "#a27d1c", "#c9561b"), strict=True))
KEPT, CUT = PALETTE[1], PALETTE[0]
COLOURS = dict(zip(("hybrid bf16", "transformer bf16", "compressed", "hybrid fp8", "transformer fp8", "random",
                    "hybrid fp8 unscaled"), PALETTE, strict=False))
DASHES = ("-", "--", ":", "-.")
KINDS = {"M": "Mamba-2", "*": "attention", "-": "FFN"}


@dataclass(frozen=True)
class Series:
    """One line; `style` is matplotlib's, or "o" for dots; `error` is half the length of error bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: str = "-"
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """A small histogram without words: `ends` of its axis, a `key` of (colour, text), where thresholds come from."""

    title: str
    svg: str
    ends: tuple[str, str]
    key: list[tuple[str, str]]
    note: str = ""


# --- Drawing ----------------------------------------------------------------------------------------------------------


@contextmanager
def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Iterator[Figure]:
    """In inches; the page scales figures to its columns."""
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        FigureCanvasSVG(figure)
        yield figure


def lines(series: Sequence[Series], x: str, y: str, adjust: Callable[[Axes], object] | None = None) -> str:
    """Lines, named in the order of their ends. `adjust` sets scales and limits; an x-axis of tokens is set already."""
    with _figure(5.2, 2.9) as figure:
        axes = figure.subplots()
        axes.set(xlabel=x, ylabel=y)
        for one in sorted(series, key=lambda one: -one.y[-1] if len(one.y) and math.isfinite(one.y[-1]) else math.inf):
            dots = one.style == "o"
            axes.errorbar(one.x, one.y, yerr=one.error, label=one.label, color=one.colour, capsize=2.5, elinewidth=1,
                          linestyle="none" if dots else one.style, marker="o", markersize=5 if dots else 3)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        if adjust:
            adjust(axes)
        if series:
            figure.legend(loc="outside right center")
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element in the colours of the page and the size of its container."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", facecolor="none", metadata=metadata)
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", f"<style>{DARK}</style>", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg xmlns="http://www.w3.org/2000/svg" '
                 r'xmlns:xlink="http://www.w3.org/1999/xlink" \1>', svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r">\s+<", "><", svg).strip()


def labelled(svg: str, name: str, words: str) -> str:
    """The element with ids that begin with `name`, and words for those who do not see it."""
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{re.sub(r'[^a-z0-9]+', '-', name.lower())}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(words, quote=True)}"', 1)


# --- Of a profile -----------------------------------------------------------------------------------------------------


def line(records: Records, model: str, curve: Curve) -> Series:
    return Series(model, list(curve), list(curve.values()), *look(records, model))


def look(records: Records, model: str) -> tuple[str, str]:
    """Colour by what a model is, dashes by its seed. The benchmark's roles are those of the BF16 models."""
    if of := records.params.variants.get(model):
        kind = " ".join(filter(None, (of.architecture, of.precision, of.fp8_recipe)))
        return COLOURS.get(kind, PALETTE[-1]), DASHES[(of.seed - 1) % len(DASHES)]
    return COLOURS[{"hybrid": "hybrid bf16", "transformer": "transformer bf16"}.get(model, model)], "-"


def zoom(series: Sequence[Series]) -> Callable[[Axes], object]:
    """Limits that cut off the steep start: the upper 40 % of the values."""
    values = sorted(value for one in series for value in one.y if math.isfinite(value)) or [0.0]
    low, high = values[0], values[int(0.6 * (len(values) - 1))]
    room = 0.06 * (high - low or 1)
    return lambda axes: axes.set_ylim(low - room, high + room)


def validation(records: Records) -> str:
    series = [line(records, name, records.validation(name)) for name in records.params.variants]
    return lines(series, "Tokens", "Bits per byte", zoom(series))


def fp8_gap(records: Records) -> str:
    """Of each FP8 model to its BF16 twin, and of further BF16 seeds to the first."""
    series = []
    for architecture in ("hybrid", "transformer"):
        if pairs := fp8_pairs(records.params, architecture):
            first, *others = variants(records.params, architecture, "bf16").values()
            series += [line(records, name, gap(records.validation(twin), records.validation(name)))
                       for name, twin in [*pairs, *((other, first) for other in others)]]
    return lines(series, "Tokens", "(BF16 − other) / BF16, %",
                 lambda axes: axes.axhspan(-0.1, 0.1, color=MUTED, alpha=0.2, linewidth=0))


def gap(reference: Curve, other: Curve) -> Curve:
    """100 (reference - other) / reference, where both were evaluated after the start."""
    return {tokens: 100 * (value - other[tokens]) / value for tokens, value in reference.items()
            if tokens > 0 and tokens in other}


def layer_importance(records: Records) -> str:
    """Ranks as they are, all else on a logarithmic scale."""
    rule = records.importance.rule
    layers = [layer for layer in records.importance.layers if rule == "rank" or layer.importance > 0]
    series = [Series(label, [layer.index for layer in layers if layer.symbol == symbol],
                     [layer.importance for layer in layers if layer.symbol == symbol], colour, "o")
              for (symbol, label), colour in zip(KINDS.items(), PALETTE[1:], strict=False)]
    return lines(series, "Layer", f"Importance ({rule})",
                 lambda axes: axes.set_yscale("linear" if rule == "rank" else "log"))


def candidates(records: Records) -> str:
    scored = [item for item in records.candidates if item.agreement is not None]
    groups = {"compared": (MUTED, [item for item in scored if item.kl_short is None]),
              "distilled": (PALETTE[1], [item for item in scored if item.kl_short is not None and not item.chosen]),
              "chosen": (PALETTE[0], [item for item in scored if item.chosen])}
    return lines([Series(label, [1024 * item.memory_gib for item in items], [item.agreement or 0.0 for item in items],
                         colour, "o") for label, (colour, items) in groups.items()],
                 "Memory (MiB)", "Agreement with the parent")


def distillation(records: Records) -> str:
    return lines([line(records, name, curve) for name, curve in records.distillation.items()],
                 "Distillation tokens", "KL to the parent (nats)")


def decoding(records: Records) -> str:
    contexts = [row.context for row in records.decode["hybrid"]]

    def adjust(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context // 1024}k" if context >= 1024 else f"{context}" for context in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)

    series = [Series(name, [row.context for row in rows], [row.tokens_per_second for row in rows], *look(records, name),
                     [row.seconds_per_token_spread * row.tokens_per_second ** 2 for row in rows])
              for name, rows in records.decode.items()]
    return lines(series, "Context (tokens)", "Tokens/s", adjust)


# --- Data -------------------------------------------------------------------------------------------------------------


def funnel(records: DataRecords, domain: str) -> str:
    """What each step left, over what it was given, paler."""
    steps = records.steps[domain]
    left = [row.bytes / 1e6 for row in steps]
    with _figure(5.2, 0.5 + 0.25 * len(steps)) as figure:
        axes = figure.subplots()
        given = axes.barh(range(len(steps)), [left[0], *left[:-1]], height=0.66, color=MUTED, alpha=0.25)
        axes.barh(range(len(steps)), left, height=0.66, color=KEPT)
        axes.bar_label(given, [f"{row.bytes / 1e6:,.2f} MB, {row.documents:,}" for row in steps], padding=5)
        axes.set_yticks(range(len(steps)), [row.step.replace("_", " ") for row in steps])
        axes.set(ylim=(len(steps) - 0.4, -0.6), xlim=(0, 1.4 * max(left) or 1))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        return _svg(figure)


def threshold_panel(measure: str, domain: str, histogram: Histogram, reasons: Mapping[str, int]) -> Panel:
    """What a rule leaves and what it takes; `reasons` are documents of the domain that went, by reason."""
    low, high, end = histogram.low, histogram.high, len(histogram.counts)
    places = sorted([0.0, 0.0 if low is None else place(histogram, low),
                     end if high is None else place(histogram, high, inclusive=True), end])
    limits = " or ".join(f"{sign} {value:,.6g}" for sign, value in (("<", low), (">", high)) if value is not None)
    went = sum(count for reason, count in reasons.items() if is_about(reason, measure))
    return _panel(measure.replace("_", " "), measure, domain, histogram, places, (CUT, KEPT, CUT),
                  [(CUT, f"{limits}: {went:,} went")] if limits else [])


def score_panel(measure: str, domain: str, histogram: Histogram) -> Panel:
    """The scores of a quality scorer, in the colours of the labels they give."""
    rising = [label for label in reversed(LABELS) if label in histogram.labels]
    lowest = next(label for label in reversed(LABELS) if label not in histogram.labels)
    places = [0.0, *(place(histogram, histogram.labels[label]) for label in rising), len(histogram.counts)]
    key = {lowest: lowest} | {label: f"{label} ≥ {histogram.labels[label]:.3g}" for label in rising}
    return _panel(f"{domain}: {measure}", measure, domain, histogram, places, [LABEL_COLOURS[label] for label in key],
                  [(LABEL_COLOURS[label], words) for label, words in reversed(key.items())])


def is_about(reason: str, measure: str) -> bool:
    """Whether documents that went for `reason` went for this measure: "digits > 0.2" for digits."""
    if measure == "language_share":
        return reason.startswith("share of ")
    return reason == measure or reason.startswith((f"{measure} < ", f"{measure} > "))


def place(histogram: Histogram, value: float, inclusive: bool = False) -> float:
    """Where `value` stands, in bins from the left and within the ends; edges may coincide.

    Args:
        inclusive: behind the bin that begins with `value` itself: most documents may have it.
    """
    edges = np.array(histogram.edges)
    index = int(np.clip(np.searchsorted(edges, value, side="right") - 1, 0, len(edges) - 2))
    low, high = edges[index], edges[index + 1]
    if inclusive and value == low:
        return index + 1.0
    return index + float((np.clip(value, low, high) - low) / (high - low) if high > low else value >= high)


def _panel(title: str, measure: str, domain: str, histogram: Histogram, places: Sequence[float],
           shades: Sequence[str], key: list[tuple[str, str]]) -> Panel:
    """Bins of one width, from place to place in another colour; heights are logarithms of documents."""
    heights = np.log1p(histogram.counts)
    heights = np.where(heights > 0, np.maximum(heights, 0.03 * heights.max()), 0)
    first, last = (f"{value:,.0f}" if 1000 <= abs(value) < 1e8 else f"{value:.3g}"
                   for value in (histogram.edges[0], histogram.edges[-1]))
    with _figure(2.4, 0.72, None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for (start, end), colour in zip(pairwise(places), shades, strict=True):
            edges = np.array([start, *range(math.floor(start) + 1, math.ceil(end)), end])
            if end > start:
                axes.stairs(heights[np.floor(edges[:-1]).astype(int)], edges, fill=True, color=colour)
            if 0 < start < len(heights):
                axes.axvline(start, color=INK, linewidth=0.8)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set(xlim=(0, len(heights)), ylim=(0, 1.05 * heights.max() or 1))
        words = f"{measure} of {domain}: documents by value, {first} to {last}"
        return Panel(title, labelled(_svg(figure), f"{domain}-{measure}", words), (first, last), key, histogram.source)
