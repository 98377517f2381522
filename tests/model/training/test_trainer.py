from __future__ import annotations

import csv
import math
import shutil
from collections import Counter
from contextlib import closing, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from tiny_engine import HYBRID, RECIPE, optimizer_state, run_processes, train_job

from model import costs
from model.checkpoint import describe, load_weights
from model.config import ModelError, PretrainConfig
from model.hybrid_lm import HybridLM
from model.megatron import optimizer
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.engine_checkpoint import save_model
from model.megatron.optimizer import build_schedule
from model.megatron.precision import Precision
from model.training import trainer
from model.training.spike_guard import SpikeGuard
from model.training.token_data import TrainingData, validation
from model.training.trainer import Trainer, train

LAYOUTS = [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {}]
BY_DOCUMENT = {"reset_at_documents": True, "recompute": "M*-"}


def losses(run: dict) -> list[float]:
    return [row["loss"] for row in run["training"]]


def test_losses_are_those_of_a_plain_pytorch_loop(tokens, unbroken, tmp_path):
    with process_groups():
        save_model(tmp_path / "start", Trainer(HYBRID, RECIPE, "float32", 1, tokens, tmp_path, ONE_COPY).model)
    describe(tmp_path / "start", HYBRID, {})
    model = HybridLM.from_state(*load_weights(tmp_path / "start")[:2])
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    data = TrainingData(tokens, 16, 24, 1, tmp_path / "index")
    for step, row in enumerate(unbroken["training"]):
        batch = torch.stack([data[4 * step + sample] for sample in range(4)])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = row["learning_rate"]
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    trained = load_weights(unbroken["directory"] / "out")[1]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=2e-4)


def test_an_id_beyond_the_vocabulary_is_refused(tokens, tmp_path):
    damaged = shutil.copytree(tokens, tmp_path / "tokens")
    for file in (damaged / "train").glob("*.bin"):
        np.memmap(file, "uint16", "r+")[:] = HYBRID.vocab_size
    with (
        process_groups(), closing(Trainer(HYBRID, RECIPE, "float32", 1, damaged, tmp_path, ONE_COPY)) as broken,
        pytest.raises(ModelError, match=f"holds the id {HYBRID.vocab_size}"),
    ):
        broken.train_step(1)


def assert_same_gradients_and_moments(ours: dict, reference: dict, before: dict, layout: dict) -> None:
    """Moments one step after the common state `before`; from them the gradient of that step, of every parameter."""
    assert ours.keys() == reference.keys() == before.keys() and len(ours) > 60
    for name, expected in reference.items():
        error = (ours[name] - expected).norm() / expected.norm()
        assert error < 1e-5, (name, layout)
        if name.startswith("exp_avg."):
            mine, theirs = ((state - 0.9 * before[name]) / 0.1 for state in (ours[name], expected))
            assert (mine - theirs).norm() < 3e-5 * theirs.norm(), (name, layout)


@pytest.fixture(scope="module")
def by_document(tokens, tmp_path_factory) -> Path:
    """The scratch directory of a run whose layers restart at documents, with the state after step 4."""
    directory = tmp_path_factory.mktemp("by-document")
    train_job(str(tokens), str(directory / "out"), str(directory / "scratch"), {}, checkpoint_every=4, **BY_DOCUMENT)
    return directory / "scratch"


@pytest.fixture(scope="module")
def on_two(tokens, unbroken, by_document, tmp_path_factory) -> list[tuple[dict, dict]]:
    """Jobs on two processes and their results: TP, TP with SP, PP and DP go on from the state one process saved; TP and
    DP also start alike; at last TP with SP and PP go on from another one with documents and recomputation."""
    directory = tmp_path_factory.mktemp("two")
    jobs = [{"parallelism": layout, "checkpoint_every": 5} for layout in LAYOUTS]
    sizes = {"micro_batch_size": 1, "validation_micro_batch_size": 2}       # of two micro-batches the second sends
    jobs += [{"parallelism": LAYOUTS[0], "checkpoint_every": 5, "fresh": True},
             {"parallelism": LAYOUTS[3], "checkpoint_every": 5, "fresh": True} | sizes]
    jobs += [{"parallelism": layout} | BY_DOCUMENT for layout in LAYOUTS[1:3]]
    for index, job in enumerate(jobs):
        name = "fresh" if job.pop("fresh", False) else "resumed"
        job |= {"tokens": str(tokens), "out": str(directory / f"out-{index}"),
                "scratch": str(directory / f"{name}-{index}")}
        if name == "resumed":
            shutil.copytree(by_document if "recompute" in job else unbroken["directory"] / "scratch", job["scratch"])
    return list(zip(jobs, run_processes(2, jobs, directory), strict=True))


def test_layouts_agree_from_scratch_and_from_one_process_state(tokens, unbroken, on_two, tmp_path):
    before, alone = optimizer_state(unbroken["directory"] / "scratch", 4), tmp_path / "alone"
    shutil.copytree(unbroken["directory"] / "scratch", alone)
    train_job(str(tokens), str(tmp_path / "out-alone"), str(alone), {}, checkpoint_every=5)
    reference = optimizer_state(alone, 5)
    of_layouts = on_two[:6]
    for job, result in of_layouts:
        assert losses(result) == pytest.approx(losses(unbroken), rel=3e-5), job["parallelism"]
        assert [row["grad_norm"] for row in result["training"]] == pytest.approx(
            [row["grad_norm"] for row in unbroken["training"]], rel=3e-4), job["parallelism"]
        for column in ("step", "loss", "bits_per_byte"):
            assert [row[column] for row in result["validation"]] == pytest.approx(
                [row[column] for row in unbroken["validation"]], rel=3e-5)
        assert result["resumed_from"] == (4 if "resumed" in job["scratch"] else None)
        if result["resumed_from"]:
            state = optimizer_state(Path(job["scratch"]), 5)
            assert_same_gradients_and_moments(state, reference, before, job["parallelism"])
    expected = load_weights(unbroken["directory"] / "out")[1]
    for job, _ in of_layouts:
        for name, tensor in load_weights(Path(job["out"]))[1].items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-4)


def test_layouts_agree_on_documents_and_recomputation(tokens, unbroken, by_document, on_two, tmp_path):
    """From the same state, resetting at documents and recomputing activations: one process, TP with SP, and PP."""
    alone = train_job(str(tokens), str(tmp_path / "out"), str(by_document), {}, **BY_DOCUMENT)
    assert losses(alone)[4:] != pytest.approx(losses(unbroken)[4:], rel=1e-3)
    assert len(on_two[6:]) == 2
    for _, result in on_two[6:]:
        assert losses(result) == pytest.approx(losses(alone), rel=3e-5)


def test_gradients_leave_while_the_backward_goes_on(tokens, tmp_path, monkeypatch):
    """From the second step on, when Megatron knows how often a step touches each weight."""
    calls = []

    def noted(name, original):
        def note(group, *arguments, **options):
            calls.append(name)
            return original(group, *arguments, **options)
        return note

    for name in ("start", "finish"):
        original = getattr(_ParamAndGradBucketGroup, f"{name}_grad_sync")
        monkeypatch.setattr(_ParamAndGradBucketGroup, f"{name}_grad_sync", noted(name, original))
    monkeypatch.setattr(PretrainConfig, "overlaps_gradients", lambda recipe, replicas: True)
    monkeypatch.setattr(
        optimizer, "DistributedDataParallelConfig", partial(optimizer.DistributedDataParallelConfig, bucket_size=2000))
    train_job(str(tokens), str(tmp_path / "out"), str(tmp_path / "scratch"), {}, tokens_to_train_on=4 * 16 * 2)
    buckets = len(calls) // 4
    assert buckets > 2 and calls[2 * buckets:] == ["start"] * buckets + ["finish"] * buckets


@pytest.fixture(scope="module")
def replicas(tokens, tmp_path_factory) -> dict:
    """Runs on two replicas by precision, whether the optimizer is distributed, and gradients summed in float32."""
    directory = tmp_path_factory.mktemp("replicas")
    kinds = [("float32", False, True), ("float32", True, True), *product(["bf16"], [False, True], [False, True])]
    jobs = [{"tokens": str(tokens), "out": str(directory / f"out-{number}"), "parallelism": {}, "precision": precision,
             "scratch": str(directory / f"scratch-{number}"), "distributed_optimizer": spread,
             "grad_reduce_in_fp32": exact, "micro_batch_size": 1 if precision == "bf16" else 2,
             "checkpoint_every": 3}
            for number, (precision, spread, exact) in enumerate(kinds)]
    runs = run_processes(2, jobs, directory)
    return {kind: run | {"scratch": Path(job["scratch"])} for kind, run, job in zip(kinds, runs, jobs, strict=True)}


def test_weights_travel_while_the_forward_goes_on(replicas):
    """The distributed optimizer's, in many buckets: a layer that did not wait for its own would train on old ones."""
    whole, spread = (losses(replicas["float32", spread, True]) for spread in (False, True))
    assert spread == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("spread", [False, True])
def test_gradients_in_bf16_train_alike(replicas, spread):
    """Added up over two micro-batches and two replicas: not to the bit."""
    exact, rounded = (replicas["bf16", spread, exact] for exact in (True, False))
    norms = [[row["grad_norm"] for row in result["training"]] for result in (exact, rounded)]
    assert norms[1] != norms[0] and norms[1] == pytest.approx(norms[0], rel=0.05)
    assert losses(rounded) == pytest.approx(losses(exact), rel=1e-2)


def test_a_state_of_a_spread_optimizer_is_the_whole_ones(replicas):
    """Gathered a parameter at a time from two replicas, each of which holds a part of some."""
    scratches = [replicas["float32", spread, True]["scratch"] for spread in (False, True)]
    whole, spread = (optimizer_state(scratch, 3) for scratch in scratches)
    weights = optimizer_state(scratches[1], 3, prefix="")
    expected = whole | {f"param.{name.removeprefix('exp_avg.')}": weights[name.removeprefix("exp_avg.")]
                        for name in whole if name.startswith("exp_avg.")}
    assert spread.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0 and (spread[name] - value).norm() <= 1e-5 * value.norm(), name


def test_a_spread_optimizer_goes_on_from_its_state(replicas, tokens, tmp_path):
    """Each of two replicas reads what it holds a part of, in many buckets; one alone reads all."""
    runs = {precision: replicas[precision, True, True] for precision in ("float32", "bf16")}
    for count in (2, 1):
        jobs = [{"tokens": str(tokens), "out": str(tmp_path / f"out-{precision}-{count}"), "parallelism": {},
                 "scratch": str(shutil.copytree(run["scratch"], tmp_path / f"scratch-{precision}-{count}")),
                 "precision": precision, "distributed_optimizer": True, "checkpoint_every": 3,
                 "micro_batch_size": 1 if precision == "bf16" else 2} for precision, run in runs.items()]
        for run, resumed in zip(runs.values(), run_processes(count, jobs, tmp_path), strict=True):
            assert resumed["resumed_from"] == 3
            assert losses(resumed) == pytest.approx(losses(run), rel=1e-6)


def test_a_state_of_the_other_optimizer_is_refused(tokens, unbroken, tmp_path):
    """Its master weights stand under other names: Megatron would end with all of them in a KeyError."""
    shutil.copytree(unbroken["directory"] / "scratch", tmp_path / "scratch")
    job = {"tokens": str(tokens), "out": str(tmp_path / "out"), "scratch": str(tmp_path / "scratch"),
           "parallelism": {}, "distributed_optimizer": True}
    with pytest.raises(AssertionError, match="step-00000004: written without the distributed optimizer"):
        run_processes(1, [job], tmp_path)


@pytest.mark.slow
def test_four_processes_go_on_from_each_others_states(tokens, unbroken, tmp_path):
    """TP2 x PP2, TP2 x DP2 with SP, PP2 x DP2 and DP4 go on from one process's state, then each from another's."""
    layouts = [{"tensor": 2, "pipeline": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {}]
    jobs = []
    for index, layout in enumerate(layouts):
        scratch = tmp_path / f"resumed-{index}"
        shutil.copytree(unbroken["directory"] / "scratch", scratch)
        jobs.append({"tokens": str(tokens), "out": str(tmp_path / f"out-{index}"), "scratch": str(scratch),
                     "parallelism": layout, "checkpoint_every": 5, "micro_batch_size": 1})
    swapped = [job | {"parallelism": layout} for job, layout in zip(jobs, layouts[1:] + layouts[:1], strict=True)]
    for step, started in ((4, jobs), (5, swapped)):
        for job, result in zip(started, run_processes(4, started, tmp_path), strict=True):
            assert result["resumed_from"] == step
            assert losses(result) == pytest.approx(losses(unbroken), rel=3e-5), job["parallelism"]
    alone = train_job(**jobs[0] | {"parallelism": {}})
    assert alone["resumed_from"] == 5 and losses(alone) == pytest.approx(losses(unbroken), rel=3e-5)


@pytest.mark.parametrize(("precision", "changes"), [
    ("bf16", {}), ("fp8", {}), ("fp8", {"fp8_recipe": "unscaled", "fp8_gradients": "e4m3"}),
    ("fp8", {"bf16_layers_at_start": 0, "bf16_layers_at_end": 0}),
])
def test_a_resumed_run_gives_the_very_same_records_and_weights(tokens, precision, changes, tmp_path):
    job = {"tokens": str(tokens), "parallelism": {}, "precision": precision, "checkpoint_every": 4} | changes
    whole = train_job(out=str(tmp_path / "a"), scratch=str(tmp_path / "whole"), **job)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    resumed = train_job(out=str(tmp_path / "b"), scratch=str(tmp_path / "broken"), **job)
    assert resumed["resumed_from"] == 4
    assert (tmp_path / "broken" / "resumed").exists()
    assert resumed["training"] == whole["training"]
    assert resumed["validation"] == whole["validation"]
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def cosine(step: int, steps: int, warmup: int) -> float:
    """What is left of the way from the peak to the least rate."""
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def minus_sqrt(step: int, steps: int, decay: int) -> float:
    return 1 - math.sqrt(max(0, step - steps + decay) / decay)


@pytest.mark.parametrize(("change", "left"), [
    ({}, lambda step: cosine(step, 50, 10)),
    ({"decay_style": "minus_sqrt", "decay_fraction": 0.4}, lambda step: minus_sqrt(step, 50, 20)),
])
def test_schedule_is_warmup_and_the_decay_in_closed_form(change, left):
    recipe = PretrainConfig.model_validate(RECIPE.model_dump() | change)
    top, least, steps, warmup = recipe.learning_rate, recipe.min_learning_rate, 50, 10
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = build_schedule(recipe, optimizer, steps)
    for step in range(1, steps + 1):
        schedule.step(1)
        expected = top * step / warmup if step <= warmup else least + (top - least) * left(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(least) == pytest.approx(top / 100)


@pytest.mark.parametrize(("change", "steps"), [
    ({"warmup_fraction": 0.96}, 10), ({"warmup_fraction": 0.6}, 1),
    ({"warmup_fraction": 0.0, "decay_style": "minus_sqrt", "decay_fraction": 0.15}, 3),
])
def test_a_schedule_of_few_steps_ends_at_the_least_rate(change, steps):
    """Where the warm-up would round to all of them, or the decay to none."""
    recipe = PretrainConfig.model_validate(RECIPE.model_dump() | change)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = build_schedule(recipe, optimizer, steps)
    schedule.step(steps)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(recipe.min_learning_rate)


def test_bf16_keeps_float32_masters_and_decays_matrices_only(tokens, tmp_path):
    with process_groups():
        trainer = Trainer(HYBRID, RECIPE, "bf16", 1, tokens, tmp_path, ONE_COPY)
        groups = trainer.optimizer.param_groups
        assert all(parameter.dtype is torch.float32 for group in groups for parameter in group["params"])
        for group in groups:
            assert all((parameter.dim() > 1) == (group["weight_decay"] > 0) for parameter in group["params"])
        names = {name for name, parameter in trainer.model.named_parameters() if parameter.dtype is torch.float32}
    assert {name.rpartition(".")[2] for name in names} == {"A_log", "D", "dt_bias"}


def test_validation_is_the_bits_a_byte_of_the_weights(tokens, unbroken):
    config, state, training = load_weights(unbroken["directory"] / "out")
    model = HybridLM.from_state(config, state)
    last = {row["domain"]: row for row in unbroken["validation"] if row["step"] == 6}
    nats = size = 0.0
    for domain in ("code", "docs"):
        data = validation(tokens, domain, 16).first(1)
        with torch.no_grad():
            loss = F.cross_entropy(model(data.sequences[:, :-1]).flatten(0, 1), data.sequences[:, 1:].flatten(),
                                   reduction="sum")
        assert last[domain]["bits_per_byte"] == pytest.approx(loss.item() / math.log(2) / data.bytes, rel=1e-5)
        nats, size = nats + loss.item(), size + data.bytes
    assert last["all"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert training["validation_bits_per_byte"] == last["all"]["bits_per_byte"]
    assert [row["step"] for row in unbroken["validation"] if row["domain"] == "all"] == [0, 3, 6]


def test_training_learns(tokens, tmp_path):
    recipe = RECIPE.model_copy(update={"tokens": 64 * 30, "micro_batch_size": 4, "learning_rate": 2e-2})
    run = train(HYBRID, recipe, "hybrid", "bf16", 1, tokens, tmp_path / "out", tmp_path / "scratch",
                lambda *_, **__: None)
    first, last = run.training[0]["loss"], run.metrics["final_loss"]
    assert first == pytest.approx(math.log(64), abs=0.5)
    assert last < first - 1.0
    assert run.metrics["steps"] == 30 and run.metrics["tokens"] == 64 * 30
    assert run.metrics["validation_bits_per_byte"] < run.metrics["validation_bits_per_byte_first"]
    assert run.metrics["validation_first_tokens"] == 64 * 15
    assert "fp8_emulated" not in run.metrics


def test_the_final_loss_is_of_the_last_twentieth_without_skipped_steps():
    run = SimpleNamespace(steps=60, tokens_per_step=64, config=HYBRID, unigram_loss=4.0, guard=SpikeGuard(10.0, 3),
                          precision=Precision("bf16"))
    training = [{"loss": float(step), "skipped": int(step == 59)} for step in range(1, 61)]
    validation = [{"step": step, "tokens": 64 * step, "domain": domain, "bits_per_byte": step + place / 4}
                  for step in (0, 30, 60) for place, domain in enumerate(("code", "docs", "all"))]
    with process_groups():
        found = Trainer._metrics(run, training, validation, 12.0)
    assert found["final_loss"] == (57 + 58 + 60) / 3 and found["tokens_per_second"] == 60 * 64 / 12
    assert (found["validation_bits_per_byte_first"], found["validation_first_tokens"]) == (30.5, 64 * 30)
    assert [found[f"validation_bits_per_byte{name}"] for name in ("", "_code", "_docs")] == [60.5, 60.0, 60.25]


@pytest.mark.parametrize(("change", "message"), [
    ({"tokens": 10}, "pretrain.tokens"),
    ({"learning_rate": 1e30, "min_learning_rate": 0.0, "clip_grad": 1e30, "max_skipped_steps": 2}, "training diverged"),
])
def test_errors_say_what_to_change(tokens, tmp_path, change, message):
    recipe = RECIPE.model_copy(update=change)
    with pytest.raises(ModelError, match=message) as error:
        train(HYBRID, recipe, "hybrid", "float32", 1, tokens, tmp_path / "out", tmp_path / "scratch",
              lambda *_, **__: None)
    assert str(error.value).count("\n") == 1


def test_validation_does_not_depend_on_micro_batches(tokens, tmp_path):
    """Of a fiftieth of 8,000 tokens in two domains: five sequences of each, in 5, 3 and 1 micro-batches."""
    seen = []
    for number, size in enumerate((1, 2, 8)):
        recipe = RECIPE.model_copy(update={"tokens": 8000, "validation_micro_batch_size": size})
        with process_groups():
            trainer = Trainer(HYBRID, recipe, "float32", 1, tokens, tmp_path / str(number), ONE_COPY)
            assert [len(data.sequences) for data in trainer.validation_sets.values()] == [5, 5]
            seen.append([value for row in trainer.validate(0) for value in (row["loss"], row["bits_per_byte"])])
            trainer.close()
    assert seen[1] == pytest.approx(seen[0], rel=1e-5) and seen[2] == pytest.approx(seen[0], rel=1e-5)


@pytest.mark.parametrize(("tokens_to_train_on", "sequences"), [(1, 1), (3199, 1), (3200, 2), (16 * 100 * 7 + 1599, 7)])
def test_validation_reads_at_most_its_share(tokens, tmp_path, tokens_to_train_on, sequences):
    recipe = RECIPE.model_copy(update={"tokens": max(64, tokens_to_train_on)})
    with process_groups():
        trainer = Trainer(HYBRID, recipe, "float32", 1, tokens, tmp_path, ONE_COPY)
        assert [len(data.sequences) for data in trainer.validation_sets.values()] == [sequences] * 2
        trainer.close()


@pytest.mark.parametrize("changes", [{"weight_decay": 0.0}, {"learning_rate": 3.0}])
def test_a_run_that_learned_nothing_fails(tokens, tmp_path, monkeypatch, changes):
    """With gradients of zero, and at an absurd learning rate."""
    if "weight_decay" in changes:
        whole = trainer._loss

        def zeroed(counted, nats):
            loss, report = whole(counted, nats)
            return (0.0 * loss if counted is None else loss), report

        monkeypatch.setattr(trainer, "_loss", zeroed)
    with pytest.raises(ModelError, match=r"not below its validation loss before training .*learned nothing") as error:
        train_job(str(tokens), str(tmp_path / "out"), str(tmp_path / "scratch"), {}, **changes)
    assert str(error.value).count("\n") == 1
    with (tmp_path / "scratch" / "validation.csv").open() as file:
        before, *_, after = (float(row["loss"]) for row in csv.DictReader(file) if row["domain"] == "all")
    assert f"ends at {after:.4f} nats" in str(error.value) and f"({before:.4f})" in str(error.value)
    assert not (tmp_path / "out").exists()


def counted_unigram_loss(tokens: Path, samples: int, cache: Path) -> float:
    """From frequencies of a run's samples, each id once more, of the predicted tokens of the first sequences."""
    data, counts = TrainingData(tokens, 16, samples, 1, cache), Counter(range(64))
    for sample in range(samples):
        counts.update(data[sample].tolist())
    predicted = [token for name in ("code", "docs") for token in validation(tokens, name, 16).sequences[0, 1:].tolist()]
    return -sum(math.log(counts[token] / counts.total()) for token in predicted) / len(predicted)


def test_a_long_run_must_know_more_than_token_frequencies(tokens, unbroken, tmp_path, monkeypatch):
    expected = counted_unigram_loss(tokens, 24, tmp_path / "index")
    assert unbroken["metrics"]["validation_unigram_loss"] == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(trainer, "UNIGRAM_TOKENS", 1000)
    enough = math.ceil(costs.parameters(HYBRID) / 64)
    for number, steps in enumerate((enough - 1, enough)):           # less than a token a parameter, and one
        recipe = RECIPE.model_copy(update={"tokens": 64 * steps})
        with process_groups():
            run = Trainer(HYBRID, recipe, "float32", 1, tokens, tmp_path / str(number), ONE_COPY)
            run.check_learned(untrained=9.0, trained=run.unigram_loss - 0.01)
            if number == 0:
                run.check_learned(untrained=9.0, trained=run.unigram_loss + 0.01)
            else:
                with pytest.raises(ModelError, match=f"not below the unigram loss.*{run.unigram_loss:.4f}"):
                    run.check_learned(untrained=9.0, trained=run.unigram_loss + 0.01)
            for nothing in (9.0, math.nan):
                with pytest.raises(ModelError, match="before training" if number == 0 else "unigram loss"):
                    run.check_learned(untrained=9.0, trained=nothing)
            run.close()


@pytest.mark.parametrize("changes", [
    {"learning_rate": 5e-3}, {"tokens_to_train_on": 4 * 16 * 8}, {"global_batch_size": 8}, {"decay_style": "linear"},
    {"precision": "bf16"},                  # whose weights could not be read either
])
def test_the_state_of_another_run_is_refused(tokens, unbroken, tmp_path, changes):
    shutil.copytree(unbroken["directory"] / "scratch", tmp_path / "scratch")
    name = next(iter(changes)).removesuffix("_to_train_on")
    with pytest.raises(ModelError, match=f"resume: the state of another run: {name} .* and now ") as error:
        train_job(str(tokens), str(tmp_path / "out"), str(tmp_path / "scratch"), {}, **changes)
    assert str(error.value).count("\n") == 1


def test_a_state_of_resets_that_does_not_say_where_documents_begin_is_refused(tokens, tmp_path):
    """It was written when their mark was the last token of each."""
    recipe = RECIPE.model_copy(update={"reset_at_documents": True, "checkpoint_every": 2})
    with process_groups():
        for refused in (nullcontext(), pytest.raises(ModelError, match="documents begin None and now with the mark")):
            with closing(Trainer(HYBRID, recipe, "float32", 1, tokens, tmp_path, ONE_COPY)) as run, refused:
                if not (tmp_path / "resume").exists():
                    run.identity.pop("documents begin", None)
                run.run(lambda *_, **__: None)


@pytest.mark.parametrize(("file", "old", "new"), [
    ("blend.json", '"until": 0.6', '"until": 0.5'), ("tokens.json", '"documents": 60', '"documents": 61'),
])
def test_the_state_of_a_run_on_other_text_is_refused(tokens, unbroken, tmp_path, file, old, new):
    shutil.copytree(unbroken["directory"] / "scratch", tmp_path / "scratch")
    other = shutil.copytree(tokens, tmp_path / "tokens")
    content = (other / file).read_text()
    (other / file).write_text(content.replace(old, new, 1))
    assert (other / file).read_text() != content
    with pytest.raises(ModelError, match=f"resume: the state of another run: {file} .* and now "):
        train_job(str(other), str(tmp_path / "out"), str(tmp_path / "scratch"), {})
