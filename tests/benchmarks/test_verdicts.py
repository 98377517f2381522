"""A benchmark that says something is wrong does not end with status 0; what can be known before it measures is."""

import importlib
import sys
from pathlib import Path

import pytest

from benchmarks.engines import is_ours
from benchmarks.step_gpu import stop_on_errors
from stages.frame.common import out_file

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WITH_OUT = [file.stem for file in sorted(BENCHMARKS.glob("*.py")) if 'add_argument("--out"' in file.read_text()]


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


@pytest.mark.parametrize("name", WITH_OUT)
def test_figures_that_cannot_be_written_are_not_measured(name, tmp_path, monkeypatch, capsys):
    """They were measured for minutes or hours, and lost."""
    if name == "kernels_gpu":
        pytest.importorskip("triton", reason="`make test` installs Triton")
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(sys, "argv", [name, "--out", "file/figures.json"])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"benchmarks.{name}").main()
    assert "argument --out: file" in capsys.readouterr().err


def test_a_place_for_figures_is_made_and_nothing_else(tmp_path):
    file = tmp_path / "no/such/figures.json"
    assert out_file(str(file)) == file and not list(file.parent.iterdir())
    file.write_text("{}")
    assert out_file(str(file)).read_text() == "{}"
