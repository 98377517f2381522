"""The main text of pages in any language, between what is none."""

import pytest
from justext import get_stoplists

from data_pipeline.sources.web import main_text
from data_pipeline.text.language import _stop_lists

# Five sentences of every language; what stands around them on a page.
ARTICLES = {
    "en": "The tasks that wait are kept in a queue, and a free worker takes the oldest of them. Nobody knows "
          "how long it will take, but that does not matter, for in the end all of them are done and everybody "
          "goes home again. ",
    "de": "Die wartenden Aufgaben stehen in einer Schlange, und wer frei ist, nimmt sich die älteste. Niemand "
          "weiß, wie lange es dauern wird, aber das ist nicht wichtig, denn am Ende sind alle fertig und gehen "
          "nach Hause. ",
    "fr": "Les tâches en attente restent dans une file, et un ouvrier libre prend la plus ancienne. Personne "
          "ne sait combien de temps cela va durer, mais ce n'est pas grave, car à la fin tout est fait et "
          "chacun rentre. ",
    "ru": "Задачи ждут в очереди, и свободный работник берёт самую старую из них. Никто не знает, сколько это "
          "продлится, но это и не важно, потому что в конце концов всё будет сделано и все пойдут домой. ",
    "ko": "기다리는 작업은 대기열에 있고, 쉬고 있는 일꾼은 그 중에서 가장 오래된 것을 가져갑니다. 얼마나 "
          "걸릴지는 아무도 모르지만 그것은 중요하지 않습니다. 결국 모든 일이 끝나고 모두 집으로 돌아갈 것이기 "
          "때문입니다. ",
    "el": "Οι εργασίες που περιμένουν είναι σε μια ουρά και ο ελεύθερος εργάτης παίρνει την παλαιότερη από "
          "αυτές. Κανείς δεν ξέρει πόσο θα διαρκέσει, αλλά αυτό δεν έχει σημασία, γιατί στο τέλος όλα θα έχουν "
          "γίνει. ",
    "he": "המשימות הממתינות עומדות בתור, והעובד הפנוי לוקח את הישנה ביותר מביניהן. אף אחד לא יודע כמה זמן זה "
          "ייקח, אבל זה לא חשוב, כי בסוף כל המשימות יהיו גמורות וכולם ילכו הביתה כמו תמיד. ",
    "no": "Oppgavene som venter står i en kø, og den som er ledig tar den eldste av dem. Ingen vet hvor lenge "
          "det vil vare, men det er ikke viktig, for til slutt er alle ferdige og går hjem igjen som de "
          "pleier. ",
    "zh": "等待的任务排成队列，空闲的工人取走其中最早的一个。没有人知道这要花多长时间，不过这并不重要，因为最后"
          "所有的任务都会完成，大家也都会回家。",
    "ja": "待っているタスクは列に並び、手の空いた作業者が一番古いものを取ります。どれだけ時間がかかるかは誰にも"
          "わかりませんが、それは重要ではありません。最後にはすべてが終わり、みんな家に帰るからです。",
    "th": "งานที่รออยู่จะเรียงกันเป็นแถว และคนงานที่ว่างจะหยิบงานที่เก่าที่สุดไปทำ ไม่มีใครรู้ว่าจะใช้เวลานานเท่"
          "าใด แต่นั่นไม่สำคัญ เพราะในที่สุดงานทั้งหมดก็จะเสร็จ ",
}
MENU = "".join(f"<li><a href='/{n}'>menu{n}</a></li>" for n in range(12))


@pytest.mark.parametrize("language", ARTICLES)
def test_an_article_stays_and_the_menu_goes_in_every_language(language):
    article = ARTICLES[language].strip()
    paragraphs = "".join(f"<p>{article} {article}</p>" for _ in range(3))
    page = ("<html><head><title>t</title><script>var text = 'the words of a script, not of the page';</script></head>"
            f"<body><nav><ul>{MENU}</ul></nav><main>{paragraphs}</main>"
            "<footer><a href='/'>menu99</a></footer></body></html>")
    text = main_text.justext(page)
    assert text.count(article) == 6 and "menu" not in text and "script" not in text


def test_a_page_in_two_languages_keeps_both():
    paragraphs = "".join(f"<p>{ARTICLES[language] * 2}</p>" for language in ("en", "de"))
    text = main_text.justext(f"<html><body>{paragraphs}</body></html>")
    assert ARTICLES["en"].strip() in text and ARTICLES["de"].strip() in text


def test_a_page_in_no_language_is_taken_for_english():
    assert main_text.justext("<html><body><p>123 456</p></body></html>") == ""
    assert main_text.justext("<html><body><p>\0\ufffe</p></body></html>") == ""


def test_every_list_of_justext_goes_by_a_code():
    lists = _stop_lists()
    assert {"en", "de", "he", "no", "nn", "id", "sr", "ko", "fy", "ht"} <= lists.keys()
    assert not {"zh", "ja", "th"} & lists.keys()
    # Dialects and constructed languages that CLD2 does not tell apart.
    assert len(get_stoplists() - set(lists.values())) < 20
