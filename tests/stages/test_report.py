"""The page and the Markdown: complete, escaped, self-contained, equal to the records."""

import json
import re
from pathlib import Path

import pytest
from pages import Page
from runs_tree import ROOT, edit_json, report_stage, write_runs

from stages.common import Stage
from stages.params import load_params
from stages.report import report
from stages.report_page import Table, to_html, to_markdown
from stages.report_page import _block_html as block_html
from stages.report_page import _block_markdown as block_markdown


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_runs(tmp_path)


def build():
    metrics = report(report_stage())
    folder = Path("reports/cpu")
    return metrics, (folder / "index.html").read_text(), (folder / "report.md").read_text()


def test_page_is_well_formed_and_self_contained(runs):
    _, page, _ = build()
    parsed = Page(page)
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)
    assert all(link.startswith("#") for link in parsed.links + parsed.resources)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & parsed.tags
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(page.encode()) < 1_500_000


def test_same_records_same_bytes_and_nothing_else_left_behind(runs, tmp_path):
    first = build()
    assert build() == first
    assert sorted(path.name for path in Path("reports/cpu").iterdir()) == ["index.html", "report.md"]


def test_verdict_counts_are_metrics_and_the_summary(runs):
    metrics, page, markdown = build()
    assert metrics == {"claims": 11, "claims_that_hold": 7, "claims_that_do_not_hold": 1,
                       "claims_that_cannot_be_tested": 3}
    sentence = "Of 11 claims, 7 hold at this scale, 1 does not, and 3 cannot be tested"
    assert sentence in page and sentence in markdown
    assert page.count('<span class="badge holds">') == 7


def test_tables_hold_the_records_numbers(runs):
    edit_json(runs / "evaluate" / "hybrid-fp8" / "metrics.json", cloze_accuracy=0.4321, cloze_accuracy_stderr=0.0217,
              bits_per_byte=2.34567)
    edit_json(runs / "compress" / "metrics.json", kl_parent_random=0.77777)
    _, text, markdown = build()
    page = Page(text)
    assert page.row("syntax pairs")                                   # the claims table
    scores = ["hybrid-fp8", "0.885 ± 0.023", "0.432 ± 0.022", "0.385 ± 0.034", "0.125 ± 0.023"]
    assert any(row[:5] == scores for row in page.rows)
    assert any(row[:2] == ["hybrid-fp8", "2.346"] for row in page.rows)
    assert page.row("KL to the parent, distilled") == ["KL to the parent, distilled", "–", "0.083", "0.778"]
    assert "| KL to the parent, distilled | – | 0.083 | 0.778 |" in markdown
    for label in ("pretrain@hybrid-bf16", "compress"):
        provenance = json.loads((runs / label.replace("@", "/") / "provenance.json").read_text())
        assert page.row(label)[1:3] == [provenance["command"], f"{provenance['wall_seconds']:,.1f}"]
    ratio = json.loads((runs / "benchmark" / "metrics.json").read_text())["decode_ratio_16384"]
    assert page.row("16,384")[4] == f"{ratio:.2f}"
    request = next(row for row in page.rows if row[:2] == ["1,024", "hybrid"])
    assert request == ["1,024", "hybrid", "0.114", "8,998", "0.41", "0.37", "320.5", "0.012"]
    assert "| 16,384 | " in markdown


def test_published_models_stand_beside_the_papers_figures(runs):
    served = {"batch": 48, "context": 65536, "output": 1024, "weights_gib": 15.1, "peak_gib": 75.2,
              "time_to_first_token": 1.934, "prefill_of_floor": 0.81, "decode_tokens_per_second": 1800.4,
              "decode_of_floor": 0.78, "output_tokens_per_second": 411.3}
    path = runs / "benchmark" / "metrics.json"
    edit_json(path, **{f"nemotron_h_8b_served_{key}": value for key, value in served.items()})
    _, text, _ = build()
    assert Page(text).row("nemotron_h_8b") == ["nemotron_h_8b", "15.1", "48", "1.93", "0.81", "1,800", "0.78", "411",
                                               "≈ 211", "75.2"]


def test_text_from_records_is_escaped(runs):
    for name in ("curate", "benchmark"):
        path = runs / name / "provenance.json"
        machine = json.loads(path.read_text())["machine"]
        edit_json(path, machine=machine | {"processor": "<script>alert('x')</script> | *chip*"})
    _, page, markdown = build()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "<script" not in markdown
    assert r"&lt;script>alert('x')&lt;/script> \| \*chip\*" in markdown
    Page(page)


def test_cells_with_marks_stay_in_their_cells():
    table = Table("A|B", ["x", "y"], [["`*-|M`", "a_b <c> & d"]])
    assert block_markdown(table).splitlines()[-1] == r"| `*-\|M` | a\_b &lt;c> &amp; d |"
    assert "<td><code>*-|M</code></td><td class=figure>a_b &lt;c&gt; &amp; d</td>" in block_html(table)


def test_every_section_of_the_page_is_in_the_markdown(runs):
    _, page, markdown = build()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    widths: list[int] = []
    for line in markdown.splitlines():
        if line.startswith("|"):
            widths.append(len(re.findall(r"(?<!\\)\|", line)))
        elif widths:
            assert len(set(widths)) == 1, widths
            widths = []


def test_out_directory_takes_the_report(runs, tmp_path):
    stage = Stage("report", load_params(ROOT / "params.yaml"), None, tmp_path / "elsewhere", ("profile",))
    report(stage)
    assert (tmp_path / "elsewhere" / "reports" / "index.html").exists()
    assert not Path("reports").exists()


def test_renderers_agree_on_an_empty_document():
    from stages.report_page import Document

    empty = Document("T", "p", "about", "summary", [], [])
    assert "<h1>T" in to_html(empty)
    assert to_markdown(empty).startswith("# T: profile `p`\n\nabout\n\n**summary**\n")
