"""Python functions as questions: which parameters does a function with this docstring take?"""

from __future__ import annotations

import ast
import copy
import keyword
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

LEAST_DOCSTRING = 40            # characters
LONGEST_SIGNATURE = 80
TRIED_NAMES = 160
WORD = re.compile(r"[a-z_][a-z0-9_]+")
NOT_ASKED = {"self", "cls"}
HEADING = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))( -> .+)?")       # of an entry in a page of docstrings


@dataclass(frozen=True)
class Function:
    """A function of a document: `row` from 0, its name, its docstring, its parameters."""

    document: str
    row: int
    name: str
    docstring: str
    arguments: ast.arguments

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that may be asked."""
        plain = [*self.arguments.posonlyargs, *self.arguments.args, *self.arguments.kwonlyargs]
        return [argument.arg for argument in plain if argument.arg not in NOT_ASKED and len(argument.arg) > 1]

    @property
    def signature(self) -> str:
        """Its parameters as source text, to the end of the line."""
        return f"({ast.unparse(self.arguments)}):\n"

    def context(self, size: int) -> str:
        """The docstring and `def NAME`, the docstring cut to its first whole words of `size` characters."""
        shown = self.docstring if len(self.docstring) <= size else self.docstring[:size].rsplit(None, 1)[0]
        return f'"""{shown}"""\n\ndef {self.name}'


def functions(document: str, text: str) -> list[Function]:
    """Those of a Python module or of a page of docstrings (`sources.python_source`) that have a docstring and a
    parameter to ask for."""
    found = _of_module(document, text) or _of_page(document, text)
    return [
        function for function in found
        if len(function.docstring) >= LEAST_DOCSTRING and function.parameters
        and len(function.signature) <= LONGEST_SIGNATURE
    ]


def _of_module(document: str, text: str) -> list[Function]:
    return [
        Function(document, node.lineno - 1, node.name, ast.get_docstring(node) or "", node.args)
        for node in ast.walk(_parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def _of_page(document: str, text: str) -> list[Function]:
    """A page's entries are paragraphs: `name(parameters)`, then the docstring, up to the next such heading."""
    found: list[Function] = []
    row = 0
    for paragraph in text.split("\n\n"):
        heading = HEADING.fullmatch(paragraph)
        body = _parse(f"def f{heading[2]}: pass").body if heading else []
        if heading and body and isinstance(body[0], ast.FunctionDef):
            found.append(Function(document, row, heading[1].rpartition(".")[2], "", body[0].args))
        elif found:
            last = found[-1]
            found[-1] = replace(last, docstring=f"{last.docstring}\n\n{paragraph}".strip())
        row += paragraph.count("\n") + 2
    return found


def _parse(text: str) -> ast.Module:
    """The syntax tree; an empty one of what is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # dubious escapes
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ast.Module([], [])


def questions(
    asked: Sequence[Function],
    context_size: int,
    choose: Callable[[str, str, list[str]], tuple[str, ...]],
    rng: random.Random,
) -> Iterator[tuple[Function, str, tuple[str, ...]]]:
    """(function, context, choices with the true signature first) for those with two choices or more.

    A wrong choice is the signature with one parameter renamed, to a word as long that stands in the docstring or names
    a parameter elsewhere in `asked`; `choose(context, true, others)` picks the true one and up to three of them.
    """
    pool: dict[int, set[str]] = defaultdict(set)
    for function in asked:
        for name in function.parameters:
            pool[len(name)].add(name)
    for function in rng.sample(asked, len(asked)):
        name, context = rng.choice(function.parameters), function.context(context_size)
        taken = set(_names(function.arguments))
        words = {word for word in WORD.findall(context) if len(word) == len(name) and not keyword.iskeyword(word)}
        near = sorted(words - taken)
        far = sorted(pool[len(name)] - taken - set(near))
        names = rng.sample(near, len(near)) + rng.sample(far, len(far))
        others = [_renamed(function.arguments, name, other) for other in names[:TRIED_NAMES]]
        choices = choose(context, function.signature, others)
        if len(choices) > 1:
            yield function, context, choices


def _names(arguments: ast.arguments) -> list[str]:
    everything = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
    return [argument.arg for argument in everything if argument is not None]


def _renamed(arguments: ast.arguments, name: str, other: str) -> str:
    changed = copy.deepcopy(arguments)
    for node in ast.walk(changed):
        if isinstance(node, ast.arg) and node.arg == name:
            node.arg = other
    return f"({ast.unparse(changed)}):\n"
