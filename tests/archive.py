"""An unpacked archive of the repository, without git, to run the pipeline in as a person does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from numba.core.caching import UserProvidedCacheLocator

import data_pipeline.steps  # noqa: F401    # says where compiled code is kept

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("data_pipeline", "docs/results/studies", "flows", "kernels", "model", "profiles", "stages", "dvc.yaml",
           "params.yaml", "pyproject.toml", "requirements.lock", ".dvcignore")


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


def start(archive: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the flow."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "PYTHONPATH"))}
    environment |= {"OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(archive / ".compiled")}
    return subprocess.Popen([sys.executable, "-m", "flows.reproduce", *arguments], cwd=archive, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def reproduce(archive: Path, *arguments: str) -> dict[str, str]:
    """Run the flow to its end; stage -> result. Fails with what it printed."""
    flow = start(archive, *arguments)
    printed, _ = flow.communicate()
    assert flow.returncode == 0, printed
    table = printed.split("\n\n")[1].splitlines()[2:]
    return {row.split()[0]: row.split()[1] for row in table}
