"""The report's figures: matplotlib draws, the page's style sheet colours.

Words and frames take the CSS variables of the page, so that a figure is legible on a light and on a dark ground; a
file of its own follows the reader's setting. Text stays text. The same records give the same bytes.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from data_pipeline.schema import Histogram
from stages.report.records import LABELS, Curve, DataRecords, Records
from stages.schema import DecodeRow, Provenance

# At least 3:1 against white and against the dark ground of style.css.
PALETTE = ("#c9561b", "#2f7dc1", "#1c8a63", "#8a66c9", "#9a7416", "#b8508f", "#5f7f96", "#c2494f")
INK, MUTED, GRID = "#010101", "#020202", "#030303"      # stand for what the style sheet says
VARIABLES = {INK: "var(--ink, #1f2933)", MUTED: "var(--muted, #5a6675)", GRID: "var(--line, #dfe4ea)"}
DARK = "@media (prefers-color-scheme: dark) { svg { --ink: #e4e8ee; --muted: #a0abb8; --line: #333c47; } }"
STYLE = Path(__file__).with_name("figures.mplstyle")
WIDTH, HEIGHT = 4.8, 2.9        # inches; the page scales figures to its columns
LABEL_COLOURS = dict(zip(LABELS, ("#2f7dc1", "#2a8a98", "#4f935f", "#a27d1c", "#c9561b"), strict=True))
KEPT, CUT = PALETTE[1], PALETTE[0]
KINDS = {"M": "Mamba-2", "*": "attention", "-": "FFN"}


@dataclass(frozen=True)
class Series:
    """One line; `style` is matplotlib's ("-", "--", ":" or "o" for dots), `error` half the length of error bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    style: str = "-"
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    text: str
    colour: str
    mark: float | None = None       # drawn across: what no training reaches
    behind: float = 0.0             # a pale bar behind it


@dataclass(frozen=True)
class Panel:
    """A small histogram without words: `ends` of its axis, a `key` of (colour, text), where thresholds come from."""

    title: str
    svg: str
    ends: tuple[str, str]
    key: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


# --- Drawing ----------------------------------------------------------------------------------------------------------


def lines(
    series: Sequence[Series], x: str, y: str, right: float = 0.73, adjust: Callable[[Axes], object] | None = None
) -> str:
    """Lines named at their ends. `adjust` sets scales and limits; an x-axis of tokens is set already."""
    with mpl.rc_context(fname=STYLE):
        figure, axes = _canvas(x, y, 0.14, right, HEIGHT)
        for one in series:
            if one.error is not None:
                axes.errorbar(one.x, one.y, yerr=one.error, fmt="none", color=one.colour, capsize=2.5, elinewidth=1)
            marker = "o" if one.style == "o" or len(one.x) < 30 else ""
            axes.plot(one.x, one.y, color=one.colour, linestyle="none" if one.style == "o" else one.style,
                      marker=marker, markersize=5 if one.style == "o" else 3)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        if adjust:
            adjust(axes)
        _name_ends(axes, series)
        return _svg(figure)


def bars(rows: Sequence[Bar], x: str = "", left: float = 0.3) -> str:
    """A horizontal bar a row, its text behind it."""
    with mpl.rc_context(fname=STYLE):
        figure, axes = _canvas(x, "", left, 0.97, 0.5 + 0.25 * len(rows))
        places = range(len(rows))
        axes.barh(places, [row.behind for row in rows], height=0.66, color=MUTED, alpha=0.25)
        axes.barh(places, [row.value for row in rows], height=0.66, color=[row.colour for row in rows])
        longest = max(number for row in rows for number in (row.value, row.mark or 0, row.behind)
                      if math.isfinite(number))
        for place, row in enumerate(rows):
            if row.mark is not None:
                axes.plot([row.mark] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.6)
            end = max(row.value, row.behind) if math.isfinite(row.value) else 0.0
            end = row.mark if row.mark is not None and end < row.mark < end + 0.2 * longest else end
            axes.annotate(row.text, (end, place), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(places, [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * longest or 1)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure)


def _canvas(x: str, y: str, left: float, right: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasSVG(figure)
    bottom = (0.46 if x else 0.26) / height
    return figure, figure.add_axes((left, bottom, right - left, 1 - bottom - 0.08 / height), xlabel=x, ylabel=y)


def _name_ends(axes: Axes, series: Sequence[Series]) -> None:
    """Write each label beside the right end of its line, moved apart where two would touch."""
    axes.autoscale_view()
    frame = axes.get_window_extent()
    gap = 11 * axes.figure.dpi / 72 / frame.height
    ends = sorted((min(max((axes.transData.transform((one.x[-1], one.y[-1]))[1] - frame.y0) / frame.height, 0), 1),
                   one.label, one.colour) for one in series if one.label and len(one.x) and math.isfinite(one.y[-1]))
    low = -math.inf
    heights = [low := max(low + gap, end[0]) for end in ends]
    high = 1 + gap
    for place in reversed(range(len(ends))):
        high = min(high - gap, heights[place])
        axes.annotate(ends[place][1], (1, high), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
                      va="center", fontsize=9, color=ends[place][2])


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


def colours(records: Records) -> dict[str, str]:
    """A colour for every model, and for the roles that records give some."""
    names = [*records.params.variants, "compressed", "compressed-random"]
    found = dict(zip(names, itertools.cycle(PALETTE), strict=False))
    roles = {architecture: next(iter(records.variants(architecture, "bf16")), names[0])
             for architecture in ("hybrid", "transformer")} | {"random": "compressed-random"}
    return found | {role: found[name] for role, name in roles.items()}


def style(records: Records, model: str) -> str:
    """Dashes for further seeds, control arms and the random cut, so that colour is not the only cue."""
    variant = records.params.variants.get(model)
    solid = records.variants(variant.architecture, variant.precision)[:1] if variant else ["compressed"]
    return "-" if model in solid else "--"


def zoom(series: Sequence[Series]) -> Callable[[Axes], object]:
    """Limits that cut off the steep start: the upper 15 % of the values."""
    values = sorted(value for one in series for value in one.y if math.isfinite(value)) or [0.0]
    low, high = values[0], values[int(0.85 * (len(values) - 1))]
    room = 0.06 * (high - low or 1)
    return lambda axes: axes.set_ylim(low - room, high + room)


def validation(records: Records) -> str:
    series = [Series(name, curves["all"]["tokens"], curves["all"]["bits_per_byte"], colours(records)[name],
                     style(records, name)) for name, curves in records.validation.items()]
    return lines(series, "Tokens", "Bits per byte", adjust=zoom(series))


def training_loss(records: Records) -> str:
    series = [Series(name, *binned(curve, "loss", 120), colours(records)[name], style(records, name))
              for name, curve in records.training.items()]
    return lines(series, "Tokens", "Loss (nats a token)", adjust=zoom(series))


def binned(curve: Curve, column: str, bins: int) -> tuple[list[float], list[float]]:
    """Tokens at the end of, and the column's mean over, at most `bins` equal runs of steps."""
    tokens, values = curve["tokens"], curve[column]
    size = math.ceil(len(values) / bins)
    starts = range(0, len(values), size)
    return ([tokens[min(start + size, len(tokens)) - 1] for start in starts],
            [fmean(values[start:start + size]) for start in starts])


def fp8_gap(records: Records) -> str:
    """Of each FP8 model to its BF16 twin and, where there are such, of further BF16 seeds to the first."""
    series = []
    for architecture in dict.fromkeys(variant.architecture for variant in records.params.variants.values()):
        pairs = records.precision_pairs(architecture)
        first, *others = records.variants(architecture, "bf16") if pairs else [""]
        for name, twin in [*pairs, *((other, first) for other in others)]:
            words = f"{architecture} " * (architecture != "hybrid") + ("FP8" if (name, twin) in pairs else "BF16")
            series.append(Series(f"{words}, seed {records.params.variants[name].seed}",
                                 *gap(records.validation[twin]["all"], records.validation[name]["all"]),
                                 colours(records)[name], "-" if (name, twin) in pairs else "--"))
    return lines(series, "Tokens", "(BF16 − other) / BF16, %",
                 adjust=lambda axes: axes.axhspan(-0.1, 0.1, color=MUTED, alpha=0.2, linewidth=0))


def gap(reference: Curve, other: Curve) -> tuple[list[float], list[float]]:
    """Tokens, and 100 (reference - other) / reference in bits per byte, where both were evaluated after the start."""
    others = dict(zip(other["tokens"], other["bits_per_byte"], strict=True))
    both = {tokens: 100 * (value - others[tokens]) / value for tokens, value in
            zip(reference["tokens"], reference["bits_per_byte"], strict=True) if tokens > 0 and tokens in others}
    return list(both), list(both.values())


def layer_importance(records: Records) -> str:
    layers = [layer for layer in records.importance if layer.importance > 0]
    series = [Series(label, [layer.index for layer in layers if layer.symbol == symbol],
                     [layer.importance for layer in layers if layer.symbol == symbol], colour, "o")
              for (symbol, label), colour in zip(KINDS.items(), PALETTE[1:], strict=False)]
    return lines(series, "Layer", "Importance (MSE)", 0.8, lambda axes: axes.set_yscale("log"))


def candidates(records: Records) -> str:
    scored = [item for item in records.candidates if item.agreement is not None]
    groups = {"compared": (MUTED, [item for item in scored if item.kl_short is None]),
              "distilled": (PALETTE[1], [item for item in scored if item.kl_short is not None and not item.chosen]),
              "chosen": (PALETTE[0], [item for item in scored if item.chosen])}
    return lines([Series(label, [1024 * item.memory_gib for item in items], [item.agreement or 0.0 for item in items],
                         colour, "o") for label, (colour, items) in groups.items()],
                 "Memory (MiB)", "Agreement with the parent", 0.8)


def distillation(records: Records) -> str:
    return lines([Series(name, curve["tokens"], curve["kl"], colours(records)[name], style(records, name))
                  for name, curve in records.distillation.items()], "Distillation tokens", "KL to the parent (nats)")


def decoding(records: Records) -> str:
    return _by_context(records, "Tokens/s", lambda row: row.tokens_per_second,
                       lambda row: row.seconds_per_token_spread * row.tokens_per_second ** 2)


def cache(records: Records) -> str:
    return _by_context(records, "MiB", lambda row: row.cache_mib)


def _by_context(
    records: Records, label: str, value: Callable[[DecodeRow], float], error: Callable[[DecodeRow], float] | None = None
) -> str:
    contexts = [row.context for row in records.decode["hybrid"]]
    series = [Series(name, [row.context for row in rows], list(map(value, rows)), colours(records)[name], "-",
                     error and list(map(error, rows))) for name, rows in records.decode.items()]

    def adjust(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{context // 1024}k" if context >= 1024 else f"{context}" for context in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        if error:
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    return lines(series, "Context (tokens)", label, 0.78, adjust)


def bits_per_byte(records: Records) -> str:
    found = {name: records.metrics("evaluate", name) for name in records.params.models}
    return bars([Bar(name, metrics["bits_per_byte"], f"{metrics['bits_per_byte']:.3f}", colours(records)[name],
                     mark=metrics["bits_per_byte_compressor"]) for name, metrics in found.items()])


def stage_times(runs: Mapping[str, Provenance]) -> str:
    stages = list(dict.fromkeys(run.stage for run in runs.values()))
    return bars([Bar(name, run.wall_seconds / 60, f"{run.wall_seconds:,.0f} s",
                     PALETTE[stages.index(run.stage) % len(PALETTE)]) for name, run in runs.items()], "Minutes", 0.42)


# --- Data -------------------------------------------------------------------------------------------------------------


def funnel(records: DataRecords, domain: str) -> str:
    steps = records.steps(domain)
    return bars([Bar(row.step.replace("_", " "), row.bytes / 1e6, f"{row.bytes / 1e6:,.2f} MB, {row.documents:,}", KEPT,
                     behind=before.bytes / 1e6) for before, row in zip([steps[0], *steps], steps, strict=False)],
                left=0.27)


def threshold_panel(measure: str, domain: str, histogram: Histogram, reasons: Mapping[str, int]) -> Panel:
    """What a rule leaves and what it takes; `reasons` are documents of the domain that went, by reason."""
    low, high, end = histogram.low, histogram.high, len(histogram.counts)
    places = sorted([0.0, 0.0 if low is None else place(histogram, low),
                     end if high is None else place(histogram, high, inclusive=True), end])
    limits = " or ".join(f"{sign} {value:,.6g}" for sign, value in (("<", low), (">", high)) if value is not None)
    went = sum(count for reason, count in reasons.items() if is_about(reason, measure))
    return _panel(measure.replace("_", " "), measure, domain, histogram, places, (CUT, KEPT, CUT),
                  [(CUT, f"{limits}: {went:,} went")] if limits else [], histogram.source)


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


def _panel(
    title: str, measure: str, domain: str, histogram: Histogram, places: Sequence[float], shades: Sequence[str],
    key: list[tuple[str, str]], note: str = "",
) -> Panel:
    """Bins of one width, from place to place in another colour; heights are logarithms of documents."""
    heights = np.log1p(histogram.counts)
    heights = np.where(heights > 0, np.maximum(heights, 0.03 * heights.max()), 0)
    first, last = (f"{value:,.0f}" if 1000 <= abs(value) < 1e8 else f"{value:.3g}"
                   for value in (histogram.edges[0], histogram.edges[-1]))
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(2.4, 0.72))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        for (start, end), colour in zip(pairwise(places), shades, strict=True):
            edges = np.array([start, *range(math.floor(start) + 1, math.ceil(end)), end])
            if end > start:
                axes.stairs(heights[np.floor(edges[:-1]).astype(int)], edges, fill=True, color=colour)
            if 0 < start < len(heights):
                axes.axvline(start, color=INK, linewidth=0.8)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(0, len(heights))
        axes.set_ylim(0, 1.05 * heights.max() or 1)
        words = f"{measure} of {domain}: documents by value, {first} to {last}"
        return Panel(title, labelled(_svg(figure), f"{domain}-{measure}", words), (first, last), key, note)
