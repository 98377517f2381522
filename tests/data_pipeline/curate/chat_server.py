"""A server of /v1/chat/completions on this machine that fails when it is told to, and documents to ask it about."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_pipeline.config import SynthesisConfig
from data_pipeline.curate.synthesis import Parent

WORDS = Path(random.__file__).read_text().split()
KEY = "sk-secret-0123456789"


def parent(number: int, label="low", length: int = 600, domain: str = "docs") -> Parent:
    chooser = random.Random(number)
    lines, text = [f"Document {number}."], ""
    while len(text) < length:
        lines.append(" ".join(chooser.choices(WORDS, k=12)))
        text = "\n".join(lines)
    return Parent(f"{number:032x}", text, domain, "BSD-3-Clause", 0.25, label)


def good_reply(body: dict) -> str:
    """As a model that does what it is told would answer, in words that depend on the question."""
    prompt = body["messages"][-1]["content"]
    chooser = random.Random(prompt)
    prose = " ".join(chooser.choices(WORDS, k=80))
    opening = re.search(r'"([A-Z][^"]*:)"', prompt)
    if opening:
        return f"{opening[1]}\n{prose}"
    if "Question:" in prompt:
        pairs = (f"- Question: What is {word}? Answer: It is {word}." for word in chooser.choices(WORDS, k=8))
        return "Here are the questions and answers based on the provided text:\n" + "\n".join(pairs)
    if "list" in prompt:
        return "Points:\n" + "\n".join(f"- {prose}" for _ in range(2))
    return f"Passage:\n{prose}"


class Server(ThreadingHTTPServer):
    """/v1/chat/completions on this machine. `faults` maps the number of an attempt at a question to what goes wrong."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, fault=lambda body, attempt: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = fault
        self.attempts: Counter[str] = Counter()
        self.times: list[tuple[str, float]] = []
        self.keys: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass                            # clients hang up on purpose here


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = json.dumps(body, sort_keys=True)
        with server.lock:
            server.attempts[name] += 1
            attempt = server.attempts[name]
            server.times.append((name, time.monotonic()))
            server.keys.add(self.headers["Authorization"])
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        fault = server.fault(body, attempt)
        with server.lock:
            server.at_once -= 1
        self.answer(body, fault)

    def answer(self, body: dict, fault) -> None:
        match fault:
            case None:
                choice = {"message": {"role": "assistant", "content": good_reply(body)}, "finish_reason": "stop"}
                self.send(200, json.dumps({"choices": [choice]}))
            case int(status), dict(headers), str(text):
                self.send(status, text, headers)
            case "cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices"')
                self.close_connection = True
            case "hang":
                time.sleep(1.5)
                self.close_connection = True
            case float(seconds):
                time.sleep(seconds)
                self.answer(body, None)

    def send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def content(text: str | None, finish: str = "stop") -> tuple[int, dict, str]:
    choice = {"message": {"content": text}, "finish_reason": finish}
    return 200, {}, json.dumps({"choices": [choice]})


def error(status: int, message: str = "no", **headers: str) -> tuple[int, dict, str]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message}})


def number_of(body: dict) -> int:
    return int(re.search(r"Document (\d+)", body["messages"][-1]["content"])[1])


def config(url: str, **values) -> SynthesisConfig:
    default = {"enabled": True, "base_url": url, "model": "mistral-nemo", "key_variable": "TEST_MODEL_KEY",
               "concurrency": 8, "timeout_seconds": 10, "retries": 4, "temperature": 0.5, "top_p": 0.9, "megabytes": 8}
    return SynthesisConfig(**{**default, **values})


def quiet(*args, **figures) -> None:
    pass
