"""Languages told apart offline, whatever characters a text holds."""

import random

import numpy as np
import pyarrow as pa
import pycld2
import pytest

from data_pipeline.annotate.language import Language
from data_pipeline.annotate.step import SCHEMA
from data_pipeline.text.language import detect
from tests.data_pipeline.real_texts import HOSTILE, real_texts

SENTENCES = {
    "en": "The tasks that wait are kept in a queue, and a free worker takes the oldest of them.",
    "de": "Die wartenden Aufgaben stehen in einer Schlange, und wer frei ist, nimmt sich die älteste.",
    "fr": "Les tâches en attente restent dans une file, et un ouvrier libre prend la plus ancienne.",
    "es": "Las tareas que esperan se guardan en una cola, y un trabajador libre toma la más antigua.",
    "ru": "Задачи ждут в очереди, и свободный работник берёт самую старую из них.",
    "ja": "待っているタスクは列に並び、手の空いた作業者が一番古いものを取ります。",
    "zh": "等待的任务排成队列,空闲的工人取走其中最早的一个。",
    "he": "המשימות הממתינות עומדות בתור, והעובד הפנוי לוקח את הישנה ביותר.",
    "id": "Tugas-tugas yang menunggu disimpan dalam antrean, dan pekerja yang bebas mengambil yang paling lama.",
    "ar": "تنتظر المهام في الطابور ويأخذ العامل الحر أقدمها.",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_languages_under_their_iso_codes(code):
    found, share = detect(SENTENCES[code])
    assert found == code and share > 0.9


def test_traditional_chinese_is_chinese():
    assert detect("等待的任務排成隊列,空閒的工人取走其中最早的一個。這個與那個")[0] == "zh"


def test_the_share_is_of_the_commonest_language():
    code, share = detect("\n".join([SENTENCES["en"]] * 7 + [SENTENCES["ru"]] * 2))
    assert code == "en" and 0.45 < share < 0.85


@pytest.mark.parametrize("text", ["", " \n", "12345 678 -- ==", "\0\0", "\ufffe", "x"])
def test_nothing_to_tell_by_is_unknown(text):
    assert detect(text) == ("un", 0.0)


def test_characters_that_cld2_refuses_do_not_hide_the_language():
    refused = ["\0", "\x07", "\x1b", "\x7f", "\x85", "\ufdd0", "\uffff", "\U0001fffe", "\U0010ffff"]
    for character in refused:
        with pytest.raises(pycld2.error):
            pycld2.detect(SENTENCES["en"] + character, isPlainText=True)
        assert detect(SENTENCES["en"].replace(" tasks", character + "tasks"))[0] == "en"


def test_no_character_fails():
    chance = random.Random(0)
    for _ in range(300):
        points = [chance.choice([chance.randrange(0x300), chance.randrange(0xE000, 0x110000)]) for _ in range(200)]
        detect("".join(map(chr, points)))
    for text in HOSTILE:
        detect(text)


def test_markup_in_text_is_text():
    """CLD2 takes text for HTML unless told: then it reads nothing between < and >."""
    assert detect("<" + SENTENCES["en"] + ">") == detect(SENTENCES["en"])


def test_the_step_on_real_texts():
    texts = [*real_texts(), *SENTENCES.values(), ""]
    rows = pa.Table.from_pylist([{"text": text} for text in texts], SCHEMA)
    filled = Language().apply(rows)
    codes, shares = filled["language"].to_pylist(), filled["language_share"].to_numpy()
    assert filled.schema == SCHEMA and codes[-len(SENTENCES) - 1 : -1] == list(SENTENCES)
    assert np.mean([code == "en" for code in codes[: -len(SENTENCES) - 1]]) > 0.85
    assert ((shares >= 0) & (shares <= 1)).all() and codes[-1] == "un"
