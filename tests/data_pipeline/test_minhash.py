"""MinHash against exact Jaccard similarity, the banding formula and brute-force components."""

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.config import MinHashConfig
from data_pipeline.steps.minhash import MinHash, band_hashes, components, shingles, signatures
from data_pipeline.steps.step import SCHEMA, text_id

RECIPE = MinHashConfig(shingle_characters=24, bands=20, rows=13)


def shingle_set(text: str, characters: int) -> set[str]:
    folded = " ".join(text.lower().split())
    return {folded[start : start + characters] for start in range(max(1, len(folded) - characters + 1))}


def jaccard(first: str, second: str, characters: int = 24) -> float:
    a, b = shingle_set(first, characters), shingle_set(second, characters)
    return len(a & b) / len(a | b)


def random_text(random: np.random.Generator, length: int) -> str:
    return "".join(random.choice(list("abcdefgh é∂\n"), length))


def variants(random: np.random.Generator, pairs: int, edits: int) -> list[tuple[str, str]]:
    """Pairs of texts, the second with `edits` characters changed."""
    result = []
    for _ in range(pairs):
        text = random_text(random, 2000)
        changed = list(text)
        for position in random.choice(len(text), edits, replace=False):
            changed[position] = "Z"
        result.append((text, "".join(changed)))
    return result


@pytest.mark.parametrize("text", ["", "short", "exactly twenty-four chars", "Ünï  CÖDE\n\n" * 9, "a\tb \n c" * 30])
def test_shingles_are_the_distinct_character_runs(text):
    assert len(np.unique(shingles(text, 24))) == len(shingle_set(text, 24)) if text.strip() else True


def test_equal_shingles_have_equal_hashes_wherever_they_stand():
    inner = "the same twenty-four characters and more"
    first, second = shingles("start/" + inner + ".", 24), shingles("another start: (" + inner + ")", 24)
    assert len(np.intersect1d(first, second)) == len(shingle_set(inner, 24))


def test_signatures_estimate_jaccard():
    random = np.random.default_rng(0)
    many = MinHashConfig(shingle_characters=24, bands=32, rows=32)
    for edits in (0, 3, 10, 40, 200):
        pairs = variants(random, 10, edits)
        expected = np.mean([jaccard(*pair) for pair in pairs])
        first, second = (signatures([pair[side] for pair in pairs], many, seed=7) for side in (0, 1))
        # 10 x 1024 draws: five standard errors of a proportion, all pairs being alike
        assert abs((first == second).mean() - expected) < 5 * np.sqrt(0.25 / first.size) + 1e-9, edits


def test_signatures_do_not_depend_on_batches(monkeypatch):
    random = np.random.default_rng(1)
    texts = [random_text(random, length) for length in (1, 10, 500, 3000, 40, 9000)]
    whole = signatures(texts, RECIPE, seed=3)
    monkeypatch.setattr("data_pipeline.steps.minhash.BATCH_SHINGLES", 600)
    assert np.array_equal(signatures(texts, RECIPE, seed=3), whole)
    assert not np.array_equal(signatures(texts, RECIPE, seed=4), whole)


def test_banding_finds_pairs_as_the_formula_says():
    random = np.random.default_rng(2)
    config = MinHashConfig(shingle_characters=8, bands=10, rows=4)
    found, expected, trials = 0, 0.0, 0
    for edits in (60, 90, 120):
        pairs = variants(random, 150, edits)
        first, second = (
            band_hashes(signatures([pair[side] for pair in pairs], config, seed=edits), config.bands) for side in (0, 1)
        )
        found += (first == second).any(axis=1).sum()
        expected += sum(1 - (1 - jaccard(*pair, characters=8) ** config.rows) ** config.bands for pair in pairs)
        trials += len(pairs)
    assert 0.1 * trials < expected < 0.9 * trials       # the steep part, where a wrong formula shows
    # the draws of one seed are shared by its pairs: twice the binomial deviation, five times over
    assert abs(found - expected) < 10 * np.sqrt(expected * (1 - expected / trials))


def test_recall_of_the_recipe():
    random = np.random.default_rng(3)
    near, far = variants(random, 40, 4), variants(random, 40, 60)
    assert min(jaccard(*pair) for pair in near) > 0.9 and max(jaccard(*pair) for pair in far) < 0.4

    def caught(pairs: list[tuple[str, str]]) -> float:
        first, second = (band_hashes(signatures([p[s] for p in pairs], RECIPE, seed=1), RECIPE.bands) for s in (0, 1))
        return float((first == second).any(axis=1).mean())

    assert caught(near) == 1.0
    assert caught(far) == 0.0


def test_components_are_those_of_a_walk():
    bands = np.random.default_rng(4).integers(0, 60, (80, 3)).astype(np.uint64)
    unvisited, expected = set(range(80)), {}
    while unvisited:
        start = min(unvisited)
        reached, waiting = {start}, [start]
        while waiting:
            current = waiting.pop()
            for other in unvisited - reached:
                if (bands[other] == bands[current]).any():
                    reached.add(other)
                    waiting.append(other)
        expected |= dict.fromkeys(reached, start)
        unvisited -= reached
    found = components(bands)
    assert 1 < len(set(expected.values())) < 80
    for a in range(80):
        for b in range(80):
            assert (found[a] == found[b]) == (expected[a] == expected[b])


def table(rows: list[tuple[str, bool]]) -> pa.Table:
    records = [
        {"id": text_id(text), "text": text, "source": "s", "path": "p", "domain": "code", "license": "MIT",
         "held_out": held_out} for text, held_out in rows
    ]
    return pa.Table.from_pylist(records, SCHEMA)


def test_one_document_of_a_component_stays_and_it_is_the_held_out_one():
    random = np.random.default_rng(5)
    (a, a2), (b, b2), (c, _) = variants(random, 3, 2)
    step = MinHash(RECIPE, seed=1)
    shards = [table([(a, False), (b, False)]), table([(a2, True), (c, False)]), table([(b2, False)]), table([])]
    decisions = step.decide([step.survey(shard) for shard in shards])
    reasons = {text: reason for shard, decision in zip(shards, decisions, strict=True)
               for text, reason in zip(shard["text"].to_pylist(), decision, strict=True)}
    assert reasons[a] == "near-duplicate of a held-out document" and reasons[a2] is None and reasons[c] is None
    kept = min((b, b2), key=text_id)
    removed = max((b, b2), key=text_id)
    assert reasons[kept] is None and reasons[removed] == "near-duplicate"
