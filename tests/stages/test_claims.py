"""Verdict rules at their boundaries, and the claims they make of a whole tree of records."""

import json
import math
import re

import pytest
from runs_tree import ROOT, edit_json, report_stage, write_runs

from data_pipeline.config import DataError
from stages.claims import claims, layer_importance
from stages.common import StageError
from stages.params import load_params
from stages.records import load
from stages.verdicts import (
    FP8_LIMIT,
    Measure,
    Verdict,
    controls,
    fp8_loss_verdict,
    growth_verdict,
    late_mean,
    loss_gaps,
    measures,
    parity,
    relative_gap,
)

HOLDS, FAILS, UNTESTED = Verdict.HOLDS, Verdict.FAILS, Verdict.UNTESTED


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_runs(tmp_path)


def claim(title, params=None):
    found = [item for item in claims(load(report_stage(params))) if title in item.title]
    assert len(found) == 1
    return found[0]


def measure(difference, margin, informative=True):
    return Measure("cloze", 0.0, 0.0, difference, margin, informative)


@pytest.mark.parametrize(("difference", "verdict"), [
    (0.0, HOLDS), (0.5, HOLDS), (-0.25, HOLDS), (-0.2500001, FAILS), (math.nan, FAILS),
])
def test_parity_fails_only_beyond_the_margin(difference, verdict):
    assert parity([measure(difference, 0.25)])[0] == verdict


def test_parity_leaves_out_what_stands_at_the_control():
    verdict, because = parity([measure(0.0, 0.1), measure(-1.0, 0.1, informative=False)])
    assert verdict == HOLDS
    assert "1 of 2 measures counted" in because


@pytest.mark.parametrize(("worse", "noise", "verdict"), [
    (FP8_LIMIT, 0.0, HOLDS), (-0.5, FP8_LIMIT, HOLDS), (FP8_LIMIT + 1e-9, FP8_LIMIT, FAILS),
    (0.004, 0.005, UNTESTED), (0.005, 0.005, UNTESTED), (0.0051, 0.005, FAILS), (0.0, None, UNTESTED),
    (math.nan, 0.0, FAILS), (0.0, math.nan, UNTESTED),
])
def test_fp8_is_judged_against_the_limit_and_the_noise(worse, noise, verdict):
    assert fp8_loss_verdict(worse, noise)[0] == verdict


def test_loss_gaps_pair_equal_seeds_and_average_over_windows(runs):
    records = load(report_stage())
    assert records.fp8_pairs == [("hybrid-fp8", "hybrid-bf16")]
    path = runs / "pretrain/hybrid-fp8/training.csv"
    twin = (runs / "pretrain/hybrid-bf16/training.csv").read_text().splitlines()
    lines = [twin[0]]
    for number, line in enumerate(twin[1:]):
        step, tokens, loss, *rest = line.split(",")
        lines.append(",".join([step, tokens, str(float(loss) * (1.01 if number % 2 else 0.99)), *rest]))
    path.write_text("\n".join(lines) + "\n")
    (gap,) = loss_gaps(load(report_stage())).values()
    assert len(gap) == 20 and gap[-1][0] == records.training["hybrid-bf16"]["tokens"][-1]
    assert max(abs(value) for _, value in gap) < 0.002        # single steps are off by 1 %


def test_fp8s_gap_is_worded_by_its_sign():
    assert fp8_loss_verdict(-0.003, 0.0)[1].startswith("better by 0.30 %")
    assert fp8_loss_verdict(0.0005, 0.0)[1].startswith("worse by 0.05 %")


def test_several_seeds_of_both_are_judged_by_what_differs_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extra = "variants.hybrid-fp8-seed2={architecture: hybrid, precision: fp8, seed: 2}"
    params = load_params(ROOT / "params.yaml", (extra,))
    write_runs(tmp_path, params)
    records = load(report_stage(params))
    assert records.fp8_pairs == [("hybrid-fp8", "hybrid-bf16"), ("hybrid-fp8-seed2", "hybrid-bf16-seed2")]
    gap, smoothed = claim("BF16: loss", params).evidence
    assert gap.measure.endswith("2 seeds")
    seeds, over_seeds = re.fullmatch(r"two BF16 seeds: (\S+) %; the gap over seeds: ± (\S+) %", gap.spread).groups()
    assert smoothed.spread.startswith("± ")
    larger = max(float(seeds), float(over_seeds))
    assert larger > 0.1 and f"differ by {larger:.2f} %" in claim("BF16: loss", params).because


@pytest.mark.parametrize(("shortest", "longest", "contexts", "verdict"), [
    ((0.9, 0.05), (1.5, 0.1), 4, HOLDS), ((0.9, 0.05), (1.1, 0.1), 4, FAILS), ((1.4, 0.1), (1.6, 0.1), 4, FAILS),
    ((1.5, 0.1), (1.5, 0.1), 1, UNTESTED), ((0.9, 0.05), (math.nan, 0.0), 4, FAILS),
])
def test_growth_must_exceed_the_spread(shortest, longest, contexts, verdict):
    assert growth_verdict(shortest, longest, contexts)[0] == verdict


def test_relative_gap_has_the_papers_sign_and_skips_the_start():
    reference = {"tokens": [0, 10, 20, 30, 40], "bits_per_byte": [8.0, 4.0, 4.0, 2.0, 2.0]}
    other = {"tokens": [0, 10, 30, 40], "bits_per_byte": [9.0, 4.4, 2.1, 1.9]}
    gap = relative_gap(reference, other)
    assert [tokens for tokens, _ in gap] == [10, 30, 40]
    assert [value for _, value in gap] == pytest.approx([-0.1, -0.05, 0.05])
    assert late_mean(gap) == pytest.approx(0.0)
    assert late_mean(gap, absolute=True) == pytest.approx(0.05)


def test_margins_are_the_larger_of_noise_and_error(runs):
    records = load(report_stage())
    bits, *tasks = measures(records, "hybrid-fp8", "hybrid-bf16")
    assert bits.margin == pytest.approx(0.01 * 2.157)
    errors = [records.metrics("evaluate", name)["cloze_accuracy_stderr"] for name in ("hybrid-fp8", "hybrid-bf16")]
    assert tasks[1].margin == pytest.approx(2 * math.sqrt(errors[0] ** 2 + errors[1] ** 2))
    edit_json(runs / "evaluate" / "hybrid-bf16-seed2" / "metrics.json", bits_per_byte=2.5, cloze_accuracy=0.1)
    bits, *tasks = measures(load(report_stage()), "hybrid-fp8", "hybrid-bf16")
    assert bits.margin == pytest.approx(2.5 - 2.157)
    assert tasks[1].margin == pytest.approx(0.575 - 0.1)
    assert [task.informative for task in tasks] == [True, True, True, False]


def test_claims_of_the_tree(runs):
    verdicts = [item.verdict for item in claims(load(report_stage()))]
    assert verdicts == [HOLDS, UNTESTED, HOLDS, UNTESTED, HOLDS, FAILS, UNTESTED, HOLDS, HOLDS, HOLDS, HOLDS]


def test_accuracy_follows_the_records(runs):
    title = "as accurate as a Transformer"
    edit_json(runs / "evaluate" / "transformer-bf16" / "metrics.json", bits_per_byte=2.1)
    worse = claim(title)
    assert worse.verdict == FAILS
    assert worse.because == "bits per byte worse by 0.057, margin 0.021"
    edit_json(runs / "evaluate" / "transformer-bf16" / "metrics.json", bits_per_byte=2.95)
    assert claim(title).verdict == UNTESTED            # the Transformer learned less than a compressor
    edit_json(runs / "evaluate" / "transformer-bf16" / "metrics.json", bits_per_byte=2.191)
    edit_json(runs / "pretrain" / "transformer-bf16" / "metrics.json", tokens=1)
    assert claim(title).because == "parameters or tokens are not alike"


def test_speed_needs_a_gpu_the_papers_context_and_a_large_model(runs):
    title = "Up to 3 times"
    assert claim(title).because == "measured on a CPU, up to 16,384 tokens, with 1.65 million parameters"
    provenance = json.loads((runs / "benchmark" / "provenance.json").read_text())
    edit_json(runs / "benchmark" / "provenance.json", machine=provenance["machine"] | {"accelerator": "H200"})
    edit_json(runs / "benchmark" / "metrics.json", decode_ratio_65536=1.8)
    assert claim(title).because == "measured with 1.65 million parameters"
    edit_json(runs / "compress" / "metrics.json", parent_parameters=8_100_852_736)
    assert claim(title).verdict == HOLDS
    edit_json(runs / "benchmark" / "metrics.json", decode_ratio_65536=1.79)
    assert claim(title).verdict == FAILS


def test_speed_of_the_published_models_decides_where_it_was_measured(runs):
    title = "20 % faster"
    edit_json(runs / "benchmark" / "metrics.json", output_ratio_47b=1.21, served_decode_ratio_47b=1.4)
    found = claim(title)
    assert found.verdict == HOLDS
    assert found.because == "1.21 times the output tokens/s at the published sizes; 1.2 asked"
    assert [item.ours for item in found.evidence[:2]] == ["1.21 times", "1.40 times"]
    edit_json(runs / "benchmark" / "metrics.json", output_ratio_47b=1.19)
    assert claim(title).verdict == FAILS


def test_layers_at_both_ends_must_be_in_the_top_quarter(runs):
    records = load(report_stage())
    assert layer_importance(records).verdict == HOLDS
    layers = json.loads((runs / "compress" / "importance.json").read_text())["layers"]
    for index in (2, 3, 4, 5):
        layers[index]["importance"] = 1.0
    edit_json(runs / "compress" / "importance.json", layers=layers)
    failed = layer_importance(load(report_stage()))
    assert failed.verdict == FAILS
    assert failed.because == "ranks 5 and 6; 5 or better asked"


@pytest.mark.parametrize(("title", "path", "values"), [
    ("Cutting by importance", "compress", {"kl_parent_compressed": 0.12465}),
    ("published sizes", "benchmark", {"nemotron_h_47b_parameters": 46_791_554_817}),
    ("Hugging Face", "export/compressed", {"logits_max_relative_difference": 1.01e-5}),
    ("Hugging Face", "export/compressed", {"logits_max_relative_difference": math.nan}),
])
def test_other_claims_fail_by_their_own_record(runs, title, path, values):
    assert claim(title).verdict == HOLDS
    edit_json(runs / path / "metrics.json", **values)
    assert claim(title).verdict == FAILS


def test_variants_a_profile_does_not_train_leave_claims_untested(runs):
    params = load_params(ROOT / "params.yaml")
    kept = {name: params.variants[name] for name in ("hybrid-fp8",)}
    params = params.model_copy(update={"variants": kept, "models": ["hybrid-fp8", "compressed", "compressed-random"]})
    for title in ("as accurate as", "trains like BF16: loss", "trains like BF16: evaluations"):
        assert claim(title, params).verdict == UNTESTED


def test_controls_at_their_thresholds(runs):
    edit_json(runs / "evaluate" / "hybrid-fp8" / "metrics.json", bits_per_byte=1.5, bits_per_byte_compressor=2.0,
              syntax_pairs_accuracy=0.85)
    edit_json(runs / "pretrain" / "hybrid-fp8" / "metrics.json", validation_bits_per_byte=1.5,
              validation_bits_per_byte_first=1.75)
    first = controls(load(report_stage()))[0]
    assert first.met == (True, False, False)


def test_a_missing_record_names_the_stage_to_run(runs):
    (runs / "pretrain" / "hybrid-fp8" / "training.csv").unlink()
    with pytest.raises(StageError, match=r"training.csv: not found[^\n]*\nRun `dvc repro pretrain@hybrid-fp8` first"):
        load(report_stage())


@pytest.mark.parametrize(("path", "content", "message"), [
    ("compress/candidates.json", "[{}]", "candidates.json: a row lacks 'pattern'"),
    ("compress/importance.json", '{"layers": [], "ffn": [{}]}', "importance.json: `ffn`"),
    ("curate/funnel.json", "{", "funnel.json: not valid JSON"),
    ("curate/metrics.json", "[]", "metrics.json: expected a JSON dict"),
    ("benchmark/decode.csv", "model,context\n", "decode.csv: column tokens_per_second"),
    ("pretrain/hybrid-fp8/training.csv", "step,tokens,loss,grad_norm\n", "training.csv: no rows"),
    ("pretrain/hybrid-fp8/training.csv", "step,tokens,loss,grad_norm\n1,2,x,4\n", "loss is 'x', not a number"),
    ("tokenize/provenance.json", "{}", "provenance.json: KeyError"),
])
def test_malformed_records_are_named(runs, path, content, message):
    (runs / path).write_text(content)
    with pytest.raises(DataError, match=message):
        load(report_stage())


def test_a_missing_figure_is_named(runs):
    (runs / "compress" / "metrics.json").write_text("{}")
    with pytest.raises(DataError, match=r"compress/metrics.json: `parent_parameters`"):
        claims(load(report_stage()))
