"""One spelling for the same text: repaired Unicode in NFC, `\\n` line ends, no licence header, no trailing space.

Most texts need little of this, and looking is cheaper than doing: each repair runs where there is something for it.
"""

from __future__ import annotations

import re
from unicodedata import is_normalized

import polars as pl
import pyarrow as pa
from ftfy import TextFixerConfig, fix_text
from ftfy.badness import BADNESS_RE, is_bad

from data_pipeline.annotate.step import Step, with_text

CODE_DOMAINS = frozenset({"code", "headers", "reference"})         # by what a domain's name begins with
# Repair of mis-decoded bytes and control characters only: quotes, ligatures and wide forms are data in source code.
REPAIR = TextFixerConfig(
    explain=False, unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False,
    normalization="NFC",
)
SIMPLE = r"^[\n\t\x20-\x7e]*$"
# All that ftfy takes out or replaces whether or not the text looks mis-decoded, and a little more.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u2060-\u206f\ufeff\ufff0-\uffff]")
TRAILING_SPACE = re.compile(r"(?<![ \t])[ \t]+$", re.M)
BLANK_LINES = re.compile(r"\n{4,}")
# Lines of comment and blank lines; a hash before a word of the C preprocessor begins no comment.
LEADING_COMMENT = re.compile(
    r"(?:[ \t]*(?:#(?!include|define|undef|if|pragma|error|import)[^\n]*|//[^\n]*|/\*[\s\S]*?\*/[ \t]*)?\n)*+"
)
LICENSE_LINE = re.compile(r"^[^\n]*(?:copyright|licen[cs]ed?\b|all rights reserved|warranty)", re.I | re.M)


def _in_rust(verbose: str) -> str:
    """A verbose regular expression without white space and remarks, in Rust's grammar; it finds no less.

    White space and word characters are not the same there and stand for any, and a text begins at any line.
    """
    def plain(part: re.Match[str]) -> str:
        if members := part["members"]:
            return re.sub(r"[\[&~]", r"\\\g<0>", members).replace("\\[", "[", 1)
        return "(?s:.)" if part[0].startswith("\\") else ""

    return "(?m)" + re.sub(r"(?P<members>\[(?:\\.|[^\]])*\])|\\[sw]|\s+|#[^\n]*", plain, verbose)


MAYBE_BAD = _in_rust(BADNESS_RE.pattern)        # a hundred times as fast to look for


def _repair(text: str, maybe_bad: bool = True) -> str:
    """ftfy's repair, where there is anything to repair. `maybe_bad`: whether MAYBE_BAD is found."""
    if not text.isascii():
        unusual = "\n".join(line for line in text.split("\n") if not line.isascii())
        if not is_normalized("NFC", unusual) or (maybe_bad and is_bad(unusual)):
            return fix_text(text, REPAIR)
    return fix_text(text, REPAIR) if CONTROL.search(text) else text


def _tidy(text: str) -> str:
    """At most two blank lines in a row, no trailing space, one line feed at the end."""
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = TRAILING_SPACE.sub("", text)
    if "\n\n\n\n" in text:
        text = BLANK_LINES.sub("\n\n\n", text)
    return text.strip("\n") + "\n"


def without_license_header(code: str) -> str:
    """`code` less its opening comment from the first line that speaks of copyright or licence."""
    header = LEADING_COMMENT.match(code)
    if not header or not (line := LICENSE_LINE.search(code, 0, header.end())):
        return code
    start = line.start()
    opening = code.rfind("/*", 0, line.end())
    if opening > code.rfind("*/", 0, start):        # inside /* */: the comment goes whole
        start = opening
    return code[:start] + code[header.end() :]


class Normalise(Step):
    """Licence headers go from code: thousands of files share them word for word.

    Text with nothing but white space comes out as "\\n".
    """

    name = "normalise"

    def apply(self, table: pa.Table) -> pa.Table:
        frame = pl.DataFrame({"text": pl.Series(table["text"])}).with_row_index()
        unusual = frame.filter(~pl.col("text").str.contains(SIMPLE))
        maybe_bad = set(unusual.filter(pl.col("text").str.contains(MAYBE_BAD))["index"])
        others = set(unusual["index"])
        texts = []
        documents = zip(table["text"].to_pylist(), table["domain"].to_pylist(), strict=True)
        for index, (text, domain) in enumerate(documents):
            text = _tidy(_repair(text, index in maybe_bad) if index in others else text)
            if domain.split("_")[0] in CODE_DOMAINS and (code := without_license_header(text)) is not text:
                text = _tidy(code)
            texts.append(text)
        return with_text(table, texts)
