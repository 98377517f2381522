"""`python -m model.serve` as clients see it: texts, streams, errors, clients that go, and its end."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from model import hub
from model.hybrid_lm import HybridLM
from model.inference.text import pieces, read_vocabulary
from model.serve.__main__ import load, main
from model.serve.engine import Limits
from model.serve.server import PAGE, Server
from tests.model.inference.test_text_generation import CONFIG, WORDS, byte_tokenizer
from tests.tiny_engine import random_model
from tests.waiting import wait_for

TURN = "<pad>"          # a control token that is none of the named ones
LONGEST = 20_000
LIMITS = Limits(LONGEST, rows=3, queue=8, piece_tokens=16, prefix_bytes=10**7)
TEMPLATE = """{% for message in messages %}
{%- if message.role == "system" %}{{ raise_exception("No systems") }}{% endif %}
{{- "<s>" + message.content + "</s>" }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, and another that has a chat template."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("base", "chat")}
    for directory in found.values():
        hub.save(directory, CONFIG, random_model(CONFIG).state_dict(), {}, "float32")
        tokenizer = byte_tokenizer(WORDS)
        tokenizer.add_special_tokens([TURN])
        tokenizer.save(str(directory / "tokenizer.json"))
    (found["chat"] / "chat_template.jinja").write_text(TEMPLATE)
    (found["chat"] / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}))
    return found


@pytest.fixture(scope="module")
def client(directories: dict[str, Path]) -> Iterator[httpx.Client]:
    models = {name: load(name, directory, LIMITS, "float32", torch.device("cpu"))
              for name, directory in directories.items()}
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port = own.getsockname()[1]
        server = Server(models, port)
        thread = threading.Thread(target=server.run, args=([own],))
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_for(lambda: server.started)
            yield client
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ask(client: httpx.Client, path: str = "completions", **body: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/{path}", json={"model": "base", "temperature": 0} | body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    yield from (json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def counted(client: httpx.Client, model: str = "base") -> dict[str, int]:
    found = re.findall(rf'nemotron_h_(\w+){{model="{model}"}} (\d+)', client.get("/metrics").text)
    return {name: int(value) for name, value in found}


def likeliest(directory: Path, ids: list[int], tokens: int) -> str:
    """What the full forward pass in float64 writes whatever ends a text, up to a token that rounding could change."""
    vocabulary = read_vocabulary(directory, CONFIG)._replace(end_ids=[])
    config, state = hub.load(directory)
    model, chosen = HybridLM.from_state(config, state, torch.float64), list[int]()
    with torch.no_grad():
        while len(chosen) < tokens:
            (first, second), (token, _) = model(torch.tensor([ids + chosen]))[0, -1].topk(2)
            if first - second < 1e-4:
                break
            chosen.append(int(token))
    return "".join(pieces(vocabulary, chosen)).rstrip("\ufffd")


def test_texts_of_unlike_length_asked_for_at_once(client, directories):
    prompts = ["the", "é" * 9, "the" * 25, "th", "the the the", "hh" * 20, "", "e"]
    ids = [read_vocabulary(directories["base"], CONFIG).encode(prompt) for prompt in prompts]
    expected = [likeliest(directories["base"], ids[size], 5 + size) for size in range(8)]
    assert sum(map(len, expected)) > 20
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda size: ask(client, prompt=prompts[size], max_tokens=5 + size, ignore_eos=True),
                         range(8))
    for size, answer in enumerate(found):
        assert answer["choices"][0]["text"].startswith(expected[size])
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 5 + size
        assert answer["usage"]["prompt_tokens"] == len(ids[size])


def test_a_stream_is_the_answer_in_parts(client):
    asked = {"prompt": "the thé", "max_tokens": 60, "seed": 3, "temperature": 1.2, "top_k": 50, "top_p": 0.9,
             "ignore_eos": True}
    whole = ask(client, **asked)
    with client.stream("POST", "/v1/completions", json={
            "model": "base", "stream": True, "stream_options": {"include_usage": True}} | asked) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *parts, last = events(answer)
    choices = [part["choices"][0] for part in parts]
    assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"] and len(parts) > 5
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert {part["id"] for part in parts} == {last["id"]} and last["choices"] == []
    assert last["usage"]["completion_tokens"] == 60 == whole["usage"]["completion_tokens"]
    assert ask(client, **asked | {"seed": 4})["choices"] != whole["choices"]


def test_ids_and_stops(client):
    asked = {"max_tokens": 8, "ignore_eos": True}
    written, same = (ask(client, prompt=prompt, **asked)["choices"][0]["text"]
                     for prompt in ("the", [2, WORDS.index("the")]))
    assert written == same
    stop = written[2:4]
    cut = ask(client, prompt="the", stop=["never", stop], **asked)["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (written[: written.index(stop)], "stop")


def test_a_prompt_that_begins_as_another_is_not_read_again(client):
    prompt = "he" * 40                                                          # 81 ids, pieces of 16
    first, again, longer = (ask(client, prompt=text, max_tokens=4) for text in (prompt, prompt, prompt + "!!"))
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, again, longer)]
    assert cached == [0, 81, 80] and first["choices"] == again["choices"]
    assert counted(client)["cached_tokens_total"] >= 161


def test_a_conversation_through_the_template(client, directories):
    turns = [{"role": role, "content": content}
             for role, content in (("user", "the"), ("assistant", "h"), ("user", "e"))]
    asked = {"model": "chat", "messages": turns, "max_tokens": 12, "ignore_eos": True}
    answer = ask(client, "chat/completions", **asked)
    the, h, e = (WORDS.index(word) for word in ("the", "h", "e"))
    ids = [1, the, 2, 1, h, 2, 1, e, 2, 1]
    choice = answer["choices"][0]
    assert answer["usage"]["prompt_tokens"] == len(ids) and answer["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].startswith(likeliest(directories["chat"], ids, 12))
    for most in ({"max_tokens": 12, "max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 12}):
        assert ask(client, "chat/completions", **asked | most)["usage"]["completion_tokens"] == 3
    with client.stream("POST", "/v1/chat/completions", json=asked | {"stream": True, "temperature": 0}) as stream:
        deltas = [part["choices"][0]["delta"] for part in events(stream)]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]


CHAT = {"model": "chat", "messages": [{"role": "user", "content": "the"}]}


@pytest.mark.parametrize(("path", "body", "status", "param", "message"), [
    ("completions", b"{", 400, None, "not JSON"), ("completions", b"[" * 100_000, 400, None, "not JSON"),
    ("completions", b"\xff", 400, None, "not JSON"), ("completions", b"3", 400, None, "no JSON object"),
    ("completions", {"model": "other"}, 404, "model", "no model 'other', but base, chat"),
    ("completions", {"prompt": None}, 400, "prompt", "prompt: Field required"),
    ("completions", {"prompt": 3}, 400, "prompt", "prompt"), ("completions", {"prompt": ["a"]}, 400, "prompt", ""),
    ("completions", {"prompt": []}, 400, "prompt", "prompt is empty"),
    ("completions", {"prompt": [1, "a"]}, 400, "prompt", ""),
    ("completions", b'{"model": "base", "prompt": "\\ud800"}', 400, None, "surrogates"),
    ("completions", {"prompt": [265]}, 400, "prompt", "beyond the vocabulary of 265"),
    ("completions", {"prompt": [-1]}, 400, "prompt", "beyond the vocabulary"),
    ("completions", {"max_tokens": 20_000}, 400, "max_tokens", "more than the 20000"),
    ("completions", {"prompt": [4] * 20_000}, 400, "max_tokens", "20000 tokens of prompt and 16 new ones"),
    ("completions", {"max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    ("completions", {"max_tokens": True}, 400, "max_tokens", "valid integer"),
    ("completions", {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ("completions", {"temperature": -1}, 400, "temperature", "greater"),
    ("completions", b'{"model": "base", "prompt": "a", "temperature": NaN}', 400, "temperature", "finite"),
    ("completions", {"top_p": 0}, 400, "top_p", "greater than 0"), ("completions", {"n": 2}, 400, "n", "should be 1"),
    ("completions", {"stop": ""}, 400, "stop", "at least 1"), ("completions", {"stop": [1]}, 400, "stop", ""),
    ("completions", {"presence_penalty": 0.5}, 400, "presence_penalty", "less than or equal to 0"),
    ("completions", {"logprobs": 3}, 400, "logprobs", "boolean"),
    ("completions", {"logprobs": 0}, 400, "logprobs", "boolean"),
    ("completions", {"logprobs": True}, 400, "logprobs", "less than or equal to 0"),
    ("completions", {"best_of": 3}, 400, "best_of", "Extra"),
    ("completions", {"stream_options": {}}, 400, "stream_options", "only with `stream`: true"),
    ("chat/completions", {"model": "base", "messages": CHAT["messages"]}, 400, "messages", "no chat template"),
    ("chat/completions", CHAT | {"messages": []}, 400, "messages", "at least 1 item"),
    ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "messages", "content: Field required"),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "a</s>"}]}, 400, "messages", "has </s>"),
    ("chat/completions", CHAT | {"messages": [{"role": "user", "content": f"a{TURN}"}]}, 400, "messages", "has <pad>"),
    ("chat/completions", CHAT | {"messages": [{"role": TURN, "content": "a"}]}, 400, "messages", "'system', 'user'"),
    ("chat/completions", CHAT | {"messages": [{"role": "system", "content": "a"}]}, 400, "messages", "No systems"),
    ("chat/completions", CHAT | {"tools": []}, 400, "tools", "Extra inputs"), ("else", {}, 404, None, "Not Found"),
])
def test_what_is_refused(client, path, body, status, param, message):
    if isinstance(body, dict) and path == "completions":
        body = {"model": "base", "prompt": "the"} | body
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(f"/v1/{path}", content=content)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param) and message in error["message"], error
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 300
    assert client.get("/health").text == "ok"


def test_a_request_that_is_too_large(client):
    assert client.post("/v1/completions", content=b" " * (17 * 2**20)).status_code == 413
    assert client.get("/v1/completions").json()["error"]["message"] == "GET /v1/completions: Method Not Allowed."


def test_other_pages_are_refused(client):
    port = client.base_url.port
    for headers in ({"Host": f"example.org:{port}"}, {"Origin": "https://example.org"}, {"Origin": "null"}):
        assert client.get("/v1/models", headers=headers).status_code == 403
    answer = client.get("/v1/models", headers={"Origin": f"http://localhost:{port}"})
    assert [(model["id"], model["max_model_len"]) for model in answer.json()["data"]] == [
        ("base", LONGEST), ("chat", LONGEST)]


@contextlib.contextmanager
def under_way(client: httpx.Client, model: str = "base", **body: Any) -> Iterator[Iterator[str]]:
    asked = {"model": model, "prompt": "the", "max_tokens": 19_000, "ignore_eos": True, "stream": True} | body
    with client.stream("POST", "/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def test_clients_that_go_leave_their_rows(client):
    before = counted(client)
    with under_way(client), under_way(client), under_way(client):
        wait_for(lambda: counted(client)["texts_running"] == 3)
        body = json.dumps({"model": "base", "prompt": "the", "max_tokens": 19_000, "ignore_eos": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{client.base_url.port}\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", client.base_url.port)) as plain:
            plain.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_for(lambda: counted(client)["texts_waiting"] == 1)
        wait_for(lambda: counted(client)["texts_waiting"] == 0)
        assert counted(client)["texts_running"] == 3
    wait_for(lambda: counted(client)["texts_running"] == 0)
    assert counted(client)["cancelled_total"] - before["cancelled_total"] == 4
    assert ask(client, prompt="the", max_tokens=3)["usage"]["prompt_tokens"] == 2


def test_more_than_may_wait_are_sent_away(client):
    with contextlib.ExitStack() as stack:
        asked = {"model": "base", "prompt": "the", "max_tokens": 19_000, "ignore_eos": True, "stream": True}
        for number in range(11):
            stack.enter_context(client.stream("POST", "/v1/completions", json=asked))
            if number == 2:         # they run, or with the next eight would be more than may wait for a moment
                wait_for(lambda: counted(client)["texts_running"] == 3)
        wait_for(lambda: counted(client)["texts_waiting"] == 8)
        answer = client.post("/v1/completions", json={"model": "base", "prompt": "the"})
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "busy"
        assert ask(client, model="chat", prompt="the", max_tokens=3)["model"] == "chat"      # has its own
    wait_for(lambda: counted(client)["texts_running"] == counted(client)["texts_waiting"] == 0)


def test_the_page_asks_nobody_else(client):
    answer = client.get("/")
    assert answer.text == PAGE.read_text() and not re.search(r"https?:|src=|@import|url\(", answer.text)
    assert "connect-src 'self'" in answer.headers["content-security-policy"]


def test_ctrl_c_ends_it_and_tells_who_waits(directories):
    command = [sys.executable, "-m", "model.serve", "--model", f"base={directories['base']}", "--port", "0",
               "--max-length", str(LONGEST)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout
            url = serving.stdout.readline().strip()
            assert serving.stdout.readline() == "Serves base. Ctrl-C ends.\n"
            with httpx.Client(base_url=url, timeout=60) as client, under_way(client) as lines:
                serving.send_signal(signal.SIGINT)
                sent = time.monotonic()
                last = [line for line in lines if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == "The server ends."
            out, error = serving.communicate(timeout=20)
            assert (serving.returncode, out, error) == (0, "", "") and time.monotonic() - sent < 10
        finally:
            serving.kill()


@pytest.mark.parametrize(("options", "message"), [
    (("--model", "a=DIRECTORY", "--model", "a=DIRECTORY"), "two models have one name"),
    (("--model", "a=DIRECTORY/nowhere"), "nowhere/config.json: not found"),
    (("--model", "DIRECTORY", "--max-length", "1000000000000"), "16 texts of 1000000000000 tokens need"),
    (("--model", "DIRECTORY", "--dtype", "fp8"), "Take --dtype bfloat16"),
])
def test_what_cannot_be_served(directories, options, message, capsys):
    options = [option.replace("DIRECTORY", str(directories["base"])) for option in options]
    assert main(["--port", "0", "--device", "cpu", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.strip().count("\n") == 1


@pytest.mark.parametrize(("option", "value", "why"), [
    ("--prefix-cache-mb", "-1", "less than 0"), ("--rows", "0", "less than 1"),
    ("--port", "65536", "not from 0 to 65535"),
])
def test_numbers_without_a_meaning(option, value, why, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "DIRECTORY", option, value])
    assert f"argument {option}: {value} is {why}" in capsys.readouterr().err


def test_a_port_in_use(directories, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["--model", str(directories["base"]), "--port", str(port)]) == 1
    assert capsys.readouterr().err.splitlines()[1] == f"Choose another: --port {port + 1}"
