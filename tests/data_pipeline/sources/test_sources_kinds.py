"""Whatever a user names or keeps in a directory: read, refused with a reason, or passed over by name."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import zipfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_server import serving

from data_pipeline.config import DataError, FilesSource, WebSource
from data_pipeline.sources import Document, PassedOver, Refusal, locations, pieces, readers, streams
from tests.data_pipeline.sources.test_sources_web import RECORDS as PAGES
from tests.data_pipeline.sources.test_sources_web import html, warc

LINES = [{"text": f"text {number} {'ä' * (number % 97)}"} for number in range(60)]
JSONL = "".join(json.dumps(line) + "\n" for line in LINES).encode()
TEXTS = [line["text"] for line in LINES]
WET = b"".join(warc("conversion", f"http://site{number}.org/", f"Page {number}".encode(), "text/plain")
               for number in range(3))


def arrow(codec: str):
    def pack(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return pack


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": arrow("zstd"), "lz4": arrow("lz4")}


def tar(mode: str = "w", **members: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def read(*paths, kind=FilesSource, shard_bytes=10**9, **fields) -> list:
    source = kind(kind="web" if kind is WebSource else "files", paths=[os.fspath(path) for path in paths],
                  domain="own", **fields)
    return [item for piece in pieces(source, 1, shard_bytes) for item in piece.read()]


def texts(items) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def reasons(items) -> Counter[str]:
    return Counter(item.reason for item in items if isinstance(item, Refusal))


def passed(items) -> Counter[str]:
    return Counter(item.what for item in items if isinstance(item, PassedOver))


# packing

@pytest.mark.parametrize("suffix", ["", ".bin", ".jsonl", *(f".jsonl.{packing}" for packing in PACKERS)])
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("shard_bytes", [100, 10**9])
def test_packing_is_known_by_content_whatever_the_name(tmp_path, packing, suffix, shard_bytes):
    (tmp_path / f"a{suffix}").write_bytes(PACKERS[packing](JSONL))
    expected = TEXTS if suffix != ".bin" else [JSONL.decode()]      # text that a user named
    found = read(tmp_path / f"a{suffix}", shard_bytes=shard_bytes)
    assert reasons(found) == {} and (texts(found) == expected or suffix == ".bin")


@pytest.mark.parametrize("packing", PACKERS)
def test_streams_one_after_another_and_within_each_other(tmp_path, packing):
    pack = PACKERS[packing]
    (tmp_path / "a.jsonl").write_bytes(pack(JSONL[:999]) + pack(JSONL[999:]))
    assert texts(read(tmp_path / "a.jsonl")) == TEXTS
    for outer in PACKERS.values():
        (tmp_path / "a.jsonl").write_bytes(outer(pack(JSONL)))
        assert texts(read(tmp_path / "a.jsonl")) == TEXTS


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_that_are_damaged_are_kept_up_to_there(tmp_path, packing):
    packed = PACKERS[packing](os.urandom(1_000_000).hex().encode())     # some blocks of each
    for data, word in ((packed[:-9], "truncated"), (packed + b"and more" * 9, "damaged")):
        (tmp_path / "a").write_bytes(data)
        *items, damage = streams.chunks(str(tmp_path / "a"))
        assert isinstance(damage, streams.Gap) and damage.reason.startswith(word)
        assert len(b"".join(items)) >= (1_800_000 if word == "truncated" else 2_000_000 - streams.SLICE)
    if packing in ("zst", "lz4"):       # Arrow writes them without checksums
        return
    spoilt = bytearray(packed)
    spoilt[len(packed) // 2 :: 97] = b"\xff" * len(spoilt[len(packed) // 2 :: 97])
    (tmp_path / "a").write_bytes(spoilt)
    assert any(isinstance(item, streams.Gap) for item in streams.chunks(str(tmp_path / "a")))


# kinds

def csv_of(rows, **dialect) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, **dialect).writerows([["id", "text"], *(map(str, row) for row in enumerate(rows))])
    return stream.getvalue().encode()


def test_a_directory_of_everything(tmp_path):
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), parquet)
    contents = {
        "a.jsonl": JSONL, "b.jsonl.bz2": bz2.compress(JSONL), "c.jsonlines.xz": lzma.compress(JSONL), "d.jl": JSONL,
        "e.tar.gz": tar("w:gz", **{"x/a.jsonl": JSONL, "x/b.txt.gz": gzip.compress(b"in a tar"), "x/c.png": b"x"}),
        "f.zip": zipped(**{"a.jsonl": JSONL, "inner.tar": tar(**{"deep.txt": b"deep"}), ".git/x": b"x"}),
        "g.csv": csv_of(TEXTS), "h.parquet.zst": arrow("zstd")(parquet.getvalue()), "i.wacz": zipped(**{"a.warc": WET}),
        "j.tgz": tar("w:gz", **{"a.parquet": parquet.getvalue()}), "k.warc.gz": gzip.compress(WET), "part-00000": JSONL,
        "l.html": html(7).encode(), "m.jsonl.gz.gz": gzip.compress(gzip.compress(JSONL)), "README": b"no suffix",
        "n.pdf": b"%PDF-1.7", "o.docx": zipped(**{"word/document.xml": b"<w/>"}),
        "p.arc.gz": gzip.compress(b"filedesc:"),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    found = read(tmp_path)
    # a b c d, e, f, g, h, j, part-00000, m: 11 times all; two texts, the page, two times WET
    assert Counter(texts(found)) == Counter([*TEXTS * 11, "in a tar", "deep", *["Page 0", "Page 1", "Page 2"] * 2,
                                             *(text for text in texts(read(tmp_path / "l.html")))])
    assert "Page 7" in texts(read(tmp_path / "l.html"))[0]
    assert passed(found) == {".png": 1, "hidden": 1, "no suffix": 1, ".pdf": 1, ".docx": 1, ".arc": 1}
    assert reasons(found) == {}


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.arc.gz", "a.png"])
def test_what_is_named_and_not_read_is_said_to_be_that(tmp_path, name):
    (tmp_path / "ok.txt").write_text("fine")
    content = {"a.docx": zipped(a=b"x"), "a.arc.gz": gzip.compress(b"filedesc:\0")}.get(name, b"%PDF\0\x01")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"/a\.\S+ is not read: it is (application|image|\.arc).*\nGive "):
        read(tmp_path / "ok.txt", tmp_path / name)


def test_a_pointer_of_git_lfs(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"
    for name in ("a.jsonl", "b.txt", "c.warc.gz", "d.parquet"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(DataError, match=r"is a Git LFS pointer.*\n.*git lfs pull"):
            read(tmp_path / name)
    assert reasons(read(tmp_path)) == {"Git LFS pointer": 4}


@pytest.mark.parametrize("shard_bytes", [1, 10**6])
def test_a_first_record_without_text_costs_itself(tmp_path, shard_bytes):
    (tmp_path / "a.jsonl").write_bytes(b'{"_meta": 1}\n' + JSONL)
    found = read(tmp_path / "a.jsonl", shard_bytes=shard_bytes)
    assert texts(found) == TEXTS and reasons(found) == {"no column 'text'": 1}


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n{"n": 1, "n": 2, "text": "c"}\n')
    (tmp_path / "b.csv").write_text("text,text\nd,e\n")
    pq.write_table(pa.Table.from_arrays([pa.array(["f"]), pa.array(["g"])], ["text", "text"]), tmp_path / "c.parquet")
    found = read(tmp_path)
    assert texts(found) == ["c"] and reasons(found) == {"several 'text'": 1, "2 columns 'text'": 2}
    for name in ("b.csv", "c.parquet"):
        with pytest.raises(DataError, match=rf"{name[0]}\.{name[2:]} has 2 columns 'text'\.\n"):
            read(tmp_path / name)


def test_a_column_of_another_name_in_a_directory(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "b.csv").write_text("content,id\nx,1\n")
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "c.parquet")
    found = read(tmp_path)
    assert reasons(found) == {"no column 'text'": 3} and all("content" in item.where for item in found)
    assert texts(read(tmp_path, text_column="content")) == ["x"] * 3


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_csv_of_any_mark_with_line_ends_and_quotes_within(tmp_path, mark):
    rows = ["plain", 'two\nlines, "quoted"; and\tmore|', "ü" * 300_000, "", "last"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + csv_of(rows, delimiter=mark))
    found = read(tmp_path / "a.csv")
    assert texts(found) == [*rows[:3], "last"] and reasons(found) == {"empty": 1}
    assert found[1].path == "line 3"
    (tmp_path / "b.tsv").write_text((tmp_path / "a.csv").read_text(encoding="utf-8-sig"), encoding="utf-16")
    assert texts(read(tmp_path / "b.tsv")) == [*rows[:3], "last"]


def test_csv_cut_short_and_without_the_column(tmp_path):
    (tmp_path / "a.csv").write_bytes(gzip.compress(csv_of(TEXTS))[:-30])
    found = read(tmp_path)
    assert texts(found) == TEXTS[: len(texts(found))] and reasons(found) == {"truncated gzip": 1}
    with pytest.raises(DataError, match=r"a\.csv has no column 'body'; it has id, text\."):
        (tmp_path / "a.csv").write_bytes(csv_of(TEXTS))
        read(tmp_path / "a.csv", text_column="body")


FRENCH = "Le café crème était brûlé à Noël; où êtes-vous allé après l'été? Ça va très bien, merci.\n" * 4


@pytest.mark.parametrize(("encoding", "text"), [
    *((name, FRENCH) for name in ("latin-1", "cp1252", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be",
                                  "utf-32")),
    ("shift_jis", "これは日本語の文章です。とても良い天気ですね。" * 5),
    ("gb18030", "这是一个中文句子，今天天气很好。" * 5),
    ("koi8-r", "Это русский текст, который написан давно. " * 5), ("cp1252", "“smart” quotes – and more " * 5),
])
def test_texts_of_any_encoding(tmp_path, encoding, text):
    for name, shown in (("a.txt", text), ("b.html", f"<p>{text}</p>")):
        (tmp_path / name).write_bytes(shown.encode(encoding))
    found = read(tmp_path / "a.txt")
    assert texts(found) == [text] and reasons(found) == {}
    (page,) = read(tmp_path / "b.html", extractor="resiliparse")
    assert isinstance(page, Document) and page.text.split() == text.split()


GOOD = b'{"text": "good"}'
HALF = b"\x00\xd8"


@pytest.mark.parametrize(("name", "content", "expected", "why"), [
    ("a.jsonl", b'{"text": "half \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}', ["whole \U0001f600"],
     ["half a surrogate pair"]),
    ("a.jsonl", b'{"text": "long", "n": %b}\n{"text": "deep", "n": %b}' % (b"1" * 5000, b"[" * 2000 + b"]" * 2000),
     ["long"], ["nested too deeply"]),
    *(("a.jsonl", first + b"\n" + JSONL, TEXTS, ["invalid JSON"])      # lines they are all the same
      for first in (b'{"text": "cut', b'{"id": 1,', b'{"id":', b'{"id": [', b"{", b'{"id": {"a": 1,')),
    ("a.json", b"[" + GOOD + b", 1, [2, null], " + GOOD + b"]", ["good"] * 2, ["no JSON object"]),      # in a row
    ("a.json", b"[\n" + GOOD + b",\n" + GOOD + b",\n", ["good"] * 2, ["truncated JSON"]),
    ("a.json", b"[\n" + GOOD + b",\n{'text': 1},\n" + GOOD + b"]", ["good"] * 2, ["invalid JSON"]),
    ("a.json", b"[\n" + GOOD + b',\n{"text": "caf\xe9"},\n' + GOOD + b"]", ["good"] * 2, ["invalid UTF-8"]),
    ("a.json", b"[\n" + GOOD + b',\n{"a": ' + b"[" * 9999 + b"},\n" + GOOD + b"]", ["good"] * 2, ["nested too deeply"]),
    ("a.json", b"{\n" + GOOD + b"\n" + GOOD, ["good"] * 2, ["invalid JSON"]),                          # lines after all
    ("a.json", b"[" + GOOD + b"," + GOOD + b', {"body": ""}]', ["good"] * 2, ["no column 'text'"]),
    ("a.jsonl", '{"text": "wide ä"}\n{"text": "more"}\n'.encode("utf-16"), ["wide ä", "more"], []),
    *((name, b"\xff\xfe" + before.encode("utf-16-le") + HALF + after.encode("utf-16-le"), ["whole"], ["invalid UTF-8"])
      for name, before, after in (
          ("a.jsonl", '{"text": "', '"}\n{"text": "whole"}\n'), ("a.json", '[{"text": "', '"}, {"text": "whole"}]'),
          ("a.csv", "text\n", "\nwhole\n"))),
    ("a.csv", b'id,text\n1,one\n2,"open quote\n3,three\n4\n5,caf\xe9\n6,six,more\n7,"seven"x\n8,eight\n',
     ["one", "three", "eight"], [*["damaged CSV"] * 4, "invalid UTF-8"]),
    ("a.txt", b"word " * 100 + b"\0", ["word " * 100 + "\ufffd"], ["invalid UTF-8"]),
])
@pytest.mark.parametrize("shard_bytes", [10, 10**9])
def test_what_is_wrong_in_a_file_costs_itself(tmp_path, name, content, expected, why, shard_bytes):
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path, shard_bytes=shard_bytes)
    assert texts(found) == expected and reasons(found) == Counter(why)


@pytest.mark.parametrize("shard_bytes", [10, 10**9])
def test_a_file_without_a_record_is_counted(tmp_path, shard_bytes):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for name, content in {"b.jsonl": b"\n\n", "c.json": b"[]\n", "d.csv": b"id,text\n", "e.wet": b"\r\n"}.items():
        (tmp_path / name).write_bytes(content)
    packed = {file.name: file.read_bytes() for file in sorted(tmp_path.iterdir())}
    (tmp_path / "f.zip").write_bytes(zipped(**packed))
    (tmp_path / "good.jsonl").write_bytes(b"\n" * 10 + GOOD)
    found = read(tmp_path, shard_bytes=shard_bytes)
    names = [item.where.removeprefix(f"{tmp_path}/") for item in found if isinstance(item, Refusal)]
    assert texts(found) == ["good"] and reasons(found) == {"empty": 10}
    assert sorted(names) == sorted([*packed, *(f"f.zip/{name}" for name in packed)])


# names and entries of directories

def test_names_that_are_not_utf_8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.txt").write_text("fine")
    (tmp_path / name / f"{name}.jsonl").write_bytes(JSONL)
    (tmp_path / name / f"{name}.tar").write_bytes(tar(**{f"{name}.md": b"in a tar", f"{name}.png": b"\0"}))
    for found in (read(tmp_path), read(tmp_path / "*" / "*"), read(tmp_path / "**" / "*.*")):
        assert Counter(texts(found)) == Counter([*TEXTS, "fine", "in a tar"])
        assert json.dumps(found, ensure_ascii=False).encode()
        assert {item.where for item in found if isinstance(item, PassedOver)} == {
            rf"{tmp_path}/caf\xe9/caf\xe9.tar/caf\xe9.png"}


def test_links_to_directories_are_followed_once(tmp_path):
    for name in ("in/deep", "out"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(name)
    inside = tmp_path / "in"
    (inside / "aside").symlink_to(tmp_path / "out")
    (inside / "again").symlink_to(inside / "deep")
    (inside / "loop").symlink_to(inside)
    (inside / "gone").symlink_to("nowhere")
    (inside / "file.txt").symlink_to(tmp_path / "out" / "a.txt")
    os.mkfifo(inside / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(inside / "socket.txt"))
        found = read(inside)
    assert sorted(texts(found)) == ["in/deep", "out", "out"]
    assert passed(found) == {"link to a directory read already": 2, "broken link": 1, "special file": 2}
    assert sorted(texts(read(inside / "**" / "a.txt"))) == ["in/deep", "out"]
    for name, expected in (("gone", "a link to .*nowhere, which is not there"), ("pipe.txt", "a pipe or a device")):
        with pytest.raises(DataError, match=expected):
            read(inside / name)


def test_a_directory_or_file_that_may_not_be_opened(tmp_path, monkeypatch):
    for name in ("open/a.txt", "locked/b.txt", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    scandir, open_file = os.scandir, streams.io.FileIO

    def refuse(path, call):
        if "locked" in os.fspath(path) or os.fspath(path).endswith("c.txt"):
            raise PermissionError(13, "Permission denied", path)
        return call(path)

    monkeypatch.setattr(locations.os, "scandir", lambda path: refuse(path, scandir))
    monkeypatch.setattr(streams.io, "FileIO", lambda path: refuse(path, open_file))
    for paths in ([tmp_path], [tmp_path / "**" / "*.txt"], [tmp_path / "*"]):
        found = read(*paths)
        assert texts(found) == ["open/a.txt"]
        assert reasons(found) == {"cannot be read": 1} and passed(found) == {"locked directory": 1}
    with pytest.raises(DataError, match=r"c\.txt cannot be read: Permission denied"):
        read(tmp_path / "c.txt")


def test_a_file_whose_name_looks_like_a_wildcard(tmp_path):
    for name in ("notes[1].txt", "notes1.txt", "all*.txt", "all1.txt", "my texts/with blanks.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("notes[1].txt", "all*.txt", "my texts/with blanks.txt"):
        assert texts(read(tmp_path / name)) == [name]
    assert texts(read(tmp_path / "my texts" / "*")) == ["my texts/with blanks.txt"]
    assert sorted(texts(read(tmp_path / "notes?.txt"))) == ["notes1.txt"]


def test_what_a_wildcard_matches_may_be_a_directory_or_no_text(tmp_path):
    for name in ("x/deep/a.txt", "x/b.py", "x/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89PNG\0" if name.endswith("png") else name.encode())
    found = read(tmp_path / "x" / "*")
    assert sorted(texts(found)) == ["x/b.py", "x/deep/a.txt"] and passed(found) == {".png": 1}


def test_other_addresses_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"'s3://bucket/a\.warc\.gz', no address of http or https\.\nFetch it first"):
        read("s3://bucket/a.warc.gz")


def test_a_file_with_nothing_to_read_is_not_called_a_pipe(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("text", pa.string())])):
        pass
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.paths").write_text("a.png\n")
    assert reasons(read(tmp_path / "a.parquet")) == {"empty": 1}
    with pytest.raises(DataError, match=r"a\.paths', where no file was found that is read, but \.png 1"):
        read(tmp_path / "a.paths")
    (tmp_path / "a.paths").write_text("\n")
    with pytest.raises(DataError, match=r"a\.paths lists no file\.\n"):
        read(tmp_path / "a.paths")


# listings

@pytest.mark.parametrize("name", ["wet.paths.gz", "wet.paths", "x.wet.paths", "warc.paths.gz", "x.warc.paths.gz"])
@pytest.mark.parametrize("kind", [FilesSource, WebSource])
def test_listings_under_their_published_names(tmp_path, name, kind):
    lines = ["crawl-data/CC-MAIN-2024-22/wet/one.warc.wet.gz", str(tmp_path / "two.warc.wet.gz"), "with blank.wet", ""]
    place = tmp_path / "crawl-data" / "CC-MAIN-2024-22"
    for path in (tmp_path / lines[0], tmp_path / lines[1], place / lines[2]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(WET))
    listing = "\r\n".join(lines).encode()
    (place / name).write_bytes(gzip.compress(listing) if name.endswith("gz") else listing)
    assert texts(read(place / name, kind=kind)) == ["Page 0", "Page 1", "Page 2"] * 3
    assert passed(read(tmp_path, kind=kind)) == {".paths": 1}
    (place / name).write_bytes(b"with blank.wet\n\ngone.wet\n")
    with pytest.raises(DataError, match=r"paths\S*, line 3: gone\.wet is not there \(1 of 2 lines lead nowhere\)\.\n"):
        read(place / name, kind=kind)


def test_lines_of_listings_are_relative_to_common_crawl_and_to_servers(tmp_path):
    place, line = locations._place, "crawl-data/CC-MAIN-2024-22/a.warc.gz"
    assert place(str(tmp_path / "warc.paths"), line) == f"https://data.commoncrawl.org/{line}"
    assert place(str(tmp_path / "warc.paths"), f"s3://commoncrawl/{line}") == f"https://data.commoncrawl.org/{line}"
    assert place("https://data.commoncrawl.org/crawl-data/CC-MAIN-2024-22/warc.paths.gz", line) == (
        f"https://data.commoncrawl.org/{line}")
    assert place("http://mirror/cc/crawl-data/CC-MAIN-2024-22/warc.paths.gz", line) == f"http://mirror/cc/{line}"
    assert place("http://host/lists/all.paths", "one.warc.gz") == "http://host/lists/one.warc.gz"


def test_files_by_address_are_known_by_content(monkeypatch):
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), parquet)
    files = {"/a%20b.jsonl?x=1": JSONL, "/data": gzip.compress(JSONL), "/a.parquet": parquet.getvalue(),
             "/a.zip": zipped(**{"a.jsonl": JSONL}), "/a.tar.xz": tar("w:xz", **{"a.jsonl": JSONL}),
             "/c.pdf": b"%PDF\0"}
    with serving(monkeypatch) as server:
        server.files = files
        for path in list(files)[:-1]:
            server.faults = ["cut"]
            assert texts(read(server.address(path.replace("%20", " ")))) == TEXTS
        with pytest.raises(DataError, match=r"/c\.pdf is not read: it is application/pdf"):
            read(server.address("/c.pdf"))


@pytest.mark.parametrize("shard_bytes", [10**5, 10**9])
def test_thousands_of_small_files_go_together(tmp_path, shard_bytes):
    names = [f"{number:04d}.txt" for number in range(2000)]
    for name in names:
        (tmp_path / name).write_text(name * 30)
    (tmp_path / "all.tar.gz").write_bytes(tar("w:gz", **{name: b"in a tar " + name.encode() for name in names}))
    assert len(pieces(FilesSource(kind="files", paths=[str(tmp_path)], domain="own"), 1, shard_bytes)) < 8
    assert sorted(texts(read(tmp_path, shard_bytes=shard_bytes))) == [
        *(name * 30 for name in names), *(f"in a tar {name}" for name in names)]


def test_an_archive_without_a_page_is_counted_beside_texts(tmp_path):
    (tmp_path / "ok.txt").write_text("fine")
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>short"
    (tmp_path / "x.warc").write_bytes(warc("response", "http://a.org/", http, "application/http;msgtype=response"))
    found = read(tmp_path / "ok.txt", tmp_path / "x.warc")
    assert texts(found) == ["fine"] and reasons(found) == {"no main text": 1}


# archives

def test_a_damaged_tar_costs_what_is_damaged(tmp_path):
    data = tar(**{f"{number}.txt": f"text {number}".encode() for number in range(6)})
    for spoilt, expected, reason in (
        (data[:2048] + b"\xff" * 512 + data[2560:], {0, 1, 3, 4, 5}, "damaged tar"),    # the header of the third
        (data[:3072], {0, 1, 2}, "truncated tar"),          # at the end of a member
        (data[: 3072 + 515], {0, 1, 2}, "damaged tar"), (data[: 3072 + 100], {0, 1, 2}, "truncated tar"),
    ):
        (tmp_path / "a.tar").write_bytes(spoilt)
        found = read(tmp_path)
        assert set(texts(found)) >= {f"text {number}" for number in expected} and reason in reasons(found)
        assert all("a.tar" in item.where for item in found if isinstance(item, Refusal))
    (tmp_path / "a.tar").write_bytes(data + data)           # as `tar --concatenate` and `cat` make them
    assert len(texts(read(tmp_path))) == 12 and reasons(read(tmp_path)) == {}


def test_a_damaged_zip_costs_what_is_damaged(tmp_path):
    data = bytearray(zipped(**{f"{number}.txt": os.urandom(300).hex().encode() for number in range(3)}))
    (tmp_path / "a.zip").write_bytes(bytes(data[:-10]))
    assert reasons(read(tmp_path)) == {"damaged zip": 1}
    data[100:130] = b"\xff" * 30
    (tmp_path / "a.zip").write_bytes(data)
    found = read(tmp_path)
    assert len(texts(found)) >= 2 and reasons(found)["damaged zip"] == 1


def test_archives_within_archives_end(tmp_path):
    data = b"the innermost"
    for depth in range(readers.DEEPEST + 2):
        data = zipped(**{"inner.zip" if depth else "a.txt": data})
        (tmp_path / "a.zip").write_bytes(data)
        found = read(tmp_path)
        is_read = depth < readers.DEEPEST
        assert len(texts(found)) == is_read and sum(reasons(found).values()) == (not is_read)


def test_links_and_directories_in_an_archive(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.txt").write_text("one")
    (tmp_path / "x" / "link.txt").symlink_to("a.txt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "x", "./x")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "x" / "a.txt", "x/a.txt")
        link = zipfile.ZipInfo("x/link.txt")
        link.external_attr = (tmp_path / "x" / "link.txt").lstat().st_mode << 16
        archive.writestr(link, "a.txt")
    for name in ("a.tar", "a.zip"):
        found = read(tmp_path / name)
        assert texts(found) == ["one"] and passed(found) == {"link or device in an archive": 1}


def test_a_web_source_reads_web_archives_alone(tmp_path):
    wacz = zipped(**{"x/a.warc": WET, "p.html": b"x"})
    for name, data in (("a.warc", b"".join(PAGES)), ("b.txt", b"text"), ("c.wacz", wacz)):
        (tmp_path / name).write_bytes(data)
    found = read(tmp_path, kind=WebSource)
    assert len(texts(found)) == len(PAGES) + 3 and passed(found) == {".txt": 1, ".html": 1}
    with pytest.raises(DataError, match=r"b\.txt is not read: .*\nGive \.warc, \.wet, .*, packed or not\.$"):
        read(tmp_path / "b.txt", kind=WebSource)
