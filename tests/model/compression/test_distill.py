"""Distillation: what it does to a student, its micro-batches and its resume."""

import copy
import math

import pytest
import torch

from model.checkpoint import load_weights
from model.compression.comparison import compare
from model.compression.distill import School
from model.compression.prune import Selection, cut
from model.compression.resume import ResultCache
from model.config import ModelError
from model.hybrid_lm import HybridLM
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.precision import choose_precision
from model.megatron.spec import build_model
from model.training.distillation import Distiller
from model.training.spike_guard import SpikeGuard
from tests.model.compression.markov import CONFIG, Weights, markov, silent
from tests.model.compression.plain import PlainLayerwise
from tests.tiny_engine import RECIPE


@pytest.fixture(scope="module")
def start(parent, tmp_path_factory):
    neurons = {index: torch.arange(24) for index in (1, 4)}
    student = Weights(*cut(*parent, Selection([0, 1, 2, 3, 4], neurons)))
    return student.save(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def distil(parent, data, tokens, config, start, tmp_path_factory):
    """The student after 6 steps towards the parent."""
    teacher = parent.save(tmp_path_factory.mktemp("teacher"))

    def run(directory, progress=silent, objective="kl", **changes):
        settings = config.model_copy(update={"distillation_tokens": 6 * 128, "checkpoint_every": 2,
                                             "learning_rate": 4e-3} | changes)
        precision = "fp8" if settings.precision == "fp8" else "float32"
        with process_groups():
            school = School(teacher, data.training, tokens, settings, RECIPE, precision, 1, ResultCache(directory),
                            ONE_COPY, progress)
            return school.distil(start, settings.distillation_tokens, "run", objective)
    return run


@pytest.fixture(scope="module")
def unbroken(distil, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    distilled = distil(directory)
    assert not (directory / "resumed").exists() and not (directory / "run" / "resume").exists()
    return distilled


def weights(directory):
    config, state, _ = load_weights(directory)
    return PlainLayerwise(HybridLM.from_state(config, state))


def test_it_brings_the_student_closer(parent, data, start, unbroken):
    models = {"cut": weights(start), "distilled": weights(unbroken.directory)}
    close = compare(PlainLayerwise(HybridLM.from_state(*parent)), models, data.validation, 8, silent)
    assert close["distilled"].kl < 0.7 * close["cut"].kl
    assert [row[:2] for row in unbroken.curve] == [(step, step * 128) for step in range(1, 7)]


def test_its_loss_is_the_divergence_of_the_logits(parent, data, start, unbroken):
    """The first step's, of the student just cut, in float64."""
    config, state, _ = load_weights(start)
    batch = torch.stack(data.training[:4])[:, :-1]
    with torch.no_grad():
        given, expected = (HybridLM.from_state(*model, torch.float64)(batch).log_softmax(-1)
                           for model in ((config, state), parent))
    divergence = torch.linalg.vecdot(expected.exp(), expected - given).mean().item()
    assert unbroken.curve[0][2] == pytest.approx(divergence, rel=1e-4) and divergence > 0.1


def test_a_run_in_micro_batches_is_the_run_in_whole_batches(distil, tmp_path, unbroken):
    """The same tokens a step in the same order; each micro-batch's gradient is rounded once more as it is added."""
    small = distil(tmp_path, micro_batch_size=1)
    assert [row[:2] for row in small.curve] == [row[:2] for row in unbroken.curve]
    assert [row[2] for row in small.curve] == pytest.approx([row[2] for row in unbroken.curve], rel=1e-2)


@pytest.mark.parametrize("last_step", [1, 3, 6])
def test_a_killed_distillation_goes_on_with_the_same_result(distil, tmp_path, unbroken, last_step):
    class Killed(Exception):
        pass

    def kill(step, total, **figures):
        if step == last_step:
            raise Killed

    with pytest.raises(Killed):
        distil(tmp_path, kill)
    (tmp_path / ".run.pt.partial").write_bytes(b"half")      # as a kill in the middle of writing leaves it
    done = distil(tmp_path)
    assert done.curve == unbroken.curve
    assert (tmp_path / "run" / "resumed").exists() == (last_step > 2)      # a state every second step
    one, other = load_weights(done.directory)[1], load_weights(unbroken.directory)[1]
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("skipped", [range(2, 6), range(1, 7)])
def test_updates_that_did_not_take_place_are_said(distil, tmp_path, capsys, monkeypatch, skipped):
    check = SpikeGuard.check
    monkeypatch.setattr(SpikeGuard, "check", lambda guard, step, loss, norm: check(
        guard, step, math.nan if step in skipped else loss, norm))
    if len(skipped) == 6:
        with pytest.raises(ModelError, match=r"training\.csv: in none of 6 steps .*\n"):
            distil(tmp_path)
    else:
        distil(tmp_path)
        assert "training.csv: 4 of 6 updates were skipped" in capsys.readouterr().out


def test_a_student_that_was_damaged_is_trained_again(distil, tmp_path, unbroken):
    for _ in range(2):
        done = distil(tmp_path, distillation_tokens=128)
        assert load_weights(done.directory)[1].keys() == load_weights(unbroken.directory)[1].keys()
        next(done.directory.glob("*.distcp")).write_bytes(b"damaged")


def test_the_text_itself_can_teach(distil, tmp_path, data, unbroken):
    """Cross-entropy on the next token, a control: another loss, from the same weights."""
    done = distil(tmp_path, objective="cross_entropy")
    losses = [row[2] for row in done.curve]
    assert losses[0] > 1.5 * unbroken.curve[0][2]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_fp8_of_teacher_and_student_is_near(distil, tmp_path, unbroken):
    done = distil(tmp_path, precision="fp8")
    assert done.curve[0][2] != unbroken.curve[0][2]
    assert [row[2] for row in done.curve] == pytest.approx([row[2] for row in unbroken.curve], rel=0.3)


def test_only_the_student_learns_and_evaluation_is_its_own(parent, tmp_path):
    with process_groups():
        precision = choose_precision("float32", torch.device("cpu"))
        student = build_model(CONFIG, precision, ONE_COPY, 1)
        teacher = build_model(CONFIG, precision, ONE_COPY, 1, start=parent.save(tmp_path))
        pair, before = Distiller(student, teacher), copy.deepcopy(teacher.state_dict())
        ids = markov(2, 9)
        pair(ids[:, :-1], None, None).backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert all(parameter.grad is not None for parameter in student.parameters())
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items()
                   if value is not None)
        pair.eval()
        losses = [model(ids[:, :-1], None, None, labels=ids[:, 1:]) for model in (pair, student)]
    assert torch.equal(*losses) and losses[0].shape == (2, CONFIG.sequence_length)


def test_its_number_format_is_the_parents(config, tmp_path):
    """Scales and gradients too, as its trainer has it."""
    recipe = RECIPE.model_copy(update={"fp8_recipe": "unscaled", "fp8_gradients": "e4m3", "bf16_layers_at_end": 2})
    with process_groups():
        school = School(tmp_path, [], tmp_path, config, recipe, "fp8", 1, ResultCache(tmp_path), ONE_COPY, silent)
        found = school.number_format
    assert (found.scaling, found.gradients) == ("unscaled", "e4m3")
    assert (found.bf16_layers_at_start, found.bf16_layers_at_end) == (1, 2)
