"""One spelling for the same text: repaired Unicode in NFC, `\\n` line ends, no licence header, no trailing space."""

from __future__ import annotations

import re

import pyarrow as pa
from ftfy import TextFixerConfig, fix_text

from data_pipeline.steps.step import Outcome, Step, with_text

# Repair of mis-decoded bytes and control characters only: quotes, ligatures and wide forms are data in source code.
REPAIR = TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, normalization="NFC"
)
NEEDS_REPAIR = re.compile(r"[^\n\t\x20-\x7e]")
TRAILING_SPACE = re.compile(r"[ \t]+$", re.M)
BLANK_LINES = re.compile(r"\n{4,}")
LEADING_COMMENT = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*")
LICENSE_LINE = re.compile(r"^[^\n]*(?:copyright|licen[cs]ed?\b|all rights reserved|warranty)", re.I | re.M)


def normalise_text(text: str) -> str:
    if NEEDS_REPAIR.search(text):
        text = fix_text(text, REPAIR)
    return BLANK_LINES.sub("\n\n\n", TRAILING_SPACE.sub("", text)).strip("\n") + "\n"


def without_license_header(code: str) -> str:
    """`code` less its opening comment from the first line that speaks of copyright or licence."""
    header = LEADING_COMMENT.match(code)
    if header and (line := LICENSE_LINE.search(code, 0, header.end())):
        return code[: line.start()] + code[header.end() :]
    return code


class Normalise(Step):
    """Licence headers go from code and stubs: thousands of files share them word for word."""

    name = "normalise"

    def apply(self, table: pa.Table, decision: None) -> Outcome:
        texts = []
        for text, domain in zip(table["text"].to_pylist(), table["domain"].to_pylist(), strict=True):
            text = normalise_text(text)
            texts.append(text if domain == "docs" else normalise_text(without_license_header(text)))
        return Outcome(with_text(table, texts), [None if text.strip() else "empty" for text in texts])
