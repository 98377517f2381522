"""An unpacked archive of the repository, without git, to run the pipeline in as a person does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("data_pipeline", "flows", "kernels", "model", "profiles", "stages", "dvc.yaml", "params.yaml",
           "pyproject.toml", "requirements.lock", ".dvcignore")


def unpack(target: Path) -> Path:
    """Copy what an archive holds to `target`."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    (target / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", target / ".dvc/config")
    return target


def start(archive: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the flow."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "PYTHONPATH"))}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.Popen([sys.executable, "-m", "flows.reproduce", *arguments], cwd=archive, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def reproduce(archive: Path, *arguments: str) -> dict[str, str]:
    """Run the flow to its end; stage -> result. Fails with what it printed."""
    flow = start(archive, *arguments)
    printed, _ = flow.communicate()
    assert flow.returncode == 0, printed
    table = printed.split("\n\n")[1].splitlines()[2:]
    return {row.split()[0]: row.split()[1] for row in table}
