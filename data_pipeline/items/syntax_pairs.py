"""Lines of Python and the same lines with a fault that no continuation can mend."""

from __future__ import annotations

import ast
import codeop
import io
import keyword
import random
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

OPENING, CLOSING = "([{", ")]}"
OPERATORS = ("=", "==", "!=", "<", ">", "+", "-", "*", "/", "%", "->", ":=", "+=", "|", "&", "@")
KEYWORDS = tuple(sorted({*keyword.kwlist} - {"True", "False", "None"}))
TRIED = 6                       # faults of a kind tried on a line


def faulty_lines(
    text: str, used: Counter[str], rng: random.Random, admissible: Callable[[int, str], bool]
) -> Iterator[tuple[int, str]]:
    """(row from 0, that line with one fault) for lines of the module `text` in random order; none if it is no Python.

    With the fault, what stands up to and on the line is no Python whatever follows; without it, it is. `used` counts
    kinds of fault and is kept level: the kind used least is tried first. `admissible(row, faulty line)` may refuse one.
    """
    lines = text.split("\n")
    for top, row in _one_line_statements(text, rng):
        wrong = _ungrammatical("\n".join(lines[top:row]), lines[row], used, rng, partial(admissible, row))
        if wrong is not None:
            yield row, wrong


def _one_line_statements(text: str, rng: random.Random) -> list[tuple[int, int]]:
    """(first row of the enclosing top-level statement, row), from 0, of statements or headers that fill one line."""
    if "\r" in text or "\f" in text:                    # other line ends: rows would not match
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # dubious escapes
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return []
    lines = text.split("\n")
    rows = []
    for statement in tree.body:
        decorators = getattr(statement, "decorator_list", [])
        top = min(node.lineno for node in [statement, *decorators]) - 1
        for node in ast.walk(statement):
            if isinstance(node, ast.stmt) and node.lineno - 1 > top:
                body = getattr(node, "body", None)
                header = body and body[0].lineno > node.lineno and lines[node.lineno - 1].endswith(":")
                if header or (not body and node.end_lineno == node.lineno):
                    rows.append((top, node.lineno - 1))
    return rng.sample(rows, len(rows))


def _ungrammatical(
    before: str, line: str, used: Counter[str], rng: random.Random, admissible: Callable[[str], bool]
) -> str | None:
    """`line` with one fault after which no Python can follow `before`."""
    try:
        tokens = _tokens(line)
    except (tokenize.TokenError, SyntaxError):
        return None
    for kind in sorted(FAULTS, key=lambda kind: (used[kind], kind)):
        changed = FAULTS[kind](line, tokens)
        for wrong in rng.sample(changed, min(TRIED, len(changed))):
            if wrong != line and admissible(wrong) and not _can_go_on(f"{before}\n{wrong}\n"):
                used[kind] += 1
                return wrong if _can_go_on(f"{before}\n{line}\n") else None
    return None


def _can_go_on(source: str) -> bool:
    """Whether `source` is Python, or the beginning of Python, to the parser (which lets `return` stand anywhere)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(source, "<line>", "exec", ast.PyCF_ONLY_AST | codeop.Compile().flags)
        except SyntaxError as error:
            return error.msg == "incomplete input"
        except ValueError:                              # a number too long to convert
            return False
    return True


@dataclass(frozen=True)
class Token:
    """A token of a line of Python, and its place: line[start:end]."""

    text: str
    start: int
    end: int


def _tokens(line: str) -> list[Token]:
    indent = len(line) - len(line.lstrip())
    skipped = (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.COMMENT)
    return [
        Token(token.string, token.start[1] + indent, token.end[1] + indent)
        for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline)
        if token.type not in skipped
    ]


def _replaced(line: str, tokens: list[Token], alternatives: Callable[[str], Iterable[str]]) -> list[str]:
    """`line` with each token in turn replaced by each of its alternatives."""
    return [
        line[: token.start] + other + line[token.end :]
        for token in tokens
        for other in alternatives(token.text)
        if other != token.text
    ]


def _wrong_bracket(line: str, tokens: list[Token]) -> list[str]:
    sides = (OPENING, CLOSING)
    return _replaced(line, tokens, lambda text: next((side for side in sides if text in side), ""))


def _wrong_keyword(line: str, tokens: list[Token]) -> list[str]:
    return _replaced(line, tokens, lambda text: KEYWORDS if text in KEYWORDS else ())


def _wrong_operator(line: str, tokens: list[Token]) -> list[str]:
    return _replaced(line, tokens, lambda text: OPERATORS if text in OPERATORS else ())


def _wrong_indentation(line: str, tokens: list[Token]) -> list[str]:
    return ["    " + line, line.removeprefix("    ")]


def _swapped(line: str, tokens: list[Token]) -> list[str]:
    """`line` with two neighbouring tokens exchanged."""
    return [
        line[: a.start] + b.text + line[a.end : b.start] + a.text + line[b.end :]
        for a, b in pairwise(tokens)
    ]


FAULTS: dict[str, Callable[[str, list[Token]], list[str]]] = {
    "bracket": _wrong_bracket,
    "indentation": _wrong_indentation,
    "keyword": _wrong_keyword,
    "operator": _wrong_operator,
    "order": _swapped,
}
