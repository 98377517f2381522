"""Crawls in German and Chinese, from the archive to the labelled table: main text, words, rules, a planted question."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.parquet as pq

from tests.flows.test_curate_own import Curate, page

# Parts of sentences, to be put together anew for each page.
GERMAN = (
    ("Der alte Schreiner", "Meine Nachbarin", "Die Lehrerin aus Kassel", "Ein junger Gärtner", "Unser Bäcker",
     "Die Leiterin der Bücherei", "Der Fährmann", "Eine Gruppe von Schülern", "Der Uhrmacher", "Die Ärztin im Dorf"),
    ("erzählte am Abend", "fragte vor der Tür", "schrieb in seinem Brief", "bemerkte beim Frühstück",
     "wusste schon lange", "hörte auf dem Markt", "las gestern in der Zeitung", "glaubte zuerst nicht"),
    ("dass die Brücke über den Fluss", "dass der schmale Weg durch den Wald", "warum das Haus mit den grünen Läden",
     "dass der große Ofen in der Küche", "wie die kleine Orgel in der Kirche", "dass das Boot mit dem roten Segel",
     "weshalb die Mühle hinter dem Hügel", "dass der Garten neben der Schule"),
    ("nach dem langen Winter", "mit der Hilfe von vielen Leuten", "trotz des schlechten Wetters", "für wenig Geld",
     "in nur drei Wochen", "vor dem Fest im Mai", "ohne einen einzigen Nagel", "wegen der hohen Kosten"),
    ("neu gebaut wurde.", "nicht mehr zu retten war.", "endlich fertig geworden ist.", "wieder offen steht.",
     "einem Verein gehören soll.", "so oft gemalt worden ist.", "von allen gelobt wird.", "verkauft werden musste."),
)
CHINESE = (
    ("村里的老木匠", "我们的数学老师", "图书馆的管理员", "那位年轻的医生", "河边的船夫", "隔壁的王阿姨", "几个中学生",
     "修理钟表的师傅", "面包店的老板", "从北方来的客人"),
    ("昨天晚上告诉大家", "在信里写道", "早就已经知道", "一边喝茶一边说", "在市场上听别人讲", "起初并不相信",
     "后来终于明白了", "在报纸上读到"),
    ("那座跨过小河的石桥", "通向山后面的小路", "学校旁边的花园", "厨房里的大炉子", "挂着红帆的小船", "山坡上的旧磨坊",
     "窗户朝南的房子", "寺庙里的那口大钟"),
    ("经过一个漫长的冬天", "在许多人的帮助之下", "虽然天气一直不好", "只花了很少的钱", "用了不到三个星期",
     "在五月的节日之前", "没有用一颗钉子", "因为费用实在太高"),
    ("又重新修好了。", "已经没有办法保留下来。", "终于可以使用了。", "现在对所有人开放。", "应该交给大家来管理。",
     "被画家画过很多次。", "得到了每个人的称赞。", "只好卖给了别人。"),
)
QUESTIONS = {
    "de": "Ein Händler hat vierzehn Körbe mit je neun Äpfeln und verkauft am ersten Tag ein Drittel davon; wie viele "
          "Äpfel bleiben ihm für den zweiten Tag übrig?",
    "zh": "一个商人有十四个篮子，每个篮子里装着九个苹果，第一天他卖掉了其中的三分之一，请问第二天他还剩下多少个苹果？",
}
PARTS = {"de": GERMAN, "zh": CHINESE}
# As web pages set them.
PLANTED = {
    "de": QUESTIONS["de"].upper().replace("; ", "&nbsp;&mdash; ").replace(" JE ", "&nbsp;je ").replace("Ä", "A\u0308"),
    "zh": QUESTIONS["zh"].replace("，", ", ").replace("苹果", "苹\u200d果").replace("？", "<b>?</b>"),
}


def pages(language: str, count: int) -> list[str]:
    """Main text of pages in HTML; the third holds the question."""
    chooser, glue = random.Random(7), "" if language == "zh" else " "
    parts = PARTS[language]
    found = []
    for number in range(count):
        sentences = [("，" if language == "zh" else ", ").join((glue.join(map(chooser.choice, parts[:2])),
                                                               glue.join(map(chooser.choice, parts[2:]))))
                     for _ in range(24)]
        if number == 2:
            sentences.insert(10, PLANTED[language])
        found.append("</p>\n<p>".join(glue.join(sentences[start : start + 6]) for start in range(0, 25, 6)))
    return found


def test_german_and_chinese_crawls_are_labelled_and_a_planted_question_is_found(
    tmp_path: Path, curate: Curate
) -> None:
    archives = []
    for first, language in ((0, "de"), (100, "zh")):
        found = [page(text, first + number) for number, text in enumerate(pages(language, 14))]
        (tmp_path / f"{language}.warc").write_bytes(b"".join(found))
        archives.append(f"{language}.warc")
    lines = [json.dumps({"question": question}, ensure_ascii=False) for question in QUESTIONS.values()]
    (tmp_path / "bench.jsonl").write_text("\n".join(lines) + "\n")
    done = curate(*archives, "--out", "mine", "--languages", "de zh", "--against", "bench.jsonl", "--set",
                  "runtime.workers=1")
    assert done.returncode == 0, done.stderr
    funnel = {row["step"]: row for row in json.loads((tmp_path / "mine/runs/curate/funnel.json").read_text())}
    assert funnel["read"]["documents"] == funnel["near_duplicates"]["documents"] == 28, funnel
    assert sum(funnel["decontaminate"]["reasons"].values()) == 2, funnel
    train = pq.read_table(tmp_path / "mine/data/curated/train/part-00000.parquet").to_pylist()
    left = {row["source"] for row in train}
    assert not left & {"site2.org", "site102.org"}
    for sites in (range(14), range(100, 114)):
        assert len(left & {f"site{number}.org" for number in sites}) >= 8, funnel
    assert {row["label"] for row in train} <= {"high", "medium-high", "medium", "medium-low", "low"}
