"""WARC and WET files, whole and damaged. The referees are FastWARC, which also writes them, and jusText."""

import gzip
import io
import pickle
import random
import re
import time
import zlib

import brotli
import justext.core
import pytest
from fastwarc.stream_io import GzipWriter
from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from justext import get_stoplist

from data_pipeline.config import WebSource
from data_pipeline.sources import Document, PassedOver, Refusal, pieces, web
from data_pipeline.sources.streams import Gap
from data_pipeline.sources.web import main_text

PARAGRAPH = (
    "It is the one that all of them had in mind when they said that there was more to it than what they could see, and "
    "that this would not be the last time they were to hear about it from those who had been there before them. "
)


def html(number: int, words: str = PARAGRAPH) -> str:
    return (
        f"<html><head><title>no</title></head><body><ul><li><a href='/'>Home</a></li></ul><h1>Page {number}</h1>"
        f"<p>{words} Page {number}.</p><p>{words}</p><div><a href='/x'>Imprint</a> <a href='/y'>Terms</a></div>"
        f"<!-- {random.Random(number).randbytes(500).hex()} --></body>"
    )


def warc(kind: str, address: str, body: bytes, content_type: str) -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {address}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000000>\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def response(number: int, body: bytes | None = None, status="200 OK", headers="Content-Type: text/html") -> bytes:
    body = html(number).encode() if body is None else body
    http = f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body
    return warc("response", f"http://www.Site{number}.org/page?{number}", http, "application/http; msgtype=response")


def read(path, extractor="justext") -> list[Document | Refusal]:
    source = WebSource(kind="web", paths=[str(path)], extractor=extractor)
    return [item for piece in pickle.loads(pickle.dumps(pieces(source, 1, 10**6))) for item in piece.read()]


def numbers(items) -> list[int]:
    """Which pages were read."""
    return [int(item.path.rpartition("?")[2]) for item in items if isinstance(item, Document)]


def reasons(items) -> list[str]:
    return [item.reason for item in items if isinstance(item, Refusal)]


def passed_over(items) -> list[str]:
    return [item.what for item in items if isinstance(item, PassedOver) and item.unit == "WARC records"]


@pytest.fixture
def archive(tmp_path):
    """Writes a file's bytes and reads it."""
    def write(data: bytes, extractor="justext", name="a.warc.gz"):
        (tmp_path / name).write_bytes(data)
        return read(tmp_path / name, extractor)
    return write


RECORDS = [response(number) for number in range(8)]
MEMBERS = [gzip.compress(record, mtime=0) for record in RECORDS]
EXPECTED = f"Page 3\n\n{PARAGRAPH}Page 3.\n\n{PARAGRAPH.strip()}"


@pytest.mark.parametrize(
    "data",
    [b"".join(MEMBERS), b"".join(RECORDS), gzip.compress(b"".join(RECORDS), mtime=0), b"\r\n".join(RECORDS).strip()],
)
@pytest.mark.parametrize("extractor", ["justext", "resiliparse"])
def test_pages_of_a_whole_file(archive, data, extractor):
    found = archive(data, extractor, "a.warc")
    assert numbers(found) == list(range(8)) and reasons(found) == []
    page = found[3]
    assert (page.source, page.path, page.domain, page.license) == (
        "www.site3.org", "http://www.Site3.org/page?3", "web", "unknown"
    )
    assert page.text == EXPECTED if extractor == "justext" else PARAGRAPH.strip() in page.text


def test_a_file_written_by_fastwarc(archive):
    stream = io.BytesIO()
    writer = GzipWriter(stream)
    for number in range(3):
        record = WarcRecord()
        record.init_headers(record_type=WarcRecordType.response)
        record.headers["WARC-Target-URI"] = f"https://site.org/?{number}"
        record.headers["Content-Type"] = "application/http; msgtype=response"
        record.set_bytes_content(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html(number).encode())
        record.write(writer, checksum_data=True)
    writer.close()
    assert numbers(archive(stream.getvalue())) == [0, 1, 2]


def test_records_are_those_of_fastwarc():
    data = b"".join(RECORDS)
    expected = [(record.headers["WARC-Target-URI"], record.reader.read())
                for record in ArchiveIterator(io.BytesIO(data), parse_http=False)]
    for size in (1, 13, 1000, 10**6):
        cut = (data[at : at + size] for at in range(0, len(data), size))
        whole = [WarcRecord.from_reader(io.BytesIO(record)) for record in web.records(cut)]
        assert [(record.headers["WARC-Target-URI"], record.reader.read()) for record in whole] == expected


def with_length(record: bytes, length: str) -> bytes:
    return re.sub(rb"(msgtype=response\r\nContent-Length: )\d+", rb"\g<1>" + length.encode(), record, count=1)


@pytest.mark.parametrize(
    "spoilt",
    [
        RECORDS[3].replace(b"WARC/1.0", b"XXXX/1.0"),
        RECORDS[3].replace(b"WARC/1.0\r\n", b""),
        with_length(RECORDS[3], "10"), with_length(RECORDS[3], "99999"), with_length(RECORDS[3], "many"),
        with_length(RECORDS[3], "9" * 17),
        RECORDS[3][:700], RECORDS[3][:100], b"some text\r\nin between\r\n\r\n", bytes(100_000),
        RECORDS[3][:400] + bytes(80_000),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_record_is_counted_and_the_rest_is_kept(archive, spoilt, packed):
    records = [*RECORDS[:3], spoilt, *RECORDS[4:]]
    found = archive(b"".join(map(gzip.compress, records) if packed else records))
    assert numbers(found) == [0, 1, 2, 4, 5, 6, 7]
    assert len(reasons(found)) == 1 and reasons(found)[0] in ("damaged record", "too large")


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_damaged_gzip_member_costs_its_record(archive, place):
    spoilt = bytearray(MEMBERS[place])
    spoilt[len(spoilt) // 3 :: 3] = b"\xff" * len(spoilt[len(spoilt) // 3 :: 3])
    found = archive(b"".join([*MEMBERS[:place], bytes(spoilt), *MEMBERS[place + 1 :]]))
    assert numbers(found) == [number for number in range(8) if number != place]
    assert reasons(found) == ["damaged gzip"]


@pytest.mark.parametrize("data", [b"".join(RECORDS), b"".join(MEMBERS), gzip.compress(b"".join(RECORDS), mtime=0)])
def test_a_truncated_file_is_kept_up_to_there(archive, data):
    random_source = random.Random(1)
    for cut in sorted(random_source.sample(range(len(data) // 2, len(data) - 8), 12)):
        found = archive(data[:cut])
        assert numbers(found) == list(range(len(numbers(found)))) and len(numbers(found)) >= 1
        assert len(reasons(found)) <= 1
        if len(numbers(found)) < 8:
            assert reasons(found) in ([], ["damaged record"], ["truncated gzip"])
    assert reasons(archive(data[: len(data) * 2 // 3])) != []


def test_what_is_no_archive(archive):
    assert reasons(archive(b"")) == ["empty"]
    assert reasons(archive(b"<html>not an archive</html>" * 1000)) == ["damaged record"]
    assert reasons(archive(gzip.compress(b"\0\1\2" * 100_000))) == ["damaged record"]


def test_only_pages_answered_with_200_and_html(archive):
    chunked = f"{len(html(5)):x}\r\n{html(5)}\r\n0\r\n\r\n".encode()
    found = archive(b"".join([
        warc("warcinfo", "", b"software: x", "application/warc-fields"),
        warc("request", "http://a.org/", b"GET / HTTP/1.1\r\n\r\n", "application/http; msgtype=request"),
        response(0, status="404 Not Found"), response(1, status="301 Moved"),
        response(2, headers="Content-Type: application/pdf"), response(3, headers="X: y"), response(4, body=b""),
        response(5, chunked, headers="Content-Type: text/html\r\nTransfer-Encoding: chunked"),
        response(6, gzip.compress(html(6).encode()), headers="Content-Type: text/html\r\nContent-Encoding: gzip"),
        response(7, b"broken", headers="Content-Type: text/html\r\nContent-Encoding: gzip"),
        response(8, b"<p>Too short.</p>", headers="Content-Type: application/xhtml+xml;charset=utf-8"),
        warc("response", "dns:a.org", b"a.org. 1 IN A 1.1.1.1", "text/dns"),
        warc("response", "http://[bad/", b"HTTP/1.1 200 OK\r\n\r\n", "application/http; msgtype=response"),
    ]))
    assert numbers(found) == [5, 6]
    assert reasons(found) == [
        "not HTTP 200", "not HTTP 200", "not HTML", "not HTML", "not HTML", "no main text", "no main text",
        "damaged record",
    ]
    assert found[2].where.endswith("a.warc.gz, record 2")
    assert passed_over(found) == ["warcinfo", "request", "response of dns"]


def test_pages_too_large_are_left_out(archive, monkeypatch):
    monkeypatch.setattr(web, "LARGEST_PAGE", 5000)
    assert reasons(archive(response(1) + response(2, b"x" * 5001))) == ["too large"]
    monkeypatch.setattr(web, "LARGEST_RECORD", 3000)
    found = archive(response(1) + response(2, b"x" * 4000) + response(3))
    assert numbers(found) == [1, 3] and reasons(found) == ["too large"]


@pytest.mark.parametrize(
    ("encoding", "headers", "meta"),
    [
        ("utf-8", "Content-Type: text/html; charset=iso-8859-1", ""),       # a server that is wrong
        ("cp1252", "Content-Type: text/html; charset=windows-1252", ""),
        ("iso-8859-2", "Content-Type: text/html", "<meta charset='iso-8859-2'>"),
        ("cp1252", "Content-Type: text/html", ""),
        ("cp1252", "Content-Type: text/html; charset=no-such-charset", ""),
        ("utf-16", "Content-Type: text/html; charset=utf-16", ""),
    ],
)
def test_character_sets(archive, encoding, headers, meta):
    words = PARAGRAPH + "Über die Höfe, schön für Jürgen, außer später; überall grüßen. " * 3
    body = f"<html><head>{meta}</head><body><p>{words}</p></body></html>".encode(encoding)
    (page,) = archive(gzip.compress(response(1, body, headers=headers)))
    assert page.text == words.strip()


def test_wet_records_as_they_are(archive):
    text = "A title\nSome text – as it is.\n"
    found = archive(b"".join(map(gzip.compress, [
        warc("warcinfo", "", b"software: x", "application/warc-fields"),
        warc("conversion", "https://a.org/?1", text.encode(), "text/plain"),
        warc("conversion", "https://a.org/?2", b"caf\xe9", "text/plain"),
        warc("conversion", "https://a.org/?3", b" \n", "text/plain"),
    ])), name="a.wet.gz")
    assert found[1] == Document(text, "a.org", "https://a.org/?1", "web", "unknown")
    assert reasons(found) == ["invalid UTF-8", "no main text"]


def test_texts_are_justexts():
    """White space of every kind, in and between tags; only headings are treated otherwise."""
    random_source = random.Random(7)
    kept = 0
    spaces = [" ", "  ", "\n", "\r\n", "\t", " \n ", "\u00a0", "\u2003 ", "<br>", "<br/> <br>", "<b> x </b>", "\x0b"]
    for _ in range(60):
        words = [word + random_source.choice(spaces) for word in PARAGRAPH.split() * random_source.randint(2, 6)]
        cut = random_source.randint(1, len(words))
        page = f"<body><p>{''.join(words[:cut])}</p> <div>{''.join(words[cut:])}<a href='/'>x  y</a></div></body>"
        expected = justext.core.justext(page, get_stoplist("English"))
        assert main_text.justext(page) == "\n\n".join(part.text for part in expected if not part.is_boilerplate)
        kept += main_text.justext(page) != ""
    assert kept > 20


def test_classes_of_paragraphs_are_justexts():
    """Random pages of every kind of paragraph, against jusText's own second pass."""
    random_source = random.Random(5)
    kinds = {"good": PARAGRAPH * 2, "neargood": PARAGRAPH[:150], "short": "few words", "bad": "wort " * 40}
    changed = 0
    for _ in range(150):
        names = random_source.choices(list(kinds), weights=[2, 2, 5, 2], k=random_source.randint(1, 40))
        tags = [random_source.choice(["h2", "p", "p"]) for _ in names]
        page = "".join(f"<{tag}>{kinds[name]}</{tag}>" for tag, name in zip(tags, names, strict=True))
        paragraphs = justext.core.justext(f"<html><body>{page}</body></html>", get_stoplist("English"))
        for paragraph in paragraphs:
            paragraph.class_type = paragraph.cf_class
        justext.core.revise_paragraph_classification(paragraphs)
        expected = [paragraph.class_type for paragraph in paragraphs]
        changed += sum(new != paragraph.cf_class for new, paragraph in zip(expected, paragraphs, strict=True))
        main_text.revise(paragraphs)
        assert [paragraph.class_type for paragraph in paragraphs] == expected
    assert changed > 500


def test_a_page_that_is_one_long_table():
    """jusText's own takes the square of the number of cells: minutes here."""
    start = time.monotonic()
    assert main_text.justext("<html><body><table>" + "<tr><td>a cell</td></tr>" * 20_000 + "</table>") == ""
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("page", ["", " ", "<!-- -->", "<?php", "<div>" * 5000 + "x", "a\0b", "<p>&#xD800;</p>"])
@pytest.mark.parametrize("extractor", ["justext", "resiliparse"])
def test_strange_pages(page, extractor):
    text = main_text.EXTRACTORS[extractor](page)
    assert text is None or isinstance(text.encode(), bytes)


def test_a_gap_stands_for_what_it_cuts_off():
    record, gap = RECORDS[0], Gap("gap")
    assert list(web.records([record + record[:50], gap, record[60:] + record])) == [record[:-4], gap, record[:-4]]
    assert list(web.records([record[:50], gap, gap, record])) == [gap, gap, record[:-4]]


@pytest.mark.parametrize("version", ["WARC/1.0", "WARC/1.1", "WARC/0.18", "WARC/0.17"])
@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_versions_and_line_ends_of_records(archive, version, line_end, packed):
    records = []
    for record in RECORDS:
        head, end, rest = record.partition(b"\r\n\r\n")
        head = head.replace(b"WARC/1.0", version.encode()).replace(b"; ", b";")
        records.append(head.replace(b"\r\n", line_end) + end.replace(b"\r\n", line_end) + rest)
    spoilt = records[3].replace(b"WARC", b"XXXX")
    found = archive(b"".join(map(gzip.compress, records) if packed else [*records[:3], spoilt, *records[4:]]))
    assert numbers(found) == list(range(8)) if packed else [0, 1, 2, 4, 5, 6, 7]
    assert len(reasons(found)) == (not packed)


def test_a_page_that_the_crawler_cut_short_is_counted(archive):
    cut = RECORDS[1].replace(b"WARC-Date", b"WARC-Truncated: length\r\nWARC-Date")
    mentioned = response(2, html(2).replace("<p>", "<p>\r\nWARC-Truncated: length\r\n").encode())
    found = archive(RECORDS[0] + cut + mentioned)
    assert numbers(found) == [0, 1, 2] and reasons(found) == ["page cut short by the crawler"]
    assert found[2].where.endswith("a.warc.gz, record 1")


def test_http_headers_that_end_in_line_feeds(archive):
    http = b"HTTP/1.1 200 OK\nContent-Type: text/html\n\n" + html(1).encode()
    found = archive(warc("response", "http://a.org/?1", http, "application/http;msgtype=response"))
    assert numbers(found) == [1]


def test_resources_and_records_of_other_types(archive):
    found = archive(b"".join([
        warc("resource", "http://a.org/?1", html(1).encode(), "text/html; charset=utf-8"),
        warc("resource", "http://a.org/?2", b"plain text", "text/plain"),
        *(warc(kind, "http://a.org/", b"x", "text/plain")
          for kind in ("warcinfo", "request", "metadata", "revisit", "continuation", "invented", "metadata")),
    ]))
    assert numbers(found) == [1] and found[0].text == EXPECTED.replace("3", "1") and reasons(found) == ["not HTML"]
    assert passed_over(found) == ["warcinfo", "request", "metadata", "revisit", "continuation", "invented", "metadata"]


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def chunked(data: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x;a=b\r\n%b\r\n" % (len(data[at : at + 99]), data[at : at + 99])
                    for at in range(0, len(data), 99)) + end


def same(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize(("headers", "pack"), [
    *((f"Content-Encoding: {name}", pack) for name, pack in (
        ("x-gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress), ("deflate", raw_deflate),
        ("br", brotli.compress), ("gzip, br", lambda data: brotli.compress(gzip.compress(data))),
        ("none", same), ("utf-8", same), ("identity", same), ("", same), ("gzip", same), ("br", same),
        ("deflate", same), ("compress", same), ("utf-8", gzip.compress),
    )),
    ("X: y", gzip.compress), ("Transfer-Encoding: chunked", chunked), ("Transfer-Encoding: chunked", same),
    ("Transfer-Encoding: chunked", lambda data: chunked(data, b"")), ("Transfer-Encoding: gzip", gzip.compress),
    ("Transfer-Encoding: gzip, chunked", lambda data: chunked(gzip.compress(data))),
    ("Content-Encoding: gzip\r\nTransfer-Encoding: chunked", lambda data: chunked(gzip.compress(data))),
    ("Content-Encoding: gzip\r\nTransfer-Encoding: chunked", gzip.compress),
])
def test_bodies_as_archives_have_them(archive, headers, pack):
    body = pack(html(3).encode())
    (page,) = archive(gzip.compress(response(3, body, headers=f"Content-Type: text/html\r\n{headers}")))
    assert page.text == EXPECTED


@pytest.mark.parametrize(
    ("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("br", brotli.compress)]
)
def test_bodies_that_are_cut_or_unpack_to_any_size(archive, name, pack):
    body = pack((html(3) + "<pre>" + random.Random(2).randbytes(50_000).hex()).encode())
    headers = f"Content-Type: text/html\r\nContent-Encoding: {name}"
    (page,) = archive(response(3, body[: len(body) * 2 // 3], headers=headers))
    assert page.text == EXPECTED
    found = archive(response(3, pack(bytes(30_000_000)), headers=headers))
    assert reasons(found) == ["too large"]
