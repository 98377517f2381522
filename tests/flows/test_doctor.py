"""The doctor finds what is missing and says the cure."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from flows import doctor
from tests import forked


def test_the_lock_is_read_for_this_platform() -> None:
    lock = (
        "# a comment\n"
        "absl-py==2.5.1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:01\n    # via megatron-core\n"
        "colorama==0.4.6 ; sys_platform == 'win32' \\\n    --hash=sha256:02\n"
        "numpy==2.3.5 ; python_full_version >= '3.11' \\\n    --hash=sha256:03\n"
    )
    assert doctor.locked_versions(lock) == {"absl-py": "2.5.1", "numpy": "2.3.5"}


def test_missing_and_other_packages_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("requirements.lock").write_text(f"no-such-package==1.0\nnumpy==0.1\npytest=={version('pytest')}\n")
    found = list(doctor.packages())
    assert [(finding.state, finding.cure.split("`")[0]) for finding in found[:2]] == [
        ("missing", "make setup"), ("warning", "Results may differ; ")
    ]
    assert "no-such-package" in found[0].detail and "instead of 0.1" in found[1].detail
    assert found[2].detail == "1 of 3 as locked"


def test_a_full_disk_is_missing_and_little_memory_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    def memory() -> object:
        return type("Memory", (), {"available": 3 * doctor.GIB})

    monkeypatch.setattr(psutil, "virtual_memory", memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Disk", (), {"free": doctor.GIB}))
    states = {finding.name: finding.state for finding in doctor.machine()}
    assert states == {"cores": "ok", "memory": "warning", "disk": "missing"}


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("params.yaml: not valid.\nCorrect that line.")

    def unimportable() -> None:
        raise ImportError("no module named prefect")

    monkeypatch.setattr(doctor, "CHECKS", [broken, unimportable])
    assert [(finding.state, finding.detail, finding.cure) for finding in doctor.examine()] == [
        ("missing", "params.yaml: not valid.", "Correct that line."),
        ("missing", "ImportError: no module named prefect", "make setup"),
    ]


def test_exit_code_and_cures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a repository reproduce cannot work; all else that is installed is found."""
    (tmp_path / "requirements.lock").write_text(f"pytest=={version('pytest')}\n")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / ".prefect"))
    done = forked.run(tmp_path, "-m", "flows.doctor", check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if "no dvc.yaml here" in line)
    assert lines[at].startswith("missing") and "Run from the repository's root." in lines[at + 1]
    assert lines[-1] == "`make reproduce` cannot work yet."
    names = {line.split()[1] for line in lines if line.startswith("ok")}
    assert {"python", "packages", "torch", "megatron-core", "prefect"} <= names
