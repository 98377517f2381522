"""An unpacked archive of the repository, without git, to run the pipeline in as a person does.

    python -m tests.archive OLD NEW

says whether the smoke profile, run in two directories, gave the same results byte for byte, as moved code must (the
habit is torchtitan's). It names the files that differ or are missing and exits 1 where there are any, or no results.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numba.core.caching import UserProvidedCacheLocator

import data_pipeline.text  # noqa: F401    # says where compiled code is kept

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("data_pipeline", "docs/results/studies", "durable", "flows", "kernels", "model", "profiles", "stages",
           "dvc.yaml", "params.yaml", "pyproject.toml", "requirements.lock", ".dvcignore")
COMMAND = [sys.executable, "-m", "flows.reproduce"]
TIMES = {"tokens_per_second", "train_seconds", "peak_memory_gib"}


def unpack(target: Path) -> Path:
    """Copy what an archive holds to `target`."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    (target / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", target / ".dvc/config")
    share_compiled(target)
    return target


def share_compiled(archive: Path) -> None:
    """In `archive/.compiled`, let its files have what Numba compiled of ours: they are the same, times and all."""
    kept = Path(os.environ["NUMBA_CACHE_DIR"])
    (archive / ".compiled").mkdir()
    for directory in {file.parent.relative_to(ROOT) for file in ROOT.glob("data_pipeline/**/*.py")}:
        ours, theirs = (UserProvidedCacheLocator.get_suitable_cache_subpath(root / directory / "any.py")
                        for root in (ROOT, archive))
        (kept / ours).mkdir(parents=True, exist_ok=True)
        (archive / ".compiled" / theirs).symlink_to(kept / ours)


def command_environment(archive: Path) -> dict[str, str]:
    """Of a person's command in the archive."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "PYTHONPATH"))}
    return kept | {"OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(archive / ".compiled")}


@contextlib.contextmanager
def oddly_surrounded(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """An environment without a home, git and compiled bytecode, with a locale that is not UTF-8 and a blank in the
    temporary directory; and, for all that this process starts, files that nobody else may read."""
    mask = os.umask(0o077)
    try:
        with tempfile.TemporaryDirectory(prefix="a blank ") as temporary:
            programs = Path(temporary, "bin")
            programs.mkdir()
            for directory in reversed(environment["PATH"].split(os.pathsep)):
                for program in Path(directory).glob("*"):
                    if not program.name.startswith("git"):
                        (programs / program.name).unlink(missing_ok=True)
                        (programs / program.name).symlink_to(program)
            kept = {key: value for key, value in environment.items() if key != "HOME"}
            yield kept | {"PATH": str(programs), "TMPDIR": temporary, "PYTHONDONTWRITEBYTECODE": "1",
                          "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    finally:
        os.umask(mask)


def start(archive: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the flow."""
    return subprocess.Popen([*COMMAND, *arguments], cwd=archive, env=environment or command_environment(archive),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")


def reproduce(archive: Path, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, str]:
    """Run the flow to its end; stage -> result. Fails with what it printed."""
    flow = start(archive, *arguments, environment=environment)
    printed, _ = flow.communicate()
    assert flow.returncode == 0, printed
    table = printed.split("\n\n")[1].splitlines()[2:]
    return {row.split()[0]: row.split()[1] for row in table}


def results(archive: Path) -> dict[str, Any]:
    """Everything a run makes, but for times and what holds them: curves of TensorBoard do in their very names, and the
    report's counts say whether what was timed decodes faster."""
    found: dict[str, Any] = {}
    for path in sorted([*archive.glob("data/smoke/**/*"), *archive.glob("runs/smoke/**/*")]):
        name = str(path.relative_to(archive))
        if path.is_dir() or path.name in ("provenance.json", ".gitignore"):
            continue
        if any(part in name for part in ("/benchmark/", "/report/", "/tensorboard/")):
            continue
        if path.name == "metrics.json":
            values = json.loads(path.read_text())
            found[name] = {key: value for key, value in values.items() if key not in TIMES}
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(old: Path, new: Path) -> list[str]:
    """Files whose results differ between two directories, or that only one has. ValueError where there are none."""
    ours, theirs = results(old), results(new)
    for directory, found in ((old, ours), (new, theirs)):
        if not found:
            raise ValueError(f"{directory}: no results.\nRun `make reproduce PROFILE=smoke` in it.")
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python -m tests.archive OLD NEW: two directories in which the smoke profile ran")
    before, after = map(Path, sys.argv[1:])
    try:
        differing = differences(before, after)
    except ValueError as error:
        sys.exit(str(error))
    print(*differing, f"{len(differing)} of {len(results(before) | results(after))} files differ", sep="\n")
    sys.exit(bool(differing))
