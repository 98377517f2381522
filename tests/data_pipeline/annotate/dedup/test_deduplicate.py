"""Copies and near-duplicates: what is kept, why the rest is not, and that shards do not matter."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.annotate.dedup.deduplicate import Deduplicate, id_numbers
from data_pipeline.annotate.step import text_id
from data_pipeline.config import MinHashConfig
from tests.data_pipeline.annotate.here import column, cut, marked, run

RECIPE = MinHashConfig(shingle_characters=24, bands=20, rows=13)
SITE_PACKAGES = Path(np.__file__).parent.parent


def deduplicate(shards: list[list[tuple[str, bool]]]) -> list[str | None]:
    """The column `duplicate` of all shards."""
    return column("duplicate", run(Deduplicate(RECIPE, seed=1), [marked(rows) for rows in shards], shares=False))


def families(random: np.random.Generator, count: int) -> list[list[str]]:
    """Texts, each with up to five near-duplicates of one another."""
    result = []
    for _ in range(count):
        text = list(random.choice(list("abcdefgh \n"), 1500))
        members = set()
        for _ in range(random.integers(1, 6)):
            text[random.integers(len(text))] = "Z"
            members.add("".join(text))
        result.append(sorted(members))
    return result


def test_ids_are_numbers_in_the_same_order():
    texts = [str(number) for number in range(50)]
    numbers = id_numbers(marked([(text, False) for text in texts]))
    order = np.lexsort((numbers[:, 1], numbers[:, 0]))
    assert [texts[index] for index in order] == sorted(texts, key=text_id)
    assert id_numbers(marked([])).shape == (0, 2)


def test_copies():
    rows = [("a", False), ("b", False), ("c", False), ("b", False), ("a", True), ("a", True), ("a", False)]
    expected = ["copy of a held-out document", None, None, "copy", None, "copy", "copy of a held-out document"]
    for shards in (1, 2, 3, 12):            # of twelve, some are empty
        assert deduplicate(cut(rows, shards)) == expected


def test_of_a_component_the_lowest_id_stays_or_a_held_out_document():
    random = np.random.default_rng(0)
    groups = families(random, 60)
    held_out = {member for group in groups[::3] for member in group[:1 + len(group) // 3]}
    rows = [(text, text in held_out) for group in groups for text in group]
    expected = {}
    for group in groups:
        kept = min(group, key=lambda text: (text not in held_out, text_id(text)))
        for text in group:
            leak = kept in held_out and text not in held_out
            expected[text] = "near-duplicate of a held-out document" if leak else "near-duplicate"
        expected[kept] = None
    assert set(expected.values()) == {None, "near-duplicate", "near-duplicate of a held-out document"}
    for shards in (1, 2, 7):
        rows = [rows[index] for index in random.permutation(len(rows))]
        assert deduplicate(cut(rows, shards)) == [expected[text] for text, _ in rows]


@pytest.mark.skipif(not (SITE_PACKAGES / "pip/_vendor/rich").is_dir() or not (SITE_PACKAGES / "rich").is_dir(),
                    reason="pip or rich is not installed")
def test_the_copy_of_rich_within_pip_is_found():
    def read(directory: Path) -> dict[str, str]:
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.py"))}
        return {name: text for name, text in files.items() if len(text) > 2000}

    original, vendored = read(SITE_PACKAGES / "rich"), read(SITE_PACKAGES / "pip/_vendor/rich")
    assert len(original.keys() & vendored.keys()) > 40
    rows = [(text, True) for text in original.values()] + [(text, False) for text in vendored.values()]
    found = dict(zip(vendored, deduplicate([rows])[len(original):], strict=True))
    assert sum(str(found[name]).endswith("of a held-out document") for name in vendored) > 0.8 * len(vendored)
