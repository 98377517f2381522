"""Plots of the report as SVG: one function a plot, one colour a model in all of them, the same bytes on every run.

Text stays text (searchable, small, in the page's own typeface). A plot has a light ground of its own, so that it reads
alike on a light and on a dark page.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from stages.records import Curve, Provenance, Records
from stages.svg import INK, MUTED, PALETTE, STYLE, Plot, canvas, count, plot
from stages.verdicts import FP8_LIMIT, TASKS, loss_gaps, validation_gaps

KINDS = {"M": ("Mamba-2", "o", "#0b5fa5"), "*": ("attention", "D", "#c8500a"), "-": ("FFN", "s", "#12805c")}


def colours(records: Records) -> dict[str, str]:
    """A colour for every model, and for the roles `hybrid` and `transformer` of the benchmark."""
    names = [*records.params.variants, "compressed", "compressed-random"]
    found = dict(zip(names, itertools.cycle(PALETTE), strict=False))
    found["hybrid"] = found[records.hybrid_seeds[0]] if records.hybrid_seeds else INK
    found["transformer"] = found[records.transformer] if records.transformer else MUTED
    return found


def plots(records: Records) -> dict[str, Plot]:
    """Every plot this profile's records allow, by name."""
    with mpl.rc_context(STYLE):
        drawn = [
            training_loss(records), validation(records), gradient_norm(records), layer_importance(records),
            ffn_importance(records), candidates(records), controls(records), distillation(records),
            decode_speed(records), output_speed(records), cache_size(records), stage_times(records),
            *evaluations(records),
        ]
        if validation_gaps(records):
            drawn.append(validation_gap(records))
        if loss_gaps(records):
            drawn.append(loss_gap(records))
        if any(item.decode_milliseconds is not None for item in records.candidates):
            drawn.append(candidate_speed(records))
    return {plot.name: plot for plot in drawn}


# --- Training ---------------------------------------------------------------------------------------------------------


def training_loss(records: Records) -> Plot:
    return _training(records, "loss", "training-loss", "Training loss", "Loss (nats a token)")


def gradient_norm(records: Records) -> Plot:
    return _training(records, "grad_norm", "gradient-norm", "Gradient norm", "Norm before clipping")


def _training(records: Records, column: str, name: str, title: str, label: str) -> Plot:
    figure, axes = canvas("Tokens", label, right=0.74)
    ends, values = [], []
    for variant, curve in records.training.items():
        tokens, means = binned(curve, column, 120)
        axes.plot(tokens, means, color=colours(records)[variant], linestyle=_line(records, variant))
        ends.append((tokens[-1], means[-1], variant, colours(records)[variant]))
        values += means
    _zoom(axes, values)
    _token_axis(axes)
    _label_ends(axes, ends)
    return plot(figure, name, title, "Means over equal runs of steps; the steep start is cut off.")


def validation(records: Records) -> Plot:
    figure, axes = canvas("Tokens", "Validation bits per byte", right=0.74)
    ends, values = [], []
    for name, domains in records.validation.items():
        curve = domains["all"]
        axes.plot(curve["tokens"], curve["bits_per_byte"], color=colours(records)[name], marker="o", markersize=3,
                  linestyle=_line(records, name))
        ends.append((curve["tokens"][-1], curve["bits_per_byte"][-1], name, colours(records)[name]))
        values += curve["bits_per_byte"]
    _zoom(axes, values)
    _token_axis(axes)
    _label_ends(axes, ends)
    return plot(figure, "validation", "Validation", "Mean over domains, weighted by bytes; lower is better.")


def validation_gap(records: Records) -> Plot:
    figure, axes = canvas("Tokens", "(BF16 − other) / BF16, %", right=0.73)
    _shade_limit(axes)
    ends = []
    gaps = validation_gaps(records)
    for name, gap in gaps.items():
        tokens, values = [point[0] for point in gap], [100 * point[1] for point in gap]
        axes.plot(tokens, values, color=colours(records)[name], marker="o", markersize=3,
                  linestyle=_line(records, name))
        seed = records.params.variants[name].seed
        label = "BF16, other seed" if name in records.hybrid_seeds else f"FP8, seed {seed}"
        ends.append((tokens[-1], values[-1], label, colours(records)[name]))
    _token_axis(axes)
    _label_ends(axes, ends)
    caption = "In validation bits per byte; below zero is worse than BF16. Shaded: ± 0.1 %, the paper's bound."
    if len(records.hybrid_seeds) > 1:
        caption += " The other BF16 seed shows what chance alone does."
    return plot(figure, "fp8-gap", "Relative gap to BF16", caption)


def loss_gap(records: Records) -> Plot:
    """Each FP8 run against its BF16 twin; the band between seeds is the gap's spread."""
    figure, axes = canvas("Tokens", "(BF16 − FP8) / BF16, %", right=0.73)
    _shade_limit(axes)
    gaps = loss_gaps(records)
    tokens = [point[0] for point in next(iter(gaps.values()))]
    columns = [[100 * value for _, value in points] for points in zip(*gaps.values(), strict=True)]
    if len(gaps) > 1:
        axes.fill_between(tokens, [min(values) for values in columns], [max(values) for values in columns], alpha=0.2,
                          color=MUTED, linewidth=0)
    ends = []
    for name, gap in gaps.items():
        values = [100 * value for _, value in gap]
        axes.plot(tokens, values, color=colours(records)[name], linestyle=_line(records, name))
        ends.append((tokens[-1], values[-1], f"seed {records.params.variants[name].seed}", colours(records)[name]))
    _token_axis(axes)
    _label_ends(axes, ends)
    return plot(figure, "loss-gap", "Relative gap to BF16 in training loss",
                "Same seed, same text in the same order; mean losses of twentieths of training. Below zero FP8 is "
                "worse. Shaded: ± 0.1 %, the paper's bound.")


def _shade_limit(axes: Axes) -> None:
    limit = 100 * FP8_LIMIT
    axes.axhspan(-limit, limit, color="#dfe8f2", linewidth=0)
    axes.axhline(0, color=MUTED, linewidth=0.8)


# --- Compression ------------------------------------------------------------------------------------------------------


def layer_importance(records: Records) -> Plot:
    figure, axes = canvas("Layer", "Importance (MSE before the head)", top=0.28)
    positive = [layer for layer in records.importance if layer.importance > 0]
    floor = min((layer.importance for layer in positive), default=1.0) / 1.6
    axes.set_yscale("log")
    for symbol, (label, marker, colour) in KINDS.items():
        layers = [layer for layer in positive if layer.symbol == symbol]
        if layers:
            indices, heights = [layer.index for layer in layers], [layer.importance for layer in layers]
            axes.vlines(indices, floor, heights, color=colour, linewidth=1.2, alpha=0.45)
            axes.plot(indices, heights, marker=marker, markersize=5, linestyle="none", color=colour,
                      label=f"{symbol}  {label}")
    axes.set_ylim(bottom=floor)
    axes.grid(axis="x", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8.5,
                handletextpad=0.2)
    return plot(figure, "layer-importance", "Layer importance",
                 "Effect of leaving one layer out on the activation before the head; logarithmic.")


def ffn_importance(records: Records) -> Plot:
    figure, axes = canvas("FFN width kept (neurons)", "Share of importance kept", right=0.84)
    ends = []
    for number, (index, shares) in enumerate(records.ffn_importance.items()):
        shade = mpl.colormaps["viridis"](0.8 * number / max(1, len(records.ffn_importance) - 1))
        axes.plot(list(shares), list(shares.values()), color=shade, marker="o", markersize=3)
        narrowest = min(shares)
        ends.append((narrowest, shares[narrowest], f"layer {index}", shade))
    axes.invert_xaxis()
    ends.sort(key=lambda end: end[1])
    _label_ends(axes, [*ends[:1], *ends[1:][-1:]])
    return plot(figure, "ffn-importance", "FFN neurons",
                 "What the most active neurons carry, a line a layer; the least and the most even layer are named.")


def candidates(records: Records) -> Plot:
    figure, axes = canvas("Memory (MiB)", "Agreement with the parent", right=0.76)
    scored = [(1024 * item.memory_gib, item.agreement, item) for item in records.candidates
              if item.agreement is not None]
    unscored = [item for item in records.candidates if item.agreement is None]
    finalists = []
    for memory, agreement, item in scored:
        colour = colours(records)["compressed"] if item.chosen else INK if item.kl_short is not None else "#8fa3b8"
        axes.plot(memory, agreement, marker="*" if item.chosen else "o", markersize=11 if item.chosen else 5,
                  linestyle="none", color=colour, zorder=3 if item.chosen else 2)
        if item.kl_short is not None:
            name = f"KL {item.kl_short:.3f}" + (", chosen" if item.chosen else "")
            finalists.append((memory, agreement, name, colour))
    axes.plot([1024 * item.memory_gib for item in unscored], [0.015] * len(unscored), marker="|", markersize=7,
              linestyle="none", color="#8fa3b8", transform=axes.get_xaxis_transform())
    axes.margins(x=0.06, y=0.16)
    budget = 1024 * records.metrics("compress")["budget_gib"]
    axes.axvline(budget, color=MUTED, linestyle=":", linewidth=1.2)
    axes.annotate("budget", (budget, 1), xycoords=("data", "axes fraction"), xytext=(-4, -3), va="top", ha="right",
                  textcoords="offset points", fontsize=8.5, color=MUTED)
    _label_ends(axes, finalists)
    which = (f"{len(records.candidates)} candidates; the {len(scored)} that keep most importance are scored, the rest "
             "are ticks on the axis.") if unscored else f"All {len(scored)} candidates are scored."
    return plot(figure, "candidates", "Candidates under the memory budget",
                f"{which} Beside the finalists' heights: KL to the parent after short distillation.")


def candidate_speed(records: Records) -> Plot:
    """Score against speed, memory as colour."""
    figure, axes = canvas("Decode step, predicted (ms)", "Agreement with the parent")
    scored = [(item.decode_milliseconds, item.agreement, item) for item in records.candidates
              if item.agreement is not None and item.decode_milliseconds is not None]
    steps, agreements = [entry[0] for entry in scored], [entry[1] for entry in scored]
    memory = [1024 * entry[2].memory_gib for entry in scored]
    axes.scatter(steps, agreements, s=26, c=memory, cmap="viridis")
    colour = colours(records)["compressed"]
    for step, agreement, item in scored:
        if item.chosen:
            axes.plot(step, agreement, marker="*", markersize=13, linestyle="none", color=colour)
    return plot(figure, "candidate-speed", "Candidates: score against speed",
                f"The darker, the less memory: {min(memory):,.1f} to {max(memory):,.1f} MiB. Star: the chosen one. "
                "Steps are sums over a table of timed layers.")


def controls(records: Records) -> Plot:
    figure, axes = canvas("KL to the parent, just cut (nats a token)", "", left=0.31, height=1.5)
    found = records.controls
    rows = [("by importance", [found.importance], colours(records)["compressed"]),
            ("at random", found.random, colours(records)["compressed-random"]),
            ("least important kept", [found.reverse], INK)]
    for place, (_, values, colour) in enumerate(rows):
        axes.plot(values, [place] * len(values), marker="o", markersize=6, linestyle="none", color=colour, alpha=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    return plot(figure, "controls", "What importance is worth", "The chosen shape, cut in three ways; a dot a draw.")


def distillation(records: Records) -> Plot:
    figure, axes = canvas("Distillation tokens", "KL to the parent (nats a token)", right=0.8)
    ends = []
    for name, curve in records.distillation.items():
        model = "compressed-random" if name == "random" else name
        axes.plot(curve["tokens"], curve["kl"], color=colours(records)[model], linestyle=_line(records, model))
        ends.append((curve["tokens"][-1], curve["kl"][-1], "random cut" if name == "random" else name,
                     colours(records)[model]))
    axes.set_ylim(bottom=0)
    _token_axis(axes)
    _label_ends(axes, ends)
    return plot(figure, "distillation", "Distillation",
                 "The cut by importance and a random cut to the same shape, on the same data.")


# --- Inference --------------------------------------------------------------------------------------------------------


def decode_speed(records: Records) -> Plot:
    figure, axes = canvas("Context (tokens)", "Decoding (tokens/s)", right=0.8)
    ends = []
    for name, points in records.decode.items():
        contexts, rates = [point.context for point in points], [point.tokens_per_second for point in points]
        errors = [point.seconds_per_token_spread * point.tokens_per_second ** 2 for point in points]
        axes.errorbar(contexts, rates, yerr=errors, color=colours(records)[name], marker="o", markersize=3.5,
                      capsize=2.5, elinewidth=1)
        ends.append((contexts[-1], rates[-1], name, colours(records)[name]))
    axes.set_ylim(bottom=0)
    _context_axis(records, axes)
    _label_ends(axes, ends)
    where = records.accelerator or records.runs["benchmark"].provenance.machine["processor"]
    return plot(figure, "decode-speed", "Decoding speed against context",
                 f"Batch {records.params.benchmark.batch}, on {where}; bars: spread over repeats.")


def output_speed(records: Records) -> Plot:
    """Of whole requests, and above each line what the machine's bandwidth and arithmetic allow."""
    figure, axes = canvas("Context (tokens)", "Decoding (tokens/s)", right=0.8)
    ends = []
    for name, points in records.decode.items():
        colour = colours(records)[name]
        contexts, rates = [point.context for point in points], [point.tokens_per_second for point in points]
        axes.plot(contexts, rates, color=colour, marker="o", markersize=3.5)
        axes.plot(contexts, [point.tokens_per_second / point.decode_of_floor for point in points], color=colour,
                  linestyle=":", linewidth=1)
        whole = [(point.context, point.output_tokens_per_second) for point in points
                 if point.output_tokens_per_second is not None]
        axes.plot([context for context, _ in whole], [rate for _, rate in whole], color=colour, linestyle="--",
                  linewidth=1)
        ends.append((contexts[-1], rates[-1], name, colour))
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _context_axis(records, axes)
    _label_ends(axes, ends)
    return plot(figure, "output-speed", "Decoding, whole requests and the roofline",
                "Solid: decoding. Dashed: output of requests that read the context first. Dotted: the roofline of "
                "decoding on this machine. Both axes are logarithmic.")


def cache_size(records: Records) -> Plot:
    figure, axes = canvas("Context (tokens)", "Cache (MiB)", right=0.8)
    ends = []
    for name, points in records.decode.items():
        contexts, sizes = [point.context for point in points], [point.cache_mib for point in points]
        axes.plot(contexts, sizes, color=colours(records)[name], marker="o", markersize=3.5)
        ends.append((contexts[-1], sizes[-1], name, colours(records)[name]))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _context_axis(records, axes)
    _label_ends(axes, ends)
    return plot(figure, "cache-size", "Cache against context",
                 "Keys, values and Mamba-2 states of one sequence; both axes are logarithmic.")


# --- Evaluation, time -------------------------------------------------------------------------------------------------


def evaluations(records: Records) -> list[Plot]:
    """Bits per byte, then one plot a task: a bar a model, its standard error, and the control's mark."""
    drawn = [_evaluation(records, "bits_per_byte", "Bits per byte, held-out text",
                         "Lower is better. Mark: the compressor.", "bits_per_byte_compressor")]
    for task, name in TASKS.items():
        drawn.append(_evaluation(records, f"{task}_accuracy", f"{name.capitalize()}: accuracy",
                                 "Higher is better. Whisker: one standard error. Mark: the control, without training.",
                                 f"{task}_accuracy_control"))
    return drawn


def _evaluation(records: Records, key: str, title: str, caption: str, control: str) -> Plot:
    models = records.params.models
    found = [records.metrics("evaluate", model) for model in models]
    widest = max(max(metrics[key] + metrics.get(f"{key}_stderr", 0.0), metrics[control]) for metrics in found)
    figure, axes = canvas("", "", left=0.29, height=0.62 + 0.27 * len(models))
    for place, (model, metrics) in enumerate(zip(models, found, strict=True)):
        error = metrics.get(f"{key}_stderr", 0.0)
        axes.barh(place, metrics[key], height=0.62, color=colours(records)[model])
        if error:
            axes.errorbar(metrics[key], place, xerr=error, color=INK, capsize=2.5, elinewidth=1)
        axes.plot([metrics[control]] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.6)
        end = metrics[key] + error
        if end < metrics[control] < end + 0.15 * widest:            # the mark would strike the number through
            end = metrics[control]
        axes.annotate(f"{metrics[key]:.3f}", (end, place), xytext=(5, 0), textcoords="offset points", va="center",
                      fontsize=8.5)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.18 * widest)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return plot(figure, key.replace("_", "-"), title, caption)


def stage_times(records: Records) -> Plot:
    """Gantt chart of the runs; idle stretches (results of another day) are shortened and dotted."""
    runs = sorted(records.runs.items(), key=lambda item: (item[1].provenance.started, item[0]))
    where, breaks, end = timeline([run.provenance for _, run in runs])
    stages = list(dict.fromkeys(run.provenance.stage for _, run in runs))
    figure, axes = canvas("Minutes since the first stage's start", "", left=0.36, height=0.75 + 0.2 * len(runs))
    for place, ((_, run), start) in enumerate(zip(runs, where, strict=True)):
        seconds = run.provenance.wall_seconds
        colour = PALETTE[stages.index(run.provenance.stage) % len(PALETTE)]
        axes.barh(place, seconds / 60, left=start / 60, height=0.7, color=colour)
        late = start + seconds > 0.82 * end
        axes.annotate(f"{seconds:.0f} s", ((start if late else start + seconds) / 60, place), fontsize=7.5,
                      xytext=(-3 if late else 3, 0), textcoords="offset points", va="center", color=MUTED,
                      ha="right" if late else "left")
    for point in breaks:
        axes.axvline(point / 60, color=MUTED, linestyle=":", linewidth=1.2)
    axes.set_yticks(range(len(runs)), [label for label, _ in runs], fontsize=7.5)
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    idle = " Dotted: idle time left out." if breaks else ""
    return plot(figure, "stage-times", "Stage times", f"When each stage ran, and its seconds.{idle}")


def timeline(runs: Sequence[Provenance]) -> tuple[list[float], list[float], float]:
    """Where to draw runs (sorted by start) so that time with nothing running takes little room.

    Returns (start of each run in seconds, the places of shortened gaps, the end).
    """
    busy = sum(run.wall_seconds for run in runs)
    longest_gap = 0.1 * busy
    starts: list[float] = []
    breaks: list[float] = []
    shift, latest = runs[0].started, runs[0].started
    for run in runs:
        if run.started - latest > longest_gap:
            breaks.append(latest - shift + 0.015 * busy)
            shift += run.started - latest - 0.03 * busy
        starts.append(run.started - shift)
        latest = max(latest, run.ended)
    return starts, breaks, latest - shift


# --- Drawing ----------------------------------------------------------------------------------------------------------


def binned(curve: Curve, column: str, bins: int) -> tuple[list[float], list[float]]:
    """Tokens at the end of, and the column's mean over, at most `bins` equal runs of steps."""
    tokens, values = curve["tokens"], curve[column]
    size = math.ceil(len(values) / bins)
    starts = range(0, len(values), size)
    return ([tokens[min(start + size, len(tokens)) - 1] for start in starts],
            [fmean(values[start:start + size]) for start in starts])


def _line(records: Records, name: str) -> str:
    """Dashes for repeats and controls, so that colour is not the only cue."""
    return "--" if name in (*records.hybrid_seeds[1:], "compressed-random") else "-"


def _zoom(axes: Axes, values: list[float]) -> None:
    """Cut off the first steep part: the upper 15 % of the values."""
    finite = sorted(value for value in values if math.isfinite(value))
    if finite:
        low, high = finite[0], finite[int(0.85 * (len(finite) - 1))]
        axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))


def _token_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(count))


def _context_axis(records: Records, axes: Axes) -> None:
    contexts = sorted({point.context for points in records.decode.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.xaxis.set_minor_locator(NullLocator())


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write each line's name beside its end (x, y, name, colour), moved apart where they would touch."""
    axes.autoscale_view()               # limits are computed late; the ends' places depend on them
    top, bottom = axes.get_window_extent().y1, axes.get_window_extent().y0
    gap = 10.5 * axes.figure.dpi / 72
    ends = sorted((end for end in ends if math.isfinite(end[1])), key=lambda end: end[1])
    heights = [min(max(axes.transData.transform((x, y))[1], bottom), top) for x, y, _, _ in ends]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    if heights and heights[-1] > top:
        heights[-1] = top
        for index in range(len(heights) - 2, -1, -1):
            heights[index] = min(heights[index], heights[index + 1] - gap)
    for (_, _, name, colour), height in zip(ends, heights, strict=True):
        axes.annotate(name, (1.0, (height - bottom) / (top - bottom)), xycoords="axes fraction", xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=8.5, color=colour)
