"""Profiles are overlays; params.yaml is the resolved file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows import profile
from stages.params import ParamsError, load_params

ROOT = Path(__file__).resolve().parents[2]
REGENERATE = "put the change into profiles/cpu.yaml and run `python -m flows.profile cpu`"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_checked_in_parameters_are_the_cpu_profile() -> None:
    assert (ROOT / "params.yaml").read_text() == (ROOT / "profiles/cpu.yaml").read_text(), REGENERATE


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "profiles").glob("*.yaml")))
def test_every_profile_is_valid_and_says_its_name(here: Path, name: str) -> None:
    profile.apply(name)
    assert load_params("params.yaml").profile == name
    assert profile.describe(name)
    assert not list(here.glob(".params*"))


def test_an_overlay_changes_what_it_names_and_keeps_the_comments(here: Path) -> None:
    text = profile.resolve("smoke")
    base = (ROOT / "profiles/cpu.yaml").read_text()
    values, overlay = YAML(typ="safe").load(text), YAML(typ="safe").load(ROOT / "profiles/smoke.yaml")

    def covers(whole: object, part: object) -> bool:
        if isinstance(part, dict) and isinstance(whole, dict):
            return all(covers(whole[key], value) for key, value in part.items())
        return whole == part

    assert covers(values, overlay)
    assert values["variants"] == YAML(typ="safe").load(base)["variants"]
    assert text.startswith(base.splitlines()[0])
    comments = [line.partition("# ")[2] for line in base.splitlines() if "# " in line]
    kept = [comment for comment in comments if comment in text]
    assert len(kept) > 0.8 * len(comments)


def test_an_empty_overlay_leaves_the_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/cpu.yaml").write_text((ROOT / "profiles/cpu.yaml").read_text())
    (tmp_path / "profiles/same.yaml").write_text("# the same\n")
    monkeypatch.chdir(tmp_path)
    assert profile.resolve("same") == profile.resolve("cpu").replace("profile: cpu", "profile: same")


def test_null_removes_a_key() -> None:
    values = YAML().load("a: {b: 1, c: 2}\nd: 3\n")
    profile.merge(values, YAML().load("a: {b: null}\nd: [4]\n"))
    assert values == {"a": {"c": 2}, "d": [4]}


def test_a_bad_overlay_leaves_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/cpu.yaml").write_text((ROOT / "profiles/cpu.yaml").read_text())
    (tmp_path / "profiles/bad.yaml").write_text("runtime: {slots: 0}\n")
    monkeypatch.chdir(tmp_path)
    profile.apply("cpu")
    with pytest.raises(ParamsError, match=r"profiles/bad\.yaml: `runtime\.slots`"):
        profile.apply("bad")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml", "profiles"]
    assert load_params("params.yaml").profile == "cpu"


def test_command_line(here: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.profile", *arguments]
        return subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    listed = run()
    assert listed.returncode == 0 and [line.split()[0] for line in listed.stdout.splitlines()] == profile.names()
    unknown = run("smok")
    assert unknown.returncode == 1
    assert unknown.stderr.splitlines() == ["Profile smok: no profiles/smok.yaml.", "Did you mean smoke?"]
