"""Every feature against plain Python written from its definition, on real and on hostile texts."""

import re
from collections import Counter
from unicodedata import category

import numpy as np
import pyarrow as pa
import pytest
import regex

from data_pipeline.annotate.features.characters import CLASSES, DIGIT, LETTER, SPACE, TERMINAL
from data_pipeline.annotate.features.features import Features
from data_pipeline.annotate.features.measures import FEATURES, measure
from data_pipeline.annotate.step import SCHEMA
from data_pipeline.text.words import texts_of
from tests.data_pipeline.plain_words import counted_words
from tests.data_pipeline.real_texts import HOSTILE, real_texts

# FineWeb's list is of Unicode 14; three Khmer signs were taken from the property since.
TERMINALS = set(regex.findall(r"\p{Sentence_Terminal}", "".join(map(chr, range(0x24F0)))))
POLICIES = ["terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"]
BOILERPLATE = [*POLICIES, "privacy overview", "privacy & cookies policy", "privacy and cookies policy"]


QUOTES = set("\"'」』﹂﹄＂＇") | set(regex.findall(r"[\p{Pi}\p{Pf}]", "".join(map(chr, range(0x3000)))))
ENDS = TERMINALS | set("。．？！｡﹒﹖﹗")
KNOWN = ENDS | set("\n,،、，､")
BULLETS = tuple("-–•‣⁃∙·・◦▪▫■□●○◆◇▶►❖➢➤✓✔★☆※")
CLOSED = f"(?:[)}}\\]）］｝【】《》〈〉⟨⟩{''.join(QUOTES)}]|\\[\\d*\\])*$"


def lower(text: str) -> str:
    return text.translate({code: code + 32 for code in range(65, 91)})


def duplicates(items: list[str]) -> tuple[int, int]:
    """How many items stood in the list before, and their characters."""
    repeated = [item for item, count in Counter(items).items() for _ in range(count - 1)]
    return len(repeated), sum(map(len, repeated))


def top_ngram(words: list[str], n: int) -> int:
    counts = Counter(" ".join(words[start : start + n]) for start in range(len(words) - n + 1))
    return max((len(gram) * count for gram, count in counts.most_common(1)), default=0)


def duplicate_ngrams(words: list[str], n: int) -> int:
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return sum(len(words[index]) for index in covered)


def ends_sentence(word: str) -> bool:
    return bool(re.sub(CLOSED, "", word)[-1:] in ENDS)


def c4(lines: list[str]) -> tuple[int, int, int]:
    """Sentences in the lines C4 keeps, lines with lorem ipsum, lines with a curly bracket."""
    sentences = lorem = curly = 0
    for line in lines:
        words = counted_words(line)
        if len(words) < 3 or any(len(word) > 1000 for word in words):
            continue
        if "lorem ipsum" in lower(line):
            lorem += 1
        elif "javascript" in lower(line):
            continue
        elif "{" in line:
            curly += 1
        elif not any(policy in lower(line) for policy in POLICIES):
            sentences += 1 + sum(map(ends_sentence, words[:-1]))
    return sentences, lorem, curly


def longest_encoded(text: str) -> int:
    return max(map(len, re.findall(r"[A-Za-z0-9+/=]+|(?:\\x[0-9a-fA-F]{2})+", text)
               + re.findall(r"(?:\\x[0-9a-fA-F]{2})+", text)), default=0)


def over(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def reference(text: str) -> dict[str, float]:
    characters, words = len(text), counted_words(text)
    lines = text.removesuffix("\n").split("\n") if text else []
    filled = [line for line in lines if line.split()]
    paragraphs = re.split(r"\n{2,}", text.strip()) if text.strip() else []
    sentences, lorem, curly = c4(lines)
    line_duplicates, line_characters = duplicates(filled)
    paragraph_duplicates, paragraph_characters = duplicates(paragraphs)
    comment = re.compile(r"\s*(#|//|/\*)")
    stop_words = {"the", "be", "to", "of", "and", "that", "have", "with"}
    made = r"(?im)^\s*(#|//|/\*).*(auto-?generated|@generated|generated (by|from|automatically)|do not (edit|modify))"
    return {
        "characters": characters,
        "words": len(words),
        "lines": len(lines),
        "mean_word_length": over(sum(map(len, words)), len(words)),
        "longest_word": max(map(len, words), default=0),
        "mean_line_length": over(characters, len(lines)),
        "longest_line": max(map(len, lines), default=0),
        "letters": over(sum(map(str.isalpha, text)), characters),
        "digits": over(sum(map(str.isdecimal, text)), characters),
        "other_characters": over(sum(
            not c.isalnum() and c not in KNOWN and (category(c)[0] != "M" or "\ufe00" <= c <= "\ufe0f") for c in text),
            characters),
        "white_space": over(sum(c in "\t\n\r\b " for c in text), characters),
        "brackets": over(len(re.findall(r"[{}⟨⟩\[\]()（）［］｛｝【】《》〈〉]", text)), characters),
        "url_characters": over(sum(map(len, re.findall(r"https?://[^\s<>\"]+", text))), characters),
        "encoded_run": longest_encoded(text),
        "generated": bool(re.search(made, text[:1500])),
        "alphabetic_words": over(sum(any(map(str.isalpha, word)) for word in words), len(words)),
        "stop_words": len(stop_words & set(words)),
        "hashes": over(text.count("#"), len(words)),
        "ellipses": over(text.count("...") + sum(map(text.count, "…⋯︙")), len(words)),
        "newlines": over(text.count("\n"), len(words)),
        "bullet_lines": over(sum(line.lstrip().startswith(BULLETS) for line in lines), len(lines)),
        "ellipsis_lines": over(sum(line.rstrip().endswith(("...", "…", "⋯", "︙")) for line in lines), len(lines)),
        "comment_lines": over(sum(bool(comment.match(line)) for line in lines), len(lines)),
        "terminal_lines": over(sum(line[-1] in ENDS for line in filled), len(filled)),
        "end_marked_lines": over(
            sum(line.strip()[-1] in ENDS | QUOTES for line in filled), len(filled)),
        "short_lines": over(sum(len(line) <= 30 for line in filled), len(filled)),
        "c4_sentences": sentences,
        "lorem_ipsum_lines": lorem,
        "curly_bracket_lines": curly,
        "boilerplate_paragraphs": over(
            sum(any(phrase in lower(paragraph) for phrase in BOILERPLATE) for paragraph in paragraphs),
            len(paragraphs)),
        "duplicate_lines": over(line_duplicates, len(filled)),
        "duplicate_line_characters": over(line_characters, characters),
        "duplicate_line_text": over(line_characters, len(text.replace("\n", ""))),
        "duplicate_paragraphs": over(paragraph_duplicates, len(paragraphs)),
        "duplicate_paragraph_characters": over(paragraph_characters, characters),
        **{f"top_{n}gram": over(top_ngram(words, n), characters) for n in (2, 3, 4)},
        **{f"duplicate_{n}grams": over(duplicate_ngrams(words, n), characters) for n in range(5, 11)},
    }


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return real_texts() + HOSTILE


def test_every_feature_is_what_its_definition_says(texts):
    assert len(texts) - len(HOSTILE) >= 150
    measured = measure(texts_of(pa.table({"text": texts})))
    assert list(measured) == list(FEATURES)
    expected = [reference(text) for text in texts]
    for name, values in measured.items():
        wanted = np.array([row[name] for row in expected], np.float32)
        wrong = np.flatnonzero(~np.isclose(values, wanted, rtol=1e-6, atol=0))
        assert not len(wrong), (name, values[wrong[0]], wanted[wrong[0]], texts[wrong[0]][:300])
        assert len(np.unique(values)) > 1, f"{name} is always the same, which shows nothing"


def test_a_text_alone_has_the_features_it_has_in_a_shard(texts):
    some = texts[::7]
    together = measure(texts_of(pa.table({"text": some})))
    for index, text in enumerate(some):
        alone = measure(texts_of(pa.table({"text": ["before", text]}).slice(1)))
        assert {name: values[0] for name, values in alone.items()} == {
            name: values[index] for name, values in together.items()
        }


def test_character_classes_are_pythons():
    for code, kind in enumerate(CLASSES.tolist()):
        character = chr(code)
        assert bool(kind & SPACE) == character.isspace() and bool(kind & LETTER) == character.isalpha()
        assert bool(kind & DIGIT) == character.isdecimal()
    assert {chr(code) for code in np.flatnonzero(CLASSES[:0x17D6] & TERMINAL)} == {
        character for character in TERMINALS if ord(character) < 0x17D6
    }


def test_the_step_fills_its_column_and_no_other():
    rows = pa.Table.from_pylist([{"text": text, "domain": "web"} for text in ("One two.", "")], SCHEMA)
    filled = Features().apply(rows)
    assert filled.schema == SCHEMA and filled.drop_columns("features") == rows.drop_columns("features")
    assert [row["words"] for row in filled["features"].to_pylist()] == [2.0, 0.0]
    assert len(Features().apply(SCHEMA.empty_table())) == 0


@pytest.mark.parametrize(("language", "text", "stop_words"), [
    ("en", "The queue of the tasks, and that with them.", 5), ("un", "the and", 2), ("de", "queue waiting tasks", 0),
    ("de", "Die Aufgaben stehen in einer Schlange, und wer frei ist, nimmt sich die älteste von ihnen.", 8),
    ("zh", "等待的任务排成队列。", 8),
])
def test_stop_words_are_of_the_texts_language(language, text, stop_words):
    rows = pa.Table.from_pylist([{"text": text, "language": language}, {"text": "to be", "language": "en"}], SCHEMA)
    assert [row["stop_words"] for row in Features().apply(rows)["features"].to_pylist()] == [stop_words, 2]


@pytest.mark.parametrize(("text", "feature", "value"), [
    ("。第一句话在这里结束。\n「第二句话结束。」\n", "end_marked_lines", 1),
    ("Er sagte: „Nein.“\n«Oui !»\n", "end_marked_lines", 1),
    ("▪ eins\n● zwei\n– drei\n・四\n", "bullet_lines", 1), ("und so weiter…\nusw. ⋯\n", "ellipsis_lines", 1),
    ("١٢٣４５６", "digits", 1), ("größeПривет世界มา", "other_characters", 0), ("（）【】", "brackets", 1),
    ("四个字四个字四个字四个字", "words", 3), ("GPT模型很好", "words", 2),
])
def test_signs_of_every_script_count(text, feature, value):
    assert measure(texts_of(pa.table({"text": [text]})))[feature].tolist() == [value]
