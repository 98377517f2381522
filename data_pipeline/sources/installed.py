"""The embedded corpus: text that every installation of this project already holds, read in place.

It is the dependency closure of some root distributions and the Python standard library:

    code        Python files without their docstrings
    docs        docstrings of the distributions, their long descriptions, .md, .rst and .txt files
    reference   standard-library docstrings under their signatures, the language reference that `help()` shows,
                and type stubs (.pyi)

A wheel's files are the same wherever it is installed, so one lock file means one corpus.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sysconfig
import tokenize
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import xxhash
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from data_pipeline.config import DataError
from data_pipeline.sources.licenses import license_of
from data_pipeline.sources.python_source import docstring_pages, parse, without_docstrings

STANDARD_LIBRARY_LICENSE = "PSF-2.0"
# Present with a CUDA build of torch only: left out, so that every machine reads the same corpus.
ACCELERATOR_ONLY = re.compile(r"(nvidia|cuda)-.*|triton")
TEST_DIRECTORIES = frozenset({"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"})
TEST_FILE = re.compile(r"test_.*\.py|.*_test\.py|conftest\.py")
# Written when Python was built, with that machine's paths in it.
BUILD_FILE = re.compile(r"_sysconfigdata.*\.py|sitecustomize\.py")
NOT_PROSE = re.compile(r"(licen[cs]e|copying|notice|authors|requirements|cmakelists|top_level|entry_points).*", re.I)

Kind = Literal["python", "stub", "prose", "description", "topics"]
KIND_OF_SUFFIX: dict[str, Kind] = {".py": "python", ".pyi": "stub", ".md": "prose", ".rst": "prose", ".txt": "prose"}


class SourceFile(NamedTuple):
    """A file to read: `source` as in the curated table, `path` relative to its installation root."""

    source: str
    path: str
    license: str
    kind: Kind
    file: Path


class Document(NamedTuple):
    text: str
    source: str
    path: str
    domain: str
    license: str


@dataclass(frozen=True)
class Corpus:
    """Files in a seeded order that depends on their names alone, and a digest of what is installed."""

    files: list[SourceFile]
    digest: str


def corpus(roots: list[str], seed: int) -> Corpus:
    """Every file of the closure of `roots` and of the standard library. Raises DataError for a missing root."""
    found = closure(roots)
    files = [file for name, package in found.items() for file in _distribution_files(name, package)]
    files += _standard_library_files()
    versions = sorted(f"{name}=={package.version}" for name, package in found.items())
    versions.append(f"python=={sysconfig.get_config_var('py_version')}")

    def order(file: SourceFile) -> tuple[int, SourceFile]:
        return xxhash.xxh3_64_intdigest(f"{file.source}\0{file.path}".encode(), seed=seed & (2**64 - 1)), file

    return Corpus(sorted(files, key=order), hashlib.sha256("\n".join(versions).encode()).hexdigest())


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
                f"params.yaml: `curate.roots` names {root!r}, which is not installed.\n"
                "Install it (`make setup`) or take it out of curate.roots."
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
            files.append(SourceFile(name, str(path), license_expression, kind, Path(str(package.locate_file(path)))))
    return files


def _standard_library_files() -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for file in root.rglob("*.py"):
        path = PurePosixPath(file.relative_to(root).as_posix())
        if _wanted(path, "python") and "_bundled" not in path.parts:
            kind: Kind = "topics" if path == PurePosixPath("pydoc_data/topics.py") else "python"
            source = f"python/{PurePosixPath(path.parts[0]).stem}"
            files.append(SourceFile(source, str(path), STANDARD_LIBRARY_LICENSE, kind, file))
    return files


def _wanted(path: PurePosixPath, kind: Kind) -> bool:
    if TEST_DIRECTORIES.intersection(path.parts[:-1]):
        return False
    if kind == "prose":
        return not NOT_PROSE.fullmatch(path.name)
    return not (TEST_FILE.fullmatch(path.name) or BUILD_FILE.fullmatch(path.name))


def read_documents(file: SourceFile, domains: frozenset[str]) -> list[Document] | str:
    """The documents of `domains` that `file` holds, or the reason it holds none: `unreadable`, `syntax`."""
    try:
        data = file.file.read_bytes()
        text = _decode(data) if file.kind != "description" else data.decode()
    except (OSError, UnicodeDecodeError, SyntaxError):
        return "unreadable"
    parts = _parts(file, text, domains)
    if parts is None:
        return "syntax"
    return [Document(part, file.source, path, domain, file.license) for domain, path, part in parts if part.strip()]


def domain_of(file: SourceFile) -> str:
    """The domain under which a file that cannot be read is counted."""
    return {"python": "code", "topics": "reference", "stub": "reference"}.get(file.kind, "docs")


def _decode(data: bytes) -> str:
    """Text by its coding cookie or byte-order mark, else UTF-8. Raises UnicodeDecodeError, SyntaxError."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def _parts(file: SourceFile, text: str, domains: frozenset[str]) -> list[tuple[str, str, str]] | None:
    """(domain, path, text) of each document in `text`; None where it should be Python and is not."""
    if file.kind == "prose":
        return [("docs", file.path, text)] if "docs" in domains else []
    if file.kind == "description":
        _, _, description = text.replace("\r\n", "\n").partition("\n\n")
        return [("docs", file.path, description)] if "docs" in domains else []
    if file.kind == "stub":
        return [("reference", file.path, text)] if "reference" in domains else []
    prose = "reference" if file.source.startswith("python/") else "docs"
    if not domains & {"code", prose}:
        return []
    if (tree := parse(text)) is None:
        return None
    if file.kind == "topics":
        return [("reference", f"{file.path}#{name}", topic) for name, topic in _topics(tree) if prose in domains]
    parts = [("code", file.path, without_docstrings(text, tree))] if "code" in domains else []
    if prose in domains:
        module = file.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, page in docstring_pages(tree, module, signatures=prose == "reference"):
            parts.append((prose, f"{file.path}#{name}" if name else file.path, page))
    return parts


def _topics(tree: ast.Module) -> list[tuple[str, str]]:
    """Name and text of the language-reference pages: `topics = {...}`, a literal."""
    literals = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    return sorted(ast.literal_eval(literals[0]).items())
