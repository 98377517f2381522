"""The language of a text by CLD2, whose model lies in the package: no download."""

from __future__ import annotations

import re
from functools import cache

import pycld2
from justext import get_stoplist, get_stoplists

UNKNOWN = "un"
# Characters that CLD2 takes for invalid UTF-8: control characters and Unicode's noncharacters.
REFUSED = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef" + "".join(chr(plane << 16 | 0xFFFE) + chr(plane << 16 | 0xFFFF)
                                                             for plane in range(17)) + "]"
)
CURRENT_CODES = {"iw": "he", "jw": "jv", "in": "id", "mo": "ro"}         # codes ISO 639-1 has withdrawn


def detect(text: str) -> tuple[str, float]:
    """ISO 639-1 code (639-2 or -3 for languages without one) of most of the text, and the share of its bytes.

    CLD2 looks at letters only; text with too few of them, or in no language it knows, is "un" with share 0.
    """
    return languages(text)[0]


def languages(text: str, markup: bool = False) -> list[tuple[str, float]]:
    """Up to three languages, the commonest first, each as `detect` has it.

    Of `markup` (HTML) CLD2 reads what stands between tags, scripts and styles left out.
    """
    try:
        details = pycld2.detect(text, isPlainText=not markup)[2]
    except pycld2.error:
        details = pycld2.detect(REFUSED.sub(" ", text), isPlainText=not markup)[2]
    return [_language(code.split("-")[0], percent) for _, code, percent, _ in details]


@cache
def codes() -> frozenset[str]:
    """All that `detect` can answer."""
    return frozenset(_language(code.split("-")[0], 100)[0] for _, code in pycld2.LANGUAGES)


@cache
def stop_words(code: str) -> frozenset[str] | None:
    """jusText's stop words of a language, None where it has no list."""
    name = _stop_lists().get(code)
    return None if name is None else get_stoplist(name)


@cache
def _stop_lists() -> dict[str, str]:
    """The name of jusText's stop list of each language, by ISO code, where it has one."""
    spelt = {"NORWEGIAN": "Norwegian_Bokmal", "NORWEGIAN_N": "Norwegian_Nynorsk", "FRISIAN": "West_Frisian",
             "HAITIAN_CREOLE": "Haitian", "NEWARI": "Newar", "WARAY_PHILIPPINES": "Waray_Waray"}
    named = {code: spelt.get(name, name.title()) for name, code in pycld2.LANGUAGES}
    there = get_stoplists()
    return {CURRENT_CODES.get(code, code): name for code, name in named.items() if name in there}


def _language(code: str, percent: int) -> tuple[str, float]:
    if code in (UNKNOWN, "xx", "xxx") or code.startswith("zz"):           # scripts and jokes
        return UNKNOWN, 0.0
    return CURRENT_CODES.get(code, code), percent / 100
