"""A slice of `python -m tests.chaos`: two dozen faults, and the tool's own means of damage."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from tests import chaos


@pytest.mark.parametrize("harm", ["bit flipped", "cut", "edited"])
def test_harm_is_done_and_a_flipped_bit_keeps_the_times(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"loss": 4.265}\n')
    os.utime(path, (1, 1))
    chaos.HARMS[harm](path, random.Random(3))
    assert path.read_bytes() != b'{"loss": 4.265}\n'
    assert (path.stat().st_mtime == 1) is (harm == "bit flipped")


@pytest.mark.parametrize(("place", "name"), [("resume state", "compress-0123456789ab/importance.pt"),
                                             ("scratch piece", "annotate-0123456789ab/read/000-000000.json")])
def test_what_a_stage_goes_on_from_is_damaged_when_nothing_runs(tmp_path: Path, place: str, name: str) -> None:
    piece = tmp_path / ".scratch" / name
    script = f"mkdir -p {piece.parent}; sleep 0.2; echo '{{\"loss\": 4.265}}' > {piece}; sleep 60"
    command = subprocess.Popen(["/bin/sh", "-c", script], cwd=tmp_path, start_new_session=True)
    killed, *damaged = chaos.spoil(tmp_path, random.Random(3), command, place)
    assert killed.kind.endswith("of all") and command.poll() and not chaos.processes(tmp_path)
    assert damaged and all(fault.kind.startswith(f"{place}: ") for fault in damaged)
    assert not piece.exists() or piece.read_bytes() != b'{"loss": 4.265}\n'


def test_nothing_is_damaged_where_a_stage_keeps_nothing(tmp_path: Path) -> None:
    assert chaos.spoil(tmp_path, random.Random(3), subprocess.Popen(["true"], cwd=tmp_path), "resume state") == []


@pytest.mark.parametrize(("script", "because"), [
    ("sleep 1", ""), ("sleep 60", "hung"), ("while :; do :; done", "did not end in 1 seconds of processor time"),
])
def test_a_command_ends_by_itself_or_never_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, because: str
) -> None:
    monkeypatch.setattr(chaos, "IDLE_SECONDS", 3.0)
    monkeypatch.setattr(chaos, "SOME_CPU_SECONDS", 0.1)
    monkeypatch.setattr(chaos, "CPU_SECONDS", 1.0)
    command = subprocess.Popen(["/bin/sh", "-c", script], cwd=tmp_path)
    try:
        found = chaos.outlast(tmp_path, command)
    finally:
        command.kill()
        command.wait()
    assert because in found if because else found == ""


def test_the_aim_is_what_is_written(tmp_path: Path) -> None:
    _, now = chaos.moments(tmp_path, random.Random(3), "scratch piece")
    piece = tmp_path / ".scratch/annotate-0123456789ab/000-000000.json"
    piece.parent.mkdir(parents=True)
    assert not any(now() for _ in range(30)), "nothing is written"
    for size in range(1, 10):
        piece.write_bytes(bytes(size))
        struck = now()
    assert struck


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_dozen_faults(tmp_path: Path, smoke_run: tuple[Path, dict[str, str]]) -> None:
    pristine, _ = smoke_run
    archive = tmp_path / "archive"
    chaos.keep(pristine, archive)
    rounds = list(chaos.chaos(archive, pristine, seed=1, wanted=24, seconds=1200))
    assert {outcome.verdict for outcome in rounds} == {"survived"}, chaos.page(rounds, 1)
