from __future__ import annotations

import math

import pytest

from model.config import ModelError
from model.training.spike_guard import WARM, WINDOW, SpikeGuard


def test_a_spike_is_a_multiple_of_the_running_median_and_is_applied():
    guard = SpikeGuard(spike_factor=5.0, max_skipped_steps=3)
    assert [guard.check(step, 2.0, 100.0 if step == 3 else 2.0) for step in range(1, WARM + 1)] == ["update"] * WARM
    assert guard.check(17, 2.0, 10.1) == "spike"
    assert guard.check(18, 2.0, 9.9) == "update"
    assert (guard.spikes, guard.skipped) == (1, 0)


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_steps_that_are_not_finite_are_skipped_and_counted_until_there_are_too_many(loss, grad_norm):
    guard = SpikeGuard(spike_factor=5.0, max_skipped_steps=2)
    assert [guard.check(step, loss, grad_norm) for step in (1, 2)] == ["skip", "skip"]
    assert guard.check(3, 2.0, 1.0) == "update"
    assert [guard.check(step, loss, grad_norm) for step in (4, 5)] == ["skip", "skip"]
    with pytest.raises(ModelError, match="3 steps in a row") as error:
        guard.check(6, loss, grad_norm)
    assert str(error.value).count("\n") == 1
    assert guard.skipped == 5 and list(guard.norms) == [1.0]


def test_a_restored_guard_checks_as_the_one_that_was_saved():
    guard = SpikeGuard(5.0, 3)
    for step in range(1, 200):
        guard.check(step, math.nan if step % 13 == 0 else 2.0, 1.0 + step % 3)
    restored = SpikeGuard(5.0, 3)
    restored.load_state_dict(guard.state_dict())
    for norm in (9.9, 10.1):
        assert restored.state_dict() == guard.state_dict() and len(guard.norms) == WINDOW
        assert restored.check(200, 2.0, norm) == guard.check(200, 2.0, norm)
    assert restored.state_dict() == guard.state_dict()
