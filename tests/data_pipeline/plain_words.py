"""Words and runs of words in plain Python, from the definition: what the compiled code is held against."""

import unicodedata

import regex

BLANKLESS = {12: r"\p{Han}\p{Hiragana}\p{Katakana}ー", 6: r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"}
OTHER = rf"[\p{{M}}[[\p{{L}}\p{{N}}]--[{''.join(BLANKLESS.values())}]]]"
WORD = regex.compile(
    "|".join(rf"(?P<size{size}>[[{scripts}]&&[\p{{L}}\p{{N}}]]\p{{M}}*)" for size, scripts in BLANKLESS.items())
    + rf"|{OTHER}(?:\p{{Pc}}*{OTHER})*", regex.V1)


def seen(text: str) -> str:
    """`text` less what is not seen; half-width voiced sound marks are marks."""
    text = text.translate({0x2BC: "'", 0xFF9E: "\u3099", 0xFF9F: "\u309a"})
    return regex.sub(r"(?!\u200b)[\p{Cf}\p{Default_Ignorable_Code_Point}\u0640]", "", text)


def folded(word: str) -> str:
    """A word without case, composition and compatibility forms."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", seen(word)).casefold())
    return regex.sub(r"[^\p{L}\p{M}\p{N}\p{Pc}]", "", plain)


def words_of_text(text: str) -> list[tuple[str, int]]:
    """Each word, folded, and its size in twentieths of a word."""
    return [(folded(match[0]), int(match.lastgroup.removeprefix("size")) if match.lastgroup else 20)
            for match in WORD.finditer(seen(text))]


def runs(text: str, n: int) -> list[tuple[str, ...]]:
    """From each word on the shortest run that counts as n words, where enough follows."""
    words, found = words_of_text(text), []
    for start in range(len(words)):
        size, end = 0, start
        while size < 20 * n and end < len(words):
            size += words[end][1]
            end += 1
        if size < 20 * n:
            break
        found.append(tuple(word for word, _ in words[start:end]))
    return found
