"""Programs that misbehave, each in its own way; the harness's own code tasks on programs known to pass or fail."""

from __future__ import annotations

import math
import time
from itertools import combinations
from pathlib import Path

import pytest

from model import code_sandbox
from model.code_sandbox import CodeEval, can_unshare, pass_at_k, run

CONNECTS = "import socket; socket.create_connection(('127.0.0.1', {port}), 2)"


def test_a_good_program_passes_and_a_bad_one_says_how_it_ended() -> None:
    assert run("assert sum(range(5)) == 10").passed
    assert run("assert False").reason == "status 1"
    assert run("import os; os.kill(os.getpid(), 9)").reason == "status -9"


def test_an_endless_program_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    started = time.monotonic()
    program = f"""
import os, time
if os.fork() == 0:
    while True:
        time.sleep(0.05)
        open({str(mark)!r}, "a").write("x")
while True:
    pass
"""
    assert run(program, seconds=1.5).reason == "no end within 1.5 s"        # before its two seconds of processor time
    assert time.monotonic() - started < 20
    assert mark.exists()
    size = mark.stat().st_size
    time.sleep(0.4)
    assert mark.stat().st_size == size, "the child is gone too"


@pytest.mark.parametrize("program", [
    "x = bytearray(3 * 2**30)",
    "open('big', 'wb').write(bytes(2**25))",
    "files = [open('/dev/null') for _ in range(100)]",
])
def test_memory_disk_and_files_are_limited(program: str) -> None:
    assert not run(program).passed


def test_surroundings_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run("import os; assert os.listdir('.') == [] and 'SECRET' not in os.environ").passed
    assert run("import os; assert os.getcwd() == os.environ['HOME']").passed


def test_no_network_where_the_kernel_allows() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        program = CONNECTS.format(port=server.getsockname()[1])
        if can_unshare():
            assert not run(program).passed
        else:
            pytest.skip("this kernel gives users no network namespace")


def test_pass_at_k_is_the_chance_of_a_draw() -> None:
    for samples, correct, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 3, 5)):
        draws = list(combinations(range(samples), k))
        expected = sum(any(item < correct for item in draw) for draw in draws) / len(draws)
        assert math.isclose(pass_at_k(samples, correct, k), expected)


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_the_harness_grades_programs_in_the_sandbox(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own modules, which ask the Hub for `code_eval` when they are imported."""
    import importlib.util
    import sys

    import lm_eval

    ran: list[str] = []
    monkeypatch.setattr(code_sandbox, "run", lambda program: ran.append(program) or run(program))
    path = Path(lm_eval.__file__).parent / f"tasks/{task}/utils.py"
    spec = importlib.util.spec_from_file_location(f"{task}_utils", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with code_sandbox.code_eval_in_sandbox():
        spec.loader.exec_module(module)
    assert len(ran) == 1, "its check of itself"
    test = "assert add(2, 3) == 5"
    good, bad = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a * b\n"
    if task == "humaneval":
        assert module.pass_at_k([test], [[good]], 1) == {"pass@1": 1.0}
        assert module.pass_at_k([test, test], [[good, bad], [bad, bad]], [1, 2]) == {"pass@1": 0.25, "pass@2": 0.5}
    else:
        assert module.pass_at_1([test], [[good]]) == 1.0
        assert module.pass_at_1([test], [[bad]]) == 0.0
    assert test in ran[-1]
    import evaluate

    assert not isinstance(sys.modules["evaluate"].load, type(CodeEval)) and evaluate.load is not None
