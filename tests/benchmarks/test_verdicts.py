"""A benchmark that says something is wrong does not end with status 0."""

import pytest

from benchmarks.engines import is_ours
from benchmarks.step_gpu import stop_on_errors


def test_rows_of_errors():
    stop_on_errors([{"loss": 1.0}])
    with pytest.raises(SystemExit, match="1 failed"):
        stop_on_errors([{"loss": 1.0}, {"error": "OutOfMemoryError"}])


def test_engines():
    right = {"wrong_from_token": None, "greedy_equal": True, "texts_equal": "370 of 370"}
    assert is_ours(right) and is_ours({"weights_held": True})
    for wrong in ({"wrong_from_token": 0}, {"greedy_equal": False}, {"texts_equal": "0 of 370"}):
        assert not is_ours(right | wrong)
    assert not is_ours({"refused": "ValueError"}) and not is_ours({"weights_held": False})
