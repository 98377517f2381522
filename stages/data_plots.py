"""Plots of the data stages: what each step leaves, how often text is read, what each phase of training reads."""

from __future__ import annotations

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.ticker import FuncFormatter, MaxNLocator

from data_pipeline.config import Label
from stages.records import LABELS, Blend, DataRecords, FunnelStep
from stages.svg import INK, MUTED, PALETTE, STYLE, Plot, canvas, plot

# How far each label's colour is from the domain's, towards white.
SHADES = dict(zip(LABELS, (0.0, 0.22, 0.42, 0.6, 0.75), strict=True))
NARROW = 3.6                     # inches
TAKEN = "#d3dae2"


def data_plots(records: DataRecords) -> dict[str, Plot]:
    """Every plot that the records allow, by name."""
    with mpl.rc_context(STYLE):
        drawn = [funnel(records, domain) for domain in records.domains]
        if records.blend:
            drawn += [blend(records, records.blend), repeats(records, records.blend)]
    return {item.name: item for item in drawn}


def tokens_left(records: DataRecords, row: FunnelStep) -> float:
    """Tokens in what `row` leaves, by the bytes a token of the domain's training text has, once that is tokenized."""
    files = records.files(row.domain)
    return row.bytes * sum(file.tokens for file in files) / sum(file.bytes for file in files)


def domain_colours(records: DataRecords) -> dict[str, str]:
    shades = PALETTE[1:]
    return {domain: shades[number % len(shades)] for number, domain in enumerate(records.domains)}


def label_colour(colour: str, label: Label) -> str:
    red, green, blue = to_rgb(colour)
    lift = SHADES[label]
    return to_hex((red + (1 - red) * lift, green + (1 - green) * lift, blue + (1 - blue) * lift))


def funnel(records: DataRecords, domain: str) -> Plot:
    """What each step leaves of a domain; light: what it takes."""
    rows = records.steps(domain)
    left, right, ends = (0.285, 0.5, (0.635, 0.81, 0.995)) if records.blend else (0.285, 0.68, (0.815, 0.995))
    figure, axes = canvas("", "", left=left, right=right, height=0.5 + 0.2 * len(rows), top=0.24, width=NARROW)
    before = [rows[0].bytes, *(row.bytes for row in rows[:-1])]
    places = range(len(rows))
    axes.barh(places, [size / 1e6 for size in before], height=0.72, color=TAKEN)
    axes.barh(places, [row.bytes / 1e6 for row in rows], height=0.72, color=domain_colours(records)[domain])
    axes.set_xlim(0, max(before) / 1e6 or 1)
    columns = {"MB": [f"{row.bytes / 1e6:,.2f}" for row in rows], "documents": [f"{row.documents:,}" for row in rows]}
    if records.blend:
        columns["tokens"] = [("" if row is rows[-1] else "≈ ") + millions(tokens_left(records, row)) for row in rows]
    for (title, texts), where in zip(columns.items(), ends, strict=True):
        for height, text in zip((-0.95, *places), (title, *texts), strict=True):
            axes.annotate(text, ((where - left) / (right - left), height), xycoords=("axes fraction", "data"),
                          ha="right", va="center", fontsize=7.5, color=MUTED if text == title else INK)
    _steps_axis(axes, [row.step.replace("_", " ") for row in rows], size=8)
    axes.xaxis.set_major_locator(MaxNLocator(2))
    return plot(figure, f"funnel-{domain}", f"Left of {domain}", "Bars: megabytes of text; light: what the step took.")


def blend(records: DataRecords, mixture: Blend) -> Plot:
    """A stacked bar a phase: weights by domain and quality label."""
    phases, found = mixture.phases, domain_colours(records)
    figure, axes = canvas("Share of the phase's tokens (%)", "", left=0.17, height=0.85 + 0.42 * len(phases), top=0.25)
    for number, phase in enumerate(phases):
        left = 0.0
        for domain in records.domains:
            start = left
            for label in SHADES:
                weight = 100 * phase.weights.get((domain, label), 0.0)
                axes.barh(number, weight, left=left, height=0.6, color=label_colour(found[domain], label),
                          edgecolor="white", linewidth=0.6)
                left += weight
            if left - start >= 4:
                axes.annotate(f"{left - start:.0f}", (start, number - 0.33), va="bottom", fontsize=8,
                              color=found[domain])
    starts = [0.0, *(phase.until for phase in phases)]
    _steps_axis(axes, [f"{100 * start:.3g}–{100 * phase.until:.3g} %"
                       for start, phase in zip(starts, phases, strict=False)])
    axes.set_xlim(0, 100)
    for domain in records.domains:
        axes.barh(0, 0, color=found[domain], label=domain)
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=len(records.domains), frameon=False,
                fontsize=8.5, handlelength=1)
    return plot(figure, "blend", "Blend of each phase of training",
                "A bar a phase, by share of training; darker: a higher quality label; numbers: the domain's share.")


def repeats(records: DataRecords, mixture: Blend) -> Plot:
    """How often training reads each file, beside the bound."""
    found = domain_colours(records)
    files = [file for domain in records.domains for file in records.files(domain)]
    figure, axes = canvas("Times read", "", left=0.31, height=0.62 + 0.17 * len(files), top=0.22)
    axes.barh(range(len(files)), [file.repeats for file in files], height=0.72,
              color=[label_colour(found[file.domain], file.label) for file in files])
    for number, file in enumerate(files):
        axes.annotate(f"{file.repeats:.2f}", (file.repeats, number), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=7.5, color=INK)
    axes.axvline(mixture.repeats_at_most, color=PALETTE[0], linewidth=1.2)
    axes.annotate(f"at most {mixture.repeats_at_most:g}", (mixture.repeats_at_most, 1), va="bottom", ha="right",
                  xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points", fontsize=8,
                  color=PALETTE[0])
    axes.set_xlim(0, 1.04 * mixture.repeats_at_most)
    _steps_axis(axes, [f"{file.domain}, {file.label}" for file in files], size=7.5)
    return plot(figure, "repeats", "Times each part is read", "In all phases together; the line is the bound.")


def _steps_axis(axes: Axes, names: list[str], size: float = 8.5) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def millions(value: float) -> str:
    """3.45 M for 3,450,000."""
    return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.2f} M"
