"""Makefile: what it offers, and a set-up that can be interrupted, repeated and explained. No package is installed here:
the Pythons on PATH are scripts that write down what they are asked to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]

# `-m venv DIR` puts a copy of itself into DIR; anything fails when a file fail-WORD names a word of the command.
PYTHON = """#!/bin/bash
case "$1 $2" in
    "-V ") echo "Python 3.11.7"; exit 0;;
    "-c "*) [ ! -e "$HOME/too-old" ]; exit;;
esac
echo "$@" >> "$HOME/calls"
for word in "$@"; do [ ! -e "$HOME/fail-${word//\\//-}" ] || { echo "ERROR: no network" >&2; exit 1; }; done
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


class Sandbox:
    """A copy of what set-up reads, in a directory whose PATH has no other Python and no GPU."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.tools = directory / "tools"
        self.tools.mkdir()
        for name in ("Makefile", "pyproject.toml", "requirements.lock", "params.yaml"):
            shutil.copy(ROOT / name, directory / name)
        (directory / "profiles").symlink_to(ROOT / "profiles")
        (directory / ".dvc").mkdir()
        for tool in ("bash", "sh", "make", "sed", "awk", "ls", "paste", "touch", "rm", "mkdir", "cp", "grep"):
            (self.tools / tool).symlink_to(str(shutil.which(tool)))
        self.python = self.tools / "python3.11"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.tools), "HOME": str(self.directory)}
        return subprocess.run(
            ["make", *arguments], cwd=self.directory, env=environment, capture_output=True, text=True, timeout=60
        )

    def calls(self) -> list[str]:
        """What the Pythons were asked since the last look."""
        log = self.directory / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def fail_on(self, *words: str) -> None:
        for old in self.directory.glob("fail-*"):
            old.unlink()
        for word in words:
            (self.directory / f"fail-{word}").touch()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_help_names_every_target_and_stage_and_profile(sandbox: Sandbox) -> None:
    shown = sandbox.make().stdout
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(targets) > 10
    assert all(re.search(rf"make {target} ", shown) for target in targets)
    stages = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
    assert " ".join(stages) in shown
    assert all(profile.stem in shown for profile in (ROOT / "profiles").glob("*.yaml"))


def test_setup_installs_torch_apart_and_then_the_lock_once(sandbox: Sandbox) -> None:
    done = sandbox.make("setup")
    assert done.returncode == 0, done.stderr
    torch = re.search(r"torch==[\d.]+", (ROOT / "pyproject.toml").read_text())
    assert torch
    assert [re.sub(r"-m pip install -qq ", "", call) for call in sandbox.calls()] == [
        "-m venv .venv",
        f"--no-deps {torch[0]}+cpu",
        "--no-deps --require-hashes -r requirements.lock",
        "--no-deps -e .",
    ]
    assert (sandbox.directory / ".dvc/config.local").read_text() == "[core]\n    no_scm = true\n"

    assert sandbox.make("setup").returncode == 0
    assert sandbox.calls() == []

    os.utime(sandbox.directory / "requirements.lock", (2e9, 2e9))
    assert sandbox.make("setup").returncode == 0
    calls = sandbox.calls()
    assert "-m venv .venv" not in calls and any("requirements.lock" in call for call in calls)


def test_torch_falls_back_to_its_own_index_and_then_to_the_default(sandbox: Sandbox) -> None:
    version = re.search(r"torch==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert version
    sandbox.fail_on(f"torch=={version[1]}+cpu")
    done = sandbox.make("setup")
    assert done.returncode == 0, done.stderr
    assert "No CPU wheel was found: taking the default build." in done.stdout
    torch = [call.removeprefix("-m pip install -qq ") for call in sandbox.calls() if "torch==" in call]
    wheel = f"--no-deps torch=={version[1]}+cpu"
    index = "--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 10"
    assert torch == [wheel, f"{wheel} {index}", f"torch=={version[1]}"]


def test_a_gpu_brings_the_cuda_build_and_transformer_engine_after_it_and_says_what_that_needs(sandbox: Sandbox) -> None:
    smi = sandbox.tools / "nvidia-smi"
    smi.write_text("#!/bin/bash\necho 'GPU 0: a GPU (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    sandbox.fail_on(".[gpu]")
    broken = sandbox.make("setup")
    assert broken.returncode != 0 and "nvcc (CUDA 13)" in broken.stdout.splitlines()[-1]
    calls = sandbox.calls()
    torch = [call for call in calls if "torch==" in call]
    assert len(torch) == 1 and "+cpu" not in torch[0] and "--no-deps" not in torch[0]
    assert "--no-build-isolation -e .[gpu]" in calls[-1]

    sandbox.fail_on()
    assert sandbox.make("setup").returncode == 0
    assert len(sandbox.calls()) == 1            # what was installed before stays
    assert sandbox.make("setup").returncode == 0
    assert sandbox.calls() == []


def test_an_interrupted_setup_starts_over_and_says_why_it_stopped(sandbox: Sandbox) -> None:
    sandbox.fail_on("requirements.lock")
    broken = sandbox.make("setup")
    assert broken.returncode != 0
    said = broken.stdout.splitlines()
    assert said[-2].startswith("The packages could not be installed") and "PIP_INDEX_URL" in said[-1]
    assert not (sandbox.directory / ".venv/.setup-complete").exists()
    (sandbox.directory / ".venv/half-unpacked").touch()

    sandbox.fail_on()
    sandbox.calls()
    mended = sandbox.make("setup")
    assert mended.returncode == 0, mended.stderr
    assert "starting over" in mended.stdout
    assert "-m venv .venv" in sandbox.calls()
    assert not (sandbox.directory / ".venv/half-unpacked").exists()


def test_an_environment_of_ones_own_is_kept(sandbox: Sandbox) -> None:
    python = sandbox.directory / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    shutil.copy(sandbox.python, python)
    assert sandbox.make("setup").returncode == 0
    assert "-m venv .venv" not in sandbox.calls()


def test_without_a_suitable_python_it_says_what_to_install(sandbox: Sandbox) -> None:
    (sandbox.directory / "too-old").touch()
    done = sandbox.make("setup")
    assert done.returncode != 0
    assert done.stdout.splitlines()[:2] == [
        "No Python 3.11 or 3.12 with venv was found.",
        "Install one (Debian: apt install python3.11-venv) or say where: make setup PYTHON=/path/to/python",
    ]
    assert not (sandbox.directory / ".venv").exists()


def test_a_python_that_was_named_is_taken_or_refused(sandbox: Sandbox) -> None:
    done = sandbox.make("setup", "PYTHON=/no/such/python")
    assert done.returncode != 0 and not sandbox.calls() and not (sandbox.directory / ".venv").exists()
    assert done.stdout.splitlines()[0] == "PYTHON=/no/such/python is no Python 3.11 or 3.12 with venv."


def test_children_get_utf8_and_a_user_with_a_name(sandbox: Sandbox) -> None:
    (sandbox.tools / "id").symlink_to(str(shutil.which("id")))
    with (sandbox.directory / "Makefile").open("a") as makefile:
        makefile.write("\nshow:\n\t@echo \"$$USER,$$PYTHONUTF8\"\n")
    assert sandbox.make("show").stdout == f"{os.getuid()},1\n"


def test_curate_gives_what_it_is_given_as_flags(sandbox: Sandbox) -> None:
    """Blanks and quotes stay what they are."""
    (sandbox.tools / "echo").symlink_to(str(shutil.which("echo")))
    (sandbox.tools / "tr").symlink_to(str(shutil.which("tr")))
    assert sandbox.make("setup").returncode == 0
    python = sandbox.directory / ".venv/bin/python"
    python.write_text('#!/bin/bash\nprintf "<%s>" "$@"\n')
    shown = sandbox.make("curate", "SOURCE=/x/my texts 'a b'", "OUT=/x/my out", "TEXT_COLUMN=content",
                         "AGAINST=b.jsonl c.jsonl", "LANGUAGES=en de", "LABELS=low", "EXTRACTOR=resiliparse",
                         'SET=curate.rules={"a": {}}').stdout
    assert shown == ("<-m><flows.curate_own></x/my texts 'a b'><--out></x/my out><--text-column><content>"
                     "<--extractor><resiliparse><--languages><en de><--against><b.jsonl c.jsonl><--labels><low>"
                     '<--set><curate.rules={"a": {}}>')


def test_what_a_stage_is_given_it_takes_or_refuses(sandbox: Sandbox) -> None:
    assert sandbox.make("setup").returncode == 0
    sandbox.calls()
    for asked in ["items"], ["curate"], ["repro-plain"], ["stage", "STAGE=items"]:
        assert sandbox.make(*asked, "PROFILE=smoke").returncode == 0
        assert sandbox.calls()[:2] == ["-m flows.profile smoke", "-m flows.mend"]
    refused = sandbox.make("curate", "DOMAIN=web")
    assert refused.returncode != 0 and not sandbox.calls() and refused.stdout.endswith("Name it: SOURCE=...\n")


def test_clean_removes_one_profile_only(sandbox: Sandbox) -> None:
    for kind in ("data", "runs", "reports"):
        for profile in ("cpu", "smoke"):
            (sandbox.directory / kind / profile).mkdir(parents=True)
    assert sandbox.make("clean", "PROFILE=smoke").returncode == 0
    assert sorted(path.name for path in sandbox.directory.glob("*/cpu")) == ["cpu"] * 3
    assert not list(sandbox.directory.glob("*/smoke"))
