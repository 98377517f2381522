"""The flow as a person runs it: in its own process, with Prefect's temporary server, in a tree without git."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

Reproduce = Callable[..., subprocess.CompletedProcess[str]]


def results(output: str) -> dict[str, str]:
    """Stage -> result, from the table at the end."""
    rows = output[output.index("stage  ") :].splitlines()[2:]
    return {row.split("  ")[0]: row.split("  ", 1)[1].strip().split("  ")[0] for row in rows if row.strip()}


def states(repository: Path) -> dict[str, list[str]]:
    """Task -> names of its states in the order of runs, from Prefect's record."""
    with sqlite3.connect(repository / ".prefect/prefect.db") as database:
        rows = database.execute("select name, state_name from task_run order by expected_start_time")
        found: dict[str, list[str]] = {}
        for name, state in rows:
            found.setdefault(name, []).append(state)
    return found


def stop_in(stage: str, repository: Path, environment: dict[str, str]) -> None:
    """Start the flow, terminate it as `stage` has come to its second step, and see that nothing is left."""
    command = [sys.executable, "-m", "flows.reproduce"]
    flow = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    log = repository / f"logs/{stage}.log"
    deadline = time.monotonic() + 90
    while not (log.exists() and "step 2/" in log.read_text()):
        assert flow.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    tree = psutil.Process(flow.pid).children(recursive=True)
    assert any("work.py" in process.cmdline() for process in tree)
    flow.send_signal(signal.SIGTERM)
    output, _ = flow.communicate(timeout=60)
    assert flow.returncode == 130
    assert "Run the same command again" in output
    _, alive = psutil.wait_procs(tree, timeout=10)         # stages, DVC and the temporary server
    assert alive == []
    assert (repository / ".dvc/tmp/rwlock").read_text() in ("", "{}")


def test_a_run_that_fails_is_stopped_and_ends_well(
    repository: Path, environment: dict[str, str], reproduce: Reproduce
) -> None:
    (repository / "break-second-right").touch()
    broken = reproduce()
    assert broken.returncode == 1, broken.stdout + broken.stderr
    summary, _, failure = broken.stdout.rstrip().rpartition("\n\n")
    assert results(summary) == {"first": "ran", "second@left": "ran", "second@right": "failed", "last": "ran"}
    assert failure.splitlines() == [
        "second@right: values.csv: column `loss` is missing. Run `dvc repro first` again.",
        "Log: logs/second@right.log. Run the same command again: it resumes.",
    ]

    (repository / "break-second-right").unlink()
    stop_in("second@right", repository, environment)

    (repository / "second-left.txt").unlink()
    mended = reproduce()
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert results(mended.stdout) == {
        "first": "cached", "second@left": "restored", "second@right": "ran", "last": "cached"
    }
    resumed = re.findall(r"second-right from (\d+)", (repository / "history").read_text())
    assert resumed[0] == "0" and int(resumed[1]) >= 2
    found = states(repository)
    assert [found[stage][0] for stage in ("first", "second@right")] == ["Completed", "Failed"]
    assert [found[stage][-1] for stage in ("first", "second@right")] == ["Cached", "Completed"]
    with sqlite3.connect(repository / ".prefect/prefect.db") as database:
        keys = {key for (key,) in database.execute("select key from artifact")}
    assert {"plan", "progress-first", "progress-second-left"} <= keys


def test_what_cannot_start_says_so_in_two_lines(reproduce: Reproduce) -> None:
    unknown = reproduce("--profile", "nowhere")
    assert unknown.returncode == 1
    assert len(unknown.stderr.splitlines()) == 2 and "profiles/nowhere.yaml" in unknown.stderr
