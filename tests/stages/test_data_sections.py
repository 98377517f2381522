"""The data part of the report: figures equal to the records, texts of documents harmless, a page of its own."""

import html
import json
import re
import shutil

import pytest
from pages import Page
from runs_tree import DOMAINS, edit_json, write_json, write_runs

from data_pipeline.config import DataError
from stages.data_plots import data_plots
from stages.data_sections import EXCERPT_BYTES, examples_shown, write_data_page
from stages.records import Dropped, Example, load_data
from stages.report_page import Excerpts
from stages.report_page import _block_html as block_html
from stages.report_page import _block_markdown as block_markdown


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_runs(tmp_path)


def build(runs, tmp_path):
    page = write_data_page(runs, tmp_path / "out", "own")
    return page.read_text(), page.with_name("report.md").read_text()


def records(runs):
    return load_data(runs.joinpath)


def table(page, caption):
    """Rows of the table under `caption`."""
    text = page.split(f'<h3 class="caption">{caption}</h3>')[1].split("</table>")[0]
    return Page(text + "</table></div>").rows


def test_page_is_well_formed_and_fetches_nothing(runs, tmp_path):
    text, _ = build(runs, tmp_path)
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "report.md"]
    assert build(runs, tmp_path)[0] == text


def test_tokens_are_reckoned_from_bytes_and_counted_in_the_end(runs, tmp_path):
    files = json.loads((runs / "tokenize" / "blend.json").read_text())["files"]
    tokens = sum(entry["tokens"] for name, entry in files.items() if name.startswith("train/docs"))
    size = sum(entry["bytes"] for name, entry in files.items() if name.startswith("train/docs"))
    funnel = json.loads((runs / "curate" / "funnel.json").read_text())
    for row in funnel:                      # what is left is what was tokenized
        if (row["domain"], row["step"]) == ("docs", "held_out"):
            row["bytes"] = size
    write_json(runs / "curate" / "funnel.json", funnel)
    text, markdown = build(runs, tmp_path)
    rows = table(text, "Left of docs")
    read, last = rows[1], rows[-1]
    assert read[0] == "read" and read[-1] == f"≈ {10_000_000 * tokens / size:,.0f}"
    assert last[0] == "held out" and last[-1] == f"{tokens:,}"
    assert f"| {tokens:,} |" in markdown
    figure = data_plots(records(runs))["funnel-docs"].svg
    assert f"≈ {10 * tokens / size:.2f} M" in figure and f">{tokens / 1e6:.2f} M" in figure


def test_steps_name_their_reasons_and_changes(runs, tmp_path):
    text, _ = build(runs, tmp_path)
    row = next(row for row in table(text, "Left of code") if row[0] == "heuristics")
    assert row[1].startswith("stop_words < 2: 40; digits > 0.2: 12; duplicate_7grams > 0.1: 7; ")
    assert row[1].endswith("; others: 1")
    assert row[2:6] == ["2,320", "−11.11 %", "12.800", "−11.11 %"]
    assert next(row for row in table(text, "Left of code") if row[0] == "license")[1] == "–"


def test_thresholds_of_every_domain_are_folded_and_scores_open(runs, tmp_path):
    text, markdown = build(runs, tmp_path)
    body = text.split('id="thresholds"')[1].split("</section>")[0]
    scores, *folds = body.split('<details class="fold">')
    assert [re.findall(r"<h4>(.*?)</h4>", part) for part in (scores, *folds)] == [
        [f"{domain}: fluency" for domain in DOMAINS],
        *[["digits", "stop words", "characters", "encoded run", "language share", "perplexity"]] * 3]
    assert "&gt; 0.2: 12 went" in folds[0] and "&lt; 0.3: 3 went" in folds[0] and "&gt; 9,000: 21 went" in folds[0]
    assert "&gt; 255: none went" in folds[0]
    assert "| code: fluency | -10 | 0 | high ≥ -2.5; medium-high ≥ -3.5; medium ≥ -5.25; " in markdown


def test_examples_are_listed_by_frequency_with_what_broke_the_rule(runs, tmp_path):
    text, markdown = build(runs, tmp_path)
    body = text.split('id="dropped"')[1].split("</section>")[0]
    titles = re.findall(r"<summary>(.*?)</summary>", body)
    assert titles[:5] == ["code: 56 dropped", "repeated strings taken out of 55 documents",
                          "stop_words &lt; 2: 40 documents", "digits &gt; 0.2: 12 documents",
                          "too large for the sample: 3 documents"]
    assert body.count("<p>not permissive: 1 document</p>") == 3             # nothing to unfold
    assert body.count("<li>") == 3 * (3 * 6 + 1)
    assert '<span class="where">package-0 a/b_0.py</span>' in body
    assert "<pre>1 &lt; 2\n\t| 3 | 4</pre>" in body
    assert markdown.count("Licensed under the Apache License") == 3         # one a domain


def test_invisible_characters_are_seen_and_marks_do_nothing():
    shown = Excerpts([Example("x\x1by", "", "\u200b<i>", "a\x07b\r\n<script>\u202e\ud800&#8238;\ufeff\ttab")])
    page, markdown = block_html(shown), block_markdown(shown)
    for text in (page, markdown):
        for character in "\x07\r\x1b\u202e\u200b\ud800\ufeff":
            assert character not in text
        for written in ("\\x1b", "\\x07", "\\r", "\\u202e", "\\ud800", "\\ufeff"):
            assert written in text
        assert "\n" in text and "\t" in text
    assert "<script" not in page and "<i>" not in page and "&amp;#8238;" in page
    assert '<span class="control">\\x07</span>' in page
    page.encode(), markdown.encode()


def test_fences_outlast_the_backticks_of_an_excerpt():
    markdown = block_markdown(Excerpts([Example("s", "p", "v", "```` four\n</details>")]))
    assert markdown.split("\n\n", 1)[1] == "`````\n```` four\n</details>\n`````"


def test_a_page_of_many_reasons_stays_small(runs, tmp_path):
    excerpt = "a<b>&'\"é" * 75
    example = {"source": "s" * 40, "path": "p" * 80, "value": "v" * 80, "excerpt": excerpt}
    write_json(runs / "curate" / "dropped.json", {
        domain: {f"reason {number}": {"documents": number, "examples": [example] * 6} for number in range(60)}
        for domain in DOMAINS})
    text, markdown = build(runs, tmp_path)
    shown = examples_shown(records(runs).dropped)
    assert 1 <= shown < 6
    assert text.count("<li>") == 3 * 60 * shown
    assert len(html.escape(excerpt).encode()) * 3 * 60 * shown <= EXCERPT_BYTES
    assert len(text.encode()) < 1_500_000 and len(markdown.encode()) < 500_000


def test_few_examples_are_all_shown():
    example = Example("s", "p", "v", "x" * 600)
    assert examples_shown([Dropped("docs", "r", 9, [example] * 6)]) == 6
    assert examples_shown([]) == 0


def test_without_tokens_the_page_has_none(runs, tmp_path):
    for stage in ("tokenizer", "tokenize"):
        shutil.rmtree(runs / stage)
    text, markdown = build(runs, tmp_path)
    assert "≈" not in text and "Tokens" not in text and 'id="tokens"' not in text
    assert table(text, "Left of docs")[0] == ["Step", "Reasons (documents)", "Documents", "Change", "MB", "Change"]
    assert "## Data: what was dropped" in markdown


def test_tokens_tables_hold_the_records_figures(runs, tmp_path):
    edit_json(runs / "tokenize" / "metrics.json", bytes_per_token_docs=3.98765, byte_fallback_share_docs=0.012345)
    text, _ = build(runs, tmp_path)
    row = Page(text).row("docs")
    assert row[3] == "3.988" and row[-1] == "1.2345"
    rows = [row for row in Page(text).rows if row[:2] == ["docs", "high"]]
    blend = json.loads((runs / "tokenize" / "blend.json").read_text())
    times, held = blend["repeats"]["train/docs-high"], blend["files"]["train/docs-high"]
    assert rows == [["docs", "high", f"{held['documents']:,}", f"{held['tokens']:,}",
                     f"{held['bytes'] / held['tokens']:.3f}", f"{times:.3f}",
                     f"{100 * times * held['tokens'] / blend['tokens']:.2f}"]]
    files = table(text, "What training reads: 800,000 tokens, nothing more than 8 times")
    assert [row[1] for row in files if row[0] == "code"] == ["high", "medium-high", "medium", "medium-low", "low"]


def test_plots_show_phases_repeats_and_the_bound(runs):
    drawn = data_plots(records(runs))
    assert set(drawn) == {"funnel-code", "funnel-docs", "funnel-reference", "blend", "repeats"}
    words = {name: re.findall(r"<text[^>]*>([^<]*)</text>", plot.svg) for name, plot in drawn.items()}
    assert {"0–60 %", "60–100 %", "45", "30", "25", "reference"} <= set(words["blend"])
    assert {"at most 8", "code, high", "reference, low", "0.10"} <= set(words["repeats"])
    assert all(len(plot.svg) < 60_000 for plot in drawn.values())
    assert {name: plot.svg for name, plot in data_plots(records(runs)).items()} == {
        name: plot.svg for name, plot in drawn.items()}


def test_a_missing_record_names_its_stage(runs, tmp_path):
    (runs / "curate" / "dropped.json").unlink()
    with pytest.raises(DataError, match=r"dropped\.json: not found; stage `curate` writes it\.\nRun that stage first"):
        write_data_page(runs, tmp_path / "out", "own")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "content"), [
    ("curate/histograms.json", {"digits": {"docs": {"edges": [0, 1], "counts": [1, 2], "low": None, "high": 1,
                                                    "source": "", "labels": {}}}}),
    ("curate/histograms.json", {"digits": {"docs": {"edges": [0, 1]}}}),
    ("curate/dropped.json", {"docs": {"digits > 0.2": {"documents": 3}}}),
    ("curate/dropped.json", {"docs": {"digits > 0.2": {"documents": 3, "examples": [{"source": "s"}]}}}),
    ("tokenize/blend.json", {"tokens": 1, "repeats_at_most": 8, "files": {}, "phases": [
        {"until": 1.0, "weights": {"train/docs-best": 1.0}}], "repeats": {}}),
    ("tokenize/blend.json", []),
])
def test_malformed_records_are_named(runs, name, content):
    write_json(runs / name, content)
    with pytest.raises(DataError, match=f"{name}: .*\nRun the stage that writes it again"):
        records(runs)
