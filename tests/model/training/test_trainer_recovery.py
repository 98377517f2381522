"""What goes wrong in a run: gradients that are not finite, a full disk, a process that is killed."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from tiny_engine import HYBRID, RECIPE, optimizer_state, train_job

from model.config import ModelError
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.engine_checkpoint import save_model
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from model.training.trainer import Trainer
from tests.forked import run


def assert_same_files(ours: Path, theirs: Path) -> None:
    assert [file.name for file in sorted(ours.iterdir())] == [file.name for file in sorted(theirs.iterdir())]
    for file in ours.iterdir():
        assert file.read_bytes() == (theirs / file.name).read_bytes(), file.name


def poison(monkeypatch, steps: set[int], value: float) -> None:
    """Make one element of the gradient `value` at these steps."""
    original = Trainer._whole_step

    def whole_step(self: Trainer, sequences: torch.Tensor) -> list[torch.Tensor]:
        losses = original(self, sequences)
        if self.schedule.num_steps + 1 in steps:
            self.model.decoder.final_norm.weight.main_grad[0] = value
        return losses

    monkeypatch.setattr(Trainer, "_whole_step", whole_step)


@pytest.mark.parametrize(("precision", "value"), [("bf16", math.nan), ("float32", math.inf)])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(tokens, tmp_path, monkeypatch, precision, value):
    poison(monkeypatch, {2}, value)
    with process_groups():
        trainer = Trainer(HYBRID, RECIPE, precision, 1, tokens, tmp_path, ONE_COPY)
        assert trainer.train_step(1)["skipped"] == 0
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        row = trainer.train_step(2)
        assert row["skipped"] == 1 and not math.isfinite(row["grad_norm"]) and math.isfinite(row["loss"])
        assert all(map(torch.equal, before, trainer.model.parameters()))
        assert trainer.train_step(3)["skipped"] == 0
        assert not all(map(torch.equal, before, trainer.model.parameters()))
        assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
        trainer.close()


def test_skipped_steps_are_in_the_records_also_of_a_run_that_goes_on(tokens, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 5}, math.nan)
    job = {"tokens": str(tokens), "parallelism": {}, "checkpoint_every": 4}
    whole = train_job(out=str(tmp_path / "a"), scratch=str(tmp_path / "whole"), **job)
    assert [row["skipped"] for row in whole["training"]] == [0, 1, 0, 0, 1, 0]
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    resumed = train_job(out=str(tmp_path / "b"), scratch=str(tmp_path / "broken"), **job)
    assert resumed["resumed_from"] == 4
    assert repr(resumed["training"]) == repr(whole["training"])              # not a number equals nothing
    assert resumed["metrics"]["steps_skipped"] == whole["metrics"]["steps_skipped"] == 2
    assert math.isfinite(whole["metrics"]["final_loss"])


@pytest.fixture(scope="module")
def two_states(tokens, tmp_path_factory) -> Path:
    """The scratch directory of a run with states after steps 2 and 4."""
    directory = tmp_path_factory.mktemp("two-states")
    train_job(str(tokens), str(directory / "out"), str(directory / "scratch"), {}, checkpoint_every=2)
    return directory / "scratch"


@pytest.mark.parametrize(("file", "damaged", "resumed_from"), [
    ("__0_0.distcp", [4], 2), (".metadata", [4], 2), ("SHA256SUMS", [4], 2), ("training.csv", [4], 2),
    ("training.csv", [2, 4], None),
])
def test_a_damaged_state_is_left_out_and_the_one_before_gone_on_from(
    tokens, unbroken, two_states, tmp_path, capsys, file, damaged, resumed_from
):
    shutil.copytree(two_states, tmp_path / "scratch")
    for step in damaged:
        path = tmp_path / f"scratch/resume/step-{step:08d}" / file
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4])
                         + content[len(content) // 2 + 1 :])
    (tmp_path / "scratch/training.csv").write_text("whatever")
    resumed = train_job(str(tokens), str(tmp_path / "b"), str(tmp_path / "scratch"), {}, checkpoint_every=5)
    said = capsys.readouterr().out
    assert resumed["resumed_from"] == resumed_from
    assert all(f"step-{step:08d}/" in said for step in damaged) and "This state is left out" in said
    left = {path.name for path in (tmp_path / "scratch/resume").glob("step-*")}
    assert left == {f"step-{step:08d}" for step in (resumed_from, 5) if step}, "a damaged one is none of those kept"
    assert resumed["training"] == unbroken["training"]
    assert_same_files(tmp_path / "b", unbroken["directory"] / "out")


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A file cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [100, 100_000])         # the disk is full at the first file, or within the weights
def test_a_disk_that_fills_during_a_checkpoint_leaves_the_last_one_whole(tokens, unbroken, tmp_path, size):
    scratch = tmp_path / "scratch"
    shutil.copytree(unbroken["directory"] / "scratch", scratch)
    with process_groups():
        trainer = Trainer(HYBRID, RECIPE, "float32", 1, tokens, scratch, ONE_COPY)
        with files_no_larger_than(size), pytest.raises(ModelError, match="checkpoint could not be written") as error:
            trainer.resume.save(5, {})
        trainer.close()
    assert str(error.value).count("\n") == 1
    assert sorted(path.name for path in (scratch / "resume").iterdir()) == ["latest", "step-00000004"]
    resumed = train_job(str(tokens), str(tmp_path / "out"), str(scratch), {}, checkpoint_every=5)
    assert resumed["resumed_from"] == 4
    assert resumed["training"] == unbroken["training"]
    assert_same_files(tmp_path / "out", unbroken["directory"] / "out")


def test_final_weights_that_a_full_disk_cut_short_leave_nothing(tmp_path):
    with process_groups():
        model = build_model(HYBRID, Precision("float32"), ONE_COPY, seed=1)
        with files_no_larger_than(100_000), pytest.raises(ModelError, match="could not be written") as error:
            save_model(tmp_path / "weights", model)
        (tmp_path / "file").touch()
        with pytest.raises(ModelError, match="could not be written"):
            save_model(tmp_path / "file" / "weights", model)
    assert str(error.value).count("\n") == 1 and not (tmp_path / "weights").exists()


def test_a_state_written_in_the_background_is_of_its_step(tokens, unbroken, tmp_path, monkeypatch):
    """The files are written only after two more steps have changed the weights."""
    go = threading.Event()
    original = FileSystemWriterAsync.write_preloaded_data

    def slow(*arguments: object, **options: object) -> None:
        assert go.wait(60)
        original(*arguments, **options)

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(slow))
    resume = tmp_path / "resume"
    with process_groups():
        recipe = RECIPE.model_copy(update={"checkpoints_kept": 2})
        trainer = Trainer(HYBRID, recipe, "float32", 1, tokens, tmp_path, ONE_COPY)
        trainer.resume.in_background = True
        for step in range(1, 5):
            trainer.train_step(step)
        (resume / ".partial").mkdir(parents=True)
        (resume / ".partial" / "of a killed run").touch()
        trainer.resume.save(4, {})
        trainer.train_step(5)
        trainer.resume.collect(wait=False)
        assert not (resume / "latest").exists()
        trainer.train_step(6)
        go.set()
        trainer.resume.save(6, {})                                  # ends the one before first
        assert (resume / "latest").read_text() == "step-00000004\n"
        trainer.resume._writing.files.thread.join()
        trainer.resume.collect(wait=False)
        assert (resume / "latest").read_text() == "step-00000006\n"
        trainer.close()
    assert {path.name for path in resume.iterdir()} == {"latest", "step-00000004", "step-00000006"}
    assert not (resume / "step-00000004" / "of a killed run").exists()
    ours, theirs = optimizer_state(tmp_path, 4), optimizer_state(unbroken["directory"] / "scratch", 4)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with process_groups():
        trainer = Trainer(HYBRID, recipe, "float32", 1, tokens, tmp_path, ONE_COPY)
        for step in (7, 8):
            trainer.resume.save(step, {})
        assert {path.name for path in resume.iterdir()} == {"latest", "step-00000007", "step-00000008"}
        (resume / "latest").unlink()
        (resume / "latest").mkdir()
        with pytest.raises(ModelError, match="could not be written"):
            trainer.resume.save(9, {})
        trainer.close()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_gives_the_very_same_results(tokens, kills, tmp_path):
    job = {"tokens": str(tokens), "parallelism": {}, "precision": "fp8", "checkpoint_every": 2}
    job["tokens_to_train_on"] = 4 * 16 * 6 * (kills + 1)
    arguments = [json.dumps(job | {"out": str(tmp_path / "a"), "scratch": str(tmp_path / "killed")}), str(kills),
                 str(tmp_path / "result.json")]
    run(tmp_path, "-m", "tests.model.training.killed_runs", *arguments)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["resumed_from"]
    whole = train_job(out=str(tmp_path / "b"), scratch=str(tmp_path / "whole"), **job)
    assert whole["resumed_from"] is None and len(whole["training"]) == 6 * (kills + 1)
    assert result["training"] == whole["training"] and result["validation"] == whole["validation"]
    assert_same_files(tmp_path / "a", tmp_path / "b")
