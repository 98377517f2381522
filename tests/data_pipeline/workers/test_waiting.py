"""Workers that let one wait."""

from __future__ import annotations

import os
import queue
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from data_pipeline.config import ExecutorConfig
from data_pipeline.workers import clusters, executor


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
    assert any(f"with processes {marker.read_text()}: `kill -9`" in text for text in said) and "(2 of 3)" in said[-1]


class Pending(executor.Backend):
    """A cluster whose one call ends when it has been asked for the third time."""

    slots, look, asked = 1, "`squeue --me` says why.", 0

    def start(self, calls: list[tuple[int, executor.Function, Any]]) -> None:
        self.number = calls[0][0]

    def finished(self, seconds: float) -> list[tuple[int, executor.CallResult]]:
        assert seconds == executor.SECONDS_BETWEEN_WORDS
        self.asked += 1
        return [(self.number, executor.CallResult("done"))] if self.asked == 3 else []

    def close(self) -> None:
        pass


def test_a_cluster_in_which_nothing_ends_is_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert [outcome.result for outcome in executor.Workers(Pending()).map(str, [1], str)] == ["done"]
    assert capsys.readouterr().err.count("none of 1 items under way has ended for 600 seconds. `squeue --me`") == 2


@pytest.mark.parametrize("kind", [clusters.Dask, clusters.Ray, clusters.Slurm])
def test_clusters_come_back_when_the_time_is_over(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that stays pending, a call that no node has a place for: nothing, not a wait without end."""
    backend = kind.__new__(kind)
    backend.done, backend.jobs = queue.SimpleQueue(), {1: mock.Mock(**{"done.return_value": False})}
    monkeypatch.setattr(clusters.Dask, "_place", lambda self: None)
    monkeypatch.setattr(clusters, "SECONDS_BETWEEN_LOOKS", 0.01)
    assert backend.finished(0.05) == []
