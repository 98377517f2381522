"""Figures: what they show, their colours, ids and bytes; histograms of odd distributions."""

import math
import re
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import hypothesis
import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs_tree import report_stage, write_runs

from data_pipeline.schema import Histogram
from stages.report import figures
from stages.report.records import Records

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ("validation", "fp8_gap", "layer_importance", "candidates", "distillation", "decoding")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    root = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_runs(root)
        return Records(report_stage().params, root / "runs/cpu")


def words(svg):
    return " ".join("".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text"))


def test_figures_name_what_they_show(records):
    expected = {"validation": "hybrid-bf16-seed2", "fp8_gap": "hybrid-fp8-seed2", "layer_importance": "attention",
                "candidates": "chosen", "distillation": "random", "decoding": "transformer"}
    for name in NAMES:
        assert expected[name] in words(getattr(figures, name)(records)), name


def test_lines_are_the_records(records, monkeypatch):
    monkeypatch.setattr(figures, "lines", lambda series, *_: {one.label: one for one in series})
    row, line = records.decode["hybrid"][0], figures.decoding(records)["hybrid"]
    slower = 1 / (1 / row.tokens_per_second + row.seconds_per_token_spread)
    assert line.error[0] == pytest.approx(row.tokens_per_second - slower, rel=0.05)
    dots = figures.candidates(records).values()         # each candidate in one colour
    assert sum(len(one.x) for one in dots) == sum(item.agreement is not None for item in records.candidates)
    seeds = [figures.look(records, f"hybrid-bf16{seed}") for seed in ("", "-seed2", "-seed3")]
    assert seeds == [(figures.PALETTE[0], style) for style in ("-", "--", ":")]


def test_colours_are_the_pages_and_bytes_the_same_whatever_the_global_style(records):
    first = {name: getattr(figures, name)(records) for name in NAMES}
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=["red"]), "axes.edgecolor": "red"}):
        assert {name: getattr(figures, name)(records) for name in NAMES} == first
    for svg in first.values():
        assert "var(--ink" in svg and "prefers-color-scheme: dark" in svg
        assert not re.search("#01010|#02020|#03030|<metadata|20\\d\\d-", svg.split(">", 1)[0] + svg[:2000])
        assert len(svg) < 60_000


@pytest.mark.parametrize(("gib", "axis", "tick"), [(0.0008, "Memory (MiB)", "0.84"), (0.084, "Memory (MiB)", "87"),
                                                   (31.0, "Memory (GiB)", "32.0")])
def test_memory_is_in_a_unit_that_is_known(records, gib, axis, tick):
    """Of the smoke profile's candidates the axis once said 808 m."""
    found = [item.model_copy(update={"memory_gib": gib * (1 + place / 100)})
             for place, item in enumerate(records.candidates)]
    shown = words(figures.candidates(SimpleNamespace(candidates=found)))
    assert axis in shown and re.search(rf"\b{tick}\b", shown) and not re.search(r"\d [mk]\b", shown)


def test_labels_make_ids_their_own(records):
    svg = figures.labelled(figures.decoding(records), "a-b", "<words> & more")
    root = ElementTree.fromstring(svg)
    ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
    assert ids and all(name.startswith("a-b-") for name in ids) and root.attrib["aria-label"] == "<words> & more"
    assert {"".join(found) for found in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)} <= ids


@pytest.mark.parametrize("ground", ["#ffffff", "#14181d"])
@pytest.mark.parametrize("colour", [*figures.PALETTE, *figures.LABEL_COLOURS.values()])
def test_colours_have_contrast_on_light_and_dark(colour, ground):
    """WCAG 2 relative luminance; 3:1 is its bound for graphics."""
    def luminance(text):
        channels = [int(text[place:place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05

    ratio = luminance(colour) / luminance(ground)
    assert max(ratio, 1 / ratio) >= 3


def test_a_diverged_run_is_drawn():
    series = [figures.Series("lost", [1, 2, 3], [5.0, math.nan, math.nan], "#c9561b"),
              figures.Series("nothing", [], [], "#2f7dc1"),
              figures.Series("well", [1, 2, 3], [5.0, 4.0, 3.0], "#1c8a63"),
              figures.Series("better", [1, 2, 3], [5.0, 3.0, 2.0], "#1c8a63")]
    assert words(figures.lines(series, "Tokens", "Loss", figures.zoom(series))).endswith("well better lost nothing")
    assert "<svg" in figures.lines([], "Tokens", "Loss", figures.zoom([]))


def test_the_gap_has_the_papers_sign():
    assert figures.gap({0: 9.0, 1: 4.0, 2: 2.0, 3: 1.0}, {0: 9.0, 1: 4.4, 2: 1.9}) == pytest.approx({1: -10, 2: 5})


# --- Histograms -------------------------------------------------------------------------------------------------------

LENGTHS = Histogram(edges=[10.0 * 3 ** edge for edge in range(8)], counts=[1, 5, 25, 125, 25, 5, 1], low=200.0,
                    high=5000.0, source="this project", labels={})


def spans(panel, colour):
    """Left and right ends of the areas of one colour, in shares of the width."""
    return [(start / len(panel.heights), end / len(panel.heights)) for start, end, of in panel.areas if of == colour]


def test_places_are_those_of_interpolation_between_edges():
    values = np.concatenate([np.linspace(10, 21_870, 50), LENGTHS.edges, [-5, 1e9]])
    expected = np.interp(values, LENGTHS.edges, np.arange(8))
    np.testing.assert_allclose([figures.place(LENGTHS, value) for value in values], expected, atol=1e-9)
    assert figures.place(LENGTHS, 90.0, inclusive=True) == 3


def test_areas_beyond_the_thresholds_are_those_cut():
    panel = figures.panel("characters", LENGTHS, {"characters < 200": 1200, "words < 30": 9})
    low, high = figures.place(LENGTHS, 200) / 7, figures.place(LENGTHS, 5000) / 7
    assert spans(panel, figures.CUT) == [pytest.approx((0, low), abs=1e-3), pytest.approx((high, 1), abs=1e-3)]
    assert spans(panel, figures.KEPT) == [pytest.approx((low, high), abs=1e-3)]
    assert panel.key == [(figures.CUT, "< 200 or > 5,000: 1,200 went")]
    assert panel.ends == ("10", "21,870") and max(panel.heights) == panel.heights[3] == 1


def test_scores_are_coloured_by_label():
    edges = [number / 10 for number in range(11)]
    labels = {"high": 0.9, "medium-high": 0.8, "medium": 0.5, "medium-low": 0.25}
    histogram = Histogram(edges=edges, counts=[9] * 10, low=None, high=None, source="", labels=labels)
    panel = figures.panel("fluency", histogram, {})
    assert [text for _, text in panel.key] == ["high ≥ 0.9", "medium-high ≥ 0.8", "medium ≥ 0.5", "medium-low ≥ 0.25",
                                               "low"]
    starts = {label: spans(panel, colour)[0][0] for label, colour in figures.LABEL_COLOURS.items()}
    assert starts == pytest.approx({**labels, "low": 0}, abs=1e-3)


@pytest.mark.parametrize("edges", [[30000.0] * 4, [0.0] * 4, [0.0, 0.0, 1.0, 1.0], [-1e300, 0.0, 0.0, 1e300]])
def test_one_document_and_documents_of_one_length_are_drawn(edges):
    """Rounded edges coincide: this divided by zero, after the work was done."""
    for low, high, counts in ((edges[0], edges[-1], [0, 0, 1]), (None, edges[1], [0] * 3), (edges[1], None, [3, 0, 1])):
        histogram = Histogram(edges=edges, counts=counts, low=low, high=high, source="", labels={})
        panel = figures.panel("characters", histogram, {})
        assert all(0 <= start <= end <= 3 for start, end, _ in panel.areas) and np.isfinite(panel.heights).all()
        labels = {"high": edges[2], "medium-high": edges[1], "medium": edges[1], "medium-low": edges[0]}
        scores = figures.panel("fluency", histogram.model_copy(update={"labels": labels}), {})
        assert scores.key and all("nan" not in figures.histogram(one) for one in (panel, scores))


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5, 1e4, 1e9]) | st.floats(-1e9, 1e9), min_size=2, max_size=8).map(sorted),
    st.data(), st.none() | st.floats(-1e9, 1e9), st.none() | st.floats(-1e9, 1e9),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_histogram_is_drawn_with_bars_as_high_as_its_counts(edges, data, low, high):
    counts = data.draw(st.lists(st.integers(0, 10**6), min_size=len(edges) - 1, max_size=len(edges) - 1))
    panel = figures.panel("words", Histogram(edges=edges, counts=counts, low=low, high=high, source="", labels={}), {})
    root = ElementTree.fromstring(figures.histogram(panel))
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    drawn = np.zeros(len(counts))
    for path in root.iter(f"{SVG}path"):
        if not re.search("fill: #", path.attrib.get("style", "")):
            continue
        pairs = re.findall("[ML] ([^MLz]+)", path.attrib["d"])
        points = [[float(number) for number in pair.split()] for pair in pairs]
        for (x, y), (beyond, same) in pairwise(points):
            if beyond > x and y == same:                        # the top of a bar
                within = int((x + beyond) / 2 / width * len(counts))
                drawn[within] = max(drawn[within], (height - y) / height * 1.05)
    np.testing.assert_allclose(drawn, panel.heights, atol=2e-3)


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=8).map(sorted), st.floats(allow_nan=False), st.booleans())
def test_every_value_has_a_place(edges, value, inclusive):
    histogram = Histogram(edges=edges, counts=[0] * (len(edges) - 1), low=None, high=None, source="", labels={})
    assert 0 <= figures.place(histogram, value, inclusive) <= len(edges) - 1


@pytest.mark.parametrize(("reason", "measure", "expected"), [
    ("digits > 0.2", "digits", True), ("stop_words < 2", "words", False), ("words_of > 2", "words", False),
    ("perplexity", "perplexity", True), ("share of en < 0.3", "language_share", True),
    ("language de", "language_share", False),
])
def test_reasons_belong_to_measures(reason, measure, expected):
    assert figures.is_about(reason, measure) is expected
