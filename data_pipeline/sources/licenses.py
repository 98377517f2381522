"""Licence of an installed distribution, from its own metadata, and whether it is permissive.

A licence is written as an SPDX expression. Weak and strong copyleft, and licences nobody named, are not permissive.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageMetadata

UNKNOWN = "unknown"

PERMISSIVE = frozenset({
    "0BSD", "AFL-3.0", "Apache-2.0", "BSD-1-Clause", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "NCSA", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
})

# Free-text `License` fields and the last part of `Classifier: License :: ...`, in lower case.
NAMES = {
    "apache": "Apache-2.0", "apache 2": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache-2": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0", "apache license 2.0": "Apache-2.0", "apache license, version 2.0": "Apache-2.0",
    "apache license version 2.0": "Apache-2.0", "apache software license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "bsd": "BSD-3-Clause", "bsd license": "BSD-3-Clause", "bsd 3-clause": "BSD-3-Clause", "new bsd": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause", "bsd-3": "BSD-3-Clause", "3-clause bsd": "BSD-3-Clause",
    "bsd 2-clause": "BSD-2-Clause", "bsd 2-clause license": "BSD-2-Clause",
    "mit license": "MIT", "the mit license": "MIT", "mit license (mit)": "MIT", "mit no attribution license": "MIT-0",
    "isc license": "ISC", "isc license (iscl)": "ISC", "psf": "PSF-2.0", "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0", "the unlicense (unlicense)": "Unlicense",
    "historical permission notice and disclaimer (hpnd)": "HPND", "zlib/libpng license": "Zlib",
    "university of illinois/ncsa open source license": "NCSA", "boost software license 1.0 (bsl-1.0)": "BSL-1.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
}
NAMES |= {identifier.lower(): identifier for identifier in PERMISSIVE}

_IDENTIFIER = re.compile(r"[A-Za-z0-9.+-]*[A-Za-z][A-Za-z0-9.+-]*")
_TOKEN = re.compile(r"\(|\)|[^\s()]+")


def license_of(metadata: PackageMetadata) -> str:
    """SPDX expression of a distribution's core metadata, or `unknown`.

    `License-Expression` is taken as it is; else a one-line `License` field; else the licence classifiers, all of which
    then apply.
    """
    for expression in metadata.get_all("License-Expression") or []:
        return " ".join(str(expression).split())
    for text in metadata.get_all("License") or []:
        if stated := _from_text(str(text)):
            return stated
    classifiers = [str(value) for value in metadata.get_all("Classifier") or []]
    last_parts = [value.rsplit(" :: ", 1)[-1] for value in classifiers if value.startswith("License :: ")]
    identifiers = [NAMES.get(part.lower(), part) for part in last_parts if part != "OSI Approved"]
    return " AND ".join(dict.fromkeys(identifiers)) or UNKNOWN


def _from_text(text: str) -> str | None:
    """A known name, or an expression of identifiers; None for anything else, such as a licence's full text."""
    text = text.strip()
    if known := NAMES.get(text.lower()):
        return known
    words = [word for word in _TOKEN.findall(text) if word not in "()"]
    operands, operators = words[0::2], words[1::2]
    is_expression = operators and all(word in ("AND", "OR", "WITH") for word in operators)
    if is_expression and len(operands) == len(operators) + 1 and all(map(_IDENTIFIER.fullmatch, operands)):
        return text
    return None


def is_permissive(expression: str) -> bool:
    """Whether an SPDX expression can be met with permissive licences alone.

    `OR` needs one permissive side, `AND` both; an exception (`WITH`) only adds permissions. An expression that cannot
    be read is not permissive.
    """
    tokens = _TOKEN.findall(expression)[::-1]
    try:
        value = _any_of(tokens)
    except (IndexError, ValueError):
        return False
    return value and not tokens


def _any_of(tokens: list[str]) -> bool:
    value = _all_of(tokens)
    while tokens and tokens[-1].upper() == "OR":
        tokens.pop()
        value = _all_of(tokens) or value
    return value


def _all_of(tokens: list[str]) -> bool:
    value = _one(tokens)
    while tokens and tokens[-1].upper() == "AND":
        tokens.pop()
        value = _one(tokens) and value
    return value


def _one(tokens: list[str]) -> bool:
    token = tokens.pop()
    if token == "(":
        value = _any_of(tokens)
        if tokens.pop() != ")":
            raise ValueError("unbalanced brackets")
        return value
    if tokens and tokens[-1].upper() == "WITH":
        tokens.pop()
        _one(tokens)
    if token.upper() in (")", "AND", "OR", "WITH"):
        raise ValueError("no licence where one is due")
    return token in PERMISSIVE
