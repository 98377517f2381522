"""The embedded corpus: text that every installation of this project already holds, read in place.

It is the dependency closure of some root distributions, or all of them, and the Python standard library:

    code        Python files without their docstrings
    docs        docstrings of the distributions, their long descriptions, .md, .rst and .txt files
    reference   standard-library docstrings under their signatures, the language reference that `help()` shows,
                and type stubs (.pyi)
    headers     C, C++ and CUDA headers of the distributions

Only what is under permissive licences is read. A wheel's files are the same wherever it is installed, so one lock file
means one corpus; with `all` a machine reads what it has.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from data_pipeline.config import DataError, InstalledSource
from data_pipeline.sources.licenses import is_permissive, license_of
from data_pipeline.sources.piece import Document, PassedOver, PassedOverPiece, Piece, Refusal, batches, seeded
from data_pipeline.sources.python_source import docstring_pages, parse, without_docstrings

STANDARD_LIBRARY_LICENSE = "PSF-2.0"
# Present with a CUDA build of torch only: left out, so that every machine reads the same corpus.
ACCELERATOR_ONLY = re.compile(r"(nvidia|cuda)-.*|triton")
TEST_DIRECTORIES = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
TEST_FILE = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py")
# Written when Python was built, with that machine's paths in it.
BUILD_FILE = re.compile(r"_sysconfigdata.*\.py|sitecustomize\.py")
NOT_PROSE = re.compile(r"(licen[cs]e|copying|notice|authors|requirements|cmakelists|top_level|entry_points).*", re.I)

Kind = Literal["python", "stub", "prose", "description", "topics", "header"]
KIND_OF_SUFFIX: dict[str, Kind] = {
    ".py": "python", ".pyi": "stub", ".md": "prose", ".rst": "prose", ".txt": "prose",
    ".h": "header", ".hpp": "header", ".cuh": "header",
}


class SourceFile(NamedTuple):
    """A file to read: `source` as in the curated table, `path` relative to its installation root, `size` in bytes."""

    source: str
    path: str
    license: str
    kind: Kind
    file: Path
    size: int

    def __str__(self) -> str:
        return f"{self.source}\0{self.path}"


@dataclass(frozen=True)
class InstalledPiece(Piece):
    """Files of installed packages, for some of the domains they have text for."""

    files: tuple[SourceFile, ...]
    domains: frozenset[str]

    def read(self) -> Iterator[Document | Refusal]:
        for file in self.files:
            found = read_documents(file, self.domains)
            if isinstance(found, str):
                domain = next(domain for domain in domains_of(file) if domain in self.domains)
                yield Refusal(domain, found, f"{file.source}, {file.path}")
            else:
                yield from found


def installed_pieces(source: InstalledSource, seed: int, shard_bytes: int) -> list[Piece]:
    """Files that may hold something of the domains asked for, by size. Raises DataError for a missing root."""
    domains = frozenset[str](source.megabytes)
    files = [file for file in installed_files(source.roots, seed) if domains.intersection(domains_of(file))]
    groups = batches(((file, file.size) for file in files), shard_bytes)
    unlisted = tuple(PassedOver("packages", "no list of files (RECORD)", name)
                     for name, package in installed_packages(source.roots).items() if package.files is None)
    pieces: list[Piece] = [InstalledPiece(tuple(group), domains) for group in groups]
    return [PassedOverPiece(unlisted), *pieces] if unlisted else pieces


def installed_files(roots: list[str] | Literal["all"], seed: int) -> list[SourceFile]:
    """Every file of the closure of `roots` and of the standard library, in a seeded order. Raises DataError."""
    packages = installed_packages(roots)
    files = [file for name, package in packages.items() for file in _distribution_files(name, package)]
    return seeded([*files, *_standard_library_files()], seed)


def installed_packages(roots: list[str] | Literal["all"]) -> dict[str, Distribution]:
    """Those that `roots` stands for. Raises DataError."""
    return everything() if roots == "all" else closure(roots)


def everything() -> dict[str, Distribution]:
    """Canonical name -> distribution for all that Python finds here; of two of a name, the one it would import."""
    found: dict[str, Distribution] = {}
    for package in distributions():
        try:
            name = canonicalize_name(package.metadata["Name"] or "")     # half-removed packages have no metadata
        except FileNotFoundError:       # which importlib_metadata, once anything has imported it, says in this way
            continue
        if name and not ACCELERATOR_ONLY.fullmatch(name):
            found.setdefault(name, package)
    return dict(sorted(found.items()))


def closure(roots: list[str]) -> dict[str, Distribution]:
    """Canonical name -> distribution for `roots` and all they require here, by name.

    Markers are evaluated for this interpreter. What a dependency asks for and the lock leaves out (CUDA libraries on a
    CPU machine) is passed over. Raises DataError for a root that is not installed.
    """
    found: dict[str, Distribution] = {}
    for root in roots:
        try:
            distribution(Requirement(root).name)
        except PackageNotFoundError:
            raise DataError(
                f"annotate.sources: `roots` names {root!r}, which is not installed.\n"
                "Install it (`make setup`) or take it out of `roots`, in params.yaml."
            ) from None
    waiting, seen = [Requirement(root) for root in roots], set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen or ACCELERATOR_ONLY.fullmatch(name):
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        extras = requirement.extras or {""}
        for needed in map(Requirement, found[name].requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return dict(sorted(found.items()))


def _distribution_files(name: str, package: Distribution) -> list[SourceFile]:
    license_expression = license_of(package.metadata)
    files = []
    for path in package.files or []:
        kind = KIND_OF_SUFFIX.get(path.suffix)
        if path.name == "METADATA" and len(path.parts) == 2 and path.parts[0].endswith(".dist-info"):
            kind = "description"
        elif ".." in path.parts or any(part.endswith(".dist-info") for part in path.parts):
            continue
        if kind and _wanted(path, kind):
            file = Path(str(package.locate_file(path)))
            files.append(SourceFile(name, str(path), license_expression, kind, file, _size(file)))
    return files


def _standard_library_files() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for directory, folders, names in os.walk(root):
        folders[:] = set(folders) - TEST_DIRECTORIES - {"_bundled"}     # in site-packages there may be any number
        for file in (Path(directory, name) for name in names if name.endswith(".py")):
            path = PurePosixPath(file.relative_to(root).as_posix())
            if _wanted(path, "python"):
                kind: Kind = "topics" if path == PurePosixPath("pydoc_data/topics.py") else "python"
                source = f"python/{PurePosixPath(path.parts[0]).stem}"
                files.append(SourceFile(source, str(path), STANDARD_LIBRARY_LICENSE, kind, file, _size(file)))
    return files


def _size(file: Path) -> int:
    """Bytes on disk; none for a file that its distribution lists and that is gone."""
    return file.stat().st_size if file.exists() else 0


def _wanted(path: PurePosixPath, kind: Kind) -> bool:
    if TEST_DIRECTORIES.intersection(path.parts[:-1]):
        return False
    if kind == "prose":
        return not NOT_PROSE.fullmatch(path.name)
    return not (TEST_FILE.fullmatch(path.name) or BUILD_FILE.fullmatch(path.name))


def domains_of(file: SourceFile) -> tuple[str, ...]:
    """The domains of which a file may hold documents; the first is where a file that cannot be read is counted."""
    match file.kind:
        case "python":
            return "code", "reference" if file.source.startswith("python/") else "docs"
        case "topics" | "stub":
            return ("reference",)
        case "prose" | "description":
            return ("docs",)
        case "header":
            return ("headers",)


def read_documents(file: SourceFile, domains: frozenset[str]) -> list[Document] | str:
    """The documents of `domains` that `file` holds, or the reason it holds none.

    Reasons: `license`, which is not permissive; `unreadable`; `syntax`, where it should be Python and is not.
    """
    if not is_permissive(file.license):
        return "license"
    is_python = file.kind in ("python", "stub", "topics")
    try:
        with tokenize.open(file.file) if is_python else file.file.open(encoding="utf-8-sig") as opened:
            text = opened.read()            # with line feeds alone
    except (OSError, UnicodeDecodeError, LookupError, SyntaxError):
        return "unreadable"
    parts = _parts(file, text, domains.intersection(domains_of(file)))
    if parts is None:
        return "syntax"
    return [Document(part, file.source, path, domain, file.license) for domain, path, part in parts if part.strip()]


def _parts(file: SourceFile, text: str, domains: frozenset[str]) -> list[tuple[str, str, str]] | None:
    """(domain, path, text) of each document of `domains` in `text`; None where it should be Python and is not."""
    if not domains:
        return []
    if file.kind == "description":
        _, _, text = text.partition("\n\n")
    if file.kind not in ("python", "topics"):
        return [(domain, file.path, text) for domain in domains]
    if (tree := parse(text)) is None:
        return None
    if file.kind == "topics":
        return [("reference", f"{file.path}#{name}", topic) for name, topic in _topics(tree)]
    parts = [("code", file.path, without_docstrings(text, tree))] if "code" in domains else []
    for prose in domains - {"code"}:
        module = file.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, page in docstring_pages(tree, module, signatures=prose == "reference"):
            parts.append((prose, f"{file.path}#{name}" if name else file.path, page))
    return parts


def _topics(tree: ast.Module) -> list[tuple[str, str]]:
    """Name and text of the language-reference pages: `topics = {...}`, a literal."""
    literals = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    return sorted(ast.literal_eval(literals[0]).items())
