"""Items that ask what stood in the context, at any length: copying, associative recall, a needle in real text.

All three are answered by one digit after a context of `length` tokens, and the digits are drawn so that no choice is
likelier than another by itself:

- copy: random digits; eight of them come again, what followed? (ten choices)
- recall: as many `key = digit` lines as fit, then a key again (ten choices)
- needle: four such lines, all with different digits, spread through held-out text (those four choices)

In `copy` and `needle` the length alone changes; in `recall` the number of pairs grows with it.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from string import ascii_lowercase

from data_pipeline.config import DataError

CUE = 8                         # digits of a copy that come again
NEEDLES = 4
DIGITS = tuple("0123456789")
RESERVED_TOKENS = 16            # for the question, and merges across the seams

Asked = tuple[str, tuple[str, ...], int]            # context, choices, answer
CountTokens = Callable[[str], int]


def copies(length: int, count_tokens: CountTokens, rng: random.Random) -> Iterator[Asked]:
    """Endless `copy` items whose context and answer have at most `length` tokens, and nearly as many."""
    per_digit = count_tokens("0123456789" * 20) / 200
    size = int((length - RESERVED_TOKENS) / per_digit) - CUE
    _check_room(size > 2 * CUE, length)
    while True:
        digits = "".join(rng.choices(DIGITS, k=size))
        start = rng.randrange(size - CUE)
        cue = digits[start : start + CUE]
        if digits.count(cue) == 1:
            yield f"{digits}\n{cue}", DIGITS, int(digits[start + CUE])


def recalls(length: int, count_tokens: CountTokens, rng: random.Random) -> Iterator[Asked]:
    """Endless `recall` items; see `copies`."""
    while True:
        pairs = _longest(_pairs(length // 4, rng), length - RESERVED_TOKENS, count_tokens)
        _check_room(len(pairs) > 1, length)
        key, digit = rng.choice(pairs).split(" = ")
        yield "".join(pairs) + f"{key} =", tuple(f" {digit}" for digit in DIGITS), int(digit)


def needles(
    texts: Sequence[str], length: int, count_tokens: CountTokens, rng: random.Random
) -> Iterator[Asked]:
    """Endless `needle` items in lines of `texts`, which follow one another from a random one on; see `copies`."""
    while True:
        order = rng.sample(texts, len(texts))
        digits = rng.sample(range(10), NEEDLES)
        keys = [line.split(" = ")[0] for line in _pairs(NEEDLES, rng)]
        hidden = [f"{key} = {digit}\n" for key, digit in zip(keys, digits, strict=True)]
        room = length - RESERVED_TOKENS - count_tokens("\n".join(hidden))
        _check_room(room > 0, length)
        lines = _longest(_hay(order, room, count_tokens), room, count_tokens)
        places = sorted(rng.choices(range(len(lines) + 1), k=NEEDLES), reverse=True)
        for place, line in zip(places, hidden, strict=True):
            lines.insert(place, line)
        asked = rng.randrange(NEEDLES)
        yield "".join(lines) + f"{keys[asked]} =", tuple(f" {digit}" for digit in digits), asked


def _hay(texts: Sequence[str], tokens: int, count_tokens: CountTokens) -> list[str]:
    """The lines of as many of `texts` as have `tokens` tokens, each with its end; a paragraph on one line comes in
    pieces."""
    hay: list[str] = []
    missing, piece = tokens, max(1, tokens // 4)            # characters
    for text in texts:
        for line in text.splitlines(keepends=True):
            parts = [line] if len(line) <= tokens else [line[at : at + piece] for at in range(0, len(line), piece)]
            hay += [part if part.endswith("\n") else part + "\n" for part in parts]
        missing -= count_tokens(text)
        if missing <= 0:
            return hay
    raise DataError(
        f"evaluate.context_multiples: all held-out text is {missing} tokens short of a context's {tokens}.\n"
        "Lower the largest of them, or raise annotate.held_out.fraction."
    )


def _check_room(enough: bool, length: int) -> None:
    if not enough:
        raise DataError(
            f"evaluate.context_tokens: {length} tokens do not hold {NEEDLES} lines `key = digit` and a question.\n"
            "Raise it."
        )


def _pairs(count: int, rng: random.Random) -> list[str]:
    """`count` lines `key = digit` with different keys and random digits."""
    return [f"{key} = {rng.choice(DIGITS)}\n" for key in draw_keys(count, rng)]


def draw_keys(count: int, rng: random.Random) -> list[str]:
    """`count` different keys of four letters."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys["".join(rng.choices(ascii_lowercase, k=4))] = None
    return list(keys)


def _longest(lines: list[str], tokens: int, count_tokens: CountTokens) -> list[str]:
    """As many of the first `lines` as have at most `tokens` tokens together, by bisection."""
    def fit(size: int) -> bool:
        return count_tokens("".join(lines[:size])) <= tokens

    return lines[: len(lines) - bisect_left(range(len(lines), 0, -1), True, key=fit)]
