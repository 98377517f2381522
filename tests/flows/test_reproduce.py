"""The flow as a person runs it: in its own process, with Prefect's temporary server, in a tree without git."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from flows.reproduce import SECONDS_TO_STOP

Reproduce = Callable[..., subprocess.CompletedProcess[str]]


def results(output: str) -> dict[str, str]:
    """Stage -> result, from the table at the end."""
    rows = output[output.index("stage  ") :].splitlines()[2:]
    return {row.split("  ")[0]: row.split("  ", 1)[1].strip().split("  ")[0] for row in rows if row.strip()}


def states(repository: Path, table: str = "task_run") -> dict[str, list[str]]:
    """Name -> names of its states in the order of runs, from Prefect's record."""
    with sqlite3.connect(repository / ".prefect/prefect.db") as database:
        rows = database.execute(f"select name, state_name from {table} order by expected_start_time")
        found: dict[str, list[str]] = {}
        for name, state in rows:
            found.setdefault(name, []).append(state)
    return found


def start(
    stage: str, repository: Path, environment: dict[str, str], interrupt: signal.Handlers = signal.SIG_DFL
) -> tuple[psutil.Popen, list[psutil.Process]]:
    """The flow in a process group of its own, as a shell starts it, as `stage` has taken two steps; and all that it
    started."""
    command = [sys.executable, "-m", "flows.reproduce"]
    flow = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                        process_group=0, preexec_fn=partial(signal.signal, signal.SIGINT, interrupt))
    log = repository / f"logs/{stage}.log"
    log.unlink(missing_ok=True)
    deadline = time.monotonic() + 180
    while not (log.exists() and log.read_text().count("step ") > 1):
        assert flow.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    tree = flow.children(recursive=True)
    assert {"work.py", "uvicorn", "repro"} <= {word for process in tree for word in process.cmdline()}
    return flow, tree


def stop_in(stage: str, repository: Path, environment: dict[str, str]) -> None:
    """Start the flow, interrupt its process group, as Ctrl-C does, and see that nothing is left."""
    flow, tree = start(stage, repository, environment)
    interrupted = time.monotonic()
    os.killpg(flow.pid, signal.SIGINT)
    output, _ = flow.communicate(timeout=60)
    assert flow.returncode == 130 and time.monotonic() - interrupted < SECONDS_TO_STOP + 5, output
    assert "Run the same command again" in output and "Traceback" not in output
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


# One branch ends by an error that is no stage's, the other before the stage begins, by Prefect. Meanwhile a hangup
# is heard by what hears Ctrl-C; SIGTERM Prefect hears itself.
BROKEN = """
import signal
from flows import artifacts, dvc_graph, reproduce
for number in (signal.SIGINT, signal.SIGHUP):               # whatever these tests were started by ignores
    signal.signal(number, signal.default_int_handler)
bar, repro = artifacts.ProgressBar, dvc_graph.StageRunner._repro
def broken(ours, name, error):
    def call(*arguments):
        if name in (arguments[0], getattr(arguments[1] if len(arguments) > 1 else None, "name", None)):
            heard = {signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
            raise error if heard == {reproduce._interrupt} else AssertionError(heard)
        return ours(*arguments)
    return call
dvc_graph.StageRunner._repro = broken(repro, "second@left", OSError(28, "No space left on device"))
artifacts.ProgressBar = broken(bar, "second@right", ValueError("no bar"))
reproduce.main()
"""


def test_no_stage_is_left_without_its_cause(repository: Path, environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], env=environment, capture_output=True, text=True, timeout=180)
    stages, left, right = done.stdout.rstrip().split("\n\n")[-3:]
    assert done.returncode == 1 and results(stages)["first"] == "ran", done.stdout
    assert left == ("second@left: OSError: [Errno 28] No space left on device\n"
                    "Log: logs/second@left.log. Run the same command again: it resumes.")
    assert right.startswith("second@right: Prefect: ") and "no bar" in right.splitlines()[0]


def test_whatever_ends_a_flow_nothing_is_left_and_the_next_goes_on_whatever_happens_beside_it(
    repository: Path, environment: dict[str, str]
) -> None:
    for victim, number, code in (
        ("DVC", signal.SIGKILL, 1), ("flow", signal.SIGTERM, 130), ("flow", signal.SIGKILL, -signal.SIGKILL),
    ):
        flow, tree = start("second@right", repository, environment)
        dvc = next(process for process in tree if {"repro", "second@right"} <= set(process.cmdline()))
        (dvc if victim == "DVC" else flow).send_signal(number)
        output, _ = flow.communicate(timeout=120)
        assert flow.returncode == code and "Traceback" not in output, output
        assert ("Run the same command again" in output) == (number == signal.SIGTERM or victim == "DVC"), output
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert alive == []
        (repository / "scratch-second-right").unlink()          # lest it soon have no two steps to go

    # None of what a flow under nohup started hears Ctrl-C; DVC is refused what runs and given the rest; a server that
    # is killed is started again.
    flow, tree = start("second@right", repository, environment, signal.SIG_IGN)
    [stage] = [process for process in tree if process.cmdline()[1:3] == ["work.py", "second-right"]]
    stage.suspend()
    os.killpg(flow.pid, signal.SIGINT)
    with Path("dvc.yaml").open("a") as graph:
        graph.write("  other: {cmd: echo other > other.txt, outs: [other.txt]}\n")
    running, other = (subprocess.run([sys.executable, "-m", "dvc", "repro", name], env=environment,
                                     capture_output=True, text=True) for name in ("second@right", "other"))
    next(process for process in tree if "uvicorn" in process.cmdline()).kill()
    stage.resume()
    output, _ = flow.communicate(timeout=120)
    assert running.returncode and "is busy" in running.stderr, running.stderr
    assert any(f"(PID {process.pid})" in running.stderr for process in tree), running.stderr
    assert other.returncode == 0 and Path("other.txt").read_text() == "other\n", other.stdout + other.stderr
    assert flow.returncode == 0 and "Traceback" not in output, output
    assert results(output).keys() == {"first", "second@left", "second@right", "last"}
    assert results(output)["second@right"] == "ran", output
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert alive == []
    runs = states(repository, "flow_run")
    assert all(re.fullmatch(r"cpu(-[0-9a-f]{7}(-changes)?)?", name) for name in runs)   # profile and, in git, commit
    assert [state for found in runs.values() for state in found] == ["Failed", "Crashed", "Crashed", "Completed"]
    assert not {"Running", "Pending"} & {state for found in states(repository).values() for state in found}


def test_what_cannot_start_says_so_in_two_lines(reproduce: Reproduce) -> None:
    unknown = reproduce("--profile", "nowhere")
    assert unknown.returncode == 1
    assert len(unknown.stderr.splitlines()) == 2 and "profiles/nowhere.yaml" in unknown.stderr
