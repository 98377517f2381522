"""A Python file as two texts: its code without docstrings, and its docstrings without code.

A sentence then stands in one domain only: `code` does not repeat what `docs` and `reference` hold.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from itertools import chain

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PAGE_CHARACTERS = 4000      # a page is closed at the first docstring past this size


def parse(text: str) -> ast.Module | None:
    """The syntax tree, or None where `text` is not this interpreter's Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # invalid escapes in other people's strings
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def without_docstrings(text: str, tree: ast.Module) -> str:
    """`text` less the lines of its docstrings; a body that was only a docstring becomes `pass`.

    A docstring that shares a line with other code stays. Lines must end in `\\n`.
    """
    lines = text.encode().split(b"\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | Definition) or (statement := _docstring(node)) is None:
            continue
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        indent, rest = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :].strip()
        if indent.strip() or (rest and not rest.startswith(b"#")):
            continue
        lines[first : last + 1] = [b"\0"] * (last + 1 - first)     # a NUL cannot stand in source: dropped below
        if len(node.body) == 1 and not isinstance(node, ast.Module):
            lines[first] = indent + b"pass"
    return b"\n".join(line for line in lines if line != b"\0").decode()


def docstring_pages(tree: ast.Module, module: str, signatures: bool) -> Iterator[tuple[str, str]]:
    """(name of the first definition or "", text) for each page of a module's docstrings, in source order.

    A page opens with the module's name; each docstring follows the name of what it documents, or its signature.
    """
    name, size = "", 0
    entries: list[str] = []
    module_docstring = ast.get_docstring(tree)
    found = chain([("", module_docstring)] if module_docstring else [], _entries(tree, "", signatures))
    for entry_name, entry in found:
        if size >= PAGE_CHARACTERS:
            yield name, "\n\n".join([module, *entries])
            name, entries, size = entry_name, [], 0
        entries.append(entry)
        size += len(entry)
    if entries:
        yield name, "\n\n".join([module, *entries])


def _entries(parent: ast.Module | ast.ClassDef, prefix: str, signatures: bool) -> Iterator[tuple[str, str]]:
    """Name and text (heading, docstring) of each documented definition in `parent`; local functions are left out."""
    for node in parent.body:
        if not isinstance(node, Definition):
            continue
        name = f"{prefix}{node.name}"
        if docstring := ast.get_docstring(node):
            yield name, f"{_signature(node, name) if signatures else name}\n\n{docstring}"
        if isinstance(node, ast.ClassDef):
            yield from _entries(node, f"{name}.", signatures)


def _signature(node: Definition, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{name}({ast.unparse(node.args)}){returns}"


def _docstring(node: ast.Module | Definition) -> ast.Expr | None:
    """The statement that is the docstring of `node`, if it has one."""
    if node.body and isinstance(first := node.body[0], ast.Expr) and isinstance(first.value, ast.Constant):
        return first if isinstance(first.value.value, str) else None
    return None
