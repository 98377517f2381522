"""A matplotlib figure as an SVG element of an HTML page."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

from matplotlib.figure import Figure


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
