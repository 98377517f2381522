"""Data sets of the Hub, streamed from a local directory, and everything that can be wrong with one."""

import gzip
import json
import pickle

import datasets
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from data_pipeline.config import DataError, HubSource
from data_pipeline.sources import Document, Refusal, hub, pieces

REVISION = "0123456789012345678901234567890123456789"


def source(dataset, **fields) -> HubSource:
    return HubSource(kind="hub", dataset=str(dataset), revision=REVISION, domain="web", **fields)


def read(dataset, seed=1, **fields) -> list[Document | Refusal]:
    found = pickle.loads(pickle.dumps(pieces(source(dataset, **fields), seed, 10**6)))
    return [item for piece in found for item in piece.read()]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    hub._builder.cache_clear()


@pytest.fixture
def parquet(tmp_path):
    directory = tmp_path / "set" / "data"
    directory.mkdir(parents=True)
    for file in range(4):
        texts = [f"file {file} row {row}" for row in range(150)]
        columns = {"url": ["u"] * 150, "text": pa.array([*texts[:-1], None])}
        pq.write_table(pa.table(columns), directory / f"train-{file:05d}-of-00004.parquet")
    return tmp_path / "set"


def test_a_piece_a_file_in_seeded_order(parquet):
    found = read(parquet, license="ODC-By")
    documents = [item for item in found if isinstance(item, Document)]
    assert sorted(item.text for item in documents) == sorted(
        f"file {file} row {row}" for file in range(4) for row in range(149)
    )
    assert len(pieces(source(parquet), 1, 10**6)) == 4
    orders = {tuple(item.text for item in read(parquet, seed=seed) if isinstance(item, Document)) for seed in range(9)}
    assert len(orders) > 3 and tuple(item.text for item in documents) in orders
    assert documents[0] == Document(
        documents[0].text, str(parquet), documents[0].path, "web", "ODC-By"
    ) and documents[0].path.endswith(", row 0")
    refused = [item for item in found if isinstance(item, Refusal)]
    assert len(refused) == 4 and refused[0].reason == "no text" and refused[0].where.endswith("row 149")


def test_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": f"text {n}", "n": n}) + "\n" for n in range(100)))
    assert [item.text for item in read(tmp_path, text_column="content")] == [f"text {n}" for n in range(100)]
    with pytest.raises(DataError, match=r"has no column 'text'; it has content, n\.\nSet `text_column`"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"column 'n' of .* holds int64, not text"):
        read(tmp_path, text_column="n")


def test_one_odd_file_costs_itself(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "whole"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "c.jsonl").touch()
    found = read(tmp_path)
    assert [item.text for item in found if isinstance(item, Document)] == ["whole"]
    refused = {item.where.rpartition("file ")[2]: item.reason for item in found if isinstance(item, Refusal)}
    assert refused == {"1, int64": "no column 'text' of text", "2": "empty"}


def test_a_file_cut_short_is_two_lines(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "whole"}\n' * 9)[:-9])
    with pytest.raises(DataError, match=r"cannot be read: Compressed file ended before the end.*\n"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text_column": "body"}, "has no column 'body'; it has text, url"),
        ({"config": "none"}, "cannot be read: BuilderConfig 'none' not found. Available: \\['default'\\]\nCorrect"),
        ({"split": "test"}, "cannot be read: Bad split: test. Available splits: \\['train'\\]\nCorrect"),
    ],
)
def test_what_a_data_set_does_not_have(parquet, fields, expected):
    with pytest.raises(DataError, match=expected):
        read(parquet, **fields)


def refusal(kind, status: int) -> Exception:
    request = httpx2.Request("GET", "https://huggingface.co/datasets/org/set")
    return kind(f"{status} Client Error", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refusal(GatedRepoError, 401), r"org/set is gated.*\nAccept them at https://\S+/datasets/org/set, .* HF_TOKEN"),
        (refusal(GatedRepoError, 403), r"org/set is gated.*\nAccept them at"),
        (refusal(RepositoryNotFoundError, 401), r"org/set is not on the Hub, or is private\.\n.*HF_TOKEN"),
        (refusal(RevisionNotFoundError, 404), rf"Revision '{REVISION}' doesn't exist.*\nCorrect .*`revision`"),
        (httpx2.ConnectError("name not known"), r"org/set cannot be reached: .*\nConnect \(and unset HF_HUB_OFFLINE\)"),
        (httpx2.ReadTimeout("slow"), r"org/set cannot be reached"),
    ],
)
def test_refusals_of_the_hub(monkeypatch, error, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(HfApi, "hf_hub_download", fail)
    with pytest.raises(DataError, match=expected) as refused:
        read("org/set")
    assert str(refused.value).count("\n") == 1


def test_offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"org/set cannot be reached.*\n.*a local copy's directory"):
        read("org/set")


@pytest.mark.parametrize(
    ("error", "expected"),
    [(refusal(GatedRepoError, 403), r"file \d of 4, is gated"), (ConnectionError("reset"), "cannot be reached: reset"),
     (pa.ArrowInvalid("Parquet magic bytes not found\nmore"), "cannot be read: Parquet magic bytes not found\n")],
)
def test_failures_on_the_way(parquet, monkeypatch, error, expected):
    def fail(*_, **__):
        raise error
        yield

    found = pieces(source(parquet), 1, 10**6)
    monkeypatch.setattr(datasets.IterableDataset, "iter", fail)
    with pytest.raises(DataError, match=expected):
        list(found[0].read())


def test_a_broken_file_is_named(parquet):
    (parquet / "data" / "train-00001-of-00004.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"file [01] of 4, cannot be read: .*Parquet file size is 17 bytes.*\nCorrect"):
        read(parquet)
