"""The pages: a run started there and cancelled there leaves no process; `make reproduce` reports there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import server
from tests.flows.conftest import without_prefect
from tests.waiting import wait_for


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST of `body`; the decoded answer. A busy server (503: SQLite is locked, nothing was done) is asked
    again, as Prefect's own client does."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})

    def answered() -> list[Any]:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return [json.loads(answer.read())]
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            return []

    return wait_for(answered)[0]


@contextlib.contextmanager
def serve(environment: dict[str, str], ends_by: signal.Signals) -> Iterator[str]:
    """`make ui`; its URL. Afterwards nothing of it may be left."""
    command = [sys.executable, "-m", "flows.server", "--port", str(free_port())]
    ui = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert ui.stdout
        url = ui.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
        yield url
    finally:
        tree = psutil.Process(ui.pid).children(recursive=True)
        ui.send_signal(ends_by)
        ui.communicate(timeout=60)
    _, alive = psutil.wait_procs(tree, timeout=60)         # a run that is told to end has some seconds of its own
    assert alive == []


def start_run(url: str, repository: Path) -> str:
    """Start a run from the pages; its id, once a stage of it is on the way."""
    deployment = wait_for(lambda: ask(f"{url}/api/deployments/filter", {}))[0]
    assert deployment["name"] == "local"
    run: str = ask(f"{url}/api/deployments/{deployment['id']}/create_flow_run", {})["id"]
    log = repository / "logs/second@left.log"
    wait_for(lambda: log.exists() and "step 2/" in log.read_text())
    return run


def is_refused(url: str, **headers: str) -> bool:
    headers |= {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/deployments/filter", b"{}", headers)
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        assert error.code == HTTPStatus.FORBIDDEN
        return True
    return False


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_wait_for_one_another_are_cancelled_killed_with_the_pages_and_tried_again(
    repository: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    work = repository / "work.py"           # of the long stages a few quick steps, then none ends before the test does
    pace = "0.02 if seconds < '1' else 0.5 if step < done + 4 else 100"
    work.write_text(work.read_text().replace("float(seconds) / 10", pace))
    environment["PREFECT_RUNNER_POLL_FREQUENCY"] = "1"

    def has_state(run: str, name: str) -> Callable[[], bool]:
        return lambda: bool(ask(f"{url}/api/flow_runs/{run}")["state_name"] == name)

    with serve(environment, signal.SIGKILL) as url:
        port = url.rpartition(":")[2]
        assert is_refused(url, Origin="https://example.org") and is_refused(url, Origin="null")
        assert is_refused(url, Host=f"example.org:{port}")              # a name that was made to lead here
        assert not is_refused(url, Origin=url) and not is_refused(url, Origin=f"http://localhost:{port}")

        command = [sys.executable, "-m", "flows.reproduce", "--stages", "first"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(f"Watch this run at {url}\n") and "Starting a temporary" not in done.stdout
        [reported] = ask(f"{url}/api/flow_runs/filter", {})
        assert reported["state_name"] == "Completed"

        first = start_run(url, repository)
        started = psutil.Process().children(recursive=True)
        assert {place.laddr.ip for process in started for place in process.net_connections()
                if place.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        stages = [process for process in started if "work.py" in process.cmdline()]
        assert stages
        deployment = ask(f"{url}/api/flow_runs/{first}")["deployment_id"]
        second = ask(f"{url}/api/deployments/{deployment}/create_flow_run", {})["id"]

        # A copy of this has all but its pages, while the second run is asked for several times.
        other = shutil.copytree(repository, tmp_path / "other")
        assert (other / ".prefect/server.json").exists()
        assert "dvc" in (other / ".dvc/tmp/rwlock").read_text()         # whose locks name processes of the other
        done = subprocess.run(command, cwd=other, env=environment | {"PREFECT_HOME": str(other / ".prefect")},
                              capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("Starting a temporary"), done.stdout + done.stderr
        assert "Waiting" not in done.stdout

        runs = {run["id"]: run["name"] for run in ask(f"{url}/api/flow_runs/filter", {})}
        assert runs.keys() == {reported["id"], first, second}
        assert all(re.fullmatch(r"cpu(-[0-9a-f]{7}(-changes)?)?", runs[run]) for run in (reported["id"], first))
        assert has_state(first, "Running")() and not has_state(second, "Running")()
        ask(f"{url}/api/flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}})
        wait_for(has_state(first, "Cancelled"))
        _, alive = psutil.wait_procs(stages, timeout=30)
        assert alive == []
        ours = {"flow_runs": {"id": {"any_": [first]}}}
        wait_for(lambda: {task["state_name"] for task in ask(f"{url}/api/task_runs/filter", ours)}
                 <= {"Cached", "Cancelled", "NotReady"})
        log = repository / "logs/second@left.log"
        log.unlink()
        wait_for(lambda: log.exists() and "step " in log.read_text())   # of the second
    with serve(environment, signal.SIGHUP) as url:                      # as of a terminal that is closed
        assert has_state(second, "Crashed")()
        states = {task["state_name"] for task in ask(f"{url}/api/task_runs/filter", {})}
        assert "Crashed" in states and not states & {"Running", "Pending"}
        history = repository / "history"
        before = history.read_text()
        retry = {"type": "SCHEDULED", "name": "AwaitingRetry"}          # as its page's Retry does
        ask(f"{url}/api/flow_runs/{first}/set_state", {"state": retry})
        wait_for(has_state(first, "Running"))
        wait_for(lambda: re.search(r"second-left from [1-9]", history.read_text().removeprefix(before)))
    assert not (repository / ".prefect/server.json").exists()


def test_pages_that_end_before_their_server_answers_leave_none(apart: dict[str, str]) -> None:
    port = free_port()
    command = [sys.executable, "-m", "flows.server", "--port", str(port)]
    ui = psutil.Popen(command, env=apart, stdout=subprocess.PIPE)
    tree = wait_for(lambda: ui.children(recursive=True))
    ui.terminate()
    ui.wait(30)
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert alive == []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_a_port_in_use_is_named(apart: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "flows.server", "--port", str(port)]
        done = subprocess.run(command, env=apart, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"Port {port} cannot be had: [Errno 98] Address already in use.",
                                        f"Choose another: make ui PORT={port + 1}"]


def test_a_number_that_is_no_port(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "--port", "70000"])
    with pytest.raises(SystemExit):
        server.main()
    assert "argument --port: 70000 is not from 0 to 65535" in capsys.readouterr().err


@pytest.fixture
def busy() -> Iterator[tuple[str, list[int]]]:
    """A server that is busy for its first two answers; its URL, and the answers it gave."""
    given: list[int] = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.append(HTTPStatus.SERVICE_UNAVAILABLE if len(given) < 2 else HTTPStatus.OK)
            self.send_response(given[-1])
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Busy) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answering.server_port}", given
        answering.shutdown()


@contextlib.contextmanager
def record_of(url: str) -> Iterator[None]:
    """What a `make ui` leaves while it serves."""
    with server.RECORD.open("w") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        record.write(json.dumps({"url": url}))
        record.flush()
        yield


def test_a_busy_server_is_waited_for(
    busy: tuple[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make reproduce` reports to it all the same, and does not start another."""
    url, given = busy
    monkeypatch.setattr(server, "RECORD", tmp_path / "server.json")
    assert server.running() is None
    with record_of(url):
        assert server.running() == url and len(given) == 3
    assert server.running() is None, "whoever held the record is gone"
    given.clear()
    assert ask(url) is True and len(given) == 3


# In place of uvicorn: whatever is asked for is there.
ANSWERS = """#!{python}
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def test_a_server_that_no_longer_answers_is_named_and_once_killed_another_answers(repository: Path) -> None:
    program = repository / "python"
    program.write_text(ANSWERS.format(python=sys.executable))
    program.chmod(0o755)
    code = ("import sys; from flows import server; server.PREFECT_HOME.mkdir(); server.LOGS.mkdir()\n"
            "server.SECONDS_TO_ANSWER = 1.0; sys.executable = './python'\n"
            "print(server.start(), flush=True); sys.stdin.read()")
    with psutil.Popen([sys.executable, "-c", code], env=without_prefect(), stdin=subprocess.PIPE,
                      stdout=subprocess.PIPE, text=True) as keeper:
        url = keeper.stdout.readline().strip()
        [hung] = keeper.children()
        hung.suspend()
        try:
            assert f"process {hung.pid}, which does not answer" in keeper.stdout.readline()
            hung.kill()
            wait_for(lambda: server._healthy(url))
        finally:
            keeper.kill()
            with contextlib.suppress(psutil.NoSuchProcess):
                hung.kill()


def test_a_server_that_does_not_answer_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "RECORD", tmp_path / "server.json")
    monkeypatch.setattr(server, "SECONDS_TO_ANSWER", 1.0)
    with record_of(f"http://127.0.0.1:{free_port()}"):
        assert server.running() is None
