"""Characters of UTF-8 text in compiled code, and the classes that rules ask about."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from data_pipeline.text.words import FOLDED, FOLDING, IDEOGRAPH, SYLLABIC, UInt8, code_points, decode
from data_pipeline.text.words import MARK as MARK_KIND

Classes = NDArray[np.uint16]

ZERO: Any = np.int64(0)         # a plain 0 is a type of its own in Numba: what is called with it is compiled twice

# Bits of a character's class.
SPACE, LETTER, TERMINAL, DIGIT, PLAIN, BLANK, BRACKET, ENCODED, QUOTE, BULLET, ELLIPSIS, MARK, BLANKLESS = (
    1 << bit for bit in range(13))
# Sentence_Terminal of Unicode, as FineWeb has it: hexadecimal code points and ranges.
TERMINALS = (
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6 "
    "17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 "
    "2e2e 2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb "
    "fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 "
    "111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 "
    "1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 16b37-16b38 "
    "16b44 16e98 1bc9f 1da88"
)


def _character_classes() -> Classes:
    """Class of every code point, shape (0x110000,)."""
    characters = np.arange(0x110000, dtype=np.uint32).view("U1")
    classes = np.strings.isspace(characters) * SPACE | np.strings.isalpha(characters) * LETTER
    classes |= np.strings.isdecimal(characters) * DIGIT | np.strings.isalnum(characters) * PLAIN
    classes[:FOLDED] |= np.where(FOLDING.kinds == MARK_KIND, MARK | PLAIN, 0)
    classes[:FOLDED] |= np.isin(FOLDING.kinds, (IDEOGRAPH, SYLLABIC)) * BLANKLESS
    classes[FOLDED:] |= np.where(classes[FOLDED:] & LETTER, BLANKLESS, 0)           # ideographs
    classes[code_points(TERMINALS)] |= TERMINAL | PLAIN
    quotes = "".join(chr(code) for code in range(0x3000) if unicodedata.category(chr(code)) in ("Pi", "Pf"))
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for bit, members in ((PLAIN, "\n,،、，､"), (BLANK, "\t\n\r\b "), (BRACKET, "{}⟨⟩[]()（）［］｛｝【】《》〈〉"),
                         (ENCODED, letters + "0123456789+/="), (QUOTE, quotes + "\"'」』﹂﹄＂＇"), (ELLIPSIS, "…⋯︙"),
                         (BULLET, "-–•‣⁃∙·・◦▪▫■□●○◆◇▶►❖➢➤✓✔★☆※")):
        classes[[ord(character) for character in members]] |= bit
    return classes.astype(np.uint16)


CLASSES = _character_classes()


@njit(cache=True, nogil=True)
def last_class(text: UInt8, classes: Classes, start: int, end: int) -> tuple[int, int]:
    """Class of the character that ends at `end`, and where it begins."""
    position = end - 1
    while position > start and text[position] & 0xC0 == 0x80:
        position -= 1
    return classes[decode(text, position)[0]], position
