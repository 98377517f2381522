"""JSONL, Parquet and text files, whole and damaged, cut into pieces anywhere."""

import gzip
import json
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataError, FilesSource
from data_pipeline.sources import Document, Refusal, digest, pieces, readers, streams
from data_pipeline.sources.readers import split_lines
from data_pipeline.sources.streams import Gap

WHOLE = 10**12


def source(*paths, **fields) -> FilesSource:
    return FilesSource(kind="files", paths=[str(path) for path in paths], domain="own", **fields)


def read(*paths, shard_bytes=WHOLE, seed=1, **fields) -> list[Document | Refusal]:
    found = pickle.loads(pickle.dumps(pieces(source(*paths, **fields), seed, shard_bytes)))
    return [item for piece in found for item in piece.read()]


def texts(items) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def reasons(items) -> list[str]:
    return [item.reason for item in items if isinstance(item, Refusal)]


def jsonl(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


RECORDS = [{"text": f"text {number} " + "ä" * (number % 97), "n": number} for number in range(400)]


def test_records_of_every_packing(tmp_path):
    data = jsonl(*RECORDS)
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as stream:
        stream.write(data)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n\r\n"))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(data))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "d.parquet", row_group_size=64)
    expected = [record["text"] for record in RECORDS]
    for path in tmp_path.iterdir():
        documents = read(path, license="CC-BY-4.0")
        assert texts(documents) == expected
        assert {item[3:] for item in documents} == {("own", "CC-BY-4.0")}
        assert {item.source for item in documents} == {str(path)} and len({item.path for item in documents}) == 400
    assert texts(read(tmp_path)) == expected * 4


@pytest.mark.parametrize("shard_bytes", [1, 7, 100, 1000, 9999])
def test_documents_do_not_depend_on_the_cuts(tmp_path, shard_bytes):
    (tmp_path / "a.jsonl").write_bytes(jsonl(*RECORDS[:60]) + b"not JSON\n" + jsonl(*RECORDS[60:80]).rstrip())
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "b.parquet", row_group_size=10)
    (tmp_path / "c.txt").write_text("plain")
    found = read(tmp_path, shard_bytes=shard_bytes)
    assert found == read(tmp_path)
    assert len(texts(found)) == 80 + 400 + 1 and reasons(found) == ["invalid JSON"]
    assert len(pieces(source(tmp_path), 1, 1000)) > 10


def test_a_file_named_in_two_ways_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "link").symlink_to("texts")
    (tmp_path / "texts/a.jsonl").write_bytes(jsonl(*RECORDS[:3]))
    for paths in (("texts/a.jsonl", "./texts/a.jsonl"), ("texts", "link/*", "texts/../texts/a.jsonl"),
                  (tmp_path / "texts/a.jsonl", "link")):
        assert len(texts(read(*paths))) == 3


def test_order_of_files_is_seeded(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(str(number))
    one, again, two = (texts(read(tmp_path, seed=seed)) for seed in (1, 1, 2))
    assert one == again != two and sorted(one) == sorted(two)
    assert one != sorted(one)


def test_a_changed_file_changes_the_digest(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = digest(pieces(source(tmp_path), 1, 10))
    assert before == digest(pieces(source(tmp_path), 1, 10))
    (tmp_path / "a.txt").write_text("two or three")
    assert before != digest(pieces(source(tmp_path), 1, 10))


def test_bad_records_are_counted_and_the_rest_is_kept(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        jsonl({"text": "first"}, {"text": None}, {"text": 3}, {"other": "x"}, {"text": " \n"}, ["text"])
        + b'{"text": "cut\n' + b'{"text": "caf\xe9"}\n' + b"[" * 100_000 + b"\n" + jsonl({"text": "last"})
    )
    found = read(tmp_path)
    assert texts(found) == ["first", "last"]
    assert reasons(found) == [
        "no text", "no text", "no column 'text'", "empty", "no JSON object", "invalid JSON", "invalid UTF-8",
        "nested too deeply",
    ]
    assert found[1].where == f"{tmp_path}/a.jsonl, byte {len(jsonl({'text': 'first'}))}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_and_objects_over_several_lines(tmp_path, indent, encoding):
    one = json.dumps(RECORDS[0], indent=1, ensure_ascii=False)
    for text, count in ((json.dumps(RECORDS, indent=indent, ensure_ascii=False), len(RECORDS)), (one, 1),
                        (f"\n{one}\n{one}\n\n", 2)):
        (tmp_path / "a.json").write_text(text, encoding=encoding)
        for found in (read(tmp_path / "a.json"), read(tmp_path, shard_bytes=50)):
            assert texts(found) == [record["text"] for record in RECORDS[:count]] if count != 2 else len(found) == 2
            assert found[-1].path == f"record {count - 1}" and reasons(found) == []


@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("between", ["\n", "", "\n\n", " \n, "])
def test_objects_one_after_another_however_they_are_laid_out(tmp_path, monkeypatch, between, chunk):
    """The first line of each is `{"id": 1,`; whatever of a value lies within a chunk."""
    monkeypatch.setattr(streams, "CHUNK", chunk)
    rows = [{"id": 1, "text": f'é \\ "{{\n\U0001f600 {index}' * 20, "n": [None, -1.5e3, {}]} for index in range(12)]
    values = [json.dumps(row).replace(", ", ",\n   ", 1) for row in rows]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.jsonl").write_text(between.join(values) + "\n", encoding=encoding)
        found = read(tmp_path, shard_bytes=300)
        assert reasons(found) == [] and texts(found) == [row["text"] for row in rows]
    if "," not in between:
        assert list(readers.strings(str(tmp_path / "a.jsonl"))) == [row["text"] for row in rows]


def test_values_that_go_on_and_on_are_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_RECORD", 3 * streams.CHUNK)
    record = json.dumps({"id": 1, "text": "word " * 40_000}, indent=1)
    (tmp_path / "a.json").write_text("\n".join([record] * 40))
    assert len(texts(read(tmp_path))) == 40
    (tmp_path / "a.json").write_text(record + "\n" + '{"text":\n"' + "x" * 4 * streams.CHUNK)
    found = read(tmp_path)
    assert len(texts(found)) == 1 and reasons(found) == ["too large"]


def test_json_over_several_lines_has_a_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_RECORD", 1000)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS, indent=1))
    assert read(tmp_path) == [Refusal("own", "too large", f"{tmp_path}/a.json, record 0")]


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    expected = r"\.(jsonl|parquet|json) has no column 'content'; it has n, text\.\nSet `text_column`"
    (tmp_path / "a.jsonl").write_bytes(jsonl(*RECORDS))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text(json.dumps(RECORDS, indent=1))
    for name in ("a.jsonl", "b.parquet", "c.json"):
        with pytest.raises(DataError, match=expected):
            read(tmp_path / name, text_column="content")
        with pytest.raises(DataError, match=expected):
            read(tmp_path / name, text_column="content", shard_bytes=100)
    with pytest.raises(DataError, match=r"column 'n' of .* holds int64, not text"):
        read(tmp_path / "b.parquet", text_column="n")


def test_a_broken_gzip_gives_what_stands_before_and_after(tmp_path):
    members = [gzip.compress(jsonl(*RECORDS[at : at + 100])) for at in range(0, 400, 100)]
    members[1] = members[1][:200] + b"\xff" * 60 + members[1][260:]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(members)[:-30])
    found = read(tmp_path)
    kept = [int(text.split()[1]) for text in texts(found)]
    assert kept[:100] == list(range(100)) and set(range(200, 300)) < set(kept)
    assert reasons(found)[0] == "damaged gzip" and reasons(found)[-1] == "truncated gzip"
    assert len(reasons(found)) == 2


def test_text_files(tmp_path):
    contents = {
        "good.md": b"# Title\n", "bom.txt": b"\xef\xbb\xbfbom", "wide.txt": "breit".encode("utf-16"), "empty.txt": b"",
        "spoilt.txt": b"word " * 200 + b"\xff", "latin.rst": b"caf\xe9 cr\xe8me", "packed.txt.gz": gzip.compress(b"gz"),
        "cut.md.gz": gzip.compress(random.Random(1).randbytes(9999).hex().encode())[:-500], "picture.txt": b"\x89PNG\0",
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    found = read(tmp_path)
    by_name = {item.source.rpartition("/")[2]: item.text for item in found if isinstance(item, Document)}
    assert {name: text for name, text in by_name.items() if name != "cut.md.gz"} == {
        "good.md": "# Title\n", "bom.txt": "bom", "wide.txt": "breit", "packed.txt.gz": "gz",
        "spoilt.txt": "word " * 200 + "\ufffd", "latin.rst": "café crème",
    }
    assert random.Random(1).randbytes(9999).hex().startswith(by_name["cut.md.gz"]) and len(by_name["cut.md.gz"]) > 9999
    assert {(item.where.rpartition("/")[2], item.reason) for item in found if isinstance(item, Refusal)} == {
        ("empty.txt", "empty"), ("spoilt.txt", "invalid UTF-8"), ("cut.md.gz", "truncated gzip"),
        ("picture.txt", "not text"),
    }


def test_other_endings_are_text_where_they_are_named(tmp_path):
    (tmp_path / "a.py").write_text("print()\n")
    assert texts(read(tmp_path / "*.py")) == texts(read(tmp_path / "a.py")) == ["print()\n"]
    expected = r"no file was found that is read, but \.py 1\.\nName files, wildcards such as 'texts/\*\*/\*\.md'"
    with pytest.raises(DataError, match=expected):
        read(tmp_path)


def test_a_line_of_50_megabytes(tmp_path):
    text = "0123456789" * 5_000_000
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}, {"text": text}, {"text": "b"}))
    (tmp_path / "b.txt").write_text(text)
    assert texts(read(tmp_path / "a.jsonl", shard_bytes=20_000_000)) == ["a", text, "b"]
    assert texts(read(tmp_path / "b.txt")) == [text]


def test_a_record_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_RECORD", 1000)
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": "a"}, {"text": "x" * 2000}, {"text": "b"}))
    (tmp_path / "b.txt").write_bytes(b"x" * 2000)
    found = read(tmp_path)
    assert sorted(texts(found)) == ["a", "b"] and reasons(found) == ["too large", "too large"]


def test_lines_across_chunks():
    data = b"one\n\ntwo and more\nthree"
    for size in range(1, 9):
        cut = [data[at : at + size] for at in range(0, len(data), size)]
        assert list(split_lines(cut, 10)) == [(10, b"one"), (14, b""), (15, b"two and more"), (28, b"three")]
    gap = Gap("gap")
    assert list(split_lines([b"one\ntw", gap, b"four\n"], 0)) == [(0, b"one"), (6, gap), (6, b"four")]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.csv", "a.html.xz", "a.zip", "a.tar.gz", "a.wet"]
)
def test_empty_files(tmp_path, name):
    (tmp_path / name).touch()
    for found in (read(tmp_path / name), read(tmp_path)):
        assert texts(found) == [] and reasons(found) == ["empty"] and found[0].where == f"{tmp_path}/{name}"


def test_parquet_types_and_bad_values(tmp_path):
    values = ["one", None, "three", "", "caf\xe9"]
    for number, array in enumerate([
        pa.array(values), pa.array(values, pa.large_string()), pa.array(values).dictionary_encode(),
        pa.array([value if value is None else value.encode() for value in values]),
    ]):
        pq.write_table(pa.table({"nested": [{"a": 1}] * 5, "text": array}), tmp_path / f"{number}.parquet")
        found = read(tmp_path / f"{number}.parquet")
        assert texts(found) == ["one", "three", "caf\xe9"] and reasons(found) == ["no text", "empty"]
        assert found[-1].path == "row 4"
    latin = pa.array([b"good", b"caf\xe9"])
    pq.write_table(pa.table({"text": latin.view(pa.string())}), tmp_path / "latin.parquet")
    found = read(tmp_path / "latin.parquet")
    assert texts(found) == ["good"] and reasons(found) == ["invalid UTF-8"]


def test_a_damaged_row_group_is_passed_over(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS), file, row_group_size=100)
    place = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    data = bytearray(file.read_bytes())
    data[place : place + 40] = b"\xff" * 40
    file.write_bytes(data)
    for shard_bytes in (1, WHOLE):
        found = read(file, shard_bytes=shard_bytes)
        assert texts(found) == [record["text"] for record in RECORDS[:100] + RECORDS[200:]]
        assert reasons(found) == ["damaged Parquet"] and found[100].where.endswith("row 100")
    file.write_bytes(bytes(data)[:-20])
    assert reasons(read(file)) == ["damaged Parquet"]


def test_parquet_that_is_packed(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "b.parquet")
    data = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").unlink()
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(data))
    found = read(tmp_path)
    assert texts(found) == [record["text"] for record in RECORDS] and reasons(found) == ["damaged Parquet"]
