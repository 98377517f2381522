"""`kind: hub` against a server on loopback that speaks the Hub's API, through the Hub's own clients."""

import io
import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_pipeline.sources.hub_server import COMMIT, Hub, hub, read_data_set


def parquet(**columns) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, row_group_size=50)
    return stream.getvalue()


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


TEXTS = [[f"file {file} row {row}" for row in range(120)] for file in range(3)]
WHOLE = {f"data/train-{file:05d}-of-00003.parquet": parquet(text=texts, n=range(120))
         for file, texts in enumerate(TEXTS)}
NUMBERS = count()
EVERYTHING = sorted(text for texts in TEXTS for text in texts)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[Hub, ProcessPoolExecutor]]:
    """The server, and a process whose Hub it is: the address is read when the clients are imported."""
    with hub() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path_factory.mktemp("hf")),
                            "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
            patch.setenv(name, value)
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield server, process


@pytest.fixture
def read(served, tmp_path):
    server, process = served
    name = f"org/{next(NUMBERS)}-set"         # the clients keep what they know of a commit
    server.gated, server.faults = set(), {}

    def serve(**files: bytes) -> None:
        server.files = {f"{name}/{file}": data for file, data in files.items()}

    def call(**fields):
        server.requests.clear()
        return process.submit(read_data_set, name, os.fspath(tmp_path), **fields).result(timeout=60)

    serve(**WHOLE)
    call.server, call.serve, call.name = server, serve, name
    return call


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_files_are_listed_and_streamed_at_a_commit(read, revision):
    assert read(revision=revision) == (EVERYTHING, {}, "")
    assert all(f"/resolve/{COMMIT}/" in request for request in read.server.requests if request.endswith(".parquet"))


@pytest.mark.parametrize(("first", "second"), [
    (lines({"text": None, "id": 1}), lines({"text": "two", "id": 2})),              # null, then text
    (lines({"text": "one"}), lines({"text": "two", "id": 2})),                      # a column more
    (lines({"text": "one", "id": 1, "x": 1}), lines({"text": "two", "id": "b"})),   # another type, a column less
    (lines({"text": "one", "id": 1}, {"text": "two", "id": "b"}), lines({"text": None})),
    (lines({"text": 3}, {"text": "one"}), lines({"text": "two"})),                  # a number among texts
])
def test_schemas_that_drift_from_file_to_file(read, first, second):
    read.serve(**{"a.jsonl": first, "b.jsonl": second})
    values = [json.loads(line)["text"] for line in (first + second).splitlines()]
    texts, reasons, error = read()
    assert error == "" and texts == sorted(value for value in values if isinstance(value, str))
    assert sum(reasons.values()) == sum(not isinstance(value, str) for value in values)


def test_parquet_that_drifts_and_lacks_the_column(read):
    read.serve(**{"data/train-0.parquet": parquet(text=["one"], n=[1]),
                  "data/train-1.parquet": parquet(text=pa.array([None, None]), m=["x", "y"]),
                  "data/train-2.parquet": parquet(body=["two"])})
    assert read() == (["one"], {"no text": 2, "no column 'text'": 1}, "")


def test_a_connection_that_is_cut_and_a_server_that_is_busy(read):
    read.server.faults = {"GET .*00001-of.*parquet": ["cut", 503, 429, "cut", 500], "GET /api/": [429, 502]}
    texts, reasons, error = read()
    assert (error, reasons) == ("", {}) and texts == EVERYTHING


@pytest.mark.parametrize(("change", "expected"), [
    ("gated", r"-set is gated.*\nAccept them at .*HF_TOKEN"),
    ("absent", r"-set is not on the Hub, or is private\.\n.*HF_TOKEN"),
    ("down", r"-set cannot be reached: .*\nConnect"),
])
def test_refusals_are_two_lines(read, change, expected):
    match change:
        case "gated":
            read.server.gated = {read.name}
        case "absent":
            read.serve()
        case "down":
            read.server.faults = {"": [503] * 100}
    texts, _, error = read()
    assert texts == [] and error.count("\n") == 1 and re.search(expected, error), error


def test_a_run_goes_on_where_it_failed(read, tmp_path):
    read.server.faults = {"GET .*00001-of.*parquet": [503] * 100}
    texts, _, error = read()
    assert texts == [] and "file 1 of 3" in error and error.count("\n") == 1
    receipts = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    assert len(receipts) == 2
    read.server.faults = {}
    sent = dict(read.server.bytes_sent)
    assert read() == (EVERYTHING, {}, "")
    assert all(file.stat().st_mtime_ns == changed for file, changed in receipts.items())
    last = f"{read.name}/data/train-00002-of-00003.parquet"
    assert read.server.bytes_sent[last] == sent[last]
