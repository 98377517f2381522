"""The pages: a run started there and cancelled there leaves no process; `make reproduce` reports there."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

Reproduce = Callable[..., subprocess.CompletedProcess[str]]


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST of `body`; the decoded answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


@pytest.fixture
def pages(repository: Path, environment: dict[str, str]) -> Iterator[str]:
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
        ui.send_signal(signal.SIGTERM)
        ui.communicate(timeout=60)
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert alive == []
    assert not (repository / ".prefect/server.json").exists()


def test_start_cancel_and_report_to_the_pages(repository: Path, pages: str, reproduce: Reproduce) -> None:
    deployment = wait_for(lambda: ask(f"{pages}/api/deployments/filter", {}))[0]
    assert deployment["name"] == "local"
    run = ask(f"{pages}/api/deployments/{deployment['id']}/create_flow_run", {})["id"]
    log = repository / "logs/second@left.log"
    wait_for(lambda: log.exists() and "step 2/" in log.read_text())
    stages = [process for process in psutil.Process().children(recursive=True) if "work.py" in process.cmdline()]
    assert stages
    ask(f"{pages}/api/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    wait_for(lambda: ask(f"{pages}/api/flow_runs/{run}")["state_type"] == "CANCELLED")
    _, alive = psutil.wait_procs(stages, timeout=30)
    assert alive == []

    done = reproduce()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"Watch this run at {pages}\n")
    assert "Starting a temporary" not in done.stdout
    states = [run["state_name"] for run in ask(f"{pages}/api/flow_runs/filter", {})]
    assert sorted(states) == ["Cancelled", "Completed"]


def test_a_port_in_use_is_named(repository: Path, environment: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "flows.server", "--port", str(port)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"Port {port} is in use.", f"Choose another: make ui PORT={port + 1}"]
