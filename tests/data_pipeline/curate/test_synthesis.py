"""Rephrasing: what is asked, what a reply gives, and how it joins the corpus."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.annotate import annotation
from data_pipeline.annotate.step import SCHEMA, text_id
from data_pipeline.config import AnnotateConfig, CurateConfig, DataError, ExecutorConfig, RulesConfig
from data_pipeline.curate import curation
from data_pipeline.curate.chat import Reply
from data_pipeline.curate.heuristics import first_broken, rules_of
from data_pipeline.curate.prompts import BYTES_PER_TOKEN, DISTILL, DIVERSE_QA, TASKS, TASKS_OF_LABEL, WIKIPEDIA
from data_pipeline.curate.synthesis import (
    Drop,
    Request,
    Synthesis,
    Synthetic,
    annotate,
    documents_of,
    postprocess,
    requests_for,
    segments,
    select,
)
from data_pipeline.workers.executor import workers
from tests.data_pipeline.curate.chat_server import config, parent, quiet

# requests

def test_tasks_follow_the_label():
    asked = {label: {request.task for request in requests_for(parent(1, label))} for label in TASKS_OF_LABEL}
    assert asked["low"] == asked["medium-low"] == {"wikipedia"}
    assert asked["medium"] == set()
    assert asked["high"] == asked["medium-high"] == set(TASKS)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_segments_fit_and_cover_the_text(task):
    text = parent(2, length=40_000).text
    pieces = list(segments(text, task))
    assert "\n".join(pieces).split("\n") == text.split("\n")
    for piece in pieces:
        asked = sum(len(message["content"].encode()) for message in task.messages(piece))
        assert asked <= task.longest_input * BYTES_PER_TOKEN
    # no two neighbours would have fitted together
    for left, right in pairwise(pieces):
        assert len(left) + len(right.split("\n")[0]) + 2 > task.longest_segment * BYTES_PER_TOKEN


def test_long_lines_short_pieces_and_short_documents_are_left_out():
    long_line = "ä" * (WIKIPEDIA.longest_segment * BYTES_PER_TOKEN // 2 + 1)
    line = "A line that is long enough to be asked about."
    assert list(segments(f"{line}\n{long_line}\n{line}", WIKIPEDIA)) == [line, line]
    assert list(segments(f"short\n{long_line}\n\n\n", WIKIPEDIA)) == []
    assert list(segments("", WIKIPEDIA)) == []
    short = parent(3, "high")._replace(text="word " * 20)          # 25 tokens
    assert {request.task for request in requests_for(short)} == {"wikipedia"}


def test_text_with_braces_is_asked_about_as_it_is():
    text = "f'{x}' {0} {text} {{}} " * 8
    assert all(text in task.messages(text)[-1]["content"] for task in TASKS.values())


def test_selection_fits_and_does_not_depend_on_order():
    documents = [parent(number, label, 200 + 40 * number) for number in range(60) for label in ("low", "medium")]
    documents = [document._replace(id=f"{index:032x}") for index, document in enumerate(documents)]
    chosen = select(documents, 0.01, seed=1)
    size = sum(len(document.text) for document in chosen)
    assert 0.008e6 < size <= 0.01e6
    assert {document.label for document in chosen} == {"low"}
    for order in range(9):
        assert select(random.Random(order).sample(documents, len(documents)), 0.01, seed=1) == chosen
    assert select(documents, 0.01, seed=2) != chosen
    assert set(chosen) < set(select(documents, 0.02, seed=1))       # a larger budget adds, so answers are used again
    huge = parent(99, length=20_000)
    assert select([huge, *documents], 0.01, seed=1) == chosen


# replies

SOURCE = "The kiln of the old brickworks holds 12,000 bricks. " * 6
PROSE = "The brickworks' kiln has room for twelve thousand bricks. " * 5


@pytest.mark.parametrize(("task", "reply", "text"), [
    ("wikipedia", f"Here is a paraphrased version:\n\n{PROSE}", PROSE.strip()),
    ("wikipedia", f"**Here is a paraphrased version:**\n“{PROSE}”", PROSE.strip()),
    ("wikipedia", 'Here is a paraphrased version: "One" and "two".', '"One" and "two".'),
    ("wikipedia", f"Sure! Here is a paraphrased version:\n{PROSE}", Drop("opening line missing")),
    ("wikipedia", "Here is a paraphrased version:", Drop("empty reply")),
    ("distill", f'Paraphrased Text: "{PROSE.strip()}"', PROSE.strip()),
    ("distill", PROSE, Drop("opening line missing")),
    ("extract_knowledge", "Passage 1:\nOne.\nPassage 2: Two, 3 * 4 * 5 and **bold** __init__.",
     "One.\nTwo, 3 * 4 * 5 and bold __init__."),
    ("extract_knowledge", "<think>Hm.</think> A passage.", Drop("thinking in the reply")),
    ("extract_knowledge", " \n", Drop("empty reply")),
    ("extract_knowledge", f"Passage: {PROSE}\udc00", Drop("half a surrogate pair")),
    ("knowledge_list", "## Facts\nHere they are:\n- One\n  - Two: 3.5\n* Three\n\n4. Four\n1998 was a year.",
     "One\nTwo: 3.5\nThree\nFour\n1998 was a year."),
    ("knowledge_list", "I cannot help with that.", Drop("no list")),
    ("diverse_qa", "There is nothing to ask.", Drop("no question with an answer")),
    ("diverse_qa", "- Question: Where to?", Drop("no question with an answer")),
])
def test_postprocess(task, reply, text):
    assert postprocess(TASKS[task], SOURCE, Reply(reply, "stop")) == text


def test_unfinished_replies_are_dropped():
    assert postprocess(DISTILL, SOURCE, Reply(f"Paraphrased Text: {PROSE}", "length")) == Drop("cut off")
    assert postprocess(DISTILL, SOURCE, Reply("", "content_filter")) == Drop("withheld by the endpoint")


def test_questions_follow_the_text_they_are_about():
    lines = "\n".join(f"- Question: What is {n}? Answer: It is {n}.\n" for n in range(8))
    reply = Reply(f"Here are the questions and answers based on the provided text:\n{lines}", "stop")
    pair = re.compile(r"Question: What is (\d)\?\nAnswer: It is \1\.")
    counts, firsts = Counter(), Counter()
    for length in (1, 40, 200):         # tokens of the source; most pairs: 1, 2, 13 (of 8)
        for number in range(60):
            source = f"{number:03} ".ljust(BYTES_PER_TOKEN * length, "x")
            text = postprocess(DIVERSE_QA, source, reply)
            assert text == postprocess(DIVERSE_QA, source, reply)
            assert text.startswith(f"{source}\n\n")
            blocks = text.removeprefix(f"{source}\n\n").split("\n\n")
            found = [pair.fullmatch(block)[1] for block in blocks]
            assert len(set(found)) == len(found)
            counts[length, len(found)] += 1
            firsts[found[0]] += 1
    assert {number for length, number in counts if length == 1} == {1}
    assert {number for length, number in counts if length == 40} == {1, 2}
    assert {number for length, number in counts if length == 200} == set(range(1, 9))
    assert set(firsts) == set("01234567")


def test_a_question_on_several_lines():
    reply = Reply("**Question 1:** Which?\nA) One\nB) Two\nAnswer: B) Two,\nsince one is less.\n", "stop")
    text = postprocess(DIVERSE_QA, SOURCE, reply)
    pair = "Question: Which?\nA) One\nB) Two\nAnswer: B) Two,\nsince one is less."
    assert text == f"{SOURCE}\n\n{pair}"
    [made] = documents_of(parent(5), [(Request("diverse_qa", 2 * SOURCE), reply)])
    assert made.text == f"{2 * SOURCE}\n\n{pair}" and made.written == pair      # compared with the corpus by this alone


def test_passages_of_a_document_are_joined_and_short_results_dropped():
    document = parent(4, "high", length=5000)
    asked = requests_for(document)
    half = "word " * 20                 # 25 tokens: too short alone

    def reply(request):
        openings = {"wikipedia": "Here is a paraphrased version:", "distill": "Paraphrased Text:"}
        return Reply(f"{openings.get(request.task, '-')} {half}", "stop")

    results = list(documents_of(document, [(request, reply(request)) for request in asked]))
    kept = [result for result in results if not isinstance(result, Drop)]
    (wiki,) = (result for result in kept if result.source == "synthetic/wikipedia")
    pieces = sum(request.task == "wikipedia" for request in asked)
    assert pieces > 2
    assert wiki.text == "\n".join([half.strip()] * pieces)
    assert wiki.written == wiki.text and wiki[3:] == (document.id, "docs", "BSD-3-Clause", 0.25, "high")
    assert {result.source for result in kept} == {"synthetic/wikipedia"}
    assert Counter(results)[Drop("too short")] == sum(
        request.task in ("distill", "extract_knowledge", "knowledge_list") for request in asked)
    gone = list(documents_of(document, [(request, None) for request in asked]))
    assert gone == [Drop("request failed")] * len(asked)


# into the corpus

def prose(seed: int, sentences: int = 16) -> str:
    """Sentences of made-up words, none like another."""
    chooser = random.Random(seed)

    def word() -> str:
        return "".join(chooser.choices(["ka", "lo", "mer", "ti", "sun", "po", "rai", "den", "fu", "gil"], k=3))

    return "\n".join(f"The {word()} of {word()} and {word()} {word()} to {word()}." for _ in range(sentences))


def shard(texts: list[str], held_out: bool, path: Path) -> Path:
    columns = {name: [None] * len(texts) for name in SCHEMA.names}
    columns |= {"text": texts, "id": [text_id(text) for text in texts], "held_out": [held_out] * len(texts)}
    pq.write_table(pa.table(columns, SCHEMA), path)
    return path


ANNOTATE = AnnotateConfig.model_validate({
    "sources": [{"kind": "files", "paths": ["unused"], "domain": "docs"}], "shard_megabytes": 1, "mask": ["email"],
    "held_out": {"fraction": 0.1, "unit": "source"}, "substring": {"bytes": 100, "domains": []},
    "minhash": {"shingle_characters": 24, "bands": 20, "rows": 13}, "decontamination": {"ngram": 13},
    "scorers": ["fluency"],
})


@pytest.mark.parametrize("shards", [1, 3])
def test_synthetic_documents_go_through_the_steps_of_the_corpus(tmp_path, shards):
    corpus, test = [prose(number) + "\n" for number in range(30)], prose(1000)
    texts = {
        "good": prose(2000),
        "mail": prose(2003) + "\nWrite to sun.rai@ka-lo.org.",
        "copy": corpus[3],
        "near copy": f"{corpus[4]} So it is.",
        "first of two": prose(2001),
        "second of two": prose(2001) + " So it is.",
        "from the test": f"{prose(2002)} {test[200:500]}",
        "repetition": "The same line of text again and again.\n" * 30,
    }
    texts = {name: text.strip() + "\n" for name, text in texts.items()}     # as Normalise leaves it
    pairs = f"Question: Which is kept?\nAnswer: {prose(3000)}\n"
    found = [Synthetic(text, text, "synthetic/distill", "0" * 32, "docs", "MIT", 0.5, "low") for text in texts.values()]
    # Questions follow a text of the corpus, which stands there twice on purpose; the same questions twice do not.
    for source in (corpus[5], corpus[6]):
        found.append(found[0]._replace(text=f"{source}\n\n{pairs}", written=pairs, source="synthetic/diverse_qa"))
    names = [*texts, "questions", "same questions"]
    paths = [shard([test], True, tmp_path / "test.parquet")]
    paths += [shard(corpus[number::shards], False, tmp_path / f"{number}.parquet") for number in range(shards)]
    with workers(ExecutorConfig(executor="local", workers=1)) as pool:
        table = annotate(Synthesis(found, {}, len(found), 0, Counter()), paths, ANNOTATE, 1, tmp_path, pool)
    assert table.schema == SCHEMA
    assert table["id"].to_pylist() == [text_id(text) for text in table["text"].to_pylist()]
    changed = [name for name, text, document in zip(names, table["text"].to_pylist(), found, strict=True)
               if text != document.text]
    assert changed == ["mail"] and table["masked"].to_pylist() == [0, 1] + [0] * 8
    assert None not in table["language"].to_pylist()
    duplicates = dict(zip(names, table["duplicate"].to_pylist(), strict=True))
    assert duplicates.pop("copy") == "copy of a corpus document"
    assert duplicates.pop("near copy") == "near-duplicate of a corpus document"
    assert {duplicates.pop("first of two"), duplicates.pop("second of two")} == {None, "near-duplicate"}
    assert {duplicates.pop("questions"), duplicates.pop("same questions")} == {None, "copy"}
    assert set(duplicates.values()) == {None}
    contaminated = dict(zip(names, table["contamination"].to_pylist(), strict=True))
    assert contaminated.pop("from the test") > 5
    assert set(contaminated.values()) == {0}
    rules = rules_of(RulesConfig(set="prose", labels=["low"]), "rules")
    broken = first_broken(table["features"], rules).rules
    reasons = {name: rules[rule].feature for name, rule in zip(names, broken, strict=True) if rule >= 0}
    assert reasons == {"repetition": "duplicate_line_characters"}


@pytest.mark.parametrize("step", ["deduplicate", "decontaminate"])
def test_surveys_of_the_corpus_outlive_a_run_cut_short(tmp_path, step):
    paths = [shard([prose(number)], False, tmp_path / f"{number}.parquet") for number in range(3)]
    found = [Synthetic(prose(9), prose(9), "synthetic/distill", "0" * 32, "docs", "MIT", 0.5, "low")]
    with workers(ExecutorConfig(executor="local", workers=1)) as pool:
        arguments = (Synthesis(found, {}, 1, 0, Counter()), paths, ANNOTATE, 1, tmp_path, pool)
        first = annotate(*arguments)
        paths[0].unlink()               # not read again
        assert annotate(*arguments) == first
        (tmp_path / f"earlier-{step}-00000.npz").unlink()
        with pytest.raises(DataError, match=r"0\.parquet"):
            annotate(*arguments)


def test_no_synthetic_documents_no_work(tmp_path):
    nothing = Synthesis([], {}, 0, 0, Counter())
    with workers(ExecutorConfig(executor="local", workers=1)) as pool:
        assert annotate(nothing, [tmp_path / "not there"], ANNOTATE, 1, tmp_path, pool).num_rows == 0


def test_synthetic_documents_become_a_shard_of_the_corpus(serve, little_reference, tmp_path):
    """Annotate and curate on a little real prose: what is asked is answered, cut and written, and again offline."""
    texts = [text for _, text in sorted(topics.items()) if len(text) > 600]
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    source = {"kind": "files", "paths": [str(tmp_path / "docs.jsonl")], "domain": "docs", "license": "PSF-2.0"}
    annotate_config = ANNOTATE.model_validate(ANNOTATE.model_dump() | {
        "sources": [source], "held_out": {"fraction": 0.1, "unit": "document"}})
    server = serve()
    curate_config = CurateConfig.model_validate({
        "language": {"keep": ["en"], "share": 0.3, "domains": ["docs"]},
        "rules": {"docs": {"set": "prose", "labels": ["low"]}},
        "perplexity": {"labels": ["low"], "share": 0.05}, "contamination": 0,
        "synthesis": config(server.url).model_dump()})
    local = ExecutorConfig(executor="local", workers=1)
    for name in ("annotated", "scratch", "first", "again"):
        (tmp_path / name).mkdir()
    annotation.annotate(annotate_config, 1, tmp_path / "annotated", tmp_path / "scratch", local, quiet)

    def curate(name: str) -> list[Path]:
        out = tmp_path / name
        scratch = tmp_path / f"scratch-{name}"
        scratch.mkdir()
        records = curation.curate(
            tmp_path / "annotated", curate_config, 1, out, scratch, tmp_path / "replies.jsonl", local, quiet)
        steps = {row.step: row for row in records.funnel}
        assert steps["synthesis"].documents > steps["held_out"].documents
        return sorted((out / "train").glob("*.parquet"))

    *real, synthetic = (pq.read_table(path) for path in curate("first"))
    parents = {row["id"]: row for table in real for row in table.to_pylist()}
    rows = synthetic.to_pylist()
    assert {row["source"] for row in rows} >= {"synthetic/wikipedia", "synthetic/diverse_qa", "synthetic/distill"}
    for row in rows:
        born = parents[row["path"]]
        assert all(row[name] == born[name] for name in ("domain", "license", "quality", "label"))
        assert row["id"] == text_id(row["text"]) and row["id"] not in parents
    asked = sum(server.attempts.values())
    server.shutdown()
    assert [pq.read_table(path) for path in curate("again")][-1] == synthetic
    assert sum(server.attempts.values()) == asked
