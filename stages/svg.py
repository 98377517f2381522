"""How the report draws: colours, style, canvas; a matplotlib figure as an SVG element of an HTML page."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Distinguishable with the common colour-vision deficiencies and at least 3:1 against white.
PALETTE = ("#c8500a", "#0b5fa5", "#12805c", "#5b93c9", "#8a3ea6", "#93691a", "#b03060", "#4a5560")
INK, MUTED, GRID = "#1f2933", "#5f6b7a", "#e3e7ec"
WIDTH, HEIGHT = 4.8, 2.95        # inches; the page scales plots to its columns
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "svg.id": None, "font.family": "DejaVu Sans", "font.size": 9,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
    "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "lines.linewidth": 1.7, "path.simplify": True,
}


@dataclass(frozen=True)
class Plot:
    """One figure: `name` is its id in the page, `caption` one line below it, `svg` the picture."""

    name: str
    title: str
    caption: str
    svg: str


def canvas(x: str, y: str, left: float = 0.14, right: float = 0.97, height: float = HEIGHT,
           top: float = 0.08, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one pair of axes: `left` and `right` as shares of its width, `height`, `width` and the `top`
    margin in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    bottom = (0.48 if x else 0.28) / height
    axes = figure.add_axes((left, bottom, right - left, 1 - bottom - top / height))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def plot(figure: Figure, name: str, title: str, caption: str) -> Plot:
    """The finished figure."""
    return Plot(name, title, caption, inline_svg(figure, name, f"{title}. {caption}"))


def count(value: float, _: int) -> str:
    """1.5 M for 1,500,000."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element for an HTML page: ids prefixed by `name`, no dates, scaled by its container."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", facecolor="none",
                   metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg, xlink = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
    ElementTree.register_namespace("", svg)
    ElementTree.register_namespace("xlink", xlink)
    root = ElementTree.fromstring(buffer.getvalue())
    for child in list(root):
        if child.tag == f"{{{svg}}}metadata":
            root.remove(child)
    for style in root.findall(f"{{{svg}}}defs/{{{svg}}}style"):
        style.text = ""                         # it would apply to the whole page
    for element in root.iter():
        _prefix_references(element, name, f"{{{xlink}}}href")
    del root.attrib["width"], root.attrib["height"]
    root.attrib |= {"role": "img", "aria-label": description}
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _prefix_references(element: ElementTree.Element, name: str, href: str) -> None:
    """Make ids unique to this figure, and what points at them follow."""
    for key, value in element.attrib.items():
        if key == "id":
            element.attrib[key] = f"{name}-{value}"
        elif key == href:
            element.attrib[key] = value.replace("#", f"#{name}-")
        elif "url(#" in value:
            element.attrib[key] = value.replace("url(#", f"url(#{name}-")
