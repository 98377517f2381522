"""The report's figures: matplotlib draws, the page's style sheet colours.

Words and frames take the CSS variables of the page, so that a figure is legible on a light and on a dark ground; a
file of its own follows the reader's setting. Text stays text. The same records give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, ScalarFormatter

from data_pipeline.schema import Histogram
from stages.report.records import LABELS, Curve, Records, pairs

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


class Series(NamedTuple):
    """One line; `style` is matplotlib's, or "o" for dots; `error` is half the length of error bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: str = "-"
    error: Sequence[float] | None = None


def lines(series: Sequence[Series], x: str, y: str, adjust: Callable[[Axes], object] | None = None) -> str:
    """SVG of lines, named in the order of their ends, in the colours of the page.

    `adjust` sets scales and limits; an x-axis of tokens is set already.
    """
    with mpl.rc_context(fname=STYLE):
        figure = Figure()
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
        return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """The same bytes for the same figure, in the colours of the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = buffer.getvalue()
    svg = re.sub(r"<style[^>]*>.*?</style>", f"<style>{DARK}</style>", svg[svg.index("<svg"):], flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r">\s+<", "><", svg).strip()


def labelled(svg: str, name: str, words: str) -> str:
    """The element with ids that begin with `name`, and words for those who do not see it."""
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\1{name}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(words, quote=True)}"', 1)


def line(records: Records, model: str, curve: Curve) -> Series:
    """A model's curve in its colour and dashes."""
    return Series(model, list(curve), list(curve.values()), *look(records, model))


def look(records: Records, model: str) -> tuple[str, str]:
    """Colour by what a model is, dashes by its seed. The benchmark's roles are those of the BF16 models."""
    if of := records.params.variants.get(model):
        kind = " ".join(filter(None, (of.architecture, of.precision, of.fp8_recipe)))
        return COLOURS.get(kind, PALETTE[-1]), DASHES[(of.seed - 1) % len(DASHES)]
    return COLOURS[{"hybrid": "hybrid bf16", "transformer": "transformer bf16"}.get(model, model)], "-"


def zoom(series: Sequence[Series]) -> Callable[[Axes], object]:
    """Limits that cut off the steep start: the upper 40 % of the values."""
    values = [value for one in series for value in one.y if math.isfinite(value)] or [0.0]
    low, high = np.quantile(values, (0, 0.6), method="lower")
    room = 0.06 * (high - low or 1)
    return lambda axes: axes.set_ylim(low - room, high + room)


def validation(records: Records) -> str:
    """Bits per byte on held-out text over training tokens."""
    series = [line(records, name, records.validation(name)) for name in records.params.variants]
    return lines(series, "Tokens", "Bits per byte", zoom(series))


def fp8_gap(records: Records) -> str:
    """Of each FP8 model to its BF16 twin, and of further BF16 seeds to the first."""
    series = []
    for architecture in ("hybrid", "transformer"):
        if twins := pairs(records.params, (architecture, "fp8"), (architecture, "bf16")):
            (_, first), *others = pairs(records.params, (architecture, "bf16"), (architecture, "bf16"))
            series += [line(records, name, gap(records.validation(twin), records.validation(name)))
                       for name, twin in [*twins, *((other, first) for other, _ in others)]]
    return lines(series, "Tokens", "(BF16 − other) / BF16, %",
                 lambda axes: axes.axhspan(-0.1, 0.1, color=MUTED, alpha=0.2, linewidth=0))


def gap(reference: Curve, other: Curve) -> Curve:
    """100 (reference - other) / reference, where both were evaluated after the start."""
    return {tokens: 100 * (value - other[tokens]) / value for tokens, value in reference.items()
            if tokens > 0 and tokens in other}


def layer_importance(records: Records) -> str:
    """Importance over a layer's place, by kind."""
    layers = [layer for layer in records.importance.layers if layer.importance > 0]
    series = [Series(label, [layer.index for layer in layers if layer.symbol == symbol],
                     [layer.importance for layer in layers if layer.symbol == symbol], colour, "o")
              for (symbol, label), colour in zip(KINDS.items(), PALETTE[1:], strict=False)]
    return lines(series, "Layer", "Importance (MSE)", lambda axes: axes.set_yscale("log"))


def candidates(records: Records) -> str:
    """Agreement with the parent over memory, by how far a candidate came."""
    scored = [item for item in records.candidates if item.agreement is not None]
    unit, size = ("MiB", 1024) if all(item.memory_gib < 1 for item in scored) else ("GiB", 1)
    groups = {"compared": (MUTED, [item for item in scored if item.kl_short is None]),
              "distilled": (PALETTE[1], [item for item in scored if item.kl_short is not None and not item.chosen]),
              "chosen": (PALETTE[0], [item for item in scored if item.chosen])}

    def adjust(axes: Axes) -> None:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))

    return lines([Series(label, [size * item.memory_gib for item in items], [item.agreement or 0.0 for item in items],
                         colour, "o") for label, (colour, items) in groups.items()],
                 f"Memory ({unit})", "Agreement with the parent", adjust)


def distillation(records: Records) -> str:
    """KL to the parent over distillation tokens."""
    return lines([line(records, name, curve) for name, curve in records.distillation.items()],
                 "Distillation tokens", "KL to the parent (nats)")


def decoding(records: Records) -> str:
    """Decoding speed over the context."""
    contexts = [row.context for row in records.decode["hybrid"]]

    def adjust(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context // 1024}k" if context >= 1024 else f"{context}" for context in contexts])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)

    series = [Series(name, [row.context for row in rows], [row.tokens_per_second for row in rows], *look(records, name),
                     [row.seconds_per_token_spread * row.tokens_per_second ** 2 for row in rows])
              for name, rows in records.decode.items()]
    return lines(series, "Context (tokens)", "Tokens/s", adjust)


class Panel(NamedTuple):
    """A small histogram with bins of one width: areas of one colour as (start, end, colour) in bins from the left,
    heights as logarithms of documents, at most 1, `ends` of the axis and (colour, text)."""

    areas: list[tuple[float, float, str]]
    heights: list[float]
    ends: tuple[str, str]
    key: list[tuple[str, str]]


def panel(measure: str, histogram: Histogram, reasons: Mapping[str, int]) -> Panel:
    """What a rule leaves and what it takes, or the labels that a quality scorer's scores give.

    Args:
        reasons: documents of the domain that went, by reason.
    """
    low, high, bins = histogram.low, histogram.high, len(histogram.counts)
    if histogram.labels:
        rising = [label for label in reversed(LABELS) if label in histogram.labels]
        lowest = next(label for label in reversed(LABELS) if label not in histogram.labels)
        inner = [place(histogram, histogram.labels[one]) for one in rising]
        words = {lowest: lowest} | {one: f"{one} ≥ {histogram.labels[one]:.3g}" for one in rising}
        colours = [LABEL_COLOURS[one] for one in words]
        key = [(LABEL_COLOURS[one], text) for one, text in reversed(words.items())]
    else:
        inner = sorted([0.0 if low is None else place(histogram, low),
                        bins if high is None else place(histogram, high, inclusive=True)])
        limits = " or ".join(f"{sign} {value:,.6g}" for sign, value in (("<", low), (">", high)) if value is not None)
        went = sum(count for reason, count in reasons.items() if is_about(reason, measure))
        colours, key = [CUT, KEPT, CUT], [(CUT, f"{limits}: {went:,} went")] if limits else []
    heights = np.log1p(histogram.counts) / (np.log1p(max(histogram.counts)) or 1)
    first, last = (f"{value:,.0f}" if 1000 <= abs(value) < 1e8 else f"{value:.3g}"
                   for value in (histogram.edges[0], histogram.edges[-1]))
    return Panel([(*ends, colour) for ends, colour in zip(pairwise([0.0, *inner, bins]), colours, strict=True)],
                 np.where(heights > 0, np.maximum(heights, 0.03), 0).tolist(), (first, last), key)


def histogram(of: Panel) -> str:
    """SVG of the bars, whose areas may end within one, over a base line, with a line where each threshold is; it may be
    stretched, for its words stand beside it."""
    bins = len(of.heights)
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(2.6, 0.8))
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, bins), ylim=(0, 1.05), frame_on=False, xticks=[], yticks=[])
        for start, end, colour in of.areas:
            inner = [edge for edge in range(1, bins) if start < edge < end]
            bars = [of.heights[min(int(edge), bins - 1)] for edge in (start, *inner)]
            axes.stairs(bars, [start, *inner, end], fill=True, facecolor=colour, linewidth=0)
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.vlines([start for start, *_ in of.areas if 0 < start < bins], 0, 1.05, colors=MUTED, linewidth=1)
        return svg_of(figure).replace("<svg", '<svg preserveAspectRatio="none"', 1)


def is_about(reason: str, measure: str) -> bool:
    """Whether documents that went for `reason` went for this measure: "digits > 0.2" for digits."""
    starts = ("share of ",) if measure == "language_share" else (f"{measure} < ", f"{measure} > ")
    return reason == measure or reason.startswith(starts)


def place(histogram: Histogram, value: float, inclusive: bool = False) -> float:
    """Where `value` stands, in bins from the left and within the ends; edges may coincide.

    Args:
        inclusive: behind the bin that begins with `value` itself: most documents may have it.
    """
    edges, bins = histogram.edges, len(histogram.counts)
    return min(float(np.interp(value, edges, range(bins + 1))) + (inclusive and value in edges), bins)
