"""A client that loses no answer, whatever the server does and whenever the run ends."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate

import pytest

from data_pipeline.config import DataError
from data_pipeline.curate import chat
from data_pipeline.curate.prompts import TASKS
from data_pipeline.curate.synthesis import synthesize
from tests.data_pipeline.curate.chat_server import KEY, config, content, error, number_of, parent, quiet
from tests.forked import start


def test_a_hundred_documents_from_a_server_that_fails_and_again_from_the_cache(serve, tmp_path):
    faults = [error(429, Retry_After="0.1"), error(500), "cut", (200, {}, "not JSON"), (200, {}, "{}"), error(503),
              (200, {}, '{"choices": [{"message": {"content": 7}}]}')]

    def fault(body, attempt):
        number = number_of(body)
        if number == 7:
            return content(None)                            # an empty reply is a reply
        if number == 8:
            return error(400, f"maximum context length, {KEY}")
        if number == 9:
            return error(500, "out of memory \ud800")
        return faults[number % len(faults)] if attempt == 1 and number % 3 == 0 else None

    server = serve(fault)
    documents = [parent(number) for number in range(100)]
    calls = []
    cache = tmp_path / "cache" / "replies.jsonl"
    result = synthesize(documents, config(server.url, retries=3), 1, cache,
                        lambda step, total, **figures: calls.append((step, total, figures)))
    assert len(result.documents) == 97
    assert result.requests == 100 and result.cached == 0
    assert result.reasons == {"docs": {"request failed": 2, "empty reply": 1}}
    assert result.failures == {"HTTP 400 (maximum context length, ***)": 1, "HTTP 500 (out of memory \\ud800)": 1}
    assert {document.source for document in result.documents} == {"synthetic/wikipedia"}
    assert {document.path for document in result.documents} < {document.id for document in documents}
    table = result.table()
    assert table["text"].to_pylist() == [document.text for document in result.documents]
    assert len(set(table["id"].to_pylist())) == 97
    assert server.keys == {f"Bearer {KEY}"}
    # every third one twice, one refused at once, one tried four times
    assert Counter(server.attempts.values()) == {1: 66, 2: 33, 4: 1}
    assert calls[0][:2] == (0, 100) and calls[-1][:2] == (100, 100)
    assert calls[-1][2]["failed"] == 2 and calls[-1][2]["req/s"] > 0
    assert KEY not in cache.read_text()

    before = sum(server.attempts.values())
    again = synthesize(documents, config(server.url, retries=0), 1, cache, quiet)
    assert again.documents == result.documents
    assert again.cached == 98 and sum(server.attempts.values()) == before + 2     # the two that failed, no other


def test_replay_needs_neither_server_nor_key(serve, tmp_path, monkeypatch):
    server = serve()
    documents = [parent(number, "high" if number % 2 else "low") for number in range(20)]
    first = synthesize(documents, config(server.url), 1, tmp_path / "replies.jsonl", quiet)
    assert {document.source for document in first.documents} == {f"synthetic/{name}" for name in TASKS}
    for document in first.documents:
        with_source = document.source == "synthetic/diverse_qa"
        assert document.written.startswith("Question: ") if with_source else document.written == document.text
        assert document.text.endswith(document.written)
    server.shutdown()
    server.server_close()
    monkeypatch.delenv("TEST_MODEL_KEY")
    again = synthesize(documents, config(server.url), 1, tmp_path / "replies.jsonl", quiet)
    assert again.documents == first.documents and again.cached == again.requests == first.requests
    # another model, temperature or wording is another question
    for other in ({"model": "qwen"}, {"temperature": 0.7}):
        with pytest.raises(DataError, match="TEST_MODEL_KEY"):
            synthesize(documents, config(server.url, **other), 1, tmp_path / "replies.jsonl", quiet)


def test_the_order_of_answers_does_not_show(serve, tmp_path):
    documents = [parent(number, "high") for number in range(12)]
    slow = serve(lambda body, attempt: random.Random(str(body)).random() * 0.05)
    quick = serve()
    results = [
        synthesize(documents, config(server.url, concurrency=concurrency), 1, tmp_path / f"{concurrency}", quiet)
        for server, concurrency in ((slow, 16), (quick, 1))
    ]
    assert results[0].documents == results[1].documents
    assert quick.most_at_once == 1


def test_as_many_requests_as_allowed_are_under_way(serve, tmp_path):
    together = threading.Barrier(8)

    def wait_for_others(body, attempt) -> None:
        together.wait(10)

    server = serve(wait_for_others)
    result = synthesize([parent(number) for number in range(24)], config(server.url, concurrency=8), 1,
                        tmp_path / "replies", quiet)
    assert len(result.documents) == 24 and server.most_at_once == 8


@pytest.mark.parametrize("header", ["0.6", "date"])
def test_retry_after_is_waited_for(serve, tmp_path, header):
    value = formatdate(time.time() + 2, usegmt=True) if header == "date" else header
    server = serve(lambda body, attempt: error(429, Retry_After=value) if attempt == 1 else None)
    synthesize([parent(1)], config(server.url), 1, tmp_path / "replies", quiet)
    (_, first), (_, second) = server.times
    assert 0.6 <= second - first < 3


def test_waits_double_with_jitter_from_the_seed(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "FIRST_WAIT_SECONDS", 0.5)
    waits: dict[int, list[float]] = {1: [], 2: []}
    for seed, waited in waits.items():

        async def sleep(seconds, waited=waited):
            waited.append(seconds)

        monkeypatch.setattr(chat.asyncio, "sleep", sleep)
        for run in range(2):
            server = serve(lambda body, attempt: None if attempt == 10 else error(503))
            synthesize([parent(1)], config(server.url, retries=9), seed, tmp_path / f"{seed}-{run}", quiet)
    for waited in waits.values():
        assert waited[:9] == waited[9:]
        bounds = [min(0.5 * 2**attempt, 60) for attempt in range(9)]
        assert all(bound / 2 <= wait <= bound for wait, bound in zip(waited[:9], bounds, strict=True))
    assert waits[1] != waits[2]


def test_a_hanging_server_is_left_after_the_time_limit(serve, tmp_path, capsys):
    server = serve(lambda body, attempt: "hang" if "Document 2." in str(body) else None)
    started = time.monotonic()
    result = synthesize([parent(1), parent(2)], config(server.url, retries=1, timeout_seconds=0.3), 1,
                        tmp_path / "replies", quiet)
    assert time.monotonic() - started < 1.2
    assert len(result.documents) == 1 and result.failures == {"no answer in 0.3 s": 1}
    assert capsys.readouterr().out == (
        f"Waiting for {server.url} (synthesis.base_url): no answer in 0.3 s; asked again.\n")


@pytest.mark.parametrize(("fault", "words", "attempts"), [
    (error(401, f"Incorrect API key provided: {KEY}"), ["HTTP 401", "TEST_MODEL_KEY", "***"], 1),
    (error(404, "no such model"), ["HTTP 404", "no such model", "ends in /v1", "mistral-nemo"], 1),
    (error(500), ["HTTP 500"], 12),                     # more than a tenth of 50, each twice
    (error(400, "bad"), ["HTTP 400"], 32),
    (error(429, "quota", Retry_After="86400"), ["HTTP 429", "quota"], 6),
])
def test_an_endpoint_that_answers_nothing_is_named(serve, tmp_path, fault, words, attempts):
    server = serve(lambda body, attempt: fault)
    with pytest.raises(DataError) as caught:
        synthesize([parent(number) for number in range(50)], config(server.url, retries=1, concurrency=1), 1,
                   tmp_path / "replies", quiet)
    message = str(caught.value)
    assert len(message.split("\n")) == 2 and KEY not in message
    assert all(word in message for word in [server.url, *words])
    assert sum(server.attempts.values()) == attempts


def test_no_server_at_all(serve, tmp_path):
    server = serve()
    synthesize([parent(0)], config(server.url), 1, tmp_path / "replies", quiet)
    server.shutdown()
    server.server_close()
    for documents in ([parent(1)], [parent(number) for number in range(60)]):
        with pytest.raises(DataError, match=f"(?s){server.url}.*ConnectError.*replies"):
            synthesize(documents, config(server.url, retries=1), 1, tmp_path / "replies", quiet)


@pytest.mark.parametrize(("status", "share", "count"), [(400, 2, 70), (500, 11, 370)])
def test_questions_that_fail_again_do_not_stop_a_later_run(serve, tmp_path, status, share, count):
    server = serve(lambda body, attempt: error(status) if number_of(body) % share == 0 else None)
    documents = [parent(number) for number in range(count)]
    first = synthesize(documents, config(server.url, retries=1), 1, tmp_path / "replies", quiet)
    failed = len(range(0, count, share))
    assert failed > chat.PATIENCE and first.failures == {f"HTTP {status} (no)": failed}
    again = synthesize(documents, config(server.url, retries=1), 1, tmp_path / "replies", quiet)
    assert again.documents == first.documents and again.failures == first.failures


def test_a_server_that_stops_answering_is_left_and_asked_again_later(serve, tmp_path):
    down = threading.Event()
    server = serve(lambda body, attempt: error(503) if down.is_set() else None)
    documents = [parent(number) for number in range(420)]

    def stop_soon(step, total, **figures):
        if step == 200:
            down.set()

    with pytest.raises(DataError, match=f"{server.url}.*HTTP 503"):
        synthesize(documents, config(server.url, retries=0), 1, tmp_path / "replies", stop_soon)
    tried = len(server.attempts)
    assert 200 + chat.PATIENCE <= tried <= 200 + 2 * chat.PATIENCE
    down.clear()
    result = synthesize(documents, config(server.url), 1, tmp_path / "replies", quiet)
    assert len(result.documents) == 420 and 200 <= result.cached <= 210


@pytest.mark.parametrize(("values", "words"), [
    ({"key_variable": "NOT_SET"}, "NOT_SET"),
    ({"url": "localhost:8000/v1"}, "localhost:8000/v1"),
    ({"url": "http://"}, "base_url"),
    ({"url": "http://[::1"}, "base_url"),
])
def test_unusable_settings_are_refused_before_anything_is_sent(serve, tmp_path, values, words):
    with pytest.raises(DataError, match=words) as caught:
        synthesize([parent(1)], config(**{"url": "http://127.0.0.1:9/v1", **values}), 1, tmp_path / "replies", quiet)
    assert len(str(caught.value).split("\n")) == 2


def test_nothing_to_rephrase_needs_nothing(tmp_path):
    result = synthesize([parent(1, "medium")], config("", key_variable="NOT_SET"), 1, tmp_path / "replies", quiet)
    assert result.documents == [] and result.requests == 0 and result.table().num_rows == 0


def test_a_line_cut_short_costs_its_question_only(serve, tmp_path):
    server = serve()
    documents = [parent(number) for number in range(10)]
    cache = tmp_path / "replies"
    whole = synthesize(documents, config(server.url), 1, cache, quiet)
    lines = cache.read_bytes().splitlines(keepends=True)
    assert len(lines) == 10
    for end in (-1, -20, -len(lines[-1]) + 1):
        cache.write_bytes(b"".join(lines)[:end])
        before = sum(server.attempts.values())
        again = synthesize(documents, config(server.url), 1, cache, quiet)
        assert again.documents == whole.documents
        assert sum(server.attempts.values()) == before + (0 if end == -1 else 1)
        assert synthesize(documents, config("http://nowhere.invalid"), 1, cache, quiet).cached == 10
    cache.write_bytes(b"\0" * 100 + b"\n[]\n{}\n" + b"".join(lines))
    assert synthesize(documents, config("http://nowhere.invalid"), 1, cache, quiet).cached == 10


SCRIPT = """
import sys
from pathlib import Path
from tests.data_pipeline.curate.chat_server import config, parent, quiet
from data_pipeline.curate.synthesis import synthesize

synthesize([parent(number) for number in range(100)], config(sys.argv[1], concurrency=4), 1, Path(sys.argv[2]), quiet)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_was_answered_before_the_end_is_not_asked_again(serve, tmp_path, end):
    server = serve()
    server.fault = lambda body, attempt: 0.02 if len(server.attempts) <= 40 else 1.0        # does not end by itself
    cache = tmp_path / "replies"
    (tmp_path / "asking.py").write_text(SCRIPT)
    words = tmp_path / "errors"
    process = start(tmp_path, "-m", "asking", server.url, str(cache), errors=str(words))
    while len(server.attempts) < 40:
        assert process.is_alive(), words.read_text()
        time.sleep(0.005)
    os.kill(process.pid, end)
    process.join(10)
    assert process.exitcode
    assert end != signal.SIGINT or "KeyboardInterrupt" in words.read_text()
    kept = len(cache.read_bytes().splitlines())
    assert 30 <= kept <= len(server.attempts) < 100
    seen = sum(server.attempts.values())
    server.fault = lambda body, attempt: None
    result = synthesize([parent(number) for number in range(100)], config(server.url), 1, cache, quiet)
    assert len(result.documents) == 100 and result.cached == kept
    assert sum(server.attempts.values()) - seen == 100 - kept
    asked_again = [name for name, count in server.attempts.items() if count > 1]
    assert len(asked_again) <= 4 and max(server.attempts.values()) <= 2      # those under way when it ended


def test_noise_from_an_untrained_model_is_dropped_and_breaks_nothing(serve, tmp_path):
    def noise(body, attempt):
        chooser = random.Random(str(body))
        pieces = ["Question:", "Answer:", "\n- ", "\n", "<s>", "\x00", "\ud800", "😀", "**", '"', " the", "Passage:"]
        return content("".join(chooser.choices(pieces, k=chooser.randrange(60))), chooser.choice(["stop", "length"]))

    server = serve(noise)
    documents = [parent(number, "high") for number in range(60)]
    result = synthesize(documents, config(server.url), 1, tmp_path / "replies", quiet)
    assert result.failures == {} and result.requests == 300
    assert {document.source for document in result.documents} <= {
        "synthetic/diverse_qa", "synthetic/extract_knowledge", "synthetic/knowledge_list"}
    assert sum(result.reasons["docs"].values()) > 200 and result.reasons["docs"]["half a surrogate pair"] > 50
    again = synthesize(documents, config("http://nowhere.invalid"), 1, tmp_path / "replies", quiet)
    assert again == replace(result, cached=300)
