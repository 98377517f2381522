"""A worker that hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import ExecutorConfig
from data_pipeline.workers import executor


def stop_once(marker: Path) -> str:
    if not marker.exists():
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return "done"


def test_a_worker_that_hangs_is_named_and_once_killed_its_item_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "SECONDS_BETWEEN_WORDS", 1.0)
    marker, said = tmp_path / "marker", []

    def user(text: str, **_: Any) -> None:
        said.append(text)
        if text.startswith("Waiting for workers") and marker.exists():
            os.kill(int(marker.read_text()), signal.SIGKILL)

    monkeypatch.setattr(executor, "print", user, raising=False)
    with executor.workers(ExecutorConfig(executor="local", workers=2)) as workers:
        assert [outcome.result for outcome in workers.map(stop_once, [marker], str)] == ["done"]
    assert any(f"processes {marker.read_text()} ends" in text for text in said) and "(2 of 3)" in said[-1]
