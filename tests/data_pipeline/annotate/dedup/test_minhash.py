"""MinHash against exact Jaccard similarity, the banding formula."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binomtest

from data_pipeline.annotate.dedup.minhash import band_hashes
from data_pipeline.config import MinHashConfig
from data_pipeline.text.words import BASE, UInt64, mix, texts_of

RECIPE = MinHashConfig(shingle_characters=24, bands=20, rows=13)
MINIMA = MinHashConfig(shingle_characters=24, bands=1000, rows=1)       # a band is one permutation


def shingle_set(text: str, characters: int = 24) -> set[str]:
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return {folded[start : start + characters] for start in range(max(1, len(folded) - characters + 1))}


def jaccard(first: str, second: str) -> float:
    a, b = shingle_set(first), shingle_set(second)
    return len(a & b) / len(a | b)


def bands_of(texts: list[str], config: MinHashConfig = RECIPE, seed: int = 0) -> UInt64:
    return band_hashes(texts_of(pa.table({"text": texts})), config, seed)


def variants(random: np.random.Generator, pairs: int, edits: int, length: int = 2000) -> list[tuple[str, str]]:
    """Pairs of random texts, the second with `edits` characters changed."""
    result = []
    for _ in range(pairs):
        text = "".join(random.choice(list("abcdefgh é∂𝔸\n"), length))
        changed = list(text)
        for position in random.choice(length, edits, replace=False):
            changed[position] = "Z"
        result.append((text, "".join(changed)))
    return result


def test_folding():
    assert len({tuple(column) for column in bands_of(["", " \n\t", "\x0c"]).T}) == 1
    same = ["Some Text\n\n  of two LINES, for instance", "  some text of two lines, for instance \n"]
    assert np.array_equal(*bands_of(same).T)
    for set_otherwise in (
        "SOME\u00a0text \u3000 Of\u2009tWo\u2028lines,\u200bFOR instance\u202f",
        "ſome text of two ｌｉｎｅｓ, for instance",
        "so\u00adme te\u200dxt\ufe0f of\u2060 two lines, \U000e0061for instance\ufeff",
    ):
        assert np.array_equal(*bands_of([same[0], set_otherwise]).T)
    for upper, lower in (("ÄÖÜ ẞ", "äöü ß"), ("ДОМ", "дом"), ("ΣΟΦΟΣ", "σοφος"), ("ÉTÉ", "été"), ("ＡＢ１", "ab1"),
                         ("ꙀͰ𐐀", "ꙁͱ𐐨"), ("Ⅷ x²", "ⅷ x2")):
        assert upper == upper.strip() and np.array_equal(*bands_of([f"{upper} " * 9, lower + f"\u00a0{lower}" * 8]).T)
    for first, second in [("a", "b"), ("a", ""), ("é", "e"), ("ا", "ى"), ("一", "二"), ("\U00020000", "\U00020001"),
                          ("a b", "ab"), ("x" * 30, "y" * 30)]:
        assert not (bands_of([first])[:, 0] == bands_of([second])[:, 0]).any()


@pytest.mark.parametrize("edits", [0, 3, 10, 40, 200])
def test_rows_agree_as_often_as_shingles_are_shared(edits):
    pairs = variants(np.random.default_rng(edits), 10, edits)
    first, second = (bands_of([pair[side] for pair in pairs], MINIMA, seed=7) for side in (0, 1))
    expected = np.array([jaccard(*pair) for pair in pairs])
    error = np.sqrt(expected * (1 - expected) / len(first))
    assert (np.abs((first == second).mean(axis=0) - expected) <= 4 * error + 1e-9).all()


def test_a_document_with_few_shingles_is_estimated_too():
    """27 shingles, of which 24 are shared with the other's 27."""
    text = "abcdefghijklmnopqrstuvwxyz0123456789!?.;:-()[]{}+*"
    pairs = [(text, text[:-3] + end) for end in ("###", "@@@", "~~~")]
    for pair in pairs:
        first, second = bands_of(list(pair), MINIMA).T
        assert binomtest(int((first == second).sum()), len(first), jaccard(*pair)).pvalue > 1e-3


def test_recall_follows_the_banding_formula():
    """Pairs are of independent random text, so those found are draws with the probability of each pair's similarity."""
    found, similarity = [], []
    for length, edits in ((2000, 6), (2000, 10), (2000, 14), (2000, 18), (400, 2), (400, 3)):
        pairs = variants(np.random.default_rng(edits), 500, edits, length)
        first, second = (bands_of([pair[side] for pair in pairs], seed=edits) for side in (0, 1))
        found.append((first == second).any(axis=0))
        similarity.append(np.array([jaccard(*pair) for pair in pairs]))
        expected = float((1 - (1 - similarity[-1] ** 13) ** 20).mean())
        assert 0.05 < expected < 0.99
        assert binomtest(int(found[-1].sum()), len(pairs), expected).pvalue > 1e-3, (length, edits)

    def deviation(rows: int, bands: int) -> float:
        """Of the number found in all, in standard errors."""
        probability = 1 - (1 - np.concatenate(similarity) ** rows) ** bands
        return (np.concatenate(found).sum() - probability.sum()) / np.sqrt((probability * (1 - probability)).sum())

    assert abs(deviation(13, 20)) < 3
    for rows, bands in ((12, 20), (14, 20), (13, 17), (13, 23)):        # draws enough to tell it from its neighbours
        assert abs(deviation(rows, bands)) > 3


def test_unlike_documents_never_meet():
    pairs = variants(np.random.default_rng(3), 100, 60)
    assert max(jaccard(*pair) for pair in pairs) < 0.4
    first, second = (bands_of([pair[side] for pair in pairs]) for side in (0, 1))
    assert not (first == second).any()


@pytest.mark.parametrize("length", [1, 23, 24, 25, 2047 + 23, 2048 + 23, 2049 + 23, 6000])
def test_bands_are_the_formula(length):
    """In integers, at the edges of a shingle and of a block of 2048 shingles."""
    text = "".join(np.random.default_rng(length).choice(list("abcdef"), length))
    size = min(24, length)
    totals = [sum((ord(text[start + place]) + 1) * BASE ** (size - 1 - place) for place in range(size)) % 2**64
              for start in range(length - size + 1)]
    shingles = (mix(np.array(totals, dtype=np.uint64)) >> np.uint64(32)) | np.uint64(1)
    multipliers = np.random.default_rng(5).integers(0, 2**32, 260, dtype=np.uint32) | np.uint32(1)
    least = [(shingles * np.uint64(multiplier) % np.uint64(2**32)).min() for multiplier in multipliers]
    value = np.zeros(20, dtype=np.uint64)
    for row in range(13):
        value = mix(value ^ np.array(least).reshape(20, 13)[:, row])
    others = ["x" * 3000, "", "yz"]
    found = bands_of([others[0], text, *others[1:]], seed=5)
    assert np.array_equal(found[:, 1], value)
    alone = [bands_of([document], seed=5) for document in (others[0], text, *others[1:])]
    assert np.array_equal(found, np.concatenate(alone, axis=1))
    assert not (bands_of([text], seed=4)[:, 0] == value).any()
