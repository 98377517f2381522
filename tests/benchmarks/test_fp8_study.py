"""The study of number formats: an arm goes on from the BF16 run, differs from it as it says, and answers a claim."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import fp8_study, studies
from benchmarks.fp8_study import ARCHITECTURES, ARMS, CONTROL, Arm, losses, model_config, recipe
from model.config import ModelError
from stages.frame.params import load_params
from stages.report.claims import judge_study
from stages.report.statistics import Answer

ROOT = Path(__file__).parents[2]
SIZES = fp8_study.CPU._replace(layers=10, learning_rate=2e-2, steps=13)
PAIR = {"BF16": ARMS["BF16"], "FP8": ARMS["FP8"]}


def trained(
    arms: dict[str, Arm], tokens: Path, scratch: Path, monkeypatch, sizes=SIZES, architecture: str = "hybrid"
) -> dict[str, float]:
    """Losses under these arms."""
    monkeypatch.setattr(fp8_study, "ARMS", arms)
    return losses(model_config(sizes, architecture, 64), recipe(sizes), 1, tokens, scratch)


@pytest.fixture(scope="module")
def alike(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, float], Path]:
    """Losses, one arm changing nothing, and the scratch directory."""
    directory = tmp_path_factory.mktemp("alike")
    with pytest.MonkeyPatch.context() as patch:
        return trained(PAIR | {"same": Arm("bf16", {})}, tokens, directory, patch), directory


def test_an_arm_goes_on_as_the_bf16_run_did_and_fp8_does_not(alike):
    found, directory = alike
    for metric in ("training loss", "validation loss"):
        assert found[f"same, {metric}"] == found[f"BF16, {metric}"] != found[f"FP8, {metric}"]
        assert found[f"FP8, {metric}"] == pytest.approx(found[f"BF16, {metric}"], rel=0.02)
    first = (directory / "BF16" / "training.csv").read_text().splitlines()
    tail = [float(line.split(",")[2]) for line in first[-3:]]            # 13 steps: the last fifth is three
    assert found["BF16, training loss"] == pytest.approx(sum(tail) / 3)
    assert sorted(path.name for path in directory.iterdir()) == ["BF16"]


@pytest.mark.parametrize(("changes", "precision", "message"), [
    ({"clip_grad": 2.0}, "fp8", r"state of another run: clip_grad 1\.0 and now 2\.0"),
    ({}, "bf16", "FP8: the same loss as in BF16"),
])
def test_an_fp8_arm_is_fp8_and_nothing_else(changes, precision, message, alike, tokens, tmp_path, monkeypatch):
    class Careless(fp8_study.ArmTrainer):
        def __init__(self, config, recipe, own, *rest):
            careless = (recipe.model_copy(update=changes), precision) if own == "fp8" else (recipe, own)
            super().__init__(config, *careless, *rest)

    monkeypatch.setattr(fp8_study, "ArmTrainer", Careless)
    with pytest.raises(ModelError, match=message):
        trained(PAIR, tokens, shutil.copytree(alike[1], tmp_path / "scratch"), monkeypatch)


def test_a_model_that_does_not_learn_is_an_error(tokens, tmp_path, monkeypatch):
    sizes = SIZES._replace(learning_rate=1e-4, steps=8)                # a little below where it started
    with pytest.raises(ModelError, match=r"BF16: the validation loss .* it did not learn"):
        trained({"BF16": ARMS["BF16"]}, tokens, tmp_path, monkeypatch, sizes, "transformer")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sizes_suit_fp8_products_and_the_kernels(architecture):
    from model.megatron.limits import FP8_MULTIPLE, check_kernels

    config = model_config(fp8_study.GPU, architecture, 8192)
    sizes = [config.hidden_size, config.ffn_hidden_size, config.attention_size,
             config.attention_size + 2 * config.kv_size]
    if architecture == "hybrid":
        check_kernels(config)
        sizes += [config.in_proj_size, config.mamba_inner_size]
    assert all(size % FP8_MULTIPLE == 0 for size in sizes)


SHIFTS = {"FP8": 2e-4, "FP8, two BF16 layers at each end": 3e-4, "FP8, no BF16 layers": 6e-4,
          "FP8, gradients in E4M3": 2e-4, CONTROL: 0.05}


@pytest.mark.parametrize("changed, parity, settings", [
    ({}, Answer.HOLDS, Answer.HOLDS),
    ({"FP8": 2e-3}, Answer.FAILS, Answer.FAILS),
    ({CONTROL: 2e-4}, Answer.UNDECIDED, Answer.UNDECIDED),
    ({"FP8, two BF16 layers at each end": 1e-4}, Answer.HOLDS, Answer.FAILS),
    ({"FP8, gradients in E4M3": 3e-3}, Answer.HOLDS, Answer.FAILS),
])
def test_the_record_is_judged_by_the_report(changed, parity, settings, tmp_path):
    draw, tasks = np.random.default_rng(0), []
    for seed in range(1, 6):
        for architecture in ARCHITECTURES:
            loss = draw.normal(4, 0.04)
            tasks.append(studies.Task("fp8_parity", architecture, seed, studies.Training(
                model_config(fp8_study.GPU, architecture, 8192), recipe(fp8_study.GPU), tmp_path), None, tmp_path,
                tmp_path, 0.0))
            studies.write(tasks[-1].result, {
                f"{architecture}, {arm}, {metric}": (loss * (1 + (SHIFTS | changed).get(arm, 0.0)
                                                             + (arm != "BF16") * draw.normal(0, 1e-5)), studies.NATS)
                for arm in ARMS for metric in ("training loss", "validation loss")})
    tasks[0] = tasks[0]._replace(scale=studies.scale_of(load_params(ROOT / "params.yaml"), 64, False, True))
    study = studies.record("fp8_parity", tasks, "python -m benchmarks.studies fp8_parity", "d6c7349")
    assert judge_study(study, "fp8_parity")[0] is parity
    assert judge_study(study, "fp8_recipe")[0] is settings
