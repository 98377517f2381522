"""Shared n-grams against sets of tuples of words; evaluation files; real text that contains other real text."""

import bz2
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataError, DecontaminationConfig
from data_pipeline.sources.readers import strings
from data_pipeline.steps.decontaminate import Decontaminate, hash_set, is_in, ngram_hashes
from data_pipeline.steps.step import SCHEMA, text_id

SITE_PACKAGES = Path(np.__file__).parent.parent


def contamination(rows: list[tuple[str, bool]], n: int, against: list[str] | None = None, shards: int = 1) -> list[int]:
    """The column `contamination` of all shards."""
    step = Decontaminate(DecontaminationConfig(ngram=n, against=against or []), strings)
    tables = [
        pa.Table.from_pylist([
            {"id": text_id(text), "text": text, "source": "s", "path": "p", "domain": "d", "license": "MIT",
             "held_out": held_out} for text, held_out in rows[len(rows) * i // shards : len(rows) * (i + 1) // shards]
        ], SCHEMA) for i in range(shards)
    ]
    decision = step.decide([step.survey(table) for table in tables])
    return [count for table, own in zip(tables, decision.shards, strict=True)
            for count in step.apply(table, decision.shared, own)["contamination"].to_pylist()]


def ngram_list(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall("[a-z0-9_\u0080-\U0010ffff]+", re.sub("[A-Z]", lambda letter: letter.group().lower(), text))
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def expected(rows: list[tuple[str, bool]], n: int) -> list[int]:
    known = {gram for text, held_out in rows if held_out for gram in ngram_list(text, n)}
    return [0 if held_out else sum(gram in known for gram in ngram_list(text, n)) for text, held_out in rows]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_hash_set(size):
    random = np.random.default_rng(size)
    known = random.integers(0, 2**64, size, dtype=np.uint64)
    known[: size // 2] >>= np.uint64(55)                # many equal, and near each other
    asked = np.concatenate([known, random.integers(0, 2**64, 500, dtype=np.uint64), np.arange(600, dtype=np.uint64)])
    members = set(known.tolist()) - {0}
    answers = is_in(asked, hash_set(known))
    assert [bool(answer) for answer, value in zip(answers, asked, strict=True) if value > 1] == [
        value in members for value in asked.tolist() if value > 1]


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_random_texts(shards):
    random = np.random.default_rng(shards)
    vocabulary = ["the", "The", "queue", "x_1", "naïve", "日本", "0", "a-b", "don't"]
    counts = 0
    for n in (2, 3, 5):
        rows = [(" ".join(random.choice(vocabulary, random.integers(0, 40))), random.random() < 0.3) for _ in range(40)]
        found = contamination(rows, n, shards=shards)
        assert found == expected(rows, n)
        counts += len(set(found))
    assert counts > 10


def test_case_and_punctuation_do_not_count_and_order_does():
    held = "one two three four five six"
    rows = [(held, True), ("One, two -- THREE: four!\nfive? (six)", False), ("six five four three two one", False)]
    assert contamination(rows, 6) == [0, 1, 0]
    assert contamination(rows[1:], 6) == [0, 0]
    assert len(ngram_hashes(held, 6)) == 1 and len(ngram_hashes(held, 7)) == 0


def test_evaluation_files(tmp_path):
    question = "what did the fox that ran over the hill say to the dog"
    nested = {"id": 3, "question": {"stem": question.upper(), "choices": [{"text": "a b c d e f"}, None, 2.5]}}
    (tmp_path / "task.jsonl").write_text(json.dumps({"text": "nothing here"}) + "\n\n" + json.dumps(nested) + "\n")
    pq.write_table(pa.table({"n": [1], "answers": [["u v w x y z", "short"]]}), tmp_path / "task.parquet")
    (tmp_path / "task.txt").write_text("first line\nsecond line goes on and on")
    rows = [("- " + question, False), ("a b c d e f g", False), ("u v w x y z", False), ("nothing here", False),
            ("line second line goes on and on", False), (question, True)]
    files = [str(tmp_path / name) for name in ("task.jsonl", "task.parquet", "task.txt")]
    assert contamination(rows, 6, files[:1]) == [8, 1, 0, 0, 0, 0]
    assert contamination(rows[:-1], 6, files[1:]) == [0, 0, 1, 0, 2]
    assert contamination(rows[:-1], 6, files) == [8, 1, 1, 0, 2]


def test_evaluation_files_are_read_as_sources_are(tmp_path):
    question = "what did the fox that ran over the hill say to the dog"
    record = json.dumps({"question": question}).encode()
    for name, content in (
        ("a.jsonl.gz", gzip.compress(record)), ("a.jsonl", gzip.compress(record)), ("a.ndjson", record),
        ("a.json.bz2", bz2.compress(b"[%b,\n%b]" % (record, record))), ("a.csv", f"id,q\n1,{question}\n".encode()),
        ("a.tsv", f"id\tq\n1\t{question}\n".encode()), ("README", question.encode("utf-16")),
    ):
        (tmp_path / name).write_bytes(content)
        assert contamination([(question, False)], 6, [str(tmp_path / name)]) == [8], name


@pytest.mark.parametrize(("name", "content"), [
    ("missing.jsonl", None), ("task.png", b"\x89PNG\0"), ("cut.jsonl.gz", gzip.compress(b"{}" * 99)[:-9]),
    ("broken.jsonl", b'{"a": 1}\n{"a": '), ("broken.parquet", b"PAR1"),
    ("latin.txt", b"caf\xe9"), ("latin.jsonl", b'"caf\xe9"'),
])
def test_files_that_cannot_be_read(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be read.*\nMend `annotate\.decontamination\.against`\.$"):
        contamination([("a b c", True)], 2, [str(path)])


@pytest.mark.skipif(not (SITE_PACKAGES / "pip/_vendor").is_dir() or not (SITE_PACKAGES / "rich").is_dir(),
                    reason="pip or rich is not installed")
def test_text_vendored_by_pip_is_found_in_all_its_files():
    def read(directory: Path) -> dict[str, str]:
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.py"))}

    rich, vendored = read(SITE_PACKAGES / "rich"), read(SITE_PACKAGES / "pip/_vendor/rich")
    shared = [name for name in vendored if name in rich and len(ngram_list(vendored[name], 13)) > 200]
    assert len(shared) > 30
    rows = [(text, True) for text in rich.values()] + [(vendored[name], False) for name in shared]
    counts = contamination(rows, 13, shards=3)
    assert counts == expected(rows, 13)
    assert min(counts[len(rich):]) > 20
