"""Shared n-grams against sets of tuples of words; evaluation files; real text that contains other real text."""

import bz2
import gzip
import html
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import evaluation_sets
from data_pipeline.annotate import decontaminate
from data_pipeline.annotate.decontaminate import Decontaminate
from data_pipeline.config import DataError, DecontaminationConfig
from data_pipeline.sources.readers import strings
from data_pipeline.text.ngrams import hash_set, is_in
from tests.data_pipeline.annotate.here import column, cut, marked, run
from tests.data_pipeline.annotate.questions import CLEAN, QUESTIONS, SETTINGS
from tests.data_pipeline.plain_words import runs
from tests.data_pipeline.real_texts import normalised

SITE_PACKAGES = Path(np.__file__).parent.parent


def contamination(rows: list[tuple[str, bool]], n: int, against: list[str] | None = None, shards: int = 1) -> list[int]:
    """The column `contamination` of all shards."""
    step = Decontaminate(DecontaminationConfig(ngram=n, against=against or []), strings)
    return column("contamination", run(step, [marked(part) for part in cut(rows, shards)]))


def test_the_papers_sets_are_known_by_name():
    items, clean = evaluation_sets.load("Rowan/hellaswag")["validation"], CLEAN["en"][0]
    question = next(row["ctx"] for row in items if len(row["ctx"].split()) > 40)
    solution = evaluation_sets.load("openai/openai_humaneval")["test"][1]["prompt"]
    rows = [(clean, False), (f"{clean} {question}", False), (solution, False), (question, True),
            (f"{question} {solution}", False)]
    for against, names in (
        (["paper-tasks"], [None, "HellaSwag", "HumanEval", None, "HumanEval"]),
        ([], [None, "held-out text", None, None, "held-out text"]),
    ):
        step = Decontaminate(DecontaminationConfig(ngram=13, against=against), strings)
        [filled] = run(step, [marked(rows)])
        assert filled["contaminated_by"].to_pylist() == names
        assert [count > 0 for count in filled["contamination"].to_pylist()] == [name is not None for name in names]


def test_a_file_is_named_by_the_documents_it_shares_words_with(tmp_path):
    text = " ".join(f"word{number}" for number in range(40))
    files = [str(tmp_path / name) for name in ("bench.jsonl", "the_same.jsonl")]
    for file in files:
        Path(file).write_text(json.dumps({"question": text}))
    step = Decontaminate(DecontaminationConfig(ngram=13, against=files), strings)
    held_out = text.replace("word", "term")
    found = run(step, [marked([(f"before {text}", False), (held_out, True), (f"before {held_out}", False)])])
    assert column("contaminated_by", found) == [files[0], None, "held-out text"]


def expected(rows: list[tuple[str, bool]], n: int) -> list[int]:
    rows = [(re.sub(r"&#?\w+;", lambda reference: html.unescape(reference[0]), text), held) for text, held in rows]
    known = {gram for text, held_out in rows if held_out for gram in runs(text, n)}
    return [0 if held_out else sum(gram in known for gram in runs(text, n)) for text, held_out in rows]


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
def test_random_texts(shards, monkeypatch):
    monkeypatch.setattr(decontaminate, "PART_NGRAMS", {1: 1 << 25, 2: 30, 7: 5}[shards])      # up to 50 parts
    random = np.random.default_rng(shards)
    vocabulary = ["the", "The", "queue", "x_1", "naïve", "日本", "ไทย", "0", "a-b", "don't"]
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
    assert [contamination(rows[:2], n) for n in (6, 7)] == [[0, 1], [0, 0]]       # of more words than a text has


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


def parquet(column: pa.Array) -> bytes:
    content = pa.BufferOutputStream()
    pq.write_table(pa.table({"question": column}), content)
    return content.getvalue().to_pybytes()


def test_evaluation_files_are_read_as_sources_are(tmp_path, capsys):
    question = "what did the fox that ran over the hill say to the dog"
    record = json.dumps({"question": question}).encode()
    for name, content in (
        ("a.jsonl.gz", gzip.compress(record)), ("a.jsonl", gzip.compress(record)), ("a.ndjson", record),
        ("a.json.bz2", bz2.compress(b"[%b,\n%b]" % (record, record))), ("a.csv", f"id,q\n1,{question}\n".encode()),
        ("a.tsv", f"id\tq\n1\t{question}\n".encode()), ("README", question.encode("utf-16")),
        ("b.csv", f"id;q\n1;{question.replace('hill', 'hill,')}\n".encode()),
        ("b.jsonl", record.replace(b'"}', b'\\ud800"}')),
        ("c.jsonl", record.replace(b'"}', b'", "question": "of the same name"}')),
        ("bytes.parquet", parquet(pa.array([question.encode()], pa.binary()))),
        ("map.parquet", parquet(pa.array([[("stem", question)]], pa.map_(pa.string(), pa.string())))),
    ):
        (tmp_path / name).write_bytes(content)
        assert contamination([(question, False)], 6, [str(tmp_path / name)]) == [8], name
        assert ("1 of 1 texts hold half a surrogate pair" in capsys.readouterr().err) == (name == "b.jsonl")


@pytest.mark.parametrize(("name", "content"), [
    ("missing.jsonl", None), ("task.png", b"\x89PNG\0"), ("cut.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9]),
    ("broken.jsonl", b'{"a": 1}\n{"a": '), ("broken.parquet", b"PAR1"),
    ("latin.txt", b"caf\xe9"), ("latin.jsonl", b'"caf\xe9"'), ("empty.jsonl", b'{"n": 1}\n[" "]\n'),
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
    shared = [name for name in vendored if name in rich and len(runs(vendored[name], 13)) > 200][::2]
    assert len(shared) > 15
    rows = [(rich[name], True) for name in shared] + [(vendored[name], False) for name in shared]
    counts = contamination(rows, 13, shards=3)
    assert counts == expected(rows, 13)
    assert min(counts[len(shared):]) > 20


@pytest.mark.parametrize(("language", "setting"), [(name, how) for name, ways in SETTINGS.items() for how in ways])
def test_a_planted_question_is_found_however_it_is_set(language, setting, tmp_path):
    """In the middle of a page, after the repairs every document goes through; pages that never saw it stay at 0."""
    questions, clean, typeset = QUESTIONS[language], CLEAN[language], SETTINGS[language][setting]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    pages = normalised([*(f"{clean[0]}\n\n{typeset(text)}\n\n{clean[1]}" for text in questions), *map(typeset, clean)])
    counts = contamination([(page, False) for page in pages], 13, [str(tmp_path / "test.jsonl")])
    assert len(questions) == len(clean) == 40
    assert [count > 0 for count in counts] == [True] * 40 + [False] * 40


def test_short_evaluation_texts_are_looked_for_whole_or_counted(tmp_path, capsys):
    short = {"q": "Which planet is the third one from the sun?", "a": "Earth",
             "zh": "哪一颗行星是离太阳第三近的行星？"}
    long = "A farmer has nine cows and buys four more of them at the market in town, how many has he?"
    two_readings = {"q": long.replace("nine", "nine\u200b")}
    (tmp_path / "task.jsonl").write_text(json.dumps(short) + "\n" + json.dumps(two_readings))
    rows = [("So “which planet is the THIRD one from the sun” was asked.", False), ("Earth is a planet.", False),
            ("Which planet is the third one from a star?", False), ("问：哪一颗行星是离太阳第三近的行星", False),
            (long, False),
            ("哪一颗行星是离太阳最近的？", False), ("A farmer has nine cows and buys four of them.", False)]
    assert contamination(rows, 13, [str(tmp_path / "task.jsonl")])[:6] == [1, 0, 0, 1, 8, 0]
    assert capsys.readouterr().err == (
        "annotate.decontamination.against: of 4 texts 1 are looked for by runs of 13 words, 2 of 8 to 12 words as a "
        "whole, 1 shorter ones not at all.\n")


def test_a_zero_width_space_is_read_both_ways():
    held = "the quick brown fox jumps over the lazy dog and then sleeps long"
    parted, within = held.replace(" ", "\u200b"), "\u200b".join(held).replace("\u200b \u200b", " ")
    assert contamination([(held, True), (parted, False), (within, False), (held[4:], False)], 13) == [0, 1, 1, 0]
    assert contamination([(within, True), (held, False), (held.upper(), False)], 13) == [0, 1, 1]
