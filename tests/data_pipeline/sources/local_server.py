"""A web server that answers wrongly when it is told to."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from data_pipeline.sources import streams


class Server(ThreadingHTTPServer):
    """Serves `files` by path; each entry of `faults` spoils one answer: a status, `cut`, or `changed`: cut, and another
    file from then on."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[int | str] = []
        self.requests: list[str | None] = []        # their ranges
        self.ranges = True
        self.validator: str | None = None
        self.changed = b""

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.headers["Range"])
        fault = self.server.faults.pop(0) if self.server.faults else None
        data = self.server.files.get(self.path)
        if isinstance(fault, int) or data is None:
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        if self.headers["Range"] and self.server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if self.server.validator:
            self.send_header(self.server.validator, hashlib.sha256(data).hexdigest())
        self.end_headers()
        end = start + (len(data) - start) // 2 if fault in ("cut", "changed") else len(data)
        self.wfile.write(data[start:end])
        if fault == "changed":
            self.server.files[self.path] = self.server.changed

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server, and clients that try again at once."""
    monkeypatch.setattr(streams, "WAITS", (0.01,) * 5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with answering(Server()) as server:
        yield server


@contextmanager
def answering(server: Any) -> Iterator[Any]:
    """The server, which answers while the block lasts."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
