"""Normalisation against ftfy and regular expressions applied to everything."""

import random
import re

import polars as pl
import pyarrow as pa
import pytest
from ftfy import fix_text
from ftfy.badness import BADNESS_RE, is_bad

from data_pipeline.annotate.normalise import MAYBE_BAD, REPAIR, Normalise, without_license_header
from data_pipeline.annotate.step import SCHEMA, text_id
from tests.data_pipeline.real_texts import HOSTILE, STDLIB, real_texts

# What repairs look for, and what lies beside it.
FRAGMENTS = [
    "word", " ", "  ", "\t", "\n", "\n\n\n", "\r", "\r\n", "\x00", "\x1b[31m", "\x0b", "\x0c", "\x7f", "\x85", "\x9f",
    "\u2028", "\ufeff", "\ufffd", "\ufff9", "\u2066", "\xa0", "\u3000", "é", "e\u0301", "\u212b", "schÃ¶n", "â€™",
    "â€œ", "Ã", "Â ", "ð\x9f\x98\x80", "“’ﬁ", "ＡＢ", "日本", "\U0001f600", "&amp;", "#", "Å", "Ã©",
]


def plainly(text: str) -> str:
    text = re.sub(r"[ \t]+$", "", fix_text(text, REPAIR), flags=re.M)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def apply(*texts: str, domain: str = "web") -> pa.Table:
    return Normalise().apply(pa.Table.from_pylist([{"text": text, "domain": domain} for text in texts], SCHEMA))


def test_looking_before_repairing_changes_no_result():
    chance = random.Random(0)
    texts = ["".join(chance.choices(FRAGMENTS, k=chance.randrange(1, 12))) for _ in range(3000)]
    texts += [text for text in real_texts() + HOSTILE if len(text) < 100_000]
    assert sum(plainly(text) != text for text in texts) > 1000
    assert apply(*texts)["text"].to_pylist() == [plainly(text) for text in texts]


def test_the_quick_look_passes_over_nothing_bad():
    """Of texts of what ftfy looks for, and of whole texts decoded wrongly."""
    chance = random.Random(0)
    signs = sorted({*BADNESS_RE.pattern, *"abc XYZ\n\t\x1c\x85\u0301²"})
    texts = ["".join(chance.choices(signs, k=chance.randrange(1, 9))) for _ in range(20_000)]
    texts += [text.encode().decode(encoding, "replace") for text in HOSTILE[-14:] for encoding in ("cp1252", "cp1251")]
    looked = pl.Series(texts).str.contains(MAYBE_BAD).to_list()
    bad = list(map(is_bad, texts))
    assert sum(bad) > 5000 and all(seen or not there for seen, there in zip(looked, bad, strict=True))
    whole = ["Größe, naïve café", "日本語のテキスト。", "Привет, мир", "ภาษาไทย"]
    assert not pl.Series(whole).str.contains(MAYBE_BAD).any()


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("schÃ¶n \u0065\u0301\r\nnext", "schön é\nnext\n"),
        ("a  \n\n\n\n\n\nb\t\n", "a\n\n\nb\n"),
        ("\ufeffx = '“’ﬁ' &amp;", "x = '“’ﬁ' &amp;\n"),        # quotes and ligatures are data in code
        (" \n\n", "\n"),
        ("", "\n"),
        ("\n\n  indented\n", "  indented\n"),
    ],
)
def test_normalise(text, normal):
    table = apply(text)
    assert table["text"].to_pylist() == [normal] and table["id"].to_pylist() == [text_id(normal)]


NOTICE = "Copyright 2020 Someone\n{0}Licensed under MIT\n"


@pytest.mark.parametrize(
    ("header", "left"),
    [
        ("#!/usr/bin/env python\n# A tool.\n# " + NOTICE.format("# ") + "\n", "#!/usr/bin/env python\n# A tool.\n"),
        ("# About rights\n\n", "# About rights\n\n"),
        ("// " + NOTICE.format("// ") + "\n", ""),
        ("/*\n * A tool.\n * " + NOTICE.format(" * ") + " */\n\n", ""),
        ("/* A tool. */\n/* All rights reserved. */\n", "/* A tool. */\n"),
        ("#ifndef X\n#define COPYRIGHT 1\n", "#ifndef X\n#define COPYRIGHT 1\n"),
        ("// Copyright\n#include <x>\n", "#include <x>\n"),
        ("/* Copyright, and never closed\n", "/* Copyright, and never closed\n"),
        ("'''Licence'''\n# Copyright\n", "'''Licence'''\n# Copyright\n"),
    ],
)
def test_license_headers_go_from_code(header, left):
    code = "x = 1  # Copyright holder\n"
    assert without_license_header(header + code) == left + code
    for domain in ("code", "code_c", "headers"):
        assert apply(header + code, domain=domain)["text"].to_pylist() == [left + code]
    assert apply(header + code, domain="docs")["text"].to_pylist() == [header + code]


def test_license_headers_of_the_standard_library():
    paths = [path for path in sorted(STDLIB.glob("[a-z]*/*.py"))[::4] if path.stat().st_size < 60_000]
    texts = [path.read_text(encoding="utf-8") for path in paths if not {"test", "site-packages"} & set(path.parts)]
    shortened = [text for text in texts if without_license_header(text) != text]
    assert len(shortened) > 5
    for text in shortened:
        kept = without_license_header(text)
        compile(kept, "kept", "exec", dont_inherit=True)
        opening = re.match(r"(?:[ \t]*(?:#[^\n]*)?\n)*", kept)
        assert opening and not re.search(r"copyright|licen[cs]ed?\b|all rights reserved|warranty", opening[0], re.I)


def test_hostile_lengths():
    long = " " * 300_000 + "é" * 300_000 + "\t " * 300_000 + "\n" * 300_000 + "/*" * 100_000
    assert apply(long, domain="code")["text"].to_pylist() == [
        " " * 300_000 + "é" * 300_000 + "\n\n\n" + "/*" * 100_000 + "\n"
    ]
