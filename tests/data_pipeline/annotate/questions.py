"""Questions as benchmarks have them, ways in which a web page sets them, and texts that never saw them."""

import html
import itertools
import unicodedata
from collections.abc import Callable

import regex

NAMES = ["Mara", "Ned", "Olga", "Pablo", "Quentin", "Rosa", "Sven", "Tilda"]
TEMPLATES = {
    "en": [
        "{} has {} red pens and {} blue pens, gives half of the red pens to a friend, and then buys another {} blue "
        "pens at the shop's sale. How many pens of both colours are left in the end?",
        "A train leaves the station with {0} passengers on board; at the next stop {1} get off and {2} get on, and {3} "
        "of them don't have a ticket. How many passengers are there with a ticket now?",
        "{0}'s garden is {1} metres long and {2} metres wide: what does a fence around it cost, if each metre of the "
        "fence costs {3} dollars and the gate is already paid for?",
        "Each of the {1} boxes that {0} carried into the cellar holds {2} jars, and every jar weighs {3} grams when "
        "it's full. What do all of the full boxes weigh together?",
        "While {0} reads {1} pages of the first volume on every weekday, on weekends it's {2} pages; the volume has "
        "{3} hundred pages. After how many weeks has the whole volume been read?",
    ],
    "zh": [
        "{}有{}支红笔和{}支蓝笔，把红笔的一半送给了朋友，后来又在商店里买了{}支蓝笔，请问最后一共还剩下多少支笔？",
        "一列火车从车站出发时载有{1}名乘客，下一站有{2}人下车，又有{3}人上车，{0}也在其中，现在车上一共有多少名乘客？",
        "{}家的花园长{}米，宽{}米，如果围栏每米需要{}元，那么把整个花园围起来一共要花多少钱呢？",
        "{}把{}个箱子搬进了地下室，每个箱子里装着{}个罐子，每个装满的罐子重{}克，所有的箱子加起来一共有多重？",
        "{}平时每天读{}页书，到了周末每天读{}页，这本书总共有{}百页，请问需要多少个星期才能把整本书读完？",
    ],
    "ja": [
        "{}さんは赤いペンを{}本と青いペンを{}本持っていて、赤いペンの半分を友だちにあげてから、青いペンをもう{}本買いました。全部で何本ですか。",
        "{}さんの庭は縦が{}メートル、横が{}メートルです。フェンスが一メートルあたり{}ドルのとき、庭全体を囲むにはいくらかかりますか。",
        "{}さんが地下室に運んだ{}個の箱には、それぞれ{}個のガラスのびんが入っていて、びん一つの重さは{}グラムです。全部でどれだけの重さですか。",
        "{}さんは平日に毎日{}ページ、週末には{}ページずつ読みます。この本が全部で{}百ページあるとき、何週間で読み終わりますか。",
        "{}さんを乗せた列車は乗客{}人で出発し、次の駅で{}人が降りて{}人が乗りました。いま列車には全部で何人の乗客がいるでしょうか。",
    ],
    "th": [
        "{}มีปากกาสีแดง {} ด้ามและปากกาสีน้ำเงิน {} ด้าม แล้วซื้อปากกาสีน้ำเงินจากร้านค้าเพิ่มอีก {} ด้าม ตอนนี้มีปากกาทั้งหมดกี่ด้าม",
        "สวนของ{}ยาว {} เมตรและกว้าง {} เมตร ถ้ารั้วราคาเมตรละ {} บาท จะต้องจ่ายเงินทั้งหมดเท่าไรเพื่อล้อมรั้วรอบสวน",
        "{}ขนกล่อง {} กล่องลงไปที่ห้องใต้ดิน แต่ละกล่องมีขวดโหล {} ขวด และขวดโหลแต่ละขวดหนัก {} กรัม กล่องทั้งหมดหนักเท่าไร",
        "{}อ่านหนังสือวันละ {} หน้าในวันธรรมดา และวันละ {} หน้าในวันหยุดสุดสัปดาห์ หนังสือมีทั้งหมด {} ร้อยหน้า จะอ่านจบในกี่สัปดาห์",
        "รถไฟของ{}ออกจากสถานีพร้อมผู้โดยสาร {} คน ที่สถานีถัดไปมีคนลง {} คนและมีคนขึ้นมาใหม่ {} คน ตอนนี้มีผู้โดยสารทั้งหมดกี่คน",
    ],
}
SUBJECTS = {
    "en": [
        "The harbour",
        "Our library",
        "This old mill",
        "The orchestra",
        "A quiet valley",
        "The bakery",
        "That museum",
        "The new bridge",
    ],
    "zh": [
        "这座港口",
        "我们的图书馆",
        "那家老磨坊",
        "交响乐团",
        "安静的山谷",
        "街角的面包店",
        "市立博物馆",
        "新建的大桥",
    ],
    "ja": [
        "この港",
        "私たちの図書館",
        "あの古い水車小屋",
        "交響楽団",
        "静かな谷",
        "角のパン屋",
        "市の博物館",
        "新しい橋",
    ],
    "th": [
        "ท่าเรือแห่งนี้",
        "ห้องสมุดของเรา",
        "โรงสีเก่าหลังนั้น",
        "วงดุริยางค์",
        "หุบเขาอันเงียบสงบ",
        "ร้านขนมปังตรงหัวมุม",
        "พิพิธภัณฑ์ประจำเมือง",
        "สะพานแห่งใหม่",
    ],
}
PREDICATES = {
    "en": [
        "was built before the war, though hardly anybody in town remembers by whom, and has been repaired twice since",
        "opens at nine o'clock every morning, except on holidays, when visitors are asked to come in the afternoon",
        "looks best in autumn: the light is low, the tourists are gone, and one hears only the wind in the trees",
        "was nearly closed last year, but the council found the money after all, so it will stay open for now",
        "is known for its collection of maps, which scholars from many countries have come to study over the years",
    ],
    "zh": [
        "是在战争之前建成的，虽然城里几乎没有人记得是谁修建的，但此后已经修缮过两次了。",
        "每天早上九点准时开放，只有节假日例外，那时参观的人们要等到下午才能进去。",
        "在秋天的时候最漂亮，阳光柔和，游客都已离去，耳边只剩下风吹过树林的声音。",
        "去年差一点就关闭了，不过议会最终还是筹到了经费，所以暂时可以继续开放下去。",
        "以收藏的古地图而闻名，多年以来有许多国家的学者专程前来这里进行研究。",
    ],
    "ja": [
        "は戦争の前に建てられましたが、町には誰が建てたのかを覚えている人はほとんどおらず、その後二度修理されています。",
        "は毎朝九時に開きますが、祝日だけは例外で、訪れる人は午後まで待つように言われます。",
        "は秋がいちばん美しく、光は低く、観光客もいなくなって、聞こえるのは木々を渡る風の音だけです。",
        "は昨年もう少しで閉じられるところでしたが、議会が予算を見つけたので、しばらくは続けられます。",
        "は古い地図の収集で知られていて、長年にわたり多くの国の学者が研究のために訪れています。",
    ],
    "th": [
        "สร้างขึ้นก่อนสงคราม แม้แทบไม่มีใครในเมืองจำได้ว่าใครเป็นผู้สร้าง และได้รับการซ่อมแซมมาแล้วสองครั้ง",
        "เปิดทุกเช้าตอนเก้าโมง ยกเว้นวันหยุดราชการที่ผู้เข้าชมต้องรอจนถึงช่วงบ่ายจึงจะเข้าไปได้",
        "สวยที่สุดในฤดูใบไม้ร่วง แสงแดดอ่อนลง นักท่องเที่ยวกลับไปหมดแล้ว และได้ยินแต่เสียงลมพัดผ่านต้นไม้",
        "เกือบถูกปิดไปเมื่อปีที่แล้ว แต่สภาเมืองหางบประมาณมาได้ในที่สุด จึงยังเปิดต่อไปได้อีกระยะหนึ่ง",
        "มีชื่อเสียงเรื่องการสะสมแผนที่โบราณ ซึ่งนักวิชาการจากหลายประเทศเดินทางมาศึกษาตลอดหลายปีที่ผ่านมา",
    ],
}
QUESTIONS = {
    language: [
        template.format(name, 12 + 7 * row, 23 + 5 * column, 31 + row * column)
        for row, template in enumerate(templates)
        for column, name in enumerate(NAMES)
    ]
    for language, templates in TEMPLATES.items()
}
CLEAN = {
    language: [
        f"{subject} {predicate}" if language == "en" else f"{subject}{predicate}"
        for predicate, subject in itertools.product(PREDICATES[language], SUBJECTS[language])
    ]
    for language in TEMPLATES
}


def each(character: str, by: str, every: int = 1) -> Callable[[str], str]:
    """Every so many-th `character` replaced."""

    def typeset(text: str) -> str:
        parts = text.split(character)
        return parts[0] + "".join(
            (by if number % every == 0 else character) + part for number, part in enumerate(parts[1:], start=1)
        )

    return typeset


def within_words(mark: str, at: int = 3) -> Callable[[str], str]:
    return lambda text: " ".join(word[:at] + mark + word[at:] if len(word) > at else word for word in text.split(" "))


def spaced(by: str, every: int) -> Callable[[str], str]:
    """After every so many characters, but neither within a number nor between a letter and its marks."""
    return lambda text: regex.sub(rf"(?s)(.{{{every}}})(?![\p{{M}}\d])", rf"\1{by}", text)


WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)} | {0x20: 0x3000}
NARROW = dict(zip(map(ord, "，？。、："), ",?.,:", strict=True))
ENGLISH: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "upper case": str.upper,
    "wrapped": each(" ", "\n", 7),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "em dashes": lambda text: text.replace(", ", " — ").replace("; ", "—"),
    "ellipses": lambda text: text.replace(",", "…").replace(" and", " … and"),
    "bullets": lambda text: "• " + text.replace(", ", "\n• ").replace(": ", "\n▪ "),
    "guillemets": lambda text: f"«{text.replace('red', '«red»')}»",
    "curly quotes": lambda text: f"“{text.replace(chr(39), '’')}”",
    "full-width punctuation": lambda text: (
        text.replace(",", "，").replace("?", "？").replace(".", "。").replace(":", "：")
    ),
    "full-width letters": lambda text: text.translate(WIDE),
    "soft hyphens": within_words("\u00ad"),
    "word joiners": within_words("\u2060"),
    "zero-width joiners": within_words("\u200d"),
    "zero-width spaces within words": within_words("\u200b"),
    "byte order marks": within_words("\ufeff"),
    "zero-width spaces for blanks": each(" ", "\u200b"),
    "every eighth blank a zero-width space": each(" ", "\u200b", 8),
    "zero-width spaces beside blanks": each(" ", " \u200b"),
    "no-break spaces": each(" ", "\u00a0"),
    "every eighth blank a no-break space": each(" ", "\u00a0", 8),
    "narrow no-break spaces": each(" ", "\u202f", 5),
    "thin spaces": each(" ", "\u2009", 5),
    "figure spaces": each(" ", "\u2007", 5),
    "direction marks": each(" ", " \u200e", 4),
    "underlined": lambda text: " ".join(f"_{word}_" for word in text.split()),
    "bold": lambda text: " ".join(f"**{word}**" for word in text.split()),
    "mathematical letters": lambda text: "".join(
        chr(0x1D400 + ord(c) - 65) if "A" <= c <= "Z" else chr(0x1D41A + ord(c) - 97) if "a" <= c <= "z" else c
        for c in text
    ),
    "ligatures": lambda text: text.replace("fi", "ﬁ").replace("ff", "ﬀ"),
    "emoji": each(" ", " ✏️ ", 6),
    "table": each(" ", " | ", 5),
    "line drawing": each(" ", "│", 5),
    "escaped": lambda text: html.escape(text.replace("'", "’")),
    "escaped twice": lambda text: html.escape(html.escape(f'"{text}"')),
    "references to spaces": each(" ", "&nbsp;", 3),
    "references to signs": lambda text: text.replace(", ", "&mdash;").replace("'", "&#8217;").replace("?", "&#x3F;"),
    "references within words": within_words("&shy;"),
    "variation selectors": each(" ", "\ufe0f ", 4),
    "tabs": each(" ", "\t"),
    "CRLF": each(" ", "\r\n", 6),
}
BLANKLESS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "ASCII punctuation": lambda text: text.translate(NARROW),
    "no punctuation": lambda text: text.translate(dict.fromkeys(NARROW)),
    "wrapped": spaced("\n", 12),
    "ideographic spaces": spaced("\u3000", 9),
    "zero-width spaces": spaced("\u200b", 4),
    "no-break spaces": spaced("\u00a0", 10),
    "full-width digits": lambda text: text.translate(WIDE),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "blanks around digits": lambda text: "".join(f" {c} " if c in "，。、" else c for c in text),
    "references": spaced("&nbsp;", 8),
    "quoted": lambda text: f"「{text}」",
    "soft hyphens": spaced("\u00ad", 6),
}
SETTINGS = {
    "en": ENGLISH,
    "zh": BLANKLESS,
    "th": BLANKLESS,
    "ja": BLANKLESS | {"half-width katakana": lambda text: "".join(HALF.get(c, c) for c in text)},
}
HALF = {unicodedata.normalize("NFKC", chr(code)): chr(code) for code in range(0xFF66, 0xFF9E)} | {
    unicodedata.normalize("NFKC", chr(code) + mark): chr(code) + mark
    for code in range(0xFF66, 0xFF9E)
    for mark in "ﾞﾟ"
    if len(unicodedata.normalize("NFKC", chr(code) + mark)) == 1
}
