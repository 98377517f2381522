"""`make ui`: Prefect's pages for this repository, from which runs can be started, watched and cancelled.

    python -m flows.server [--port 4200]

Runs until Ctrl-C. While it does, `make reproduce` reports here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from flows import PREFECT_HOME

RECORD = PREFECT_HOME / "server.json"             # {"url", "pid"} of the server that runs
LOG = Path("logs/prefect-server.log")
SECONDS_TO_START = 180.0
SECONDS_TO_ANSWER = 30.0
PORT = 4200


def running() -> str | None:
    """URL of this repository's server, if it runs. One that is too busy to answer is waited for, SECONDS_TO_ANSWER."""
    try:
        record = json.loads(RECORD.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    while psutil.pid_exists(record["pid"]):
        if _healthy(record["url"]):
            return str(record["url"])
        if time.monotonic() > deadline:
            break
        time.sleep(0.3)
    return None


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def end_orphans() -> None:
    """End temporary servers of this repository whose flow was killed before it could."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.ppid() == 1
                and "prefect.server.api.server:create_app" in process.cmdline()
                and process.environ().get("PREFECT_HOME") == str(PREFECT_HOME)
            ):
                process.terminate()


@contextlib.contextmanager
def serve_pages(port: int) -> Iterator[str]:
    """A Prefect server on 127.0.0.1 for the length of the block; its URL. SystemExit when the port is taken."""
    if url := running():
        raise SystemExit(f"The pages are already served at {url}.\nOpen them there, or stop that `make ui` first.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise SystemExit(f"Port {port} is in use.\nChoose another: make ui PORT={port + 1}") from None
    url = f"http://127.0.0.1:{port}"
    os.environ["PREFECT_API_URL"] = f"{url}/api"      # the pages call 4200 unless the server itself has it
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"Prefect's server did not start.\nRead {LOG}; `make doctor` checks the packages.")
            time.sleep(0.3)
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(json.dumps({"url": url, "pid": process.pid}))
        yield url
    finally:
        RECORD.unlink(missing_ok=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args()
    with serve_pages(options.port) as url:
        from flows.reproduce import reproduce  # prefect reads PREFECT_API_URL when it is imported

        print(url, "Start runs there (Deployments) or by `make reproduce`. Ctrl-C ends.", sep="\n", flush=True)
        reproduce.serve(name="local", limit=1, print_starting_message=False, pause_on_shutdown=False)


if __name__ == "__main__":
    main()
