"""What sources, evaluation sets and scorers are made of at the moment: a result is no longer theirs once this changes.

Files count by name, size and time, as DVC takes them; an address by itself: what stands there is taken to stay. A
branch or tag of the Hub counts as the commit that it names now, which needs a network; a commit needs none.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from platform import python_version
from typing import Any, Literal

from packaging.version import Version

from data_pipeline.config import (
    PAPER_TASKS,
    AnnotateConfig,
    ClassifierConfig,
    DataError,
    HubSource,
    InstalledSource,
    Source,
)
from data_pipeline.evaluation_sets import PACKAGE, VERSION
from data_pipeline.sources.locations import locate, nothing
from data_pipeline.sources.streams import is_url

COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(config: AnnotateConfig) -> AnnotateConfig:
    """`config` with branches and tags of the Hub as commits. Raises DataError where the Hub does not say."""
    return config.model_copy(update={
        "sources": [
            source.model_copy(update={"revision": commit_of(source.dataset, source.revision, "dataset")})
            if isinstance(source, HubSource) else source for source in config.sources
        ],
        "scorers": [
            scorer.model_copy(update={"revision": commit_of(scorer.model, scorer.revision, "model")})
            if isinstance(scorer, ClassifierConfig) else scorer for scorer in config.scorers
        ],
    })


def identity(config: AnnotateConfig) -> dict[str, Any]:
    """JSON values by what `config`, as `pinned` gives it, names: sources, evaluation sets and scorers.

    Raises DataError for a source or a file that is not there.
    """
    models = [scorer for scorer in config.scorers if isinstance(scorer, ClassifierConfig)]
    return {
        "sources": [_of_source(source) for source in config.sources],
        "against": {name: f"{PACKAGE} {VERSION}" if name == PAPER_TASKS else stamp([name])
                    for name in config.decontamination.against},
        "scorers": {one.name: stamp([one.model]) if Path(one.model).exists() else one.revision for one in models},
    }


def _of_source(source: Source) -> dict[str, Any]:
    if isinstance(source, InstalledSource):
        from data_pipeline.sources.installed import installed_packages

        return {"python": python_version()} | {         # the same text for any GPU
            name: Version(package.version).public for name, package in installed_packages(source.roots).items()
        }
    if isinstance(source, HubSource):
        return {source.dataset: stamp([source.dataset]) if Path(source.dataset).exists() else source.revision}
    return {path: _of_path(path) for path in source.paths}


def _of_path(path: str) -> dict[str, Any]:
    if is_url(path):
        return {"address": path}
    if Path(path).is_dir():
        return stamp([path])
    if not (named := set(locate(path).files)):
        raise nothing(path, [])
    named |= {path} if Path(path).is_file() else set()          # a listing, its files
    return stamp(name for name in named if not is_url(name)) | {"addresses": sorted(filter(is_url, named))}


def stamp(paths: Iterable[str]) -> dict[str, Any]:
    """Number, bytes and a digest over names, sizes and times (nanoseconds) of these files and of all below them.

    Raises DataError for one that is not there.
    """
    digest, number, size = hashlib.sha256(), 0, 0
    for file in (file for path in sorted(paths) for file in _below(Path(path))):
        status = file.stat()
        digest.update(os.fsencode(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n"))
        number, size = number + 1, size + status.st_size
    return {"files": number, "bytes": size, "digest": digest.hexdigest()}


def _below(path: Path) -> Iterator[Path]:
    """The file, or those below the directory, through links, in order; hidden ones are left out, as in reading."""
    if not path.exists():
        raise DataError(f"{path}: not found, and the settings name it.\n"
                        "Put it back, or take it out of them, in params.yaml.")
    if path.is_file():
        yield path
    seen = {path.resolve()}
    for directory, inner, files in os.walk(path, followlinks=True):
        here = Path(directory)
        real = {name: (here / name).resolve() for name in sorted(inner)}
        inner[:] = [name for name in real if not name.startswith(".") and real[name] not in seen]
        seen.update(real.values())
        yield from (here / name for name in sorted(files) if not name.startswith(".") and (here / name).is_file())


def commit_of(name: str, revision: str | None, kind: Literal["dataset", "model"]) -> str | None:
    """The commit that a revision on the Hub stands for; of a local directory, the revision as it is.

    Raises DataError where the Hub does not know or answer.
    """
    if Path(name).exists() or COMMIT.fullmatch(revision or ""):
        return revision
    from huggingface_hub import HfApi

    from data_pipeline.sources.hub import READING_ERRORS

    try:
        return str(HfApi().repo_info(name, revision=revision, repo_type=kind).sha)
    except READING_ERRORS as error:
        raise DataError(
            f"annotate: which commit of {kind} {name} `{revision or 'main'}` is cannot be asked: "
            f"{str(error).strip().partition(chr(10))[0]}\n"
            "Connect, or give a commit (40 hexadecimal digits) as `revision`, in params.yaml: then nothing is asked."
        ) from error
