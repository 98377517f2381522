"""The arithmetic of the studies, each of them at tiny size, and the records they have left."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import studies
from benchmarks.studies import (
    LABELS,
    STUDIES,
    Task,
    by_quality,
    changed_pairs,
    equal_ffn_cut,
    hold_out_high,
    label_blends,
    mean_weights,
    pieces,
    scale_of,
)
from data_pipeline.config import TokenizeConfig
from model import costs
from model.checkpoint import load_weights, save_weights
from model.hybrid_lm import HybridLM
from model.training import token_data
from stages.frame.params import load_params
from stages.report.records import load_studies, read_study
from stages.report.study_schema import FOLDER, WORDS, Study
from tests.tiny_engine import PROCESSES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale(tokens):
    vocab_size = json.loads((tokens / "tokens.json").read_text())["vocab_size"]
    found = scale_of(load_params(ROOT / "params.yaml"), vocab_size, on_gpu=False, tiny=True)
    return found._replace(
        recall=found.recall._replace(steps=2, layers=13, hidden=16),
        formats=found.formats._replace(layers=10, learning_rate=2e-2, steps=12),
        recipe=found.recipe.model_copy(update={"tokens": 512}),
        compress=found.compress.model_copy(update={
            "validation_samples": 8, "short_distillation_tokens": 128, "distillation_tokens": 256}),
    )


def tasks(name, design, scale, tokens, scratch):
    return [Task(name, arm, 1, work, scale, tokens, scratch, float("inf"))
            for arm, work in design.arms(scale, tokens, scratch).items()]


@pytest.fixture(scope="module")
def scratch(scale, tokens, tmp_path_factory):
    """With the parent of seed 1."""
    directory = tmp_path_factory.mktemp("scratch")
    [task] = tasks("parent", studies.PARENT, scale, tokens, directory)
    studies.perform(task, 1)
    return directory


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in ("quality_labels", "schedule")])
def test_a_study_measures_what_it_compares(name, scale, tokens, scratch):
    every, figures = tasks(name, STUDIES[name], scale, tokens, scratch), {}
    for task in every:
        figures |= studies.perform(task, 1)
        assert studies.read(task)                           # and keeps it
    assert all(np.isfinite(value) for value, _ in figures.values())
    found = studies.record(name, every, "python -m benchmarks.studies", "d6c7349")
    assert isinstance(found, Study) and len(found.measurements) == len(figures)     # the record checks the names
    assert read_study(found.save(scratch / "records")) == found


def test_schedules_differ_in_the_decay_alone(scale, tokens, tmp_path):
    arms = studies.schedules(scale, tokens, tmp_path)
    same = {"decay_style": None, "decay_fraction": None}
    assert arms["cosine"].recipe.model_copy(update=same) == arms["WSD"].recipe.model_copy(update=same)
    assert (arms["WSD"].recipe.decay_style, arms["WSD"].recipe.decay_fraction) == ("minus_sqrt", 0.2)
    for work in arms.values():
        type(work.recipe).model_validate(work.recipe.model_dump())                  # the pair is one the trainer takes


def test_labels_compared_hold_other_text_of_the_same_domains(scale, tokens, tmp_path, monkeypatch):
    counts = {f"train/{domain}-{label}": 10_000 for domain in ("code", "docs", "reference") for label in studies.LABELS}
    monkeypatch.setattr(studies, "training_tokens", lambda _: counts)
    monkeypatch.setattr(studies, "load_params", lambda: load_params(ROOT / "params.yaml"))
    top, bottom = (json.loads((work.tokens / "blend.json").read_text())["phases"][0]["weights"]
                   for work in studies.labels(scale, tokens, tmp_path).values())
    assert {name.partition("-")[2] for name in top} == {"high", "medium-high"}
    assert {name.partition("-")[2] for name in bottom} == {"low", "medium-low"}


def test_phases_by_quality_read_the_same_text_in_order(tokens, tmp_path):
    weights = {"train/code-low": 0.1, "train/code-medium": 0.3, "train/code-high": 0.2, "train/docs-medium-low": 0.35,
               "train/docs-high": 0.05}
    phases = by_quality(weights)
    assert mean_weights(phases) == pytest.approx(weights)
    for phase in phases:
        assert sum(phase["weights"].values()) == pytest.approx(1)
        assert sum(value for name, value in phase["weights"].items() if "code" in name) == pytest.approx(0.6)
    assert [sorted(phase["weights"]) for phase in phases] == [
        ["train/code-low", "train/code-medium", "train/docs-medium-low"],           # 60 % of either domain
        ["train/code-high", "train/code-medium", "train/docs-medium-low"],
        ["train/code-high", "train/docs-high", "train/docs-medium-low"],
    ]


def test_arms_of_the_labels_differ_in_labels_alone():
    config = TokenizeConfig.model_validate({
        "validation_kilobytes_per_domain": 1, "repeats": 4,
        "phases": [{"until": 0.5, "weights": {"code": 1, "docs": 1}, "labels": LABELS},
                   {"until": 1.0, "weights": {"code": 1, "docs": 3}, "labels": ["high", "medium-high"]}],
    })
    tokens = {f"train/{domain}-{label}": 1000 * number for domain in ("code", "docs")
              for number, label in enumerate(LABELS[::-1], start=1)}
    arms = label_blends(config, tokens, 2000)
    for name, labels in (("top labels", ["high", "medium-high"]), ("bottom labels", ["medium-low", "low"])):
        weights = mean_weights(arms[name])
        assert len(arms[name]) == 1 and sum(weights.values()) == pytest.approx(1)
        assert set(weights) == {f"train/{domain}-{label}" for domain in ("code", "docs") for label in labels}
        code = sum(weight for file, weight in weights.items() if "/code-" in file)
        assert code == pytest.approx(0.5 * 0.5 + 0.5 * 0.25)


def test_the_high_label_is_held_out_and_nothing_else_lost(tokens, tmp_path):
    hold_out_high(tokens, tmp_path)
    token_data.check(tmp_path, 64)

    def documents(path):
        data = token_data.IndexedDataset(str(path))
        return [tuple(data[number].tolist()) for number in range(len(data))]

    for domain in ("code", "docs"):
        kept, held = documents(tmp_path / f"train/{domain}-high"), documents(tmp_path / f"validation/{domain}-high")
        assert Counter(kept + held) == Counter(documents(tokens / f"train/{domain}-high"))
        assert len(held) == 6 and not set(held) & set(kept)
    assert documents(tmp_path / "train/code-low") == documents(tokens / "train/code-low")
    assert token_data.domains(tmp_path) == ["code-high", "docs-high", "code", "docs"]
    token_data.validation(tmp_path, "code-high", 16)                                # its bytes are right


def test_phased_and_constant_draw_the_same_samples(scale, tokens, tmp_path):
    arms = studies.phases(scale, tokens, tmp_path)
    drawn = []
    for name, work in arms.items():
        data = token_data.TrainingData(work.tokens, 16, 200, 1, tmp_path / f"{name}.cache")
        drawn.append([tuple(data[sample].tolist()) for sample in range(200)])
    assert (Counter(drawn[0]) & Counter(drawn[1])).total() >= 197                   # to one sample a file, of rounding
    assert drawn[0] != drawn[1]


def test_every_length_predicts_the_same_tokens():
    text = (torch.arange(3)[:, None] * 8 + torch.arange(9))                         # each begins with the last before
    for length in (2, 4, 8):
        cut = pieces(text, length)
        assert cut.shape == (24 // length, length + 1)
        assert cut[:, 1:].flatten().tolist() == list(range(1, 25))
        assert torch.equal(cut[:, 0], cut[:, 1] - 1)


def test_longer_context_lowers_the_loss_only_where_it_is_read(scale, tokens):
    model = HybridLM(scale.hybrid).requires_grad_(False)
    found = studies.losses(model, tokens, (1, 2))
    for domain in found:
        assert found[domain][1][1] == found[domain][2][1]                           # as many tokens
        assert found[domain][1][0] == pytest.approx(found[domain][2][0], rel=0.05)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_cuts_to_compare_have_as_many_parameters(on_gpu):
    parent = scale_of(load_params(ROOT / "params.yaml"), 8192, on_gpu, tiny=False).hybrid
    half = parent.model_copy(update={"mamba_num_heads": parent.mamba_num_heads // 2})
    cut = costs.parameters(parent) - costs.parameters(half)
    assert costs.parameters(parent) - costs.parameters(equal_ffn_cut(parent, costs.parameters(half))) == pytest.approx(
        cut, rel=0.03)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_both_architectures_are_of_one_size(on_gpu):
    found = scale_of(load_params(ROOT / "params.yaml"), 8192, on_gpu, tiny=False)
    assert costs.parameters(found.transformer) == pytest.approx(costs.parameters(found.hybrid), rel=0.02)
    assert found.recall.tokens >= max(studies.MULTIPLES) * found.recall.pairs       # keys of the longest recall


def test_pairs_whose_order_changes():
    assert changed_pairs([1, 2, 3, 4], [10, 20, 30, 40]) == 0
    assert changed_pairs([1, 2, 3, 4], [4, 3, 2, 1]) == 1
    assert changed_pairs([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 / 6)


def test_a_seed_counts_when_all_its_arms_are_done(tmp_path, scale):
    def task(arm, seed):
        return Task("schedule", arm, seed, None, scale, tmp_path, tmp_path, float("inf"))

    every = [task(arm, seed) for seed in (1, 2, 3) for arm in ("cosine", "WSD")]
    for one, value in zip(every[:5], (3.0, 3.1, 2.9, 3.2, 2.8), strict=True):
        studies.write(one.result, {one.arm: (value, studies.NATS)})
    found, seeds = studies.measurements(every)
    assert seeds == [1, 2]
    assert {one.name: one.values for one in found} == {"cosine": [3.0, 2.9], "WSD": [3.1, 3.2]}
    assert {one.better for one in found} == {"lower"}


def test_nothing_begins_after_the_time(tmp_path, scale):
    late = Task("schedule", "cosine", 1, None, scale, tmp_path, tmp_path, 0.0)
    assert studies.perform(late, 1) is None and not late.result.exists()


def test_the_command(tokens, scratch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: PROCESSES)       # which have imported it all
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.setattr(sys, "argv", [
        "studies", "neuron_score", "--tokens", str(tokens), "--parents", str(scratch / "parent-1"), "--jobs", "1",
        "--tiny", "--out", str(tmp_path / "out"), "--commit", "d6c7349"])
    studies.main()
    found = read_study(tmp_path / "out/neuron_score.json")
    assert found.command == "python -m benchmarks.studies neuron_score --parents parent-1 --tiny"
    assert "Parents of" in found.note and found.commit == "d6c7349"
    assert "wrote" in capsys.readouterr().out


def test_results_are_of_the_parent_that_lies_there(tokens, scratch, scale, tmp_path):
    first = tmp_path / "parent"
    shutil.copytree(scratch / "parent-1", first)
    before = studies.identity(scale, tokens, [first])
    assert before == studies.identity(scale, tokens, [scratch / "parent-1"])
    config, state, _ = load_weights(first)
    shutil.rmtree(first)
    first.mkdir()
    save_weights(first, config, {name: tensor + 0.1 for name, tensor in state.items()}, {})
    assert before != studies.identity(scale, tokens, [first])


def test_results_are_of_the_blend_that_lies_there(tokens, scale, tmp_path):
    for name in ("tokens.json", "blend.json"):
        shutil.copy(tokens / name, tmp_path)
    before = studies.identity(scale, tmp_path, [])
    assert before == studies.identity(scale, tokens, [])
    (tmp_path / "blend.json").write_text((tmp_path / "blend.json").read_text().replace('"until": 1.0', '"until": 1.00'))
    assert before != studies.identity(scale, tmp_path, [])


@pytest.mark.parametrize("module", [studies.recall_study, studies.fp8_study])
def test_results_are_of_the_code_of_all_studies(tokens, scale, tmp_path, monkeypatch, module):
    before = studies.identity(scale, tokens, [])
    changed = tmp_path / "changed.py"
    changed.write_text(Path(module.__file__).read_text() + "# changed\n")
    monkeypatch.setattr(module, "__file__", str(changed))
    assert before != studies.identity(scale, tokens, [])


def test_records_can_be_read():
    found = load_studies(ROOT / FOLDER)
    assert found
    for name, study in found.items():
        assert isinstance(study, Study), f"{name}: {study}"
        assert study.note and not any(part in study.model_dump_json() for part in ("/work", "/tmp"))


def test_a_claim_sends_nobody_to_a_study_that_is_not_there():
    sent = {words["command"].split()[-1] for words in WORDS if "benchmarks.studies" in words["command"]}
    assert sent and sent <= set(studies.STUDIES)
