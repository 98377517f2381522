"""`make ui`: Prefect's pages for this repository, from which runs can be started, watched and cancelled.

    python -m flows.server [--port 4200]

Runs until Ctrl-C. While it does, `make reproduce` reports here.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial

from flows import PREFECT_HOME
from flows.dvc_graph import LOGS, GraphError, check_places
from model.serve.loopback import Application, own_pages_only, port_number
from stages.frame.common import die_with_parent

RECORD = PREFECT_HOME / "server.json"             # {"url"} of the pages; locked by the process that serves them
LOG = LOGS / "prefect-server.log"
SECONDS_TO_START = 600.0        # alive, but on a busy machine
SECONDS_TO_ANSWER = 30.0
SECONDS_FOR_DATABASE = 10.0
PORT = 4200


def running() -> str | None:
    """URL of this repository's pages, if they are served. One that is too busy to answer is waited for,
    SECONDS_TO_ANSWER."""
    try:
        with RECORD.open() as record:
            fcntl.flock(record, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None                               # what a `make ui` left that was killed
    except FileNotFoundError:
        return None
    except BlockingIOError:
        url = json.loads(RECORD.read_text() or '{"url": null}')["url"]
    return url if url and _answers(url) else None


def _answers(url: str) -> bool:
    """Whether it does within SECONDS_TO_ANSWER."""
    deadline = time.monotonic() + SECONDS_TO_ANSWER
    while not _healthy(url):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.3)
    return True


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/api/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def start(port: int = 0) -> str:
    """Start a Prefect server on 127.0.0.1 that lives as long as this process; its URL.

    One that is killed is started again, and one that no longer answers is named. It has a process session of its own:
    Ctrl-C leaves it to the flow, which has an end to record.

    Args:
        port: of a server with pages; 0 is one for a single run, without pages, wherever there is room.
    Raises:
        SystemExit: the port is taken, or the server does not start, in two lines.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SystemExit(f"Port {port} cannot be had: {error}.\nChoose another: make ui PORT={port + 1}") from None
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    check_database()
    environment = os.environ | {"PREFECT_API_URL": f"{url}/api"}      # the pages call 4200 unless the server has it
    if not port:
        environment |= {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT_UI_ENABLED": "0"}
    command = [sys.executable, "-m", "uvicorn", "--factory", "flows.server:app", "--host", "127.0.0.1",
               "--port", url.rpartition(":")[2], "--log-level", "warning", "--timeout-graceful-shutdown", "3"]
    answered = threading.Event()

    def keep() -> None:
        with LOG.open("w") as log:
            while True:
                process = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=partial(die_with_parent, signal.SIGTERM),
                )
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(SECONDS_TO_ANSWER)
                    if answered.is_set() and process.poll() is None and not _answers(url):
                        print(f"Waiting for Prefect's server, process {process.pid}, which does not answer. "
                              f"`kill -9 {process.pid}` has another started.", flush=True)
                if not answered.is_set():
                    return

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    deadline = time.monotonic() + SECONDS_TO_START
    while not _healthy(url):
        if not keeper.is_alive() or time.monotonic() > deadline:
            raise SystemExit(f"Prefect's server did not start.\nRead {LOG}; `make doctor` checks the packages.")
        time.sleep(0.3)
    answered.set()
    return url


def check_database() -> None:
    """Raise SystemExit where Prefect's record of runs cannot be written."""
    file = PREFECT_HOME / "prefect.db"
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=SECONDS_FOR_DATABASE)) as database:
            database.execute("begin immediate")
    except sqlite3.Error as error:
        raise SystemExit(f"{file}: {error}.\nEnd the process that has it, or `rm -r {PREFECT_HOME}`: it holds the "
                         "record of past runs, no results.") from None


def app() -> Application:
    """Prefect's application, for its own pages."""
    from prefect.server.api.server import create_app

    port = os.environ["PREFECT_API_URL"].removesuffix("/api").rpartition(":")[2]
    return own_pages_only(create_app(final=True), int(port))


@contextlib.contextmanager
def serve_pages(port: int) -> Iterator[str]:
    """The pages, in this repository's name. SystemExit when others serve them."""
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("a") as record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"The pages are already served at {running()}.\n"
                             "Open them there, or stop that `make ui` first.") from None
        record.truncate(0)
        try:
            url = start(port)
            json.dump({"url": url}, record)
            record.flush()
            yield url
        finally:
            RECORD.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=port_number, default=PORT)
    options = parser.parse_args()
    try:
        check_places()
    except GraphError as error:
        sys.exit(str(error))
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))      # the terminal is closed
    with serve_pages(options.port) as url:
        os.environ["PREFECT_API_URL"] = f"{url}/api"
        from flows.reproduce import mark_crashed, reproduce  # prefect reads PREFECT_API_URL when it is imported

        mark_crashed()
        print(url, "Start runs there (Deployments) or by `make reproduce`. Ctrl-C ends.", sep="\n", flush=True)
        reproduce.serve(name="local", limit=1, print_starting_message=False, pause_on_shutdown=False)


if __name__ == "__main__":
    main()
