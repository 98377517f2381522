"""Bytes of files and addresses: compression, damage, retries. The referees are gzip and pyarrow."""

import gzip
import random

import pytest
from local_server import serving

from data_pipeline.config import DataError, FilesSource
from data_pipeline.sources import PassedOver, pieces, streams
from data_pipeline.sources.locations import locate
from data_pipeline.sources.streams import Gap, chunks, decode
from tests.data_pipeline.sources.test_sources_kinds import PACKERS

TEXT = b"".join(b"%d %x\n" % (number, random.Random(number).getrandbits(64)) for number in range(30_000))


def read(location) -> tuple[bytes, list[str]]:
    found = list(chunks(str(location)))
    return b"".join(item for item in found if isinstance(item, bytes)), [
        item.reason for item in found if isinstance(item, Gap)
    ]


@pytest.mark.parametrize("data", [
    b"".join(gzip.compress(TEXT[at : at + 999], mtime=0) for at in range(0, len(TEXT), 999)),
    b"".join(gzip.compress(part, mtime=0) + bytes(zeros) for part, zeros in ((TEXT[:5000], 700), (TEXT[5000:], 3))),
])
def test_many_members_and_zeros_between_them(tmp_path, data):
    (tmp_path / "a.gz").write_bytes(data)
    assert read(tmp_path / "a.gz") == (TEXT, [])


def test_high_compression_is_unpacked_in_bounded_chunks(tmp_path):
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    sizes = [len(chunk) for chunk in chunks(str(tmp_path / "zeros.gz"))]
    assert sum(sizes) == 50_000_000 and max(sizes) <= streams.CHUNK


def test_after_damage_gzip_goes_on_at_the_next_member(tmp_path):
    members = [gzip.compress(TEXT[at : at + 50_000]) for at in range(0, 500_000, 50_000)]
    for bad in (0, 4, 9):
        broken = bytearray(members[bad])
        broken[len(broken) // 2 : len(broken) // 2 + 50] = b"\xff" * 50
        (tmp_path / "bad.gz").write_bytes(b"".join(members[:bad]) + broken + b"".join(members[bad + 1 :]))
        data, damage = read(tmp_path / "bad.gz")
        assert damage == ["damaged gzip"]
        assert data.startswith(TEXT[: 50_000 * bad]) and data.endswith(TEXT[50_000 * (bad + 1) : 500_000])


def test_a_wrong_checksum_is_damage(tmp_path):
    packed = bytearray(gzip.compress(TEXT))
    packed[-6] ^= 1
    (tmp_path / "checksum.gz").write_bytes(packed + gzip.compress(b"more"))
    data, damage = read(tmp_path / "checksum.gz")
    assert damage == ["damaged gzip"] and data.endswith(b"more")


@pytest.mark.parametrize(("name", "pack"), [("text.gz", gzip.compress), ("text.zst", PACKERS["zst"])])
def test_a_name_that_promises_compression(tmp_path, name, pack):
    (tmp_path / name).write_bytes(TEXT)
    assert read(tmp_path / name) == (TEXT, [])
    (tmp_path / name).write_bytes(pack(TEXT)[3:])
    assert read(tmp_path / name) == (b"", [f"damaged {'gzip' if name.endswith('gz') else 'zstd'}"])


def test_text_of_bytes():
    assert decode("Ärger".encode()) == ("Ärger", 0)
    assert decode(b"\xef\xbb\xbfa") == ("a", 0)
    assert decode("Ärger".encode("utf-16")) == ("Ärger", 0)
    assert decode(b"word " * 100 + b"\xff") == ("word " * 100 + "\ufffd", 1)
    assert decode(b"caf\xe9 cr\xe8me br\xfbl\xe9e") == ("café crème brûlée", 0)
    assert decode(b"\x7fELF\0\0\1") is None


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_where_it_broke(server, ranges):
    server.files["/a.gz"] = gzip.compress(TEXT)
    server.faults, server.ranges = ["cut", 503, "cut", 500, 429], ranges
    assert read(server.address("/a.gz")) == (TEXT, [])
    assert len(server.requests) == 6
    half = len(server.files["/a.gz"]) // 2
    assert server.requests[:3] == [None, f"bytes={half}-", f"bytes={half}-"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(("validator", "changed"), [
    ("ETag", TEXT[::-1]), ("Last-Modified", TEXT[::-1]), (None, TEXT[1:])])
def test_halves_of_two_files_are_not_joined(server, ranges, validator, changed):
    server.files["/a"], server.changed = TEXT, changed
    server.faults, server.ranges, server.validator = ["changed"], ranges, validator
    with pytest.raises(DataError, match=r"/a was changed on its server while it was read\.\nRun again"):
        read(server.address("/a"))


def test_an_address_that_goes_on_failing_is_named(server, capsys):
    server.files["/a"] = TEXT
    server.faults = [503] * 6
    with pytest.raises(DataError, match=r"/a failed 6 times.*503.*\n.*run again"):
        read(server.address("/a"))
    said, waits = capsys.readouterr().out.splitlines(), f"Waiting for {server.address('/a')}: HTTP Error 503"
    assert len(said) == 4 and all(line.startswith(waits) for line in said)


def test_an_address_that_is_not_there_is_not_tried_again(server):
    with pytest.raises(DataError, match=r"/none answers 404 Not Found\.\n"):
        read(server.address("/none"))
    assert len(server.requests) == 1


def test_a_port_nobody_listens_on(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"failed 6 times.*refused.*\n"):
        read(server.address("/a"))


def test_the_wait_a_server_asks_for():
    asked = streams.urllib.error.HTTPError("http://a", 429, "Too Many", {"Retry-After": "7"}, None)
    assert streams.wait(asked, 1.0) == 7.0
    asked.headers["Retry-After"] = "86400"
    assert streams.wait(asked, 1.0) == streams.LONGEST_WAIT
    assert streams.wait(ConnectionError(), 1.0) == 1.0


def test_paths_stand_for_files(tmp_path, server):
    for name in ("b.txt", "a.txt.gz", "deep/c.TXT", "deep/no.png", ".git/hidden.txt", "[odd].dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    server.files["/lists/all.paths.gz"] = gzip.compress(b"crawl/one.warc.gz\ncrawl/two.warc.gz\n")

    def names(*paths: str) -> list[str]:
        return [name.removeprefix(f"{tmp_path}/") for path in paths for name in locate(path).files]

    assert names(str(tmp_path)) == ["[odd].dat", "a.txt.gz", "b.txt", "deep/c.TXT", "deep/no.png"]
    assert locate(str(tmp_path)).passed_over == [PassedOver("files", "hidden", f"{tmp_path}/.git")]
    assert names(f"{tmp_path}/*.txt") == ["b.txt"]
    assert names(f"{tmp_path}/**/*.png", str(tmp_path / "[odd].dat")) == ["deep/no.png", "[odd].dat"]
    assert names("https://a.org/x") == ["https://a.org/x"]
    assert names(server.address("/lists/all.paths.gz")) == [
        server.address("/crawl/one.warc.gz"), server.address("/crawl/two.warc.gz")
    ]
    for nothing in (tmp_path / "none.txt", tmp_path / "*.warc", tmp_path / "a**b", ""):
        (tmp_path / "empty").mkdir(exist_ok=True)
        source = FilesSource(kind="files", paths=[str(nothing or tmp_path / "empty")], domain="own")
        with pytest.raises(DataError, match=r"no file was found\.\n"):
            pieces(source, 1, 10**6)


def test_a_file_that_may_not_be_opened_is_named(tmp_path):
    with pytest.raises(DataError, match=r"/gone cannot be read: No such file or directory\.\n"):
        read(tmp_path / "gone")
