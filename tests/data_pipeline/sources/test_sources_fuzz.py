"""Random directories of files of all kinds, damaged in random ways: nothing is lost in silence, nothing fails.

Documents read, refused and passed over are those that were written. Where damage makes their number unknowable, the
file is named.
"""

import gzip
import io
import json
import os
import pickle
import random
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import FilesSource
from data_pipeline.sources import Document, pieces
from data_pipeline.sources.streams import shown
from tests.data_pipeline.sources.test_sources_kinds import PACKERS, csv_of, tar, zipped
from tests.data_pipeline.sources.test_sources_web import PARAGRAPH, response, warc

Written = dict[str, int]        # documents by the name of their file; something that is passed over is one
STRAY = "a site whose name was damaged"
LINES = (".csv", ".jsonl", ".ndjson", ".jl", ".json", ".jsonlines")
BAD_LINES = ['{"text": null}', '{"text": ""}', "not JSON", "[1, 2]", '{"other": 1}', '{"text": "caf\udce9"}',
             '{"text": "deep", "n": ' + "[" * 2000 + "]" * 2000 + "}"]


class Maker:
    """Files of random kinds, with the number of documents in them."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.hosts: list[str] = []          # of the web archives, which pages are from

    def texts(self) -> list[str]:
        return [f"A text with {self.random.randrange(10**9)} in it, äöü. " * self.random.choice([1, 3, 300])
                for _ in range(self.random.randint(1, 12))]

    def records(self) -> tuple[str, bytes, int]:
        lines = ['{"text": "first"}', *(json.dumps({"id": 7, "text": text}) for text in self.texts()),
                 *self.random.sample(BAD_LINES, self.random.randint(0, 3))]
        data = self.random.choice(["\n", "\r\n", "\n\n"]).join(lines).encode(errors="surrogateescape")
        return self.random.choice([".jsonl", ".ndjson", ".jl", ".json", ".jsonlines"]), data, len(lines)

    def values(self) -> tuple[str, bytes, int]:
        """An array, or objects one after another, over several lines."""
        objects = [{"text": "first"}, *({"id": 7, "text": text} for text in self.texts()),
                   *self.random.sample([{"text": None}, {"text": ""}, [1, [2]], {"n": {"text": "inner"}}], 2)]
        values = [objects] if self.random.random() < 0.5 else objects
        return ".json", "\n".join(json.dumps(value, indent=1) for value in values).encode(), len(objects)

    def table(self) -> tuple[str, bytes, int]:
        texts = self.texts()
        return ".csv", csv_of(texts, delimiter=self.random.choice(",;\t")), len(texts)

    def text(self) -> tuple[str, bytes, int]:
        encoding = self.random.choice(["utf-8", "utf-16", "latin-1"])
        return self.random.choice([".txt", ".md", ".rst"]), self.texts()[0].encode(encoding), 1

    def page(self) -> tuple[str, bytes, int]:
        return ".html", f"<html><body><p>{PARAGRAPH * 2}</p></body></html>".encode(), 1

    def warc(self) -> tuple[str, bytes, int]:
        numbers = range(self.random.randint(1, 6))
        records = [self.random.choice([
            response(number, headers="Content-Type: text/html"), response(number, status="404 Gone"),
            warc("conversion", f"http://a.org/{number}", self.texts()[0].encode(), "text/plain"),
            warc("metadata", f"http://a.org/{number}", b"x: y", "application/warc-fields"),
        ]) for number in numbers]
        version = self.random.choice([b"WARC/1.0", b"WARC/1.1", b"WARC/0.18"])
        line_end = self.random.choice([b"\r\n", b"\n"])
        self.hosts.append(f"host{len(self.hosts)}.org")
        changed = []
        for record in records:
            head, end, body = record.partition(b"\r\n\r\n")
            head = re.sub(rb"http://[^/]*", f"http://{self.hosts[-1]}".encode(), head)
            changed.append((head.replace(b"WARC/1.0", version) + end).replace(b"\r\n", line_end) + body)
        packed = self.random.random() < 0.5
        data = b"".join(map(gzip.compress, changed) if packed else changed)
        return self.random.choice([".warc", ".wet"]) + (".gz" if packed else ""), data, len(records)

    def parquet(self) -> tuple[str, bytes, int]:
        stream, texts = io.BytesIO(), self.texts()
        pq.write_table(pa.table({"text": texts, "n": range(len(texts))}), stream, row_group_size=3,
                       write_page_checksum=True)
        return ".parquet", stream.getvalue(), len(texts)

    def unknown(self) -> tuple[str, bytes, int]:
        return self.random.choice([".png", ".pdf", ".py", "", ".docx", ".arc"]), self.random.randbytes(200), 1

    def archive(self, depth: int) -> tuple[str, bytes, int]:
        members, documents = {}, 0
        for number in range(self.random.randint(1, 4)):
            suffix, data, count = self.file(depth + 1)
            members[f"inner/{number}{suffix}"] = data
            documents += count
        kind = self.random.choice(["tar", "zip"])
        return f".{kind}", (tar if kind == "tar" else zipped)(**members), documents

    def file(self, depth: int = 0) -> tuple[str, bytes, int]:
        """Suffix, bytes and number of documents."""
        kinds = [self.records, self.records, self.values, self.table, self.text, self.page, self.warc, self.parquet,
                 self.unknown]
        if depth < 2 and self.random.random() < 0.2:
            suffix, data, documents = self.archive(depth)
        else:
            suffix, data, documents = self.random.choice(kinds)()
        if self.random.random() < 0.4 and not suffix.endswith(".gz"):
            packing = self.random.choice(list(PACKERS))
            data = PACKERS[packing](data)
            suffix += self.random.choice([f".{packing}", f".{packing}", ""])
        return suffix, data, documents

    def damaged(self, data: bytes) -> bytes:
        place, size = self.random.randrange(len(data)), self.random.choice([1, 10, 600])
        match self.random.choice(["cut", "flip", "zero", "insert", "remove", "swap", "more"]):
            case "cut":
                return data[:place]
            case "flip":
                spoilt = bytearray(data)
                for _ in range(size):
                    spoilt[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
                return bytes(spoilt)
            case "zero":
                return data[:place] + bytes(len(data[place : place + size])) + data[place + size :]
            case "insert":
                return data[:place] + self.random.randbytes(size) + data[place:]
            case "remove":
                return data[:place] + data[place + size :]
            case "swap":
                return data[place:] + data[:place]
            case _:
                return data + self.random.randbytes(size)

    def directory(self, root: Path) -> tuple[Written, set[str], dict[str, str]]:
        """Fill `root`: the documents of each file, the files that are damaged, the file that a site's pages are in."""
        written, spoilt, files = Written(), set(), {}
        for number in range(self.random.randint(1, 10)):
            before = len(self.hosts)
            suffix, data, documents = self.file()
            stem = self.random.choice(["a", "with blank", "[1]", os.fsdecode(b"caf\xe9"), "ünï"])
            path = root / self.random.choice([".", "deep", "deep/er", os.fsdecode(b"\xff")]) / f"{stem}{number}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if data and self.random.random() < 0.4:
                data = self.damaged(data)
                if suffix in LINES:             # nothing tells that lines are missing
                    lines = sum(bool(line.strip()) for line in data.split(b"\n"))
                    documents = min(documents, max(0, lines - (suffix == ".csv")))
                spoilt.add(shown(str(path)))
            path.write_bytes(data)
            written[shown(str(path))] = documents
            files.update(dict.fromkeys(self.hosts[before:], shown(str(path))))
        for name, make in (("gone", lambda path: path.symlink_to("nowhere")), ("pipe.txt", os.mkfifo),
                           (".hidden", Path.touch), ("loop", lambda path: path.symlink_to(root))):
            if self.random.random() < 0.3:
                make(root / name)
                written[str(root / name)] = 1
        return written, spoilt, files


def place_of(item, files, sites) -> str:
    """Which of the files an item is of: that of its site, or the longest whose name begins its place."""
    where = item.source if isinstance(item, Document) else item.where
    return sites.get(where) or max((file for file in files if where.startswith(file)), key=len, default=STRAY)


@pytest.mark.parametrize("seed", range(int(os.environ.get("FUZZ", "120"))))
def test_nothing_is_lost_in_silence(tmp_path, seed):
    maker = Maker(seed)
    written, spoilt, sites = maker.directory(tmp_path)
    (tmp_path / "whole.txt").write_text("one text at least")
    written[f"{tmp_path}/whole.txt"] = 1
    source = FilesSource(kind="files", paths=[str(tmp_path)], domain="own", extractor="resiliparse")
    found = pickle.loads(pickle.dumps(pieces(source, seed, maker.random.choice([100, 10_000, 10**7]))))
    read: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for item in (item for piece in found for item in piece.read()):
        assert json.dumps(item, ensure_ascii=False).encode()
        (read if isinstance(item, Document) else others)[place_of(item, written, sites)] += 1
    for file, documents in written.items():
        said = file, documents, read[file], others[file]
        if file in spoilt:
            assert read[file] >= documents or others[file] or read[STRAY], said
        else:
            assert read[file] + others[file] == documents, said
