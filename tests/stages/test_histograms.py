"""Panels of thresholds: where lines stand, what is coloured as cut, what the words say."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from stages.histograms import HEIGHT, WIDTH, is_about, place, score_panel, threshold_panel
from stages.records import Histogram

LINEAR = Histogram("digits", "docs", [0.1 * edge for edge in range(11)], [9, 9, 9, 9, 9, 9, 9, 9, 9, 9], None, 0.42,
                   "Nemotron-CC", {})
LENGTHS = Histogram("characters", "docs", [10.0 * 3 ** edge for edge in range(8)], [1, 5, 25, 125, 25, 5, 1], 200.0,
                    5000.0, "this project", {})


def spans(panel, name):
    """Left and right ends of the bars of one colour, in bars, and their heights."""
    found = []
    for path in ElementTree.fromstring(panel.svg):
        if path.attrib["class"] == name:
            for left, top, right in re.findall(r"M([\d.]+) \d+V([\d.]+)H([\d.]+)", path.attrib["d"]):
                found.append((float(left) / WIDTH, float(right) / WIDTH, HEIGHT - float(top)))
    return found


def lines(panel):
    return [float(place) / WIDTH for place in re.findall(r'class="limit" d="M([\d.]+) 0V', panel.svg)]


@pytest.mark.parametrize("histogram", [LINEAR, LENGTHS])
def test_places_are_those_of_interpolation_between_edges(histogram):
    values = np.concatenate([np.linspace(histogram.edges[0], histogram.edges[-1], 50), histogram.edges, [-5, 1e9]])
    expected = np.interp(values, histogram.edges, np.arange(len(histogram.edges)))
    np.testing.assert_allclose([place(histogram, value) for value in values], expected, atol=1e-9)


def test_bars_beyond_the_thresholds_are_those_cut():
    panel = threshold_panel(LENGTHS, {})
    low, high = place(LENGTHS, 200), place(LENGTHS, 5000)
    assert lines(panel) == pytest.approx([low, high], abs=0.01)
    assert all(right <= low + 0.01 or left >= high - 0.01 for left, right, _ in spans(panel, "cut"))
    assert all(low - 0.01 <= left and right <= high + 0.01 for left, right, _ in spans(panel, "keep"))
    covered = sum(right - left for name in ("cut", "keep") for left, right, _ in spans(panel, name))
    assert covered == pytest.approx(7, abs=0.8)                 # bars end a little before the next begins


def test_heights_are_logarithms_of_documents():
    panel = threshold_panel(LENGTHS, {})
    heights = {left: height for name in ("cut", "keep") for left, _, height in spans(panel, name)}
    assert heights[0] == pytest.approx(HEIGHT * np.log1p(1) / np.log1p(125), rel=0.01)
    assert heights[1] == pytest.approx(HEIGHT * np.log1p(5) / np.log1p(125), rel=0.01)
    assert max(heights.values()) == HEIGHT


def test_the_bar_of_a_value_that_may_be_is_not_cut():
    """A rule of at most 0 marked nothing, where most documents have 0."""
    panel = threshold_panel(replace(LINEAR, measure="generated", high=0.0), {"generated > 0": 4})
    assert spans(panel, "keep") == [(0, 0.9, HEIGHT)]
    assert len(spans(panel, "cut")) == 9
    assert panel.key == [("cut", "> 0: 4 went")]


def test_a_threshold_that_no_document_reaches_has_no_line():
    panel = threshold_panel(replace(LINEAR, high=7.0), {"digits_of_others > 7": 3})
    assert not lines(panel) and not spans(panel, "cut")
    assert panel.key == [("cut", "> 7: none went")]


def test_empty_bins_and_a_single_value_are_drawn():
    panel = threshold_panel(replace(LINEAR, counts=[0] * 9 + [1]), {})
    assert [span[:2] for span in spans(panel, "cut")] == [(9, 9.9)]
    assert not spans(threshold_panel(replace(LINEAR, counts=[0] * 10), {}), "keep")


def test_words_say_thresholds_source_and_documents():
    panel = threshold_panel(LENGTHS, {"characters < 200": 1200, "characters > 5000": 34, "words < 30": 9})
    assert panel.key == [("cut", "< 200 or > 5,000: 1,234 went")]
    assert panel.notes == ["this project"]
    assert panel.axis == ["10", "810", "21,870"]


def test_scores_are_coloured_by_label():
    labels = {"high": 0.9, "medium-high": 0.8, "medium": 0.5, "medium-low": 0.25}
    panel = score_panel(replace(LINEAR, measure="fluency", high=None, labels=labels))
    assert [text for _, text in panel.key] == ["high ≥ 0.9", "medium-high ≥ 0.8", "medium ≥ 0.5", "medium-low ≥ 0.25",
                                               "low"]
    begins = {name: min(left for left, _, _ in spans(panel, name)) for name, _ in panel.key}
    assert begins == pytest.approx({"high": 9, "medium-high": 8, "medium": 5, "medium-low": 2.5, "low": 0}, abs=0.01)
    assert lines(panel) == pytest.approx([2.5, 5, 8, 9], abs=0.01)


@pytest.mark.parametrize(("reason", "measure", "expected"), [
    ("digits > 0.2", "digits", True), ("words < 30", "words", True), ("stop_words < 2", "words", False),
    ("words_of > 2", "words", False), ("perplexity", "perplexity", True),
    ("share of en < 0.3", "language_share", True), ("language de", "language_share", False),
])
def test_reasons_belong_to_measures(reason, measure, expected):
    assert is_about(reason, measure) is expected
