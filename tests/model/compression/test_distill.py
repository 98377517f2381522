"""Distillation: what it does to students, its schedule and its resume."""

from types import SimpleNamespace

import pytest
import torch

from model.compression.comparison import compare
from model.compression.distill import _Student, check_memory, distill, learning_rate, least_memory
from model.compression.prune import Selection, cut
from model.compression.resume import ResultCache
from model.config import ModelError
from model.hybrid_lm import HybridLM
from tests.model.compression.markov import silent


def test_learning_rate_warms_up_and_falls_to_its_least(config):
    rates = [learning_rate(config, step, 50) for step in range(50)]
    assert rates[:5] == pytest.approx([4e-4, 8e-4, 1.2e-3, 1.6e-3, 2e-3])
    assert rates[-1] == pytest.approx(2e-4) and rates[4:] == sorted(rates[4:], reverse=True)


@pytest.fixture(scope="module")
def students(parent):
    neurons = {index: torch.arange(24) for index in (1, 4)}
    kept = {"short": [0, 1, 3, 4], "narrow": [0, 1, 2, 3, 4]}
    return {name: cut(*parent, Selection(layers, neurons)) for name, layers in kept.items()}


def run(parent, students, data, config, directory, progress=silent):
    teacher = HybridLM.from_state(*parent)
    return distill(
        teacher, students, data.training, config.distillation_tokens, config, ResultCache(directory), "run", progress
    )


@pytest.fixture(scope="module")
def unbroken(parent, students, data, config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    distilled = run(parent, students, data, config, directory)
    assert not (directory / "resumed").exists()
    return distilled


def equal(one, other):
    return one.curve == other.curve and all(
        torch.equal(one.states[name][key], tensor)
        for name, state in other.states.items() for key, tensor in state.items()
    )


def test_distillation_leaves_the_start_as_it_is(parent, students, data, config, tmp_path):
    before = {name: {key: tensor.clone() for key, tensor in state.items()} for name, (_, state) in students.items()}
    run(parent, students, data, config.model_copy(update={"distillation_tokens": 128}), tmp_path)
    for name, (_, state) in students.items():
        assert all(torch.equal(before[name][key], state[key]) for key in state)


def test_distillation_brings_the_student_closer(parent, students, data, unbroken):
    teacher = HybridLM.from_state(*parent)
    for name, (geometry, state) in students.items():
        models = {"cut": HybridLM.from_state(geometry, state),
                  "distilled": HybridLM.from_state(geometry, unbroken.states[name])}
        close = compare(teacher, models, data.validation, 8, silent)
        assert close["distilled"].kl < 0.7 * close["cut"].kl
    assert [row[:3] for row in unbroken.curve[:3]] == [("short", 1, 128), ("narrow", 1, 128), ("short", 2, 256)]
    assert unbroken.curve[-1][1:3] == (20, 20 * 128)


def test_a_student_is_trained_the_same_alone_and_beside_another(parent, students, data, config, tmp_path, unbroken):
    alone = run(parent, {"narrow": students["narrow"]}, data, config, tmp_path)
    assert all(torch.equal(alone.states["narrow"][key], tensor) for key, tensor in unbroken.states["narrow"].items())


@pytest.mark.parametrize("objective", ["kl", "cross_entropy"])
def test_accumulated_gradients_are_those_of_the_whole_batch(parent, students, data, objective):
    """To float32's rounding: each micro-batch's gradient is rounded once more as it is added."""
    geometry, state = students["narrow"]
    teacher = HybridLM.from_state(*parent)
    batch = torch.stack(data.training[:8])
    gradients, losses = [], []
    for parts in (1, 2, 8):
        learner = _Student(geometry, state, torch.device("cpu"), torch.float32)
        learner.begin()
        loss = torch.zeros(())
        for micro in batch.chunk(parts):
            with torch.no_grad():
                logits = teacher(micro[:, :-1]).flatten(0, 1) if objective == "kl" else None
            loss += learner.accumulate(micro[:, :-1], micro[:, 1:].flatten(), logits, 1 / parts)
        gradients.append(torch.cat([gradient.flatten() for gradient in learner.gradients]))
        losses.append(loss)
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()
        assert loss.item() == pytest.approx(losses[0].item(), rel=1e-5)


def test_a_run_in_micro_batches_is_the_run_in_whole_batches(parent, students, data, config, tmp_path, unbroken):
    """The same tokens a step, the same number of steps; sequences are drawn in the same order."""
    small = run(parent, students, data, config.model_copy(update={"micro_batch_size": 1}), tmp_path)
    assert [row[:3] for row in small.curve] == [row[:3] for row in unbroken.curve]
    assert [row[3] for row in small.curve] == pytest.approx([row[3] for row in unbroken.curve], rel=1e-2)


@pytest.mark.parametrize("last_step", [3, 10, 20])
def test_a_killed_distillation_goes_on_with_the_same_result(
    parent, students, data, config, tmp_path, unbroken, last_step
):
    class Killed(Exception):
        pass

    def kill(step, total, **figures):
        if step == last_step:
            raise Killed

    with pytest.raises(Killed):
        run(parent, students, data, config, tmp_path, kill)
    (tmp_path / ".run.partial").write_bytes(b"half")      # as a kill in the middle of writing leaves it
    assert equal(run(parent, students, data, config, tmp_path), unbroken)
    assert (tmp_path / "resumed").exists() == (last_step >= config.checkpoint_every)


def test_a_parent_too_large_for_one_device_is_refused_before_work(monkeypatch, config):
    """What fits is what the students themselves take: 18 bytes a parameter, and 2 the teacher's."""
    config = config.model_copy(update={"parameters_fraction": 0.5})
    card = SimpleNamespace(total_memory=20 * 1000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert least_memory(1000, config) == 20_000
    check_memory(1000, config, torch.device("cuda"))
    check_memory(10**12, config, torch.device("cpu"))
    with pytest.raises(ModelError, match="a parent of 1,001 parameters takes"):
        check_memory(1001, config, torch.device("cuda"))
