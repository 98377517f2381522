"""Words and runs of words in plain Python, from the definition: what the compiled code is held against."""

import unicodedata

import regex

BLANKLESS = {12: r"\p{Han}\p{Hiragana}\p{Katakana}ー", 6: r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"}
OTHER = rf"[\p{{M}}[[\p{{L}}\p{{N}}]--[{''.join(BLANKLESS.values())}]]]"
WORD = regex.compile(
    "|".join(rf"(?P<size{size}>[[{scripts}]&&[\p{{L}}\p{{N}}]]\p{{M}}*)" for size, scripts in BLANKLESS.items())
    + rf"|{OTHER}(?:\p{{Pc}}*{OTHER})*", regex.V1)
BLANKLESS_LETTER = regex.compile(rf"[[{''.join(BLANKLESS.values())}]&&[\p{{L}}\p{{N}}]]", regex.V1)
AFTER_LETTER = regex.compile(rf"(?:{BLANKLESS_LETTER.pattern}|\p{{M}})\Z", regex.V1)


def counted_words(text: str) -> list[str]:
    """The words that are counted: between white space, and in runs of a script without blanks each four letters."""
    words = []
    for run in text.split():
        start = letters = 0
        for index, character in enumerate(run if BLANKLESS_LETTER.search(run) else ""):
            if not BLANKLESS_LETTER.match(character):
                continue
            word = run[start:index]
            begins = letters == 4 or not AFTER_LETTER.search(word[-2:])
            if word and (begins if letters else any(map(str.isalpha, word))):
                words.append(word)
                start, letters = index, 0
            letters += 1
        words.append(run[start:])
    return words


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
