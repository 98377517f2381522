"""Words, n-grams and the flat view of a shard, against regular expressions over single texts."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import data_pipeline.text
from data_pipeline.text.words import Words, mix, mix64, ngrams_of, one_text, passages_of, texts_of, words, words_of
from tests.data_pipeline.plain_words import folded, runs, words_of_text

SENTENCE = (
    "The scheduler keeps a queue of the tasks that wait. When a worker is free, it takes the oldest of them and runs "
    "it to the end."
)
TEXTS = [
    "", "one", SENTENCE, SENTENCE.upper() + "\n\n" + SENTENCE[40:], "", " \n", "\0a\0b_c\x7f",
    "ÄÖ naïve_naïve x1 x1 x1 x1 é\u0301 日本語 日本語 -- == 0.5e-3", "x" * 1_000_000, "\U0001f600 emoji\U0001f600",
    "_Kursiv_ __init__ a__b „Straße“, Ｆｕｌｌ　ｗｉｄｔｈ－１２ don’t don\u02bct co\u00adop no\u00a0break",
    "🇩🇪 ﬁn ① x² ½ ㎏ İI ı",
    "日本語のテスト。GPT４モデル（ｶﾞｷﾞ）", "ภาษาไทยไม่มีช่องว่าง ครับ", "မြန်မာဘာသာ ភាសាខ្មែរ ພາສາລາວ", "한국어 단어",
    "مـــرحبا می\u200cخواهم",
]


def ngrams(hashes, n):
    """Of the words of one text."""
    return ngrams_of(Words(hashes, hashes, hashes, np.array([0, len(hashes)]), hashes), n)[0]


def reference_words(text: str) -> list[str]:
    return [word for word, _ in words_of_text(text)]


def reference_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = reference_words(text)
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]


def shard(texts: list[str], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"text": pa.array(texts, kind or pa.string())})


@pytest.mark.parametrize("n", [1, 2, 13])
def test_ngrams_are_equal_exactly_where_plain_python_says(n):
    plain = [gram for text in TEXTS for gram in reference_ngrams(text, n)]
    hashed, first = ngrams_of(words_of(shard(TEXTS)), n)
    assert np.diff(first).tolist() == [len(reference_ngrams(text, n)) for text in TEXTS]
    assert len(set(plain)) == len(set(hashed.tolist())) == len(set(zip(plain, hashed.tolist(), strict=True)))


def test_words_lie_where_they_stand_in_the_text():
    texts = texts_of(shard(TEXTS))
    found = words_of(shard(TEXTS))
    spelled = [folded(bytes(texts.buffer[start:end]).decode())
               for start, end in zip(found.starts, found.ends, strict=True)]
    assert spelled == [word for text in TEXTS for word in reference_words(text)]
    assert np.diff(found.first).tolist() == [len(reference_words(text)) for text in TEXTS]


@pytest.mark.parametrize("n", [1, 2, 13])
def test_passages_are_equal_exactly_where_plain_python_says(n):
    """Of words parted by blanks they are the n-grams."""
    found = words_of(shard(TEXTS))
    hashed = passages_of(found, n)
    for text, start, stop in zip(TEXTS, found.first[:-1], found.first[1:], strict=True):
        mine, plain = hashed[start:stop], runs(text, n)
        assert np.count_nonzero(mine) == len(plain) and not mine[len(plain) :].any()
        assert len(set(plain)) == len({*zip(plain, mine.tolist(), strict=False)})
        if all(size == 20 for _, size in words_of_text(text)):
            assert mine[: len(plain)].tolist() == ngrams(words(text)[0], n).tolist()
    everything = [run for text in TEXTS for run in runs(text, n)]
    assert len(set(everything)) == len(set(hashed[hashed != 0].tolist()))


@pytest.mark.parametrize(("one", "other"), [
    ("STRASSE FIN AB12 É", "straße ﬁn ａｂ１２ e\u0301"), ("cooperate", "co\u00adop\u2060er\ufe0fate"),
    ("don't", "don’t"),
    ("ガギグ", "ｶﾞｷﾞｸﾞ"), ("twelve pens", "_twelve_\u00a0“pens”…"), ("ὈΔΥΣΣΕΎΣ", "ὀδυσσεύς"), ("п'ять", "пʼять"),
    ("мир и война", "\u200eМир\u2009и\u202fВОЙНА\u200f"), ("한국어", "\u1112\u1161\u11ab국어"),
    ("abc", "𝐀𝒃𝕔"),
])
def test_typesetting_makes_no_other_word(one, other):
    assert words(one)[0].tolist() == words(other)[0].tolist()


@pytest.mark.parametrize("n", [1, 3])
def test_a_text_alone_has_the_hashes_it_has_in_a_shard(n):
    found, texts = words_of(shard(TEXTS)), texts_of(shard(TEXTS))
    grams, gram_first = ngrams_of(found, n)
    for index, text in enumerate(TEXTS):
        hashes, starts, ends = words(text)
        own = slice(found.first[index], found.first[index + 1])
        assert np.array_equal(hashes, found.hashes[own])
        assert np.array_equal(starts + texts.offsets[index], found.starts[own])
        assert np.array_equal(ends + texts.offsets[index], found.ends[own])
        assert np.array_equal(ngrams(hashes, n), grams[gram_first[index] : gram_first[index + 1]])


def test_hashes_never_change():
    # other stages and earlier runs compare with these
    assert words("Hello, World!")[0].tolist() == words("hello world")[0].tolist()
    assert ngrams(words("hello world")[0], 2).tolist() == [4019751668136865060]
    assert ngrams(words("twelve words only")[0], 13).tolist() == []
    assert mix64(np.uint64(3)) == mix(np.array([3], np.uint64))[0]


def test_view_of_slices_chunks_and_empty_tables():
    whole = shard(TEXTS)
    expected = [text.encode() for text in TEXTS]
    chunked = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 0), whole.slice(3)])
    for table, start, stop in [
        (whole, 0, len(TEXTS)), (whole.slice(2, 5), 2, 7), (whole.slice(9, 1), 9, 10), (chunked, 0, len(TEXTS)),
        (chunked.slice(2, 4), 2, 6),
        (whole.slice(4, 0), 4, 4), (shard([]), 0, 0), (whole.schema.empty_table(), 0, 0),
        (shard(TEXTS, pa.large_string()).slice(1), 1, len(TEXTS)),
    ]:
        buffer, offsets = texts_of(table)
        assert [bytes(buffer[a:b]) for a, b in pairwise(offsets)] == expected[start:stop]
        assert len(words_of(table).first) == stop - start + 1


def test_numba_compiles_once_for_texts_from_anywhere():
    columns = pa.array(["a b", "c"]), pa.array(["a b"], pa.large_string()), pa.chunked_array([["a"], ["b"]])
    for texts in [one_text("a b"), *(texts_of(pa.table({"text": column})) for column in columns)]:
        assert not texts.buffer.flags.writeable and not texts.offsets.flags.writeable


def test_words_are_found_once_for_a_column_and_never_taken_for_another():
    table = shard(TEXTS)
    found = words_of(table)
    assert words_of(table.append_column("more", pa.nulls(len(TEXTS)))) is found
    for _ in range(50):         # memory of a dropped column is given out again
        count = len(words_of(shard(["a b"])).hashes)
        assert count == 2 and len(words_of(shard(["abc"])).hashes) == 1


def test_compiled_code_is_not_used_again_once_what_it_calls_has_changed(tmp_path):
    """Numba by itself looks at the file of the calling function only."""
    package = tmp_path / "package"
    for folder in ("text", "annotate"):
        (package / folder).mkdir(parents=True)
    shutil.copy(Path(data_pipeline.text.__file__), package / "text/__init__.py")
    (package / "annotate/calling.py").write_text(
        "from numba import njit\nfrom package.text.called import called\n"
        "@njit(cache=True)\ndef calls():\n    return called()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = "from package.annotate.calling import calls; print(calls(), sum(calls.stats.cache_hits.values()))"
    printed = []
    for value in (1, 1, 2):
        (package / "text/called.py").write_text(f"from numba import njit\n@njit\ndef called():\n    return {value}\n")
        run = subprocess.run(
            [sys.executable, "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        printed.append(run.stdout.split())
    assert printed == [["1", "0"], ["1", "1"], ["2", "0"]]


def test_files_with_compiled_code_lie_where_its_state_is_read_and_import_what_reads_it():
    root = Path(data_pipeline.text.__file__).parents[1]
    compiled = [file for file in root.rglob("*.py") if "from numba import" in file.read_text()]
    assert {file.relative_to(root).parts[0] for file in compiled} == {"annotate", "text", "tokenize"}
    assert all(file.parent.name == "text" or "from data_pipeline.text." in file.read_text() for file in compiled)
