"""A document of sections, tables and figures, and its two forms: one self-contained HTML page, one Markdown file.

Texts may hold `code` in backticks; everything else in them is shown as it is written. Excerpts of documents show what
they hold, control characters too. The page fetches nothing and needs no script.
"""

from __future__ import annotations

import html
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from stages.claims import Claim
from stages.histograms import Panel
from stages.records import Example
from stages.svg import Plot
from stages.verdicts import Verdict

# Controls but line feed and tab, format characters, lone surrogates, line and paragraph separators, private use.
CONTROL = re.compile("[" + "".join(
    re.escape(chr(code)) for code in range(0x10000)
    if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co") and chr(code) not in "\n\t") + "]")
STYLE_SHEET = Path(__file__).with_name("report.css")
MARKS = {Verdict.HOLDS: ("✓", "holds"), Verdict.FAILS: ("✗", "fails"), Verdict.UNTESTED: ("○", "untested")}


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of texts under `header`; the first `text_columns` are prose, the others figures (set to the right)."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Figures:
    """Plots side by side; `narrow` for those drawn on a narrow canvas."""

    plots: list[Plot]
    narrow: bool = False


@dataclass(frozen=True)
class ClaimTable:
    claims: list[Claim]


@dataclass(frozen=True)
class Listing:
    """Preformatted text, folded away in the page."""

    title: str
    text: str


@dataclass(frozen=True)
class Panels:
    """Small histograms side by side."""

    panels: list[Panel]
    large: bool = False


@dataclass(frozen=True)
class Excerpts:
    """Documents, or parts of them, word for word; Markdown holds the first."""

    examples: list[Example]


@dataclass(frozen=True)
class Fold:
    """Blocks folded away under a title."""

    title: str
    blocks: list[Block]


Block = Paragraph | Table | Figures | ClaimTable | Listing | Panels | Excerpts | Fold


@dataclass(frozen=True)
class Section:
    """`command` makes the section's figures again; empty where there is nothing to run."""

    name: str
    title: str
    command: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    title: str
    profile: str
    about: str
    summary: str
    facts: list[tuple[str, str]]
    sections: list[Section]


def write_page(document: Document, directory: Path) -> Path:
    """Write DIRECTORY/index.html and DIRECTORY/report.md, each whole or not at all; the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in (("index.html", to_html(document)), ("report.md", to_markdown(document))):
        partial = directory / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.rename(directory / name)
    return directory / "index.html"


# --- HTML -------------------------------------------------------------------------------------------------------------


def to_html(document: Document) -> str:
    """The page, complete."""
    links = "".join(f'<a href="#{section.name}">{_inline(section.title)}</a>' for section in document.sections)
    facts = "".join(f"<div><dt>{_inline(name)}</dt><dd>{_inline(value)}</dd></div>" for name, value in document.facts)
    body = "\n".join(_section_html(section) for section in document.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(document.title)}: {html.escape(document.profile)}</title>
<style>
{STYLE_SHEET.read_text().strip()}
</style>
</head>
<body>
<header>
<h1>{_inline(document.title)} <span class="profile">profile <b>{html.escape(document.profile)}</b></span></h1>
<p>{_inline(document.about)}</p>
<p class="summary">{_inline(document.summary)}</p>
<dl class="facts">{facts}</dl>
<nav aria-label="Contents">{links}</nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _inline(text: str) -> str:
    """Escaped text with `code` marked."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _section_html(section: Section) -> str:
    command = f'<p class="command">Make again: {_inline(f"`{section.command}`")}</p>' if section.command else ""
    blocks = "\n".join(_block_html(block) for block in section.blocks)
    return f'<section id="{section.name}">\n<h2>{_inline(section.title)}</h2>\n{command}\n{blocks}\n</section>'


def _block_html(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Figures(plots, narrow):
            kind = " narrow" if narrow else " single" if len(plots) == 1 else ""
            return f'<div class="plots{kind}">{"".join(_figure_html(plot) for plot in plots)}</div>'
        case ClaimTable(claims):
            return _claims_html(claims)
        case Listing(title, text):
            return f"<details><summary>{_inline(title)}</summary><pre>{html.escape(text)}</pre></details>"
        case Panels(panels, large):
            size = " large" if large else ""
            return f'<div class="panels{size}">{"".join(_panel_html(panel) for panel in panels)}</div>'
        case Excerpts(examples):
            return f'<ol class="examples">{"".join(_example_html(example) for example in examples)}</ol>'
        case Fold(title, blocks):
            folded = "\n".join(_block_html(inner) for inner in blocks)
            return f'<details class="fold"><summary>{_inline(title)}</summary>\n{folded}\n</details>'
        case Table():
            return _table_html(block)


def _figure_html(plot: Plot) -> str:
    return (f'<figure id="plot-{plot.name}"><h3>{_inline(plot.title)}</h3>{plot.svg}'
            f"<figcaption>{_inline(plot.caption)}</figcaption></figure>")


def _panel_html(panel: Panel) -> str:
    ends = "".join(f"<span>{html.escape(value)}</span>" for value in panel.axis)
    key = "".join(f'<span class="key {name}">{_inline(text)}</span>' for name, text in panel.key)
    notes = "".join(f"<p>{_inline(note)}</p>" for note in panel.notes)
    return (f'<figure class="panel"><h4>{_inline(panel.title)}</h4>{panel.svg}<div class="axis">{ends}</div>'
            f"<figcaption>{key}{notes}</figcaption></figure>")


def _example_html(example: Example) -> str:
    """Source, path and value, then the text; a refused document has no text to show."""
    where = " ".join(filter(None, (example.source, example.path)))
    text = CONTROL.sub(lambda found: f'<span class="control">{_visible(found[0])}</span>', html.escape(example.excerpt))
    excerpt = f"<pre>{text}</pre>" if text.strip() else ""
    return (f'<li><p><span class="where">{html.escape(_seen(where))}</span> '
            f'<span class="value">{html.escape(_seen(example.value))}</span></p>{excerpt}</li>')


def _seen(text: str) -> str:
    return CONTROL.sub(lambda found: _visible(found[0]), text)


def _visible(character: str) -> str:
    """A character one would not see, as Python writes it."""
    return ascii(character)[1:-1]


def _table_html(table: Table) -> str:
    def cells(row: list[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        return "".join(f'<{tag}{scope}{"" if column < table.text_columns else " class=figure"}>{_inline(cell)}</{tag}>'
                       for column, cell in enumerate(row))

    rows = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    return (f'<h3 class="caption">{_inline(table.caption)}</h3>'
            f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.caption)}"><table>'
            f"<thead><tr>{cells(table.header, 'th')}</tr></thead>\n"
            f"<tbody>\n{rows}\n</tbody></table></div>")


def _claims_html(claims: list[Claim]) -> str:
    groups = "\n".join(_claim_html(claim) for claim in claims)
    return ('<table class="claims"><thead><tr><th scope="col">Claim</th><th scope="col">Paper</th>'
            '<th scope="col" colspan="2">Ours, at this scale</th><th scope="col">Spread</th>'
            f'<th scope="col">Verdict</th></tr></thead>\n{groups}\n</table>')


def _claim_html(claim: Claim) -> str:
    """One claim as a table body: a row for each line of evidence, then the rule."""
    mark, kind = MARKS[claim.verdict]
    span = len(claim.evidence) + 1
    lines = [f'<td class="measure">{_inline(line.measure)}</td><td class="ours">{_inline(line.ours)}</td>'
             f'<td class="spread">{_inline(line.spread)}</td>' for line in claim.evidence]
    rule = (f'<td class="rule" colspan="3"><b>Rule.</b> {_inline(claim.rule)} '
            f"{_inline(f'`{claim.command}`')}</td>")
    first, *rest = [*lines, rule]
    opening = (f'<th class="claim" scope="rowgroup" rowspan="{span}">{_inline(claim.title)}</th>'
               f'<td class="paper" rowspan="{span}">{_inline(claim.paper)} '
               f'<span class="source">{_inline(claim.source)}</span></td>')
    verdict = (f'<td class="verdict" rowspan="{span}"><span class="badge {kind}">{mark} {claim.verdict}</span> '
               f'<span class="because">{_inline(claim.because)}</span></td>')
    rows = "".join(f"<tr>{row}</tr>" for row in rest)
    return f'<tbody class="{kind}"><tr>{opening}{first}{verdict}</tr>{rows}</tbody>'


# --- Markdown ---------------------------------------------------------------------------------------------------------


def to_markdown(document: Document) -> str:
    """The same sections and tables, without pictures."""
    facts = "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in document.facts)
    parts = [f"# {_plain(document.title)}: profile `{document.profile}`", _plain(document.about),
             f"**{_plain(document.summary)}**", facts]
    for section in document.sections:
        parts.append(f"## {_plain(section.title)}")
        if section.command:
            parts.append(f"Make again: `{section.command}`")
        parts += [text for block in section.blocks if (text := _block_markdown(block))]
    return "\n\n".join(parts) + "\n"


def _panels_markdown(panels: list[Panel]) -> str:
    rows = [[panel.title, panel.axis[0], panel.axis[-1], "; ".join([*(text for _, text in panel.key), *panel.notes])]
            for panel in panels]
    return _rows_markdown([["Measure", "Least", "Largest", "Thresholds"], [":--", "--:", "--:", ":--"], *rows])


def _excerpts_markdown(examples: list[Example]) -> str:
    """The first example, fenced."""
    parts = []
    for example in examples[:1]:
        where = " ".join(filter(None, (example.source, example.path)))
        parts.append(f"{_plain(_seen(where))}: {_plain(_seen(example.value))}")
        if example.excerpt.strip():
            parts.append(_fenced(_seen(example.excerpt)))
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>\n\n{content}\n\n</details>"


def _plain(text: str) -> str:
    """Text that Markdown shows as written: its marks escaped outside `code`, bars everywhere (tables)."""
    pieces = re.split(r"(`[^`]*`)", text.replace("\n", " "))
    escaped = [piece if piece.startswith("`") else _escape_marks(piece) for piece in pieces]
    return "".join(escaped).replace("|", "\\|")


def _escape_marks(text: str) -> str:
    return re.sub(r"([\\*_\[\]#])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _block_markdown(block: Block) -> str:
    match block:
        case Paragraph(text):
            return _plain(text)
        case Figures(plots):
            return "Plots, in `index.html`: " + "; ".join(_plain(plot.title) for plot in plots) + "."
        case ClaimTable(claims):
            return _claims_markdown(claims)
        case Listing(title, text):
            return _folded(title, _fenced(text))
        case Panels(panels):
            return _panels_markdown(panels)
        case Excerpts(examples):
            return _excerpts_markdown(examples)
        case Fold(title, blocks):
            return _folded(title, "\n\n".join(filter(None, map(_block_markdown, blocks))))
        case Table(caption, header, rows, text_columns):
            ruler = [":--" if column < text_columns else "--:" for column in range(len(header))]
            return f"**{_plain(caption)}**\n\n{_rows_markdown([header, ruler, *rows])}"


def _rows_markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)


def _claims_markdown(claims: list[Claim]) -> str:
    rows = [["", "Claim", "Paper", "Ours, at this scale", "", "Spread", "Verdict"], [":--"] * 7]
    rules = []
    for number, claim in enumerate(claims, start=1):
        lines = [[line.measure, line.ours, line.spread] for line in claim.evidence] or [["", "", ""]]
        verdict = f"{MARKS[claim.verdict][0]} {claim.verdict}: {claim.because}"
        rows.append([str(number), claim.title, f"{claim.paper} ({claim.source})", *lines[0], verdict])
        rows += [["", "", "", *line, ""] for line in lines[1:]]
        rules.append(f"{number}. {_plain(claim.rule)} `{claim.command}`")
    return f"{_rows_markdown(rows)}\n\nThe rules behind the verdicts:\n\n" + "\n".join(rules)
