"""Plots: what they show, their ids and bytes."""

import re
from xml.etree import ElementTree

import matplotlib
import pytest
from runs_tree import edit_json, report_stage, write_runs

from stages.plots import binned, colours, plots, timeline
from stages.records import Provenance, load
from stages.svg import PALETTE

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("plots")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_runs(root)
        return plots(load(report_stage()))


def run(started, seconds):
    return Provenance("curate", None, "", started, seconds, False, 0.0, {}, None, "", {}, {})


def words(plot):
    return " ".join(text for element in ElementTree.fromstring(plot.svg).iter(f"{SVG}text")
                    if (text := "".join(element.itertext()).strip()))


def test_every_plot_is_there_with_its_words(drawn):
    expected = {
        "training-loss": "Loss (nats a token)", "validation": "Validation bits per byte", "gradient-norm": "Tokens",
        "fp8-gap": "FP8, seed 1", "loss-gap": "seed 1", "layer-importance": "attention",
        "ffn-importance": "neurons",
        "candidates": "KL 0.141, chosen", "candidate-speed": "Decode step", "controls": "least important kept",
        "distillation": "random cut", "decode-speed": "transformer", "output-speed": "compressed",
        "cache-size": "Cache (MiB)", "bits-per-byte": "2.162",
        "syntax-pairs-accuracy": "0.885", "cloze-accuracy": "hybrid-bf16", "recall-accuracy": "0.155",
        "signature-accuracy": "0.415",
        "stage-times": "pretrain@hybrid-fp8",
    }
    assert set(drawn) == set(expected)
    for name, text in expected.items():
        assert text in words(drawn[name]), name


def test_ids_are_unique_over_all_plots_and_references_resolve(drawn):
    ids: list[str] = []
    for plot in drawn.values():
        root = ElementTree.fromstring(plot.svg)
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        for reference in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', plot.svg):
            assert "".join(reference) in own
        ids += own
    assert len(ids) == len(set(ids))


def test_svg_scales_is_labelled_and_carries_no_date(drawn):
    for plot in drawn.values():
        root = ElementTree.fromstring(plot.svg)
        assert root.attrib["aria-label"].startswith(plot.title)
        assert "viewBox" in root.attrib
        assert not {"width", "height"} & set(root.attrib)
        assert root.find(f"{SVG}metadata") is None
        assert len(plot.svg) < 60_000


def test_same_records_same_bytes_whatever_the_global_style(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_runs(tmp_path)
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=["red"])}):
        again = plots(load(report_stage()))
    assert {name: plot.svg for name, plot in drawn.items()} == {name: plot.svg for name, plot in again.items()}


def test_a_model_keeps_its_colour(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_runs(tmp_path)
    found = colours(load(report_stage()))
    assert found["hybrid"] == found["hybrid-bf16"]
    assert found["transformer"] == found["transformer-bf16"]
    assert len(set(found.values())) == 6
    for name, model in (("training-loss", "transformer-bf16"), ("decode-speed", "transformer"),
                        ("cloze-accuracy", "transformer-bf16"), ("distillation", "compressed")):
        assert f"fill: {found[model]}" in drawn[name].svg or f"stroke: {found[model]}" in drawn[name].svg


@pytest.mark.parametrize("colour", PALETTE)
def test_colours_have_contrast_on_white(colour):
    """WCAG 2 relative luminance; 3:1 is its bound for graphics."""
    channels = [int(colour[place:place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 3


def test_idle_time_is_left_out():
    starts, breaks, end = timeline([run(1000, 50), run(1020, 60), run(90_000, 90)])
    assert starts[:2] == [0, 20]
    assert 80 < starts[2] < 90
    assert len(breaks) == 1 and 80 < breaks[0] < starts[2]
    assert end == pytest.approx(starts[2] + 90)
    assert timeline([run(5, 10), run(15, 10)])[1] == []


def test_bins_keep_the_mean_and_the_last_step():
    curve = {"tokens": [1, 2, 3, 4, 5], "loss": [4.0, 2.0, 3.0, 1.0, 7.0]}
    assert binned(curve, "loss", 3) == ([2, 4, 5], [3.0, 2.0, 7.0])
    assert binned(curve, "loss", 50) == ([1, 2, 3, 4, 5], curve["loss"])


def test_a_diverged_run_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = write_runs(tmp_path)
    path = runs / "pretrain" / "hybrid-fp8" / "training.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:200], *(re.sub(r",[^,]*,[^,]*(,[^,]*)$", r",nan,nan\1", line)
                                                for line in lines[200:])]) + "\n")
    edit_json(runs / "pretrain" / "hybrid-fp8" / "metrics.json", final_loss=float("nan"))
    assert "hybrid-bf16" in words(plots(load(report_stage()))["training-loss"])
