"""The trainer with real FP8 and Transformer Engine's optimizer. On two GPUs the distributed optimizer has two parts."""

from __future__ import annotations

import csv
import math
import shutil

import pytest
import torch
from tiny_engine import run_processes, train_job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EVERYWHERE = {"bf16_layers_at_start": 0, "bf16_layers_at_end": 0}


def losses(run: dict) -> list[float]:
    return [row["loss"] for row in run["training"]]


@pytest.mark.parametrize(("precision", "changes"), [
    ("bf16", {}), ("fp8", {}), ("fp8", EVERYWHERE),
    ("bf16", {"distributed_optimizer": True}), ("fp8", {"distributed_optimizer": True}),
    ("fp8", {"cuda_graph": True, "fp8_statistics": True}),
])
def test_a_resumed_run_gives_the_same_losses(tokens, precision, changes, tmp_path):
    job = {"tokens": str(tokens), "parallelism": {}, "precision": precision, "checkpoint_every": 3,
           "checkpoints_kept": 2} | changes
    whole = train_job(out=str(tmp_path / "a"), scratch=str(tmp_path / "whole"), **job)
    assert all(map(math.isfinite, losses(whole)))
    assert (tmp_path / "whole" / "resume" / "latest").read_text() == "step-00000003\n"
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    resumed = train_job(out=str(tmp_path / "b"), scratch=str(tmp_path / "broken"), **job)
    assert resumed["resumed_from"] == 3
    assert losses(resumed) == pytest.approx(losses(whole), rel=2e-3)
    if "fp8_statistics" in changes:
        rows = list(csv.DictReader((tmp_path / "broken" / "fp8_statistics.csv").open()))
        assert len(rows) == 2 * 8 * 3           # evaluations, linear layers, tensors
        assert all(10 < float(row["snr_db"]) < 60 for row in rows)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_distributed_optimizer_in_processes_of_its_own(tokens, precision, tmp_path):
    """Saved, and reloaded by fresh processes, as many as there are GPUs up to two; then by one alone. On two, weights
    travel in many buckets while the forward goes on: a layer that did not wait for its own would train on old ones."""
    processes = min(2, torch.cuda.device_count())
    job = {"tokens": str(tokens), "parallelism": {}, "precision": precision, "checkpoint_every": 3}
    plain = train_job(out=str(tmp_path / "plain"), scratch=str(tmp_path / "plain-scratch"), **job)
    job |= {"distributed_optimizer": True}
    first = job | {"out": str(tmp_path / "a"), "scratch": str(tmp_path / "saved")}
    [saved] = run_processes(processes, [first], tmp_path)
    assert losses(saved) == pytest.approx(losses(plain), rel=5e-3)
    for count in {processes, 1}:
        scratch = tmp_path / f"reloaded-{count}"
        shutil.copytree(tmp_path / "saved", scratch)
        [reloaded] = run_processes(
            count, [job | {"out": str(tmp_path / f"out-{count}"), "scratch": str(scratch)}], tmp_path)
        assert reloaded["resumed_from"] == 3
        assert losses(reloaded) == pytest.approx(losses(saved), rel=5e-3)


@pytest.mark.parametrize("changes", [
    {}, {"fp8_gradients": "e4m3"}, {"fp8_recipe": "unscaled"}, {"fp8_recipe": "unscaled", "fp8_gradients": "e4m3"},
    EVERYWHERE,
])
def test_fp8_settings_train_near_bf16_and_are_not_bf16(tokens, changes, tmp_path):
    job = {"tokens": str(tokens), "parallelism": {}} | changes
    fp8 = train_job(out=str(tmp_path / "a"), scratch=str(tmp_path / "fp8"), precision="fp8", **job)
    bf16 = train_job(out=str(tmp_path / "b"), scratch=str(tmp_path / "bf16"), precision="bf16", **job)
    assert losses(fp8) != losses(bf16)
    assert losses(fp8) == pytest.approx(losses(bf16), rel=0.1)
