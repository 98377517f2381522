"""A slice of `python -m tests.chaos`: two dozen faults, and the tool's own means of damage."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests import chaos
from tests.archive import reproduce, unpack


@pytest.mark.parametrize("harm", ["bit flipped", "cut", "edited"])
def test_harm_is_done_and_a_flipped_bit_keeps_the_times(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"loss": 4.265}\n')
    os.utime(path, (1, 1))
    chaos.HARMS[harm](path, random.Random(3))
    assert path.read_bytes() != b'{"loss": 4.265}\n'
    assert (path.stat().st_mtime == 1) is (harm == "bit flipped")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_dozen_faults(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    reproduce(unpack(archive), "--profile", "smoke")
    pristine = tmp_path / "pristine"
    chaos.keep(archive, pristine)
    rounds = list(chaos.chaos(archive, pristine, seed=1, wanted=24, seconds=1200))
    assert {outcome.verdict for outcome in rounds} == {"survived"}, chaos.page(rounds, 1)
