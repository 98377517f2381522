"""The FP8 study: its scheduler loses nothing and says what failed, its answers are SciPy's, a branch is its trunk's."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import fp8_parity
from benchmarks.fp8_jobs import METRICS, Job, Scheduler, append_row, job_of, read_rows
from benchmarks.fp8_parity import (
    ARMS,
    METRIC,
    SETTINGS,
    Arm,
    figure,
    gaps,
    judge,
    metrics,
    run_jobs,
    study_of,
    train_one,
)
from data_pipeline.tokenize.indexed_dataset import IndexedDatasetWriter
from model.config import ModelError
from stages.report.claims import judge_study
from stages.report.statistics import ALPHA, Answer

TRUNK = Job("tiny", "hybrid", 1)
FP8 = TRUNK._replace(arm="fp8", start=0.5)
RESULT = dict.fromkeys(METRICS, 2.0) | {"unigram_loss": 3.0, "parameters": 10, "trunk": "t", "tokens": 100,
                                          **dict.fromkeys(("machine", "python", "torch"), "x"),
                                          **dict.fromkeys(("megatron", "transformer_engine"), "x")}
EXTRA = {"at_once": 2, "gpus": 1, "commit": "c"}


def row(job: Job, loss: float, trunk: str = "t", seconds: float = 1.0) -> dict:
    return job._asdict() | RESULT | EXTRA | dict.fromkeys(METRICS, loss) | {
        "trunk": trunk, "seconds": seconds, "date": "2026-01-01"}


def says(code: str = "", seconds: float = 0.0, result: dict = RESULT) -> list[str]:
    """A process that takes `seconds`, runs `code` and prints `result`."""
    program = f"import time; time.sleep({seconds}); {code or 'pass'}; print({json.dumps(result)!r})"
    return [sys.executable, "-S", "-c", program]


def scheduler(tmp_path: Path, command, seconds: float | None = None, slots: int = 2, **options) -> Scheduler:
    return Scheduler(command, [{}] * slots, tmp_path / "runs.csv", seconds, EXTRA, logs=tmp_path / "logs", **options)


def test_every_job_leaves_a_row_and_is_not_run_again(tmp_path):
    jobs = [Job("tiny", "hybrid", seed) for seed in (1, 2, 3)]
    started = []

    def command(job):
        started.append(job)
        return says()

    first = scheduler(tmp_path, command)
    first.run(jobs)
    assert not first.failed and not first.left
    assert sorted(job_of(row) for row in read_rows(tmp_path / "runs.csv")) == jobs
    scheduler(tmp_path, command).run([*jobs, Job("tiny", "hybrid", 4)])
    assert sorted(started) == [*jobs, Job("tiny", "hybrid", 4)]


def test_a_failed_run_is_said_leaves_no_row_and_is_tried_again(tmp_path, capsys):
    bad = Job("tiny", "hybrid", 1)

    def broken(job):
        return says("raise SystemExit('the loss is\\nnot finite')") if job == bad else says()

    first = scheduler(tmp_path, broken)
    first.run([bad, Job("tiny", "hybrid", 2)])
    assert list(first.failed) == [bad] and "not finite" in first.failed[bad]
    assert "seed 1 bf16@0: FAILED (1)" in capsys.readouterr().out
    assert [row["seed"] for row in read_rows(tmp_path / "runs.csv")] == [2]
    second = scheduler(tmp_path, lambda _: says())
    second.run([bad])
    assert not second.failed and len(read_rows(tmp_path / "runs.csv")) == 2


def test_nothing_is_started_that_would_not_end_in_time(tmp_path):
    append_row(tmp_path / "runs.csv", row(Job("tiny", "hybrid", 9), 2.0, seconds=1000))
    limited = scheduler(tmp_path, lambda _: says(), seconds=60)
    limited.run([TRUNK])
    assert limited.left == [TRUNK] and not limited.failed
    free = scheduler(tmp_path, lambda _: says())
    free.run([TRUNK])
    assert not free.left


def test_a_trunk_is_not_started_where_no_branch_of_it_would_end(tmp_path):
    append_row(tmp_path / "runs.csv", row(TRUNK._replace(seed=9), 2.0, seconds=40))
    for seconds, ends in ((60, False), (80, True)):         # 1.1 x 40 s, and half of it for the branch
        limited = scheduler(tmp_path, lambda _: says(), seconds=seconds)
        limited.run([TRUNK, FP8])
        assert limited.left == ([] if ends else [TRUNK, FP8])


def test_what_runs_over_the_limit_is_stopped_and_said(tmp_path):
    started = time.monotonic()
    limited = scheduler(tmp_path, lambda _: says(seconds=60), seconds=1.0)
    limited.run([TRUNK])
    assert time.monotonic() - started < 30
    assert list(limited.failed) == [TRUNK] and "time limit" in limited.failed[TRUNK]
    assert not read_rows(tmp_path / "runs.csv")


def test_a_branch_waits_for_its_trunk_and_goes_with_it_where_it_fails(tmp_path):
    order = []

    def command(job):
        order.append(job)
        return says("raise SystemExit(1)" if job == TRUNK and len(order) == 1 else "")

    first = scheduler(tmp_path, command, ready=lambda job: TRUNK in order[1:])
    first.run([FP8, TRUNK])
    assert order == [TRUNK] and first.left == [FP8]
    second = scheduler(tmp_path, command, ready=lambda job: TRUNK in order[1:])
    second.run([FP8])
    assert order == [TRUNK, TRUNK, FP8] and not second.failed


def test_a_lost_trunk_is_trained_again_with_all_that_branched_from_it(tmp_path):
    other = FP8._replace(arm="e4m3")
    for job in (TRUNK, FP8):
        append_row(tmp_path / "runs.csv", row(job, 2.0, "old"))
    order = []

    def command(job):
        order.append(job)
        return says()

    scheduler(tmp_path, command, slots=1, ready=lambda _: False).run([TRUNK, FP8, other])
    assert order == [TRUNK, FP8, other]
    order.clear()
    scheduler(tmp_path, command, ready=lambda _: False).run([TRUNK, FP8, other])
    assert not order                            # all is there: nothing has to branch


def test_a_file_of_other_columns_is_an_error_and_a_line_cut_short_is_not(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match=r"columns are not"):
        read_rows(path)
    path.unlink()
    append_row(path, row(TRUNK, 2.0))
    with path.open("a") as file:
        file.write("tiny,hybrid,2,bf")
    assert [one["seed"] for one in read_rows(path)] == [1]


@pytest.mark.parametrize("shift, spread, answer", [
    (0.0, 0.05, Answer.HOLDS), (0.5, 0.05, Answer.FAILS), (-0.5, 0.05, Answer.FAILS), (0.0, 1.0, Answer.UNDECIDED),
])
def test_the_answer_is_that_of_two_one_sided_tests(shift, spread, answer):
    values = np.random.default_rng(3).normal(0, spread, 16)
    values = (values + shift - values.mean()) / 100
    found, estimate = judge(list(values))
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found is answer and estimate.interval(ALPHA) == pytest.approx((interval.low, interval.high))
    margin = math.log(1.001)
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert (max(above, below) < 0.05) == (answer is Answer.HOLDS)


def test_losses_that_are_not_finite_do_not_hold():
    found, estimate = judge([0.0, 1e-4, -1e-4, math.inf])
    assert found is Answer.FAILS and estimate.value == 0
    assert judge([0.0])[0] is judge([])[0] is Answer.UNDECIDED
    assert judge([math.inf])[0] is Answer.FAILS


def test_a_gap_is_of_the_run_it_branched_from():
    rows = [row(TRUNK, 2.0, "new"), row(FP8, 2.02, "new"), row(FP8._replace(arm="e4m3"), 3.0, "old"),
            row(FP8._replace(seed=2), 2.0)]
    assert gaps(rows, METRIC) == {("tiny", "hybrid", "fp8", 0.5): {1: pytest.approx(math.log(1.01))}}
    with pytest.raises(SystemExit, match="Nothing was computed in FP8"):
        gaps([row(TRUNK, 2.0), row(FP8, 2.0)], METRIC)


def test_means_are_over_the_last_fifth():
    training = [{"step": step, "loss": float(step)} for step in range(1, 11)]
    validation = [{"step": step, "domain": domain, "loss": step * scale}
                  for step in range(1, 11) for domain, scale in (("code", 7.0), ("all", 10.0))]
    assert metrics(training, validation, 10) == {"validation": 100.0, "training_mean": 9.5}


def test_jobs_come_seed_by_seed_and_arms_differ_from_bf16_alone():
    jobs = run_jobs("tiny", ["transformer", "hybrid"], [101, 102], ["fp8", "unscaled"], 0.5)
    assert [job.seed for job in jobs] == [101] * 6 + [102] * 6 and jobs[0] == jobs[1].trunk == jobs[2].trunk
    recipes = {arm: fp8_parity.recipe(SETTINGS["tiny"], ARMS[arm], False).model_dump() for arm in ARMS}
    for arm, recipe in recipes.items():
        assert {name for name, value in recipe.items() if value != recipes["bf16"][name]} == set(ARMS[arm].changes)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "tiny"])
@pytest.mark.parametrize("architecture", fp8_parity.ARCHITECTURES)
def test_the_settings_suit_fp8_products_and_the_kernels(setting, architecture):
    from model.megatron.limits import FP8_MULTIPLE, check_kernels

    config = fp8_parity.model_config(SETTINGS[setting], architecture, 8192)
    sizes = [config.hidden_size, config.ffn_hidden_size, config.attention_size,
             config.attention_size + 2 * config.kv_size]
    if architecture == "hybrid":
        check_kernels(config)
        sizes += [config.in_proj_size, config.mamba_inner_size]
    assert all(size % FP8_MULTIPLE == 0 for size in sizes)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """Random text in which every token has two successors."""
    directory, vocabulary, draw, files = tmp_path_factory.mktemp("tokens"), 64, np.random.default_rng(0), {}
    successors, sizes = draw.integers(1, vocabulary, (vocabulary, 2)), np.full(vocabulary, 3, np.uint16)
    sizes[0] = 0
    for name, documents in {"train/text-high": 400, "validation/text": 40}.items():
        count = 0
        with IndexedDatasetWriter(directory / name, vocabulary) as writer:
            for _ in range(documents):
                document = [int(draw.integers(1, vocabulary))]
                for _ in range(100):
                    document.append(int(successors[document[-1], draw.integers(2)]))
                writer.add([*document, 0])
                count += len(document) + 1
        files[name] = {"documents": documents, "tokens": count, "bytes": 3 * (count - documents)}
    np.save(directory / "token_bytes.npy", sizes)
    (directory / "tokens.json").write_text(json.dumps({
        "vocab_size": vocabulary, "eod_id": 0, "dtype": "uint16", "tokenizer_digest": "tiny", "corpus_digest": "tiny",
        "files": files}))
    (directory / "blend.json").write_text(json.dumps({"phases": [{"until": 1.0, "weights": {"train/text-high": 1}}]}))
    return directory


def test_a_branch_goes_on_as_its_trunk_did_and_fp8_does_not(tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(ARMS, "same", Arm("bf16", {}))
    setting = SETTINGS["tiny"]._replace(steps=28)
    trunk = train_one(TRUNK, setting, tokens, tmp_path, keeps_states=True)
    assert trunk["validation"] < trunk["unigram_loss"] and trunk["trunk"]
    same = train_one(TRUNK._replace(arm="same", start=0.5), setting, tokens, tmp_path)
    assert {name: same[name] for name in (*METRICS, "trunk")} == {name: trunk[name] for name in (*METRICS, "trunk")}
    fp8 = train_one(FP8, setting, tokens, tmp_path)
    assert all(fp8[name] != trunk[name] for name in METRICS)
    with pytest.raises(ModelError, match="state of another run"):
        train_one(FP8, setting._replace(learning_rate=2e-2), tokens, tmp_path)
    assert fp8["validation"] == pytest.approx(trunk["validation"], rel=0.02)
    assert fp8["trunk"] == trunk["trunk"]


def test_a_model_that_does_not_learn_is_an_error(tokens, tmp_path):
    with pytest.raises(ModelError, match="it did not learn"):
        setting = SETTINGS["tiny"]._replace(learning_rate=1e-4, steps=20)     # a little below where it started
        train_one(Job("tiny", "transformer", 1), setting, tokens, tmp_path)


SHIFTS = {"bf16": 0.0, "fp8": 2e-4, "fp8-2": 3e-4, "fp8-0": 6e-4, "e4m3": 2e-4, "again": 0.0, "unscaled": 0.05}


def recorded(shifts: dict[str, float], seeds: int = 5, others: int = 3) -> list[dict]:
    """`seeds` pairs of BF16 and FP8, of which the last `others` have the other arms, in shares of the loss."""
    draw, rows = np.random.default_rng(0), []
    for architecture in fp8_parity.ARCHITECTURES:
        for seed in range(101, 101 + seeds):
            trunk, loss = Job("deep-1e-3", architecture, seed), draw.normal(4, 0.04)
            for arm, shift in shifts.items():
                if arm in ("bf16", "fp8") or seed >= 101 + seeds - others:
                    job = trunk if arm == "bf16" else trunk._replace(arm=arm, start=0.5)
                    rows.append(row(job, loss * (1 + shift + (arm != "bf16") * draw.normal(0, 1e-5))))
    return rows


@pytest.mark.parametrize("changed, parity, recipe", [
    ({}, Answer.HOLDS, Answer.HOLDS),
    ({"fp8": 2e-3}, Answer.FAILS, Answer.FAILS),
    ({"unscaled": 2e-4}, Answer.UNDECIDED, Answer.UNDECIDED),
    ({"fp8-2": 1e-4}, Answer.HOLDS, Answer.FAILS),
    ({"e4m3": 3e-3}, Answer.HOLDS, Answer.FAILS),
])
def test_the_record_is_judged_by_the_report(changed, parity, recipe):
    study = study_of(recorded(SHIFTS | changed), "deep-1e-3", 0.5, "2 cards")
    assert judge_study(study, "fp8_parity")[0] is parity
    assert judge_study(study, "fp8_recipe")[0] is recipe


def test_the_record_pairs_by_seed():
    rows = recorded(SHIFTS)
    study = study_of(rows, "deep-1e-3", 0.5, "2 cards")
    losses = {job_of(one): one[METRIC] for one in rows}
    for architecture in fp8_parity.ARCHITECTURES:
        order = [Job("deep-1e-3", architecture, seed) for seed in (103, 104, 105, 101, 102)]
        assert study.measurement(f"{architecture}, BF16, training loss").values == [losses[job] for job in order]
        assert study.measurement(f"{architecture}, FP8 without scales, training loss").values == [
            losses[job._replace(arm="unscaled", start=0.5)] for job in order[:3]]
    with pytest.raises(SystemExit, match="1 seeds have every arm"):
        study_of(recorded(SHIFTS, others=1), "deep-1e-3", 0.5, "2 cards")


def test_the_record_counts_what_it_lacks_and_names_every_commit():
    lacking = [one for one in recorded(SHIFTS) if job_of(one) != Job("deep-1e-3", "hybrid", 101, "fp8", 0.5)]
    lacking[-1]["commit"] = "d"
    study = study_of(lacking, "deep-1e-3", 0.5, "2 cards")
    assert "transformer 5, of each other arm 3; hybrid 4, of each other arm 3 (of 1 more seeds there" in study.note
    assert study.commit == "c, d" and study.versions["torch"] == "x"


def test_without_its_control_no_answer_counts(capsys):
    for shifts, seen in ((SHIFTS, False), (SHIFTS | {"unscaled": 1e-4}, True), (
            {arm: shift for arm, shift in SHIFTS.items() if arm != "unscaled"}, True)):
        fp8_parity.print_table(recorded(shifts))
        assert ("deep-1e-3  hybrid       0.5: no answer counts" in capsys.readouterr().out) is seen


def test_the_figure_is_the_same_from_the_same_rows():
    drawn = figure(recorded(SHIFTS), "deep-1e-3", 0.5)
    assert drawn == figure(recorded(SHIFTS), "deep-1e-3", 0.5) and drawn.startswith("<svg") and "hybrid" in drawn
