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
import pytest

from flows.reproduce import SECONDS_TO_STOP, Run, main, run_stage

# isort: split
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import dvc_graph, server
from flows.console import Console
from flows.dvc_graph import Node, StageRunner
from tests.archive import ROOT, oddly_surrounded


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


# One branch ends by an error that is no stage's, the other before the stage begins, by Prefect. Meanwhile a hangup
# is heard by what hears Ctrl-C; SIGTERM Prefect hears itself. Then the same command, without the errors; what it would
# start, the server, is there.
BROKEN = """
import functools, signal, sys
sys.argv = ["-m"]                                           # as while `python -m` imports the package
from flows import artifacts, dvc_graph, reproduce, server
sys.argv = ["reproduce"]
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
server.start = functools.cache(server.start)
try:
    reproduce.main()
except SystemExit as ended:
    print("status", ended.code)
artifacts.ProgressBar, dvc_graph.StageRunner._repro = bar, repro
reproduce.main()
"""


@pytest.mark.timeout(600)               # with the first start of Prefect's server, beside others
def test_no_stage_is_left_without_its_cause_and_the_next_run_goes_on_in_odd_surroundings(
    repository: Path, apart: dict[str, str]
) -> None:
    with oddly_surrounded(apart) as odd:
        done = subprocess.run([sys.executable, "-c", BROKEN], env=odd, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    failed, resumed = done.stdout.split("status 1\n")
    stages, left, right = failed.rstrip().split("\n\n")[-3:]
    assert results(stages) == {"first": "ran", "second@left": "failed", "second@right": "not run", "last": "not run"}
    assert left == ("second@left: OSError: [Errno 28] No space left on device\n"
                    "Log: logs/second@left.log. Run the same command again: it resumes.")
    assert right.startswith("second@right: Prefect: ") and "no bar" in right.splitlines()[0]
    assert results(resumed) == {"first": "cached", "second@left": "ran", "second@right": "ran", "last": "ran"}
    assert Path("last.txt").read_text() == "lastsecond-leftfirst"
    assert {Path(name).stat().st_mode & 0o077 for name in ("last.txt", "dvc.lock", "logs/last.log")} == {0}
    assert not list(repository.rglob("*.pyc"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whatever_ends_a_flow_nothing_is_left_and_the_next_goes_on_whatever_happens_beside_it(
    repository: Path, environment: dict[str, str]
) -> None:
    for victim, number, code in (                                   # the second as Ctrl-C does
        ("DVC", signal.SIGKILL, 1), ("group", signal.SIGINT, 130), ("flow", signal.SIGTERM, 130),
        ("flow", signal.SIGKILL, -signal.SIGKILL),
    ):
        flow, tree = start("second@right", repository, environment)
        dvc = next(process for process in tree if {"repro", "second@right"} <= set(process.cmdline()))
        told = time.monotonic()
        if victim == "group":
            os.killpg(flow.pid, number)
        else:
            (dvc if victim == "DVC" else flow).send_signal(number)
        output, _ = flow.communicate(timeout=120)
        assert flow.returncode == code and "Traceback" not in output, output
        assert ("Run the same command again" in output) == (code != -signal.SIGKILL), output
        assert code != 130 or time.monotonic() - told < SECONDS_TO_STOP + 5
        _, alive = psutil.wait_procs(tree, timeout=60)              # stages, DVC and the temporary server
        assert alive == []
        if victim == "DVC":
            summary, _, failure = output.rstrip().rpartition("\n\n")
            assert results(summary) == {"first": "ran", "second@left": "ran", "second@right": "failed", "last": "ran"}
            assert re.fullmatch(r"second@right: .*\nLog: logs/second@right\.log\. Run the same command .*", failure)
        if victim == "group":
            assert (repository / ".dvc/tmp/rwlock").read_text() in ("", "{}")
        else:
            (repository / "scratch-second-right").unlink()          # lest it soon have no two steps to go
    resumed = re.findall(r"second-right from (\d+)", (repository / "history").read_text())
    assert resumed[:2] == ["0", "0"] and int(resumed[2]) >= 2

    # None of what a flow under nohup started hears Ctrl-C; DVC is refused what runs and given the rest; a server that
    # is killed is started again.
    (repository / "second-left.txt").unlink()
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
    assert results(output) == {
        "first": "cached", "second@left": "restored", "second@right": "ran", "last": "cached"
    }
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert alive == []
    runs = states(repository, "flow_run")
    assert all(re.fullmatch(r"cpu(-[0-9a-f]{7}(-changes)?)?", name) for name in runs)   # profile and, in git, commit
    assert [state for found in runs.values() for state in found] == [
        "Failed", "Crashed", "Crashed", "Crashed", "Completed"]
    found = states(repository)
    assert not {"Running", "Pending"} & {state for of in found.values() for state in of}
    assert [found[stage][0] for stage in ("first", "second@right")] == ["Completed", "Failed"]
    assert [found[stage][-1] for stage in ("first", "second@right")] == ["Cached", "Completed"]
    with sqlite3.connect(repository / ".prefect/prefect.db") as database:
        keys = {key for (key,) in database.execute("select key from artifact")}
    assert {"plan", "progress-first", "progress-second-left"} <= keys


def test_what_a_stage_waits_for_is_shown(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Runner(StageRunner):
        def run(self, node: Node, on_start: Callable[[], None], on_line: Callable[[str], None]) -> str:
            on_start()
            for line in ("Waiting for GPU 0, which another stage has (process 17).", "Reading."):
                on_line(line)
            return "ran"

    run = object.__new__(Run)
    run.stale, run.runner, run.console, run.outcomes, run.seconds = {"toy"}, Runner(1, 1), Console(), {}, {}
    with disable_run_logger():
        run_stage.fn(run, Node("toy", frozenset(), False, 1, 0))
    shown = capsys.readouterr().out
    assert re.fullmatch(r".* started\n\S+  toy +Waiting for GPU 0, .*process 17.*\n.* ran in .*\n", shown)


@pytest.mark.parametrize(("arguments", "url", "said"), [
    (["--profile", "nowhere"], None, r"^Profile nowhere: no profiles/nowhere\.yaml\.\nThere are: "),
    ([], "http://127.0.0.1:9/api", r"^PREFECT_API_URL=http://127\.0\.0\.1:9/api: no server answers \(.*\)\.\nStart it"),
])
def test_what_cannot_start_says_so_in_two_lines(
    repository: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], url: str | None, said: str
) -> None:
    (repository / "profiles").symlink_to(ROOT / "profiles")
    monkeypatch.setattr(dvc_graph, "PREFECT_HOME", repository / ".prefect")
    monkeypatch.setattr(server, "RECORD", repository / ".prefect/server.json")
    monkeypatch.setattr(signal, "signal", lambda *_: None)          # the tests' own stay
    monkeypatch.setattr(sys, "argv", ["reproduce", *arguments])
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(SystemExit, match=said) as ended:
        main()
    assert str(ended.value).count("\n") == 1
