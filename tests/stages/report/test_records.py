"""Records are what was written, and whatever is not as it should be is named with its file and its cure."""

import json
import re
from pathlib import Path

import pytest
from runs_tree import ROOT, edit_json, final, load_params, report_stage, write_json, write_runs

from stages.report.records import Reader, RecordError, Records, pairs


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_runs(tmp_path)


def records():
    return Records(report_stage().params, Path("runs/cpu"))


def test_what_was_written_is_read_back(runs):
    found = records()
    assert [candidate.model_dump() for candidate in found.candidates] == json.loads(
        (runs / "compress/candidates.json").read_text())
    assert found.provenance("pretrain@hybrid-fp8").command.endswith("--variant hybrid-fp8")
    curve = found.validation("hybrid-fp8")
    assert list(curve)[:2] == [0, 6 * 2048] and curve[60 * 2048] == pytest.approx(final("hybrid-fp8"))  # of all
    assert found.decode["hybrid"][-1].time_to_first_token_seconds is None
    assert len(found.decode_repeats["compressed"][256]) == found.params.benchmark.repeats
    assert found.reasons("code")["stop_words < 2"] == 40
    assert found.metrics("evaluate", "compressed")["bits_per_byte_compressor"] == 2.91
    assert pairs(found.params, ("hybrid", "fp8"), ("hybrid", "bf16")) == [
        (f"hybrid-fp8{seed}", f"hybrid-bf16{seed}") for seed in ("", "-seed2", "-seed3")]
    assert pairs(found.params, ["compressed"], ["parent"]) == [("compressed", found.params.compress.parent)]


def test_a_pair_is_of_the_recipe_that_trained_it():
    def of(variant, recipe):
        params = load_params(ROOT / "params.yaml", (f"variants.hybrid-fp8.fp8_recipe={variant}",
                                                    "variants.hybrid-fp8-unscaled.seed=4",      # no other's training
                                                    "variants.hybrid-bf16-seed3.seed=4",
                                                    f"pretrain.fp8_recipe={recipe}"))
        return [len(pairs(params, ("hybrid", "fp8", *own), ("hybrid", "bf16"))) for own in ((), ("unscaled",))]

    assert of("null", "current") == of("current", "current") == [2, 1]
    assert of("null", "unscaled") == [0, 3] and of("current", "unscaled") == [1, 2]


def test_nothing_is_read_before_it_is_asked_for(runs):
    found = records()
    assert not found.reader.files
    assert found.controls.seeds and found.controls.reverse
    assert list(found.reader.files) == [Path("runs/cpu/compress/controls.json")]
    write_json(runs / "annotate/refused.json", {})
    assert found.refused == {}                                  # nothing was
    write_json(runs / "curate/funnel.json", [])
    with pytest.raises(RecordError, match=r"funnel\.json: holds nothing"):
        _ = found.funnel


@pytest.mark.parametrize(("name", "change", "fault", "stage"), [
    ("compress/controls.json", {"median": 0.2}, "`median` is unknown; of another version", "compress"),
    ("benchmark/provenance.json", {"machine": {"cores": 2}}, "`machine.processor` is missing, and 1 more faults",
     "benchmark"),
    ("pretrain/hybrid-fp8/provenance.json", {"wall_seconds": "long"}, "`wall_seconds` (Input should be a valid number",
     "pretrain@hybrid-fp8"),
    ("curate/histograms.json", {"digits": {"docs": {"edges": [0, 1], "counts": [1, 2], "low": None, "high": 1,
                                                    "source": "", "labels": {}}}},
     "2 edges do not go with 2", "curate"),
])
def test_records_of_another_version_say_so(runs, name, change, fault, stage):
    edit_json(runs / name, **change)
    found = records()
    with pytest.raises(RecordError, match=re.escape(fault)) as caught:
        (found.controls, *map(found.provenance, found.runs), found.histograms)
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"runs/cpu/{name}: ") and first.endswith(".")
    assert second == f"Run `dvc repro --force --single-item {stage}` to write it again."
    assert str(caught.value) in found.reader.faults


def test_a_missing_metric_names_its_file(runs):
    with pytest.raises(RecordError, match=r"evaluate/compressed/metrics\.json: `nothing` is missing or not a number"):
        records().metrics("evaluate", "compressed")["nothing"]
    with pytest.raises(RecordError, match="`models` lacks gpt-2"):
        records().metrics("evaluate", "gpt-2")
    edit_json(runs / "evaluate/compressed/metrics.json", items_digest="")       # two that lack it are not alike
    with pytest.raises(RecordError, match=r"evaluate/compressed/metrics\.json: no `items_digest`\.\nRun `dvc repro"):
        records().items_digest("compressed")
    edit_json(runs / "evaluate/compressed/metrics.json", cut=True)
    with pytest.raises(RecordError, match="`cut` is missing or not a number"):
        records().metrics("evaluate", "compressed")["cut"]


def test_a_model_that_was_not_measured_is_named(runs):
    path = runs / "benchmark/decode.csv"
    path.write_text("".join(line for line in path.open() if not line.startswith("compressed")))
    with pytest.raises(RecordError, match="0 of 1 rows for model compressed at 256 tokens"):
        _ = records().decode


def test_more_than_was_asked_for_is_no_measurement(runs):
    """What another run left: it would be taken for this one's, without a word."""
    edit_json(runs / "pretrain/hybrid-fp8/metrics.json", tokens=59 * 2048)
    with pytest.raises(RecordError, match=r"validation\.csv: cut off: ends at 122,880 of 120,832 tokens"):
        records().validation("hybrid-fp8")
    for name, times in (("decode.csv", 1), ("decode_repeats.csv", load_params(ROOT / "params.yaml").benchmark.repeats)):
        with (runs / "benchmark" / name).open("a") as stream:
            stream.write((runs / "benchmark" / name).read_text().splitlines()[1] + "\n")
        with pytest.raises(RecordError, match=f"{times + 1} of {times} rows for model hybrid at 256 tokens"):
            _ = records().decode if times == 1 else records().decode_repeats


def test_a_paper_task_is_compared_with_the_same_one(runs):
    """The first model that was asked it stands for how it was; another's that differs is none of it."""
    first, second = records().params.models[:2]
    path = runs / "evaluate" / second / "paper_tasks.json"
    scores = json.loads(path.read_text())
    scores[0]["task"]["shots"] += 1
    write_json(path, scores)
    found = records()
    asked = found.paper_asked
    assert asked == found.paper_tasks(first) and found.paper_score(second, asked[1].task).task == asked[1].task
    with pytest.raises(RecordError, match=rf"evaluate/{second}/paper_tasks\.json: no MMLU as other models were"):
        found.paper_score(second, asked[0].task)
    assert len(found.reference_tasks) == len(asked)
    edit_json(runs / "reference/metrics.json", left_out="not installed")
    assert records().reference_tasks == []


def test_what_is_not_a_number_stays_one_and_is_read(tmp_path):
    write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert Reader(tmp_path).read(dict[str, float], "x.json")["loss"] != 0


@pytest.mark.parametrize(("content", "fault"), [
    (b'{"loss\xff": 1}', r"not UTF-8 \(invalid start byte\)"), (b"[" * 100_000, "nested too deeply to be read"),
])
def test_a_record_that_is_no_text_is_named(tmp_path, content, fault):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(RecordError, match=rf"metrics\.json: {fault}\.\nRun `dvc repro"):
        Reader(tmp_path).metrics()
