"""Rules against datatrove's filters given the same words, and on texts made to break one each."""

import inspect
import re
import sched

import numpy as np
import pyarrow as pa
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    gopher_quality_filter,
    gopher_repetition_filter,
)
from datatrove.utils.word_tokenizers import WordTokenizer

from data_pipeline.annotate.features.features import Features
from data_pipeline.annotate.features.measures import FEATURES, measure
from data_pipeline.annotate.language import Language
from data_pipeline.annotate.step import SCHEMA
from data_pipeline.config import DataError, RulesConfig
from data_pipeline.curate.heuristics import (
    C4,
    FINEWEB,
    GOPHER,
    GOPHER_REPETITION,
    RULES,
    Rule,
    first_broken,
    reason,
    rules_of,
)
from data_pipeline.text.words import texts_of
from tests.data_pipeline.plain_words import counted_words
from tests.data_pipeline.real_texts import HOSTILE, PROSE, normalised, real_texts

CODE = inspect.getsource(sched)
COMMENTS = "\n".join(f"# a comment, number {i}, about nothing" for i in range(60))


# A page each, made for this test, in scripts without blanks; Thai and Lao have no sentence marks either.
PAGES = {
    "th": (
        "คิวงานเก็บงานที่รอไว้ตามลำดับเวลา เมื่อคนงานว่างก็จะหยิบงานท"
        "ี่เก่าที่สุดไปทำจนเสร็จ\n"
        "หากงานล้มเหลว ข้อผิดพลาดจะถูกเก็บไว้พร้อมผลลัพธ์ เพื่อให้ผู้"
        "ที่ถามถึงได้เห็นว่าเกิดอะไรขึ้น งานที่ถูกยกเลิกก่อนเริ่มจะไม"
        "่ถูกทำเลย\n"
        "ประเทศไทยตั้งอยู่ในเอเชียตะวันออกเฉียงใต้ มีแม่น้ำเจ้าพระยาไ"
        "หลผ่านที่ราบภาคกลาง ชาวนาปลูกข้าวในฤดูฝนและเก็บเกี่ยวเมื่ออา"
        "กาศเริ่มเย็น\n"
        "ในตลาดเช้ามีผักสด ผลไม้ และปลาจากแม่น้ำวางขาย ผู้คนพูดคุยกัน"
        "เรื่องราคาและสภาพอากาศก่อนกลับบ้านไปทำอาหาร\n"
    ),
    "lo": (
        "ແຖວວຽກເກັບວຽກທີ່ລໍຖ້າໄວ້ຕາມລຳດັບເວລາ ເມື່ອຄົນງານຫວ່າງກໍຈະເອົ"
        "າວຽກທີ່ເກົ່າທີ່ສຸດໄປເຮັດຈົນແລ້ວ\n"
        "ຖ້າວຽກລົ້ມເຫຼວ ຂໍ້ຜິດພາດຈະຖືກເກັບໄວ້ພ້ອມຜົນໄດ້ຮັບ ເພື່ອໃຫ້ຜູ"
        "້ທີ່ຖາມເຖິງໄດ້ເຫັນວ່າເກີດຫຍັງຂຶ້ນ\n"
        "ປະເທດລາວຕັ້ງຢູ່ໃນອາຊີຕະເວັນອອກສຽງໃຕ້ ແມ່ນ້ຳຂອງໄຫຼຜ່ານຈາກພາກເ"
        "ໜືອລົງສູ່ພາກໃຕ້ ຊາວນາປູກເຂົ້າໃນລະດູຝົນແລະເກັບກ່ຽວເມື່ອອາກາດເ"
        "ລີ່ມເຢັນ\n"
        "ໃນຕະຫຼາດເຊົ້າມີຜັກສົດ ໝາກໄມ້ ແລະປາຈາກແມ່ນ້ຳວາງຂາຍ ຜູ້ຄົນລົມກ"
        "ັນເລື່ອງລາຄາແລະສະພາບອາກາດກ່ອນກັບບ້ານໄປເຮັດອາຫານ\n"
    ),
    "km": (
        "ជួររង់ចាំរក្សាទុកកិច្ចការដែលកំពុងរង់ចាំតាមលំដាប់ពេលវេលា។ នៅព"
        "េលកម្មករទំនេរ គាត់យកកិច្ចការចាស់ជាងគេទៅធ្វើរហូតដល់ចប់។\n"
        "ប្រសិនបើកិច្ចការបរាជ័យ កំហុសត្រូវបានរក្សាទុកជាមួយលទ្ធផល ដើម្"
        "បីឲ្យអ្នកដែលសួរបានឃើញថាមានអ្វីកើតឡើង។\n"
        "ប្រទេសកម្ពុជាស្ថិតនៅអាស៊ីអាគ្នេយ៍ មានទន្លេមេគង្គហូរកាត់។ កសិ"
        "ករដាំស្រូវនៅរដូវវស្សា ហើយច្រូតកាត់នៅពេលអាកាសធាតុចាប់ផ្តើមត្រ"
        "ជាក់។\n"
        "នៅផ្សារព្រឹកមានបន្លែស្រស់ ផ្លែឈើ និងត្រីពីទន្លេ។ មនុស្សជជែកគ"
        "្នាអំពីតម្លៃ និងអាកាសធាតុ មុនពេលត្រឡប់ទៅផ្ទះធ្វើម្ហូប។\n"
    ),
    "my": (
        "တန်းစီဇယားသည် စောင့်ဆိုင်းနေသော အလုပ်များကို အချိန်အလိုက် သိ"
        "မ်းထားသည်။ အလုပ်သမား အားလပ်သောအခါ အဟောင်းဆုံး အလုပ်ကို ယူ၍ ပ"
        "ြီးအောင် လုပ်သည်။\n"
        "အလုပ် မအောင်မြင်ပါက အမှားကို ရလဒ်နှင့်အတူ သိမ်းထားသည်။ မေးမြ"
        "န်းသူသည် ဘာဖြစ်ခဲ့သည်ကို မြင်နိုင်သည်။\n"
        "မြန်မာနိုင်ငံသည် အရှေ့တောင်အာရှတွင် တည်ရှိပြီး ဧရာဝတီမြစ် စီ"
        "းဆင်းသည်။ လယ်သမားများသည် မိုးရာသီတွင် စပါးစိုက်ပျိုးပြီး ဆော"
        "င်းရာသီတွင် ရိတ်သိမ်းကြသည်။\n"
        "မနက်ဈေးတွင် လတ်ဆတ်သော ဟင်းသီးဟင်းရွက်၊ သစ်သီးနှင့် ငါးများ ရ"
        "ောင်းချသည်။ လူများသည် ဈေးနှုန်းနှင့် ရာသီဥတုအကြောင်း ပြောဆို"
        "ကြသည်။\n"
    ),
    "ja": (
        "待ち行列には、処理を待っているタスクが時刻の順に並んでいます。作業者の手が空くと、一番古いものを取り出し、終わるまで実行"
        "します。\n"
        "タスクが失敗した場合、エラーは結果と一緒に保存されるので、後から何が起きたのかを確かめることができます。始まる前に取り消"
        "されたものは実行されません。\n"
        "日本は東アジアの島国で、四つの大きな島と多くの小さな島からなります。春には桜が咲き、夏は蒸し暑く、秋には山の木々が赤く染"
        "まります。\n"
        "朝の市場には新鮮な野菜や果物、近くの港で水揚げされた魚が並びます。人々は値段や天気の話をしてから、家に帰って食事の支度を"
        "します。\n"
    ),
    "zh": (
        "等待的任务按照时间顺序排在队列里。工人有空的时候，就取出其中最早的一个，一直做到结束为止。\n"
        "如果任务失败了，错误会和结果一起保存下来，这样以后询问的人就能看到发生了什么事情。在开始之前被取消的任务永远不会执行。\n"
        "中国位于亚洲东部，长江和黄河从西向东流过广阔的平原。农民在雨季种植水稻，等到天气转凉的时候再去收割。\n"
        "早晨的市场里摆着新鲜的蔬菜、水果和从河里打来的鱼。人们先聊聊价格和天气，然后回家做饭，一天就这样开始了。\n"
    ),
}


def features_of(texts: list[str]) -> pa.StructArray:
    measured = measure(texts_of(pa.table({"text": texts})))
    return pa.StructArray.from_arrays([pa.array(values) for values in measured.values()], names=list(measured))


def reasons_of(texts: list[str], rules: list[Rule]) -> list[str | None]:
    broken = first_broken(features_of(texts), rules)
    return [None if rule < 0 else reason(rules[rule], above)
            for rule, above in zip(broken.rules, broken.above.tolist(), strict=True)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Normalised, as the rules see them; less the last line feed and form feeds, at which datatrove ends lines too."""
    pages = [text.replace("\f", "").strip("\n") for text in normalised(real_texts() + HOSTILE)]
    pages = [text for text in pages if text.split()]
    assert len(pages) >= 150
    # Half-repeated and cut texts, so that decisions fall on both sides of every threshold.
    return pages + [text + "\n" + text[: len(text) // 5] for text in pages[:60]] + [text[:400] for text in pages[:60]]


class WhiteSpace(WordTokenizer):
    """Words and sentences as the features count them."""

    def word_tokenize(self, text: str) -> list[str]:
        return counted_words(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S.*?(?:[.!?][\"')}\]]*(?=\s|$)|$)", text)]

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end] for start, end in self.span_tokenize(text)]


SAME_WORDS = WhiteSpace()


def decisions(block, texts: list[str]) -> list[str | None]:
    """datatrove's reason for each text, None where it keeps it."""
    verdicts = [block.filter(Document(text=text, id="")) for text in texts]
    return [None if verdict is True else verdict[1] for verdict in verdicts]


def from_source(source: str) -> list[Rule]:
    return [rule for rule in RULES["web"] if rule.source == source]


def assert_both_ways(decided: list[str | None]) -> None:
    dropped = sum(bool(why) for why in decided)
    assert dropped > 20 and len(decided) - dropped > 20


def test_gopher_quality_decides_as_datatrove(texts, monkeypatch):
    """Words of punctuation counted as words, as in Gopher's text."""
    monkeypatch.setattr(gopher_quality_filter, "PUNCTUATION_SET", set())
    theirs, ours = decisions(GopherQualityFilter(language=SAME_WORDS), texts), reasons_of(texts, from_source(GOPHER))
    names = {
        "gopher_short_doc": "words < 50", "gopher_below_avg_threshold": "mean_word_length < 3",
        "gopher_above_avg_threshold": "mean_word_length > 10", "gopher_too_many_hashes": "hashes > 0.1",
        "gopher_too_many_ellipsis": "ellipses > 0.1", "gopher_too_many_bullets": "bullet_lines > 0.9",
        "gopher_too_many_end_ellipsis": "ellipsis_lines > 0.3",
        "gopher_below_alpha_threshold": "alphabetic_words < 0.8", "gopher_enough_stop_words": "stop_words < 2",
    }
    assert [why and names[why] for why in theirs] == ours
    assert_both_ways(ours)


def test_gopher_quality_differs_from_datatrove_only_by_words_of_punctuation(texts):
    """datatrove as it is counts no word of punctuation; Gopher's text makes no such exception."""
    ours, theirs = reasons_of(texts, from_source(GOPHER)), decisions(GopherQualityFilter(language=SAME_WORDS), texts)
    differing = [text for text, a, b in zip(texts, ours, theirs, strict=True) if bool(a) != bool(b)]
    assert len(differing) < 0.05 * len(texts)
    punctuation = gopher_quality_filter.PUNCTUATION_SET
    assert all(any(punctuation.issuperset(word) for word in counted_words(text)) for text in differing)


def test_fineweb_decides_as_datatrove(texts):
    names = {"line_punct_ratio": "terminal_lines < 0.12", "short_line_ratio": "short_lines > 0.67",
             "char_dup_ratio": "duplicate_line_text > 0.01", "list_ratio": "newlines > 0.3"}
    ours = reasons_of(texts, from_source(FINEWEB))
    assert [why and names[why] for why in decisions(FineWebQualityFilter(language=SAME_WORDS), texts)] == ours
    assert_both_ways(ours)


def test_c4_decides_as_datatrove(texts):
    """Without the rule on the end of lines, as in FineWeb; datatrove gives the reason it meets first in the text.

    It parts lines at white space whatever words it is given: texts in scripts without blanks are left out here.
    """
    texts = [text for text in texts if counted_words(text) == text.split()]
    theirs = decisions(C4QualityFilter(filter_no_terminal_punct=False, language=SAME_WORDS), texts)
    ours = reasons_of(texts, from_source(C4))
    assert [bool(why) for why in theirs] == [bool(why) for why in ours]
    assert {"lorem_ipsum", "curly_bracket", "too_few_sentences"} <= set(theirs)
    assert_both_ways(ours)


def test_gopher_repetition_decides_as_datatrove_but_for_overlapping_repeats(texts):
    """datatrove skips n words after each repeat it finds, and so misses what is left of a repeated stretch.

    Gopher counts the characters within duplicate n-grams, those under several once. With datatrove's count in the place
    of this one every decision is the same; and its count is never the larger.
    """
    theirs = decisions(GopherRepetitionFilter(language=SAME_WORDS), texts)
    features = measure(texts_of(pa.table({"text": texts})))
    rules = from_source(GOPHER_REPETITION)
    own = reasons_of(texts, rules)
    for n in range(5, 11):
        greedy = np.array([
            gopher_repetition_filter.find_all_duplicate(counted_words(text), n) / len(text) for text in texts
        ], np.float32)
        assert (greedy <= features[f"duplicate_{n}grams"] + 1e-6).all()
        features[f"duplicate_{n}grams"] = greedy
    column = pa.StructArray.from_arrays([pa.array(values) for values in features.values()], names=list(features))
    broken = first_broken(column, rules)
    ours = [None if rule < 0 else rules[rule].feature for rule in broken.rules]
    names = {"dup_para_frac": "duplicate_paragraphs", "dup_para_char_frac": "duplicate_paragraph_characters",
             "dup_line_frac": "duplicate_lines", "dup_line_char_frac": "duplicate_line_characters",
             **{f"top_{n}_gram": f"top_{n}gram" for n in range(2, 5)},
             **{f"duplicated_{n}_n_grams": f"duplicate_{n}grams" for n in range(5, 11)}}
    assert [why and names[why] for why in theirs] == ours
    assert_both_ways(ours)
    differing = [why for why, verdict in zip(own, theirs, strict=True) if bool(why) != bool(verdict)]
    assert all(why and why.startswith("duplicate_") and "grams" in why for why in differing)
    assert len(differing) < 0.1 * len(texts)


@pytest.mark.parametrize(
    ("rules", "text", "why"),
    [
        ("prose", PROSE, None),
        ("prose", "Too short to tell.", "words < 30"),
        ("prose", PROSE + "\n" + "A" * 300, "encoded_run > 255"),
        ("prose", PROSE + " word" * 300, "longest_line > 1000"),
        ("prose", "\n".join(f"numpy scipy pandas {i} torch datasets polars" for i in range(40)), "stop_words < 2"),
        ("prose", PROSE + "\n" + "# # # # # # # # # #", "hashes > 0.1"),
        ("prose", PROSE + "\n" + "\n".join(f"{i * 7919} {i * 104729}" for i in range(60)), "alphabetic_words < 0.7"),
        ("prose", "\n".join([PROSE] * 3), "duplicate_line_characters > 0.4"),
        ("prose", "\n".join(f"{i}. {PROSE}" for i in range(3)), "duplicate_10grams > 0.33"),
        ("code", CODE, None),
        ("code", "x = 1\n", "lines < 5"),
        ("code", "# Code generated by protoc. DO NOT EDIT.\n" + CODE, "generated > 0"),
        ("code", "'''generated by hand'''\n" + CODE, None),
        ("code", "\n".join(f"number = {i * 104729}" for i in range(80)), "digits > 0.2"),
        ("code", COMMENTS + "\nx = 1\n", "comment_lines > 0.85"),
        ("code", CODE + "x = 'a' + " * 200, "longest_line > 1000"),
        ("code", CODE + "value = compute(value, other)\n" * 400, "duplicate_line_characters > 0.6"),
        ("reference", CODE, None),
    ],
)
def test_the_reason_is_the_first_rule_broken(rules, text, why):
    assert reasons_of([text], RULES[rules]) == [why]


@pytest.mark.parametrize("language", PAGES)
def test_pages_in_scripts_without_blanks_are_judged_by_what_their_languages_have(language):
    page = PAGES[language]
    lines = page.splitlines()
    menu = "\n".join(line[start : start + 8] for line in lines for start in range(0, 64, 8))
    spam = {
        "clean": page, "the same line again and again": page + (lines[0] + "\n") * 6,
        "a phrase again and again": "".join(lines) + lines[1][:30] * 12,
        "a menu": menu, "prices": page + "\n".join(f"{number * 7919}" for number in range(90)),
        "too short": lines[0], "links": page + "\n".join(f"http://x.org/{number * 7919}" for number in range(40)),
    }
    rows = pa.Table.from_pylist([{"text": text} for text in spam.values()], SCHEMA)
    filled = Features().apply(Language().apply(rows))
    assert filled["language"].to_pylist()[0] == language
    broken = first_broken(filled["features"], RULES["web"]).rules
    assert [name for name, rule in zip(spam, broken, strict=True) if rule < 0] == ["clean"]


def test_short_lines_of_ideographs_are_no_fragments():
    """Thirty characters are five words of English and seventeen of Chinese."""
    verses = "\n".join(line[start : start + 28] for line in PAGES["zh"].splitlines() for start in (0, 28)) + "。"
    filled = Features().apply(Language().apply(pa.Table.from_pylist([{"text": verses}], SCHEMA)))
    assert first_broken(filled["features"], from_source(FINEWEB)).rules.tolist() == [-1]


def test_a_share_of_exactly_the_threshold_passes():
    for numerator, denominator in ((1, 5), (3, 10), (12, 100), (67, 100)):
        value = np.float32(numerator / denominator)
        column = pa.StructArray.from_arrays([pa.array([value, np.nextafter(value, np.float32(1))])], names=["digits"])
        above = first_broken(column, [Rule("digits", None, numerator / denominator, "")])
        assert above.rules.tolist() == [-1, 0] and above.above.tolist() == [False, True]
        below = first_broken(column, [Rule("digits", numerator / denominator, None, "")])
        assert below.rules.tolist() == [-1, -1]


def test_first_broken_is_the_plain_loop(texts):
    for rules in RULES.values():
        column = features_of(texts)
        broken = first_broken(pa.chunked_array([column.slice(0, 50), column.slice(50)]), rules)
        for index, row in enumerate(column.to_pylist()):
            first = next((
                (number, row[rule.feature]) for number, rule in enumerate(rules)
                if (rule.low is not None and row[rule.feature] < np.float32(rule.low))
                or (rule.high is not None and row[rule.feature] > np.float32(rule.high))
            ), (-1, 0.0))
            assert (broken.rules[index], broken.values[index]) == first


def test_thresholds_of_the_configuration_take_the_place_of_the_sets():
    config = RulesConfig(
        set="web", labels=["low"],
        thresholds={"words": (10, None), "stop_words": (None, None), "duplicate_line_text": (None, 0.05),
                    "longest_line": (None, 500)},
    )
    rules = {rule.feature: rule for rule in rules_of(config, "curate.rules.web")}
    assert "stop_words" not in rules and len(rules) == len(RULES["web"])
    assert rules["words"] == Rule("words", 10, None, "configuration")
    assert list(rules)[-1] == "longest_line" and rules["c4_sentences"].low == 5
    assert list(rules).index("duplicate_line_text") > list(rules).index("terminal_lines")
    unknown = RulesConfig(set="code", labels=["low"], thresholds={"letter": (0.1, None)})
    with pytest.raises(DataError, match=r"curate\.rules\.code\.thresholds.*letter\n.*letters"):
        rules_of(unknown, "curate.rules.code")


def test_every_rule_is_about_a_feature_and_says_where_it_is_from():
    for rules in RULES.values():
        assert len({rule.feature for rule in rules}) == len(rules)
        for rule in rules:
            assert rule.feature in FEATURES and rule.source and (rule.low is not None or rule.high is not None)
