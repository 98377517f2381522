"""Profiles are overlays; params.yaml is the resolved file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from flows import profile
from flows.plan import compression_grid
from model.megatron.optimizer import build_schedule
from stages.frame.params import ParamsError, load_params

ROOT = Path(__file__).resolve().parents[2]
REGENERATE = "put the change into profiles/cpu.yaml and run `python -m flows.profile cpu`"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["profile"])
    with pytest.raises(ParamsError, match=r"/profiles: not found\.\nRun from the repository's root\."):
        profile.main()


def test_the_checked_in_parameters_are_the_cpu_profile() -> None:
    assert (ROOT / "params.yaml").read_text() == (ROOT / "profiles/cpu.yaml").read_text(), REGENERATE


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "profiles").glob("*.yaml")))
def test_every_profile_is_valid_and_says_its_name(here: Path, name: str) -> None:
    profile.apply(name)
    assert load_params("params.yaml").profile == name
    assert profile.describe(name)
    assert not list(here.glob(".params*"))


def test_values_of_ones_own_are_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, kept = here / "params.yaml", here / "params.yaml.orig"
    for name in ("cpu", "smoke", "cpu", "cpu"):
        profile.apply(name)
    assert not kept.exists() and not capsys.readouterr().out
    for mine in (file.read_text().replace("tokens: 196_608", "tokens: 400_000"), "profile: none\n", "{"):
        file.write_text(mine)
        profile.apply("cpu")
        assert kept.read_text() == mine and profile.resolve("cpu") == file.read_text()
        assert "kept as params.yaml.orig" in capsys.readouterr().out


def test_an_overlay_changes_what_it_names_and_keeps_the_comments(here: Path) -> None:
    text = profile.resolve("smoke")
    base = (ROOT / "profiles/cpu.yaml").read_text()
    values, overlay = YAML(typ="safe").load(text), YAML(typ="safe").load(ROOT / "profiles/smoke.yaml")

    def covers(whole: object, part: object) -> bool:
        if isinstance(part, dict) and isinstance(whole, dict):
            return all(key not in whole if value is None else covers(whole[key], value) for key, value in part.items())
        return whole == part

    assert covers(values, overlay)
    variants = YAML(typ="safe").load(base)["variants"]
    assert all(variants[name] == variant for name, variant in values["variants"].items())
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
    assert profile.merge(values, YAML().load("a: {b: null, e: null}\nd: [4]\n")) == ["a.e"]
    assert values == {"a": {"c": 2}, "d": [4]}


@pytest.mark.parametrize(("overlay", "message"), [
    ("runtime: {slots: 0}\n", r"`runtime\.slots`"), ("seed: 5\nseed: 6\n", "not valid YAML"), ("- a\n", "expected"),
    ("variants: {hybrid-fp8-sed2: null}\n", r"removes `variants\.hybrid-fp8-sed2`, which profiles/cpu\.yaml does not"),
])
def test_a_bad_overlay_leaves_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlay: str, message: str
) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/cpu.yaml").write_text((ROOT / "profiles/cpu.yaml").read_text())
    (tmp_path / "profiles/bad.yaml").write_text(overlay)
    monkeypatch.chdir(tmp_path)
    profile.apply("cpu")
    with pytest.raises(ParamsError, match=rf"^profiles/bad\.yaml: {message}"):
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


@pytest.mark.parametrize(("name", "steps", "warmup", "peak", "last_phase"), [
    ("nemotron-h-8b", 2_384_185, 8.3e9, 8e-4, 0.9747), ("nemotron-h-56b", 3_178_914, 25e9, 4e-4, 0.981),
])
def test_the_papers_schedule(
    here: Path, name: str, steps: int, warmup: float, peak: float, last_phase: float
) -> None:
    """Peak after the paper's warm-up, and where its four phases begin (paper section 2.4)."""
    profile.apply(name)
    recipe = load_params("params.yaml").pretrain
    batch = recipe.global_batch_size * 8192
    assert (batch, recipe.tokens // batch) == (768 * 8192, steps)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = build_schedule(recipe, optimizer, steps)
    found = {}
    for share in (warmup / recipe.tokens, 0.6, 0.8, last_phase, 1.0):
        schedule.num_steps = 0
        schedule.step(round(share * steps))
        found[share] = optimizer.param_groups[0]["lr"] / peak
    assert list(found.values()) == pytest.approx([1, 0.352, 0.105, 0.0115, 0.01], abs=1e-3)


@pytest.mark.parametrize("name", ["nemotron-h-8b", "nemotron-h-56b"])
def test_the_published_sizes_are_not_compressed_with_a_laptops_rounds_and_states(here: Path, name: str) -> None:
    profile.apply(name)
    params = load_params("params.yaml")
    compress = params.compress
    assert compress.checkpoint_every >= params.pretrain.checkpoint_every        # a state is of as many gigabytes
    assert compress.ranked_by_agreement >= min(400, compression_grid(params).candidates)
    assert 1 / (2 * compress.task_items**0.5) < 0.02                # standard error of an accuracy, at most
