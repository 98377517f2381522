from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.checkpoint import load_weights
from model.training.trainer import train
from stages.frame.params import load_params
from stages.frame.schema import csv_text
from tests.forked import run, start
from tests.namespaces import ORDINARY, on_full, unshare

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--set", "pretrain.tokens=256", "--set", "pretrain.evaluations=1")
COMMAND = ("-m", "stages.pretrain", "--set", "tokenizer.vocab_size=512", "--out", ".", "--variant")


def pretrain_apart(before: Sequence[str], workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, *COMMAND, *arguments], cwd=workplace, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_a_killed_run_goes_on_to_the_very_same_results(workplace):
    """SIGKILL after a resume state exists; the same command again; the same files as a run left alone."""
    killed = start(workplace, *COMMAND, "hybrid-fp8")
    resume = workplace / ".scratch"
    while not list(resume.glob("pretrain-hybrid-fp8-*/resume/latest")):
        assert killed.is_alive()
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert not (workplace / "data" / "toy" / "checkpoints" / "hybrid-fp8").exists()

    records = workplace / "runs" / "pretrain" / "hybrid-fp8"
    (workplace / "data/toy/tokens/blend.json").touch()
    output = run(workplace, *COMMAND, "hybrid-fp8", "--set", "pretrain.checkpoint_every=7").stdout
    assert "step 24/24 loss " in output and " lr " in output and " tok/s " in output
    assert json.loads((records / "provenance.json").read_text())["resumed"]
    params = load_params(workplace / "params.yaml", ("tokenizer.vocab_size=512",))
    whole = train(
        params.model_of("hybrid-fp8"), params.pretrain, "hybrid", "fp8", 1, workplace / "data" / "toy" / "tokens",
        workplace / "whole", workplace / "scratch", lambda *_, **__: None,
    )
    assert whole.resumed_from is None
    assert (records / "training.csv").read_text() == csv_text(whole.training)
    assert (records / "validation.csv").read_text() == csv_text(whole.validation)
    for path in (workplace / "data" / "checkpoints" / "hybrid-fp8").iterdir():
        assert path.read_bytes() == (workplace / "whole" / path.name).read_bytes(), path.name
    check_records(records, workplace)


def test_a_blend_of_fewer_tokens_is_refused(workplace):
    """How often files are read was counted for those of blend.json: 1,536 would be beyond tokenize.repeats."""
    file = workplace / "data/toy/tokens/blend.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokens": 1535}))
    refused = run(workplace, *COMMAND, "hybrid-bf16", check=False)
    assert refused.returncode == 1 and refused.stderr == (
        "data/toy/tokens/blend.json: made for 1,535 tokens, and pretrain.tokens is 1,536: files would be read more "
        "often than tokenize.repeats says.\nRun the stage `tokenize` with it first, or lower it.\n")


def check_records(records: Path, workplace: Path) -> None:
    training, validation = rows(records / "training.csv"), rows(records / "validation.csv")
    assert list(training[0]) == ["step", "tokens", "loss", "grad_norm", "learning_rate", "skipped", "spike"]
    assert [int(row["step"]) for row in training] == list(range(1, 25))
    assert {row["skipped"] for row in training} == {"0"}
    assert list((records / "tensorboard").glob("events.out.tfevents.*"))
    assert [int(row["tokens"]) for row in training] == [64 * step for step in range(1, 25)]
    assert list(validation[0]) == ["step", "tokens", "domain", "loss", "bits_per_byte"]
    assert [int(row["step"]) for row in validation if row["domain"] == "all"] == [0, 8, 16, 24]
    assert {row["domain"] for row in validation} == {"code", "docs", "all"}
    metrics = json.loads((records / "metrics.json").read_text())
    config, state, description = load_weights(workplace / "data" / "checkpoints" / "hybrid-fp8")
    assert config == load_params(workplace / "params.yaml", ("tokenizer.vocab_size=512",)).model_of("hybrid-fp8")
    assert metrics["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert metrics["fp8_emulated"] == 1
    last = {row["domain"]: float(row["bits_per_byte"]) for row in validation if row["step"] == "24"}
    assert metrics["validation_bits_per_byte"] == pytest.approx(last["all"], rel=1e-4)
    assert metrics["validation_bits_per_byte_code"] == pytest.approx(last["code"], rel=1e-4)
    assert {"tokens_per_second", "train_seconds", "peak_memory_gib", "final_loss", "steps", "tokens",
            "validation_bits_per_byte_first", "validation_first_tokens", "validation_unigram_loss",
            "steps_skipped", "gradient_spikes"} <= metrics.keys()
    assert description["precision"] == "fp8" and description["architecture"] == "hybrid" and description["seed"] == 1
    assert description["tokenizer_digest"] == "aa" and not any("second" in name for name in description)
    assert math.isclose(description["validation_bits_per_byte"], last["all"], rel_tol=1e-4)


def test_a_variant_trains_with_its_own_fp8_recipe(workplace):
    """The same seed without scales: the first loss is already another, and it is that of the recipe given outright."""
    run(workplace, *COMMAND, "hybrid-fp8-unscaled", *SHORT)
    params = load_params(workplace / "params.yaml", ("tokenizer.vocab_size=512", *SHORT[1::2]))
    for scaling, same in (("unscaled", True), ("current", False)):
        recipe = params.pretrain.model_copy(update={"fp8_recipe": scaling})
        trained = train(
            params.model_of("hybrid-fp8"), recipe, "hybrid", "fp8", 1, workplace / "data" / "toy" / "tokens",
            workplace / scaling, workplace / "scratch" / scaling, lambda *_, **__: None,
        )
        written = (workplace / "runs" / "pretrain" / "hybrid-fp8-unscaled" / "training.csv").read_text()
        assert (written == csv_text(trained.training)) is same


def test_full_shared_memory_is_not_needed(workplace):
    full = pretrain_apart(on_full("/dev/shm", "4k"), workplace, "hybrid-fp8", *SHORT)
    assert full.returncode == 0, full.stderr
    params = load_params(workplace / "params.yaml", ("tokenizer.vocab_size=512", *SHORT[1::2]))
    trained = train(
        params.model_of("hybrid-fp8"), params.pretrain, "hybrid", "fp8", 1, workplace / "data/toy/tokens",
        workplace / "whole", workplace / "scratch", lambda *_, **__: None,
    )
    assert (workplace / "runs/pretrain/hybrid-fp8/training.csv").read_text() == csv_text(trained.training)


def test_tokens_that_this_user_may_not_read_are_named(workplace):
    tokens = workplace / "data/toy/tokens/tokens.json"
    tokens.chmod(0)
    done = pretrain_apart(unshare(*ORDINARY), workplace, "hybrid-fp8")
    assert done.returncode == 1
    assert done.stderr.startswith("data/toy/tokens/tokens.json: Permission denied.\nLet user 54321 "), done.stderr
    assert done.stderr.count("\n") == 2


def refused(workplace: Path, variant: str) -> str:
    """The two lines with which the stage ends."""
    done = run(workplace, *COMMAND, variant, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 2, done.stderr
    return done.stderr


def test_tokens_of_another_tokenizer_are_an_error(workplace):
    tokenizer = workplace / "data" / "toy" / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes(b"another")
    errors = refused(workplace, "hybrid-fp8")
    assert "tokens.json: made with tokenizer aa, and data/toy/tokenizer/tokenizer.model is " in errors
    ours = workplace / "data" / "tokenizer"                 # under --out, where every stage looks first
    ours.mkdir()
    (ours / "tokenizer.model").write_bytes(b"one more")
    assert "and data/tokenizer/tokenizer.model is " in refused(workplace, "hybrid-fp8")


def test_a_truncated_token_file_is_an_error_before_any_work(workplace):
    path = workplace / "data" / "toy" / "tokens" / "train" / "code-high.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert "train/code-high.bin: " in refused(workplace, "hybrid-fp8")
    assert not list((workplace / ".scratch").glob("*/index"))
