"""Programs that misbehave, each in its own way; the harness's own code tasks on programs known to pass or fail."""

from __future__ import annotations

import math
import time
from itertools import combinations
from pathlib import Path

import pytest

from model.config import ModelError
from model.evaluation import sandbox
from model.evaluation.sandbox import CodeEval, pass_at_k, run

CONNECTS = "import socket; socket.create_connection(('127.0.0.1', {port}), 2)"


def test_a_good_program_passes_and_a_bad_one_says_how_it_ended() -> None:
    assert run("assert sum(range(5)) == 10 and len('é') == 1").passed
    assert run("assert False").reason == "status 1"
    assert run("import os; os.kill(os.getpid(), 9)").reason == "status 137"


@pytest.mark.parametrize("way_out", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_who_leaves_before_the_tests_has_not_passed(way_out: str) -> None:
    assert run(f"{way_out}\nassert False").reason == "ended before its last line"


def commands() -> str:
    return "".join(file.read_bytes().decode(errors="replace") for file in Path("/proc").glob("[0-9]*/cmdline"))


@pytest.mark.parametrize("program", [
    "os.execvp('sleep', ['sleep', '{mark}']) if os.fork() == 0 else time.sleep(0.3)",
    "(os.setsid(), os.execvp('sleep', ['sleep', '{mark}'])) if os.fork() == 0 else time.sleep(0.3)",
    "os.fork()\nwhile True: '{mark}'",
])
def test_nothing_a_program_started_is_left(program: str) -> None:
    mark = f"{time.time_ns() % 10**9 + 10**9}"
    outcome = run("import os, time\n" + program.format(mark=mark), seconds=1.5)
    assert outcome.passed or outcome.reason == "no end within 1.5 s"        # before its two seconds of processor time
    assert mark not in commands()


@pytest.mark.parametrize("program", [
    "open({outside!r}, 'w')",
    "open('/dev/shm/sandbox-escaped', 'w')",
    "import os; os.mkdir('/tmp/sandbox-escaped')",
    # the rights with which the file system was shut are gone, and none can be had
    "import ctypes; assert ctypes.CDLL(None).mount(None, b'/', None, 32 | 4096, None) == 0",
    "import subprocess; subprocess.run(['mount', '-o', 'remount,bind,rw', '/'], check=True)",
])
def test_nothing_is_written_outside(program: str, tmp_path: Path) -> None:
    assert run(program.format(outside=str(tmp_path / "escaped"))).reason == "status 1"
    assert not list(tmp_path.iterdir()) and not Path("/tmp/sandbox-escaped").exists()


@pytest.mark.parametrize("program", [
    "x = bytearray(3 * 2**30)",
    "open('big', 'wb').write(bytes(2**25))",
    "for number in range(16): open(str(number), 'wb').write(bytes(2**23))",
    "files = [open('/dev/null') for _ in range(100)]",
])
def test_memory_disk_and_files_are_limited(program: str) -> None:
    assert run(program).reason == "status 1"


def test_surroundings_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run("import os; assert os.listdir('.') == [] and 'SECRET' not in os.environ").passed
    assert run("import os; assert os.getcwd() == os.environ['HOME']").passed


def test_no_network() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert run(CONNECTS.format(port=server.getsockname()[1])).reason == "status 1"


@pytest.mark.parametrize("namespaces", [("no-such-unshare",), ("false",)])
def test_without_namespaces_nothing_is_run(
    namespaces: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "NAMESPACES", namespaces)
    refused = pytest.raises(ModelError, match=r"cannot be run apart here: .+\nSet evaluate\.generation to text")
    with refused, sandbox.code_eval_in_sandbox():
        run(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


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
    monkeypatch.setattr(sandbox, "run", lambda program: ran.append(program) or run(program))
    path = Path(lm_eval.__file__).parent / f"tasks/{task}/utils.py"
    spec = importlib.util.spec_from_file_location(f"{task}_utils", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with sandbox.code_eval_in_sandbox():
        spec.loader.exec_module(module)
    assert len(ran) == 2, "whether programs can be run here, and its check of itself"
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


def test_what_a_program_does_as_a_script_is_left_out() -> None:
    """As in OpenAI's grader, which the harness has: it would wait for input, or leave before the tests."""
    script = "def f(x):\n    return x + 1\n\nif __name__ == '__main__':\n    print(f(int(input())))\n"
    assert run(f"{script}\nassert f(1) == 2").passed
    assert not run(f"{script}\nassert f(1) == 3").passed
