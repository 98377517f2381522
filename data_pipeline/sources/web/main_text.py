"""A web page's main text.

jusText is Nemotron-CC's extractor (paper 2412.02595), here with its own thresholds and, as in NeMo Curator, the stop
words of the languages the page is in, by CLD2: whatever `curate.language.keep` asks for has been extracted. A page
mostly in a language that jusText has no list of (Chinese, Japanese, Thai ...) goes to Resiliparse, whose rules look at
the page's structure alone; one in no language that can be told is taken for English.

Two things of jusText are written anew: a paragraph makes up its text once, not at every question asked of it, and the
second pass over the paragraphs takes linear time, where jusText's own takes minutes for one page that is a long table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, cached_property

import lxml.etree
from justext.core import MAX_HEADING_DISTANCE_DEFAULT, ParagraphMaker, classify_paragraphs, html_to_dom, preprocessor
from justext.paragraph import Paragraph
from resiliparse.extract.html2text import extract_plain_text

from data_pipeline.text.language import UNKNOWN, languages, stop_words

SPOKEN = 0.1                    # share of a page's text that makes a language one of the page's
DECIDED = ("good", "bad")
WHITE_SPACE = re.compile(r"[^\S ]\s*|\s{2,}")       # all but single blanks, which stay


class _Paragraph(Paragraph):
    def append_text(self, text: str) -> str:
        text = _collapse(text)
        self.text_nodes.append(text)
        return text

    @cached_property
    def text(self) -> str:
        return _collapse("".join(self.text_nodes).strip())


class _ParagraphMaker(ParagraphMaker):
    def _start_new_pragraph(self) -> None:
        super()._start_new_pragraph()
        self.paragraph = _Paragraph(self.path)


def _collapse(text: str) -> str:
    """Runs of white space as one line feed where they hold a line end, else as one blank."""
    return WHITE_SPACE.sub(lambda run: "\n" if "\n" in run[0] or "\r" in run[0] else " ", text)


def justext(html: str) -> str | None:
    """Paragraphs that are not boilerplate, with an empty line between; None for what is no HTML."""
    found = languages(html, markup=True)
    commonest = found[0][0]
    if commonest != UNKNOWN and stop_words(commonest) is None:
        return resiliparse(html)
    spoken = frozenset(code for code, share in found if share >= SPOKEN and stop_words(code))
    try:
        paragraphs = _ParagraphMaker.make_paragraphs(preprocessor(html_to_dom(html)))
    except (lxml.etree.LxmlError, ValueError, AssertionError, RecursionError):
        return None
    classify_paragraphs(paragraphs, _stop_words(spoken or frozenset({"en"})))
    revise(paragraphs)
    return "\n\n".join(paragraph.text for paragraph in paragraphs if paragraph.class_type == "good")


def resiliparse(html: str) -> str | None:
    """What Resiliparse takes for main content; None for what is no HTML."""
    try:
        return extract_plain_text(html, main_content=True, alt_texts=False)
    except (ValueError, RuntimeError):
        return None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {"justext": justext, "resiliparse": resiliparse}


@cache
def _stop_words(spoken: frozenset[str]) -> frozenset[str]:
    return frozenset[str]().union(*(stop_words(code) or () for code in spoken))


def revise(paragraphs: list[Paragraph]) -> None:
    """Set `class_type` of each paragraph from its `cf_class` and its neighbours'.

    The rules of `justext.core.revise_paragraph_classification`, with every class known before headings look ahead, as
    in NeMo Curator.
    """
    classes = [paragraph.cf_class for paragraph in paragraphs]
    lengths = [len(paragraph) for paragraph in paragraphs]
    for index, paragraph in enumerate(paragraphs):
        if paragraph.heading and classes[index] == "short" and _good_follows(index, classes, lengths):
            classes[index] = "neargood"

    before, after = _neighbours(classes), _neighbours(classes[::-1])[::-1]
    classes = [
        _short(before[index], after[index]) if name == "short" else name for index, name in enumerate(classes)
    ]

    decided_after = [decided for decided, _ in _neighbours(classes[::-1])[::-1]]
    for index, name in enumerate(classes):
        if name == "neargood":
            previous = classes[index - 1] if index else "bad"
            classes[index] = "bad" if (previous, decided_after[index]) == ("bad", "bad") else "good"

    for index, paragraph in enumerate(paragraphs):
        if paragraph.heading and classes[index] == "bad" and paragraph.cf_class != "bad":
            classes[index] = "good" if _good_follows(index, classes, lengths) else "bad"
    for paragraph, name in zip(paragraphs, classes, strict=True):
        paragraph.class_type = name


def _good_follows(index: int, classes: list[str], lengths: list[int]) -> bool:
    """Whether a good paragraph stands near below."""
    distance = 0
    for following in range(index + 1, len(classes)):
        if distance > MAX_HEADING_DISTANCE_DEFAULT:
            break
        if classes[following] == "good":
            return True
        distance += lengths[following]
    return False


def _neighbours(classes: list[str]) -> list[tuple[str, str]]:
    """For each place the nearest class before it that is good or bad, and the nearest that is not short."""
    decided = classified = "bad"
    found = []
    for name in classes:
        found.append((decided, classified))
        decided = name if name in DECIDED else decided
        classified = name if name != "short" else classified
    return found


def _short(before: tuple[str, str], after: tuple[str, str]) -> str:
    """The class of a short paragraph: that of its neighbours; between good and bad, good beside a near-good one."""
    if before[0] == after[0]:
        return before[0]
    return "good" if any(side == ("bad", "neargood") for side in (before, after)) else "bad"
