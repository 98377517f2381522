"""Items from the standard library: are they what they claim to be, and is the compressor control at chance?"""

from __future__ import annotations

import ast
import json
import math
import os
import random
import re
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import DataError
from data_pipeline.items import context_items, evaluation_items
from data_pipeline.items.evaluation_items import ChoiceItem, EvaluationItems
from tests.data_pipeline.small_corpus import HELD_OUT, TRAIN, encode, write_curated

SIZES = {"items_per_task": 40, "bits_per_byte_kilobytes": 12, "recall_pairs": 8, "context_tokens": 128, "seed": 7,
         "context_multiples": [1, 4], "items_per_context": 6, "encode": encode}
FEW = {name: value for name, value in SIZES.items() if name != "encode"} | {"items_per_task": 6}
AT = [f"{task}_at_{multiple}x" for multiple in (1, 4) for task in ("copy", "recall", "needle")]


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_curated(tmp_path_factory.mktemp("corpus") / "curated")


@pytest.fixture(scope="module")
def items(curated: Path) -> EvaluationItems:
    return evaluation_items.build(curated, **SIZES)


def held_out_texts(curated: Path) -> dict[str, str]:
    rows = [row for shard in sorted(curated.glob("heldout/*.parquet")) for row in pq.read_table(shard).to_pylist()]
    return {row["id"][:16]: row["text"] for row in rows}


def test_counts_identifiers_and_answers(items: EvaluationItems) -> None:
    counts = {task: len(members) for task, members in items.tasks.items()}
    assert counts == dict.fromkeys(("syntax_pairs", "recall"), 40) | dict.fromkeys(AT, 6)
    everything = [item for members in [*items.texts.values(), *items.tasks.values()] for item in members]
    assert len({item.id for item in everything}) == len(everything)
    for task, choices in (("syntax_pairs", 2), ("recall", 8)):
        assert all(len(set(item.choices)) == len(item.choices) == choices for item in items.tasks[task])
        assert {item.answer for item in items.tasks[task]} == set(range(choices)), "answers stand anywhere"


def test_texts_fill_the_budget_with_several_documents(items: EvaluationItems, curated: Path) -> None:
    documents = held_out_texts(curated)
    for domain, texts in items.texts.items():
        size = sum(len(item.text.encode()) for item in texts)
        assert 10_000 <= size <= 12_000, (domain, size)
        assert len(texts) >= 12
        assert all(documents[item.id.split("/")[1]].startswith(item.text) for item in texts)


def test_same_seed_same_items_in_another_process(curated: Path) -> None:
    program = f"""
from pathlib import Path
from data_pipeline.items import evaluation_items
from tests.data_pipeline.small_corpus import encode
print(evaluation_items.build(Path({str(curated)!r}), encode=encode, **{FEW!r}).digest())
"""
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    one, other = (evaluation_items.build(curated, encode=encode, **FEW | {"seed": seed}).digest() for seed in (7, 8))
    assert done.stdout.strip() == one != other


def test_true_choices_are_what_the_document_says(items: EvaluationItems, curated: Path) -> None:
    documents = held_out_texts(curated)
    for item in items.tasks["syntax_pairs"]:
        assert item.context + item.choices[item.answer] in documents[item.id.split("/")[1]], item.id


def test_syntax_pairs_are_decided_by_the_parser(items: EvaluationItems, curated: Path) -> None:
    """The document parses with the true line and does not with the wrong one: `ast.parse` is the referee."""
    documents = held_out_texts(curated)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for item in items.tasks["syntax_pairs"]:
            _, identity, row = item.id.split("/")
            lines = documents[identity].split("\n")
            true, wrong = item.choices[item.answer], item.choices[1 - item.answer]
            assert lines[int(row) - 1] + "\n" == true
            ast.parse("\n".join(lines))
            lines[int(row) - 1] = wrong.rstrip("\n")
            with pytest.raises(SyntaxError):
                ast.parse("\n".join(lines))


@pytest.mark.parametrize("multiple", [1, 4])
def test_answers_stand_in_contexts_of_the_asked_length(
    items: EvaluationItems, curated: Path, multiple: int
) -> None:
    length = multiple * SIZES["context_tokens"]
    for task in ("copy", "recall", "needle"):
        members = items.tasks[f"{task}_at_{multiple}x"]
        assert len({item.context for item in members}) == 6
        for item in members:
            asked = len(encode(item.context + item.choices[item.answer]))
            assert length - 90 < asked <= length, "nearly as long: lines are whole"
    for item in items.tasks[f"copy_at_{multiple}x"]:
        passage, cue = item.context.split("\n")
        assert len(cue) == 8 and passage.count(cue) == 1
        assert passage[passage.index(cue) + 8] == item.choices[item.answer]
    held_out = "\n".join(held_out_texts(curated).values())
    for task in ("recall", "needle"):
        for item in items.tasks[f"{task}_at_{multiple}x"]:
            *lines, query = item.context.split("\n")
            pairs = dict(match.groups() for line in lines if (match := re.fullmatch(r"([a-z]{4}) =( \d)", line)))
            assert pairs[query.removesuffix(" =")] == item.choices[item.answer]
            if task == "needle":
                assert set(item.choices) == set(pairs.values()) and len(pairs) == 4
                assert all(line in held_out for line in lines if not re.fullmatch(r"[a-z]{4} = \d", line))
            else:
                assert len(pairs) == len(lines) and len(item.choices) == 10


def test_needles_stand_in_contexts_of_the_asked_length_whatever_the_lines() -> None:
    """A page of the web has a paragraph a line."""
    def count_tokens(text: str) -> int:
        return len(encode(text))

    for text in ("a word " * 300 + "\n") * 9, "a word " * 2700:
        for length in (256, 1024):
            asked = context_items.needles([text], length, count_tokens, random.Random(1))
            for context, _, _ in islice(asked, 5):
                assert 0.75 * length < count_tokens(context) <= length
    with pytest.raises(DataError, match=r"all held-out text is \d+ tokens short of a context's \d+\.\nLower"):
        next(context_items.needles(["a word " * 30] * 3, 512, count_tokens, random.Random(1)))


def test_items_on_disk_are_the_same(items: EvaluationItems, tmp_path: Path) -> None:
    evaluation_items.write(tmp_path / "items.json", items, {"recall_accuracy_chance": 0.25})
    again, controls = evaluation_items.read(tmp_path / "items.json")
    assert again == items and again.digest() == items.digest()
    assert controls == {"recall_accuracy_chance": 0.25}
    (tmp_path / "items.json").write_text("{}")
    with pytest.raises(DataError, match=r"items\.json: not evaluation items .*\nRun the stage `items`"):
        evaluation_items.read(tmp_path / "items.json")


def test_faults_are_of_several_kinds(items: EvaluationItems) -> None:
    def kind(item: ChoiceItem) -> str:
        true, wrong = item.choices[item.answer], item.choices[1 - item.answer]
        if true.strip() == wrong.strip():
            return "indentation"
        if sorted(true) == sorted(wrong):
            return "order"
        return "token"

    assert {kind(item) for item in items.tasks["syntax_pairs"]} == {"indentation", "order", "token"}


def test_recall_has_one_right_value(items: EvaluationItems) -> None:
    for item in items.tasks["recall"]:
        *lines, query = item.context.split("\n")
        pairs = dict(re.fullmatch(r"([a-z]{4}) =( \d+)", line).groups() for line in lines)
        assert len(pairs) == 8
        assert pairs[query.removesuffix(" =")] == item.choices[item.answer]


def test_control_is_at_chance_where_text_is_judged(items: EvaluationItems) -> None:
    metrics = evaluation_items.control(items, 400, encode)
    assert metrics["syntax_pairs_accuracy_control"] == pytest.approx(0.5, abs=1e-9)
    assert metrics["syntax_pairs_accuracy_chance"] == 0.5
    assert {round(metrics[f"{name}_accuracy_chance"], 9) for name in AT} == {0.1, 0.25}
    assert metrics["recall_accuracy_control"] > 0.9, "a compressor finds a repeated key"
    assert 2.5 < metrics["bits_per_byte_compressor"] < 6


def test_frequencies_and_lengths_prefer_as_many_wrong_lines(items: EvaluationItems, curated: Path) -> None:
    texts = [text for shard in curated.glob("train/*.parquet") for text in pq.read_table(shard)["text"].to_pylist()]

    def unigram(split: Callable[[str], Sequence[str]]) -> Callable[[str], int]:
        """Thousandths of a bit that a text costs by how often its parts stand in the training text."""
        seen = Counter(part for text in texts for part in split(text))
        return lambda text: sum(round(1000 * math.log2(seen.total() / (1 + seen[part]))) for part in split(text))

    for measure in (unigram(encode), unigram(list), len):
        costs = [[measure(item.context + choice) for choice in item.choices] for item in items.tasks["syntax_pairs"]]
        assert sum(one != other for one, other in costs) >= 8, "of 40: some are decided"
        assert evaluation_items.cheapest_accuracy(items.tasks["syntax_pairs"], [measure]) == pytest.approx(
            0.5, abs=0.05), "two may have lost their opposite: an n-gram of it stands in training text"


def test_compressor_bits_of_windows_by_hand() -> None:
    text = "abcabcabcabc" * 20 + "Äö"
    data = text.encode()
    sizes = []
    for start in range(0, len(data), 100):
        # zlib's own container: 2 bytes of header, 4 of checksum
        compressor = zlib.compressobj(9, zlib.DEFLATED, 15, 9)
        sizes.append(len(compressor.compress(data[start : start + 100]) + compressor.flush()) - 6)
    assert evaluation_items.compressor_bits([text], 100) == 8 * sum(sizes)
    assert evaluation_items.compressor_bits([text], 1000) < 8 * sum(sizes), "more context, fewer bits"


def test_equal_costs_share_the_credit() -> None:
    item = ChoiceItem("x", "pqrs tuvw ", ("kj", "hg"), 0)
    measures = evaluation_items.TextCosts(list).measures
    assert evaluation_items.cheapest_accuracy([item, replace(item, answer=1)], measures) == pytest.approx(0.5)
    repeated = ChoiceItem("y", "the quick brown fox, the quick ", ("brown fox", "vjzkqxwyuabc"), 0)
    assert evaluation_items.cheapest_accuracy([repeated], measures) == 1
    assert evaluation_items.cheapest_accuracy([replace(repeated, answer=1)], measures) == 0


def test_items_that_occur_in_training_text_are_refused(tmp_path: Path, items: EvaluationItems) -> None:
    """The held-out `json` package is put into the training text as well: nothing of it may be asked."""
    leaky = write_curated(tmp_path / "leaky", train=[*TRAIN, "json"], held_out=HELD_OUT)
    leaked = evaluation_items.build(leaky, **SIZES)
    assert leaked.refused > items.refused
    rows = [row for shard in leaky.glob("heldout/*.parquet") for row in pq.read_table(shard).to_pylist()]
    inside = {row["id"][:16] for row in rows if row["source"] == "python/json"}

    def asked(of: EvaluationItems) -> set[str]:
        """Documents an item of n-gram length comes from."""
        members = [item for group in of.texts.values() for item in group if len(item.text.split()) > 30]
        members += [item for item in of.tasks["syntax_pairs"] if len(item.context) > 400]
        return {item.id.split("/")[1] for item in members}

    assert asked(items) & inside, "without the leak they are asked"
    assert not asked(leaked) & inside


def test_a_corpus_without_code_is_asked_no_syntax(curated: Path, items: EvaluationItems, tmp_path: Path) -> None:
    """As the profile `web`'s."""
    for split in ("train", "heldout"):
        (tmp_path / split).mkdir()
        for file in (curated / split).glob("*.parquet"):
            table = pq.read_table(file)
            pq.write_table(table.filter(pc.field("domain") == "docs"), tmp_path / split / file.name)
    (tmp_path / "manifest.json").write_text(json.dumps({"decontamination_ngram": 13, "heldout": {"docs": {}}}))
    assert evaluation_items.build(tmp_path, **SIZES).tasks.keys() == items.tasks.keys() - {"syntax_pairs"}


def test_errors_say_what_to_do(tmp_path: Path, curated: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json: no manifest .*FileNotFound.*\nRun the `curate` stage"):
        evaluation_items.build(tmp_path, **SIZES)
    with pytest.raises(DataError, match=r"context_tokens: 64 tokens do not hold 4 lines"):
        evaluation_items.build(curated, **FEW | {"recall_pairs": 2, "context_tokens": 64,
                                                 "encode": lambda text: 3 * text})
    with pytest.raises(DataError, match="recall_pairs: 40 pairs take up to"):
        evaluation_items.build(curated, encode=encode, **FEW | {"recall_pairs": 40})
    bare = tmp_path / "bare"
    for split in ("train", "heldout"):
        (bare / split).mkdir(parents=True)
        row = {"id": "0" * 32, "text": f"no code to {split}\n" * 200, "domain": "code"}
        pq.write_table(pa.Table.from_pylist([row]), bare / split / "part-0.parquet")
    (bare / "manifest.json").write_text(json.dumps({"decontamination_ngram": 13, "heldout": {"code": {}}}))
    with pytest.raises(DataError, match="no item for `syntax_pairs`"):
        evaluation_items.build(bare, **SIZES)
    (bare / "train/part-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train/part-0.parquet: cannot be read"):
        evaluation_items.build(bare, **SIZES)


def test_line_ends_that_a_needles_context_is_given_count() -> None:
    """A paragraph on one line comes in pieces, and of a tokenizer of words a piece has few tokens."""
    def count_tokens(text: str) -> int:
        return len(re.findall(r" ?\w+|\W", text))

    asked = context_items.needles(["history of the language " * 400], 128, count_tokens, random.Random(1))
    for context, choices, answer in islice(asked, 5):
        assert 96 < count_tokens(context + choices[answer]) <= 128
