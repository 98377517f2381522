"""A server on loopback that speaks as much of the Hub's API as data sets need, and errs when it is told to."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.data_pipeline.sources.local_server import answering

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = re.compile(
    r"^/(?:api/)?datasets/(?P<name>[^/]+/[^/]+)(?:/(?P<what>[^/]+)(?:/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?)?$"
)


class Hub(ThreadingHTTPServer):
    """`files` of data sets by `org/name/path`, under one commit; `main` names it.

    `faults` spoils answers: a pattern of "GET path" to a list of statuses, `cut`, or `None`, taken one a request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.gated: set[str] = set()
        self.faults: dict[str, list[int | str | None]] = {}
        self.requests: list[str] = []
        self.bytes_sent: Counter[str] = Counter()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        fault = next((faults.pop(0) for pattern, faults in self.server.faults.items()
                      if faults and re.search(pattern, request)), None)
        if isinstance(fault, int):
            self._send(fault, b"", {"Retry-After": "0"} if fault == 429 else {})
            return
        asked = REPOSITORY.match(path)
        if asked is None:
            self._send(404, b"{}", {})
            return
        name = asked["name"]
        files = {file.removeprefix(f"{name}/"): data for file, data in self.server.files.items()
                 if file.startswith(f"{name}/")}
        if name in self.server.gated:
            self._error(401, "GatedRepo", f"Access to dataset {name} is restricted.")
            return
        if not files:
            self._error(401, "RepoNotFound", "Repository Not Found")
            return
        if asked["revision"] not in (None, "main", COMMIT):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {asked['revision']}")
            return
        match asked["what"]:
            case None | "revision":
                self._json({"_id": "1", "id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False,
                            "downloads": 0, "likes": 0, "tags": [], "lastModified": "2026-01-01T00:00:00.000Z",
                            "siblings": [{"rfilename": file} for file in files]})
            case "tree":
                below = f"{asked['path']}/" if asked["path"] else ""
                found = [file for file in files if file.startswith(below)]
                if below and not found:
                    self._error(404, "EntryNotFound", "Entry not found")
                    return
                recursive = "recursive=true" in self.path.lower()
                self._json(_entries({file: files[file] for file in found}, below, recursive))
            case "paths-info":
                is_json = body.startswith(b"{")
                form = json.loads(body)["paths"] if is_json else re.findall("paths=([^&]+)", body.decode())
                wanted = set(map(unquote, form))
                self._json([entry for entry in _entries(files, "", True) if entry["path"] in wanted])
            case "resolve":
                self._file(files.get(asked["path"] or ""), f"{name}/{asked['path']}", fault)
            case _:
                self._error(404, "EntryNotFound", "Entry not found")

    def _file(self, data: bytes | None, name: str, fault: int | str | None) -> None:
        if data is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        start, end = 0, len(data)
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, end = int(wanted[1]), min(int(wanted[2] or end - 1) + 1, end)
        part = data[start:end]
        sent = part[: len(part) // 2] if fault == "cut" else part
        self._send(206 if wanted else 200, sent, {
            "X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes",
            **({"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"} if wanted else {}),
        }, len(part))
        if self.command == "GET":
            self.server.bytes_sent[name] += len(sent)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = length is not None and length != len(body)

    def log_message(self, *_: object) -> None:
        pass


def _entries(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    found = [{"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
             for file, data in files.items() if recursive or "/" not in file.removeprefix(below)]
    directories = {f"{below}{'/'.join(parts[:depth])}" for file in files
                   for parts in [file.removeprefix(below).split("/")]
                   for depth in range(1, len(parts) if recursive else min(2, len(parts)))}
    return [*({"type": "directory", "path": name, "size": 0, "oid": "0"} for name in sorted(directories)), *found]


def hub() -> AbstractContextManager[Hub]:
    return answering(Hub())


def read_data_set(name: str, directory: str, **fields: Any) -> tuple[list[str], dict[str, int], str]:
    """In a process that was started with HF_ENDPOINT set: texts, refusals by reason, and the error.

    What is read is kept in `directory`, as a run does that is taken up again.
    """
    import time
    from pathlib import Path

    from data_pipeline.annotate import reading
    from data_pipeline.config import AnnotateConfig, DataError, ExecutorConfig
    from data_pipeline.sources import hub as reader
    from data_pipeline.sources import pieces
    from data_pipeline.workers.executor import workers
    from tests.data_pipeline.annotate_corpus import annotate_config

    time.sleep = lambda seconds: None           # clients try again at once
    reader._builder.cache_clear()
    source = {"kind": "hub", "dataset": name, "revision": COMMIT, "domain": "web", **fields}
    config: AnnotateConfig = annotate_config(Path(), sources=[source])
    try:
        with workers(ExecutorConfig(executor="local", workers=1)) as pool:
            cut = [pieces(config.sources[0], 1, 10**6)]
            found = reading.read(config, cut, Path(directory), pool, lambda share, new: None)
    except DataError as error:
        return [], {}, str(error)
    texts = [text for shard in found.shards for text in reading.load(shard)["text"].to_pylist()]
    reasons = {why: entry["documents"] for by in found.refusals.values() for why, entry in by.items()}
    return sorted(texts), reasons, ""
