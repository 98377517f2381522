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
from dataclasses import dataclass

LEAST_DOCSTRING = 40            # characters
LONGEST_SIGNATURE = 80
TRIED_NAMES = 160
WORD = re.compile(r"[a-z_][a-z0-9_]+")
NOT_ASKED = {"self", "cls"}


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
        return f"({ast.unparse(self.arguments)}):\n"

    def context(self, size: int) -> str:
        """The docstring and `def NAME`, the docstring cut to its first whole words of `size` characters."""
        shown = self.docstring if len(self.docstring) <= size else self.docstring[:size].rsplit(None, 1)[0]
        return f'"""{shown}"""\n\ndef {self.name}'


def functions(document: str, text: str) -> list[Function]:
    """Those of the module `text` that have a docstring and a parameter to ask for; none if it is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # dubious escapes
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node) or ""
            function = Function(document, node.lineno - 1, node.name, docstring, node.args)
            if len(docstring) >= LEAST_DOCSTRING and function.parameters \
                    and len(function.signature) <= LONGEST_SIGNATURE:
                found.append(function)
    return found


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
