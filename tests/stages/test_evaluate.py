"""The evaluate stage as a user runs it: records, offline, and a run that is killed and goes on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from tiny_corpus import ROOT, write_params

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenize import fast_tokenizer, tokenizer
from model import hub
from model.hybrid_lm import HybridLM
from stages.frame.params import load_params
from tests.data_pipeline.small_corpus import write_curated
from tests.forked import run, start

NAMES = ("hybrid-bf16", "transformer-bf16")
COMMAND = ("-m", "stages.evaluate", "--variant")
QUICK = ("-m", "tests.quick", *COMMAND[1:])
SIZES = {
    "evaluate.items_per_task": 8,
    "evaluate.bits_per_byte_kilobytes": 5,
    "evaluate.context_tokens": 96,
    "evaluate.recall_pairs": 4,
    "evaluate.items_per_context": 4,
    "evaluate.paper_items": 2,
    "evaluate.reference_share": 0,
    "evaluate.context_multiples": [1, 2, 4],
    "pretrain.bf16_layers_at_start": 1,
    "pretrain.bf16_layers_at_end": 1,
    "model.hybrid.pattern": "M-*-",
    "model.transformer.pattern": "*-",
    "model.hybrid.hidden_size": 64,
    "model.transformer.hidden_size": 64,
    "tokenizer.vocab_size": 512,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with curated text and two exported models with random weights."""
    directory = tmp_path_factory.mktemp("evaluate")
    write_params(directory, **SIZES)
    curated = write_curated(directory / "data/tiny/curated")
    tokens = directory / "data/tiny/tokenizer"
    tokens.mkdir()
    tokenizer.train(curated, TokenizerConfig(vocab_size=512, training_megabytes=1), 1, tokens)
    params = load_params(directory / "params.yaml")
    torch.manual_seed(5)
    corpus = json.loads((curated / "manifest.json").read_text())["corpus_digest"]
    for name, training in zip(NAMES, ({"corpus_digest": corpus}, {"imported_from": "owner/model"}), strict=True):
        config = params.model_of(name)
        exported = directory / "data/tiny/hub" / name
        hub.save(exported, config, HybridLM(config).state_dict(), training, "float32")
        fast_tokenizer.export(tokens / "tokenizer.model", exported)
    run(directory, "-m", "stages.items")
    return directory


def records(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """metrics.json, samples.json, provenance.json."""
    there = directory / "runs/tiny/evaluate" / name
    metrics, samples, provenance = (
        json.loads((there / f"{part}.json").read_text()) for part in ("metrics", "samples", "provenance")
    )
    return metrics, samples, provenance


def test_records_of_two_models(prepared: Path) -> None:
    done = subprocess.run(                                  # with imports of its own
        [sys.executable, *COMMAND, NAMES[0]], cwd=prepared, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.stdout.startswith("step "), done.stdout
    assert not done.stderr, "no bars or warnings where nobody looks"
    run(prepared, *QUICK, NAMES[1])
    metrics, samples, provenance = records(prepared, NAMES[0])
    other, _, _ = records(prepared, NAMES[1])
    at = [f"{task}_at_{multiple}x" for task in ("copy", "recall", "needle") for multiple in (1, 2, 4)]
    expected = {f"{task}_{key}" for task in ("syntax_pairs", "recall", *at)
                for key in ("accuracy", "accuracy_stderr", "accuracy_control", "accuracy_chance", "items")}
    suffixes = ("", "_stderr", "_compressor")
    expected |= {f"bits_per_byte_{domain}{suffix}" for domain in ("code", "docs") for suffix in suffixes}
    expected |= {"bits_per_byte", "bits_per_byte_compressor", "items_refused", "items_digest"}
    assert set(metrics) == expected
    assert metrics["items_digest"] == other["items_digest"]
    same = {key for key in metrics if metrics[key] == other[key]}
    assert {"bits_per_byte_compressor", "syntax_pairs_accuracy_control", "recall_items"} <= same
    assert metrics["bits_per_byte"] != other["bits_per_byte"]
    assert 2 < metrics["bits_per_byte"] < 12
    assert metrics["syntax_pairs_items"] == 8
    assert {len(examples) > 0 for examples in samples.values()} == {True}
    assert set(provenance["inputs"]) == {
        "data/tiny/curated/manifest.json", "data/tiny/items/items.json", f"data/tiny/hub/{NAMES[0]}"}
    there = prepared / "runs/tiny/evaluate" / NAMES[0]
    scores = json.loads((there / "scores.json").read_text())
    for name, right in scores.items():
        if name.startswith("bits_per_byte"):
            figure = -sum(score for score, _ in right) / sum(size for _, size in right) / math.log(2)
            assert figure == pytest.approx(metrics[name], rel=1e-4)
        else:
            assert len(right) == metrics[f"{name}_items"]
            assert sum(right) / len(right) == pytest.approx(metrics[f"{name}_accuracy"], rel=1e-5)
    assert len(scores) == 2 + 2 + 9
    paper = {row["task"]["task"]: row for row in json.loads((there / "paper_tasks.json").read_text())}
    assert len(paper) == 19 and paper["mmlu"]["items"] == paper["mmlu"]["cut"] == len(paper["mmlu"]["right"]) == 2
    assert 1 < paper["gsm8k_cot"]["bits_per_byte"] < 15 and paper["gsm8k_cot"]["score"] is None
    card = (there / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    index = YAML(typ="safe").load(front)["model-index"][0]["results"]
    assert len(index) == 14, "every measured figure"
    assert f"| syntax pairs accuracy | {metrics['syntax_pairs_accuracy']:.3f} ±" in text
    assert "python/" in text, "the sources of the training text"
    assert "python/" not in (there.with_name(NAMES[1]) / "README.md").read_text(), "which did not train the other"
    assert not provenance["resumed"]
    assert not list((prepared / ".scratch").glob("evaluate-*-*/*")), "resume state is gone"


def test_killed_run_goes_on_with_the_same_results(prepared: Path) -> None:
    unbroken, samples, _ = records(prepared, NAMES[0])
    (prepared / f"runs/tiny/evaluate/{NAMES[0]}/metrics.json").unlink()
    process = start(prepared, *QUICK, NAMES[0])
    deadline = time.monotonic() + 240
    while not list(prepared.glob(".scratch/evaluate-*/rolling-000001-*.json")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (prepared / f"runs/tiny/evaluate/{NAMES[0]}/metrics.json").exists()
    run(prepared, *QUICK, NAMES[0])
    metrics, resumed_samples, provenance = records(prepared, NAMES[0])
    assert provenance["resumed"]
    assert metrics == unbroken
    assert resumed_samples == samples


@pytest.mark.slow
def test_a_model_over_two_processes_gets_the_figures_of_one(prepared: Path) -> None:
    """By torchrun: every metric to float32 rounding, the paper's tasks among them."""
    split = ["--set", "runtime.launcher={kind: torchrun, processes_per_node: 2}",
             "--set", "runtime.parallel={tensor: 2}"]
    both = [run(prepared, *COMMAND, NAMES[0], "--out", out, *options) for out, options in (("one", []), ("two", split))]
    assert all(done.stdout.count("step ") for done in both)
    one, two = ({name: json.loads((prepared / out / "runs/evaluate" / NAMES[0] / f"{name}.json").read_text())
                 for name in ("metrics", "scores", "paper_tasks")} for out in ("one", "two"))
    assert two["metrics"].pop("processes") == 2
    assert two["metrics"].pop("items_digest") == one["metrics"].pop("items_digest")
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
    for task, rows in one["scores"].items():
        other = torch.tensor(two["scores"][task])
        torch.testing.assert_close(other, torch.tensor(rows), rtol=1e-5, atol=1e-2, msg=task)
    for row, other in zip(one["paper_tasks"], two["paper_tasks"], strict=True):
        assert other["right"] == row["right"] and other["left_out"] == row["left_out"]
        assert (other["bits_per_byte"] or 0) == pytest.approx(row["bits_per_byte"] or 0, rel=1e-4)


def test_the_reference_is_left_out_with_a_reason(prepared: Path) -> None:
    done = run(prepared, "-m", "stages.reference")
    assert "SmolLM2-135M-Instruct is left out: evaluate.reference_share is 0." in done.stdout and not done.stderr
    there = prepared / "runs/tiny/reference"
    assert json.loads((there / "metrics.json").read_text()) == {"left_out": "evaluate.reference_share is 0"}
    assert json.loads((there / "paper_tasks.json").read_text()) == []


def test_what_is_missing_is_named(prepared: Path) -> None:
    done = run(prepared, *COMMAND, "compressed", check=False)
    assert done.returncode == 1
    assert "stage `export@compressed` writes it" in done.stderr
