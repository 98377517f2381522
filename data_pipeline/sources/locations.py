"""`paths` of the configuration as single files and addresses."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urljoin

from data_pipeline.config import DataError
from data_pipeline.sources.streams import Damage, chunks, is_url

COMPRESSED = (".gz", ".zst")
LISTINGS = (".paths", ".paths.gz")      # a path or an address a line, as Common Crawl publishes them


def suffix(location: str) -> str:
    """The suffix in lower case, before that of a compression: `.jsonl` of `a.jsonl.gz`."""
    name = Path(location.lower())
    return name.with_suffix("").suffix if name.suffix in COMPRESSED else name.suffix


def expand(paths: list[str], suffixes: frozenset[str]) -> list[str]:
    """Every file and address that `paths` stand for, once, sorted.

    A directory stands for the files below it that end in one of `suffixes`, hidden ones left out; a wildcard for every
    file it matches; a listing (`.paths`, `.paths.gz`) for its lines, which in a listing read from an address are
    relative to the root of that server. Raises DataError for a path that stands for nothing.
    """
    found: set[str] = set()
    for path in paths:
        if path.endswith(LISTINGS):
            new = _listed(path)
        elif is_url(path):
            new = [path]
        elif Path(path).is_dir():
            files = (file for file in Path(path).rglob("*") if suffix(file.name) in suffixes and file.is_file())
            new = [str(file) for file in files if not _hidden(file.relative_to(path))]
        else:
            new = [file for file in [path, *_matching(path)] if Path(file).is_file()]
        if not new:
            raise DataError(
                f"annotate.sources: `paths` names {path!r}, where no file was found.\n"
                f"Name files, wildcards such as 'texts/**/*.md', or directories with files in "
                f"{' '.join(sorted(suffixes))} (also .gz, .zst), in params.yaml."
            )
        found.update(new)
    return sorted(found)


def _matching(pattern: str) -> list[str]:
    """What a wildcard matches; it may be absolute and hold `**` between slashes."""
    path = Path(pattern)
    root = Path(path.anchor)
    try:
        return [str(file) for file in root.glob(str(path.relative_to(root)))]
    except ValueError:
        return []


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _listed(path: str) -> list[str]:
    parts = list(chunks(path))
    if damage := [part.reason for part in parts if isinstance(part, Damage)]:
        raise DataError(f"annotate.sources: {path}: {damage[0]}.\nA list of files must be whole: fetch it again.")
    lines = b"".join(part for part in parts if isinstance(part, bytes)).decode(errors="replace").split()
    return [urljoin(path, f"/{line}") if is_url(path) and not is_url(line) else line for line in lines]
