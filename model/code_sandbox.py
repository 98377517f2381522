"""Programs that a model wrote, run apart: a process of its own, without network, with little time, memory and disk.

Not a jail: the program can read what the user can read. It cannot fill memory or disk, run on, or, where the kernel
lets users make namespaces, reach a network. Run it on a machine that holds nothing secret.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

NO_NETWORK = ("unshare", "--user", "--map-root-user", "--net", "--")
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Outcome:
    """`passed`: the program ended by itself with status 0; `reason`: why not, in a few words."""

    passed: bool
    reason: str


def run(program: str, seconds: float = 10.0, memory_bytes: int = 2 * GIBIBYTE) -> Outcome:
    """Run a Python program in an empty directory that is removed afterwards, with its output thrown away."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        command = [*(NO_NETWORK if can_unshare() else ()), sys.executable, "-I", "-c", program]
        process = subprocess.Popen(
            command,
            cwd=directory,
            env={"PATH": os.defpath, "HOME": directory, "TMPDIR": directory, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=functools.partial(_limit, math.ceil(seconds), memory_bytes),
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no end within {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)          # with what it started
            process.wait()
    return Outcome(status == 0, "" if status == 0 else f"status {status}")


def _limit(seconds: int, memory_bytes: int) -> None:
    """In the new process, before the program: no way back from these."""
    for what, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_FSIZE, 2**24),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))


@functools.cache
def can_unshare() -> bool:
    """Whether this machine lets a user make a network namespace."""
    try:
        return subprocess.run([*NO_NETWORK, "true"], capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class CodeEval:
    """What `evaluate.load("code_eval")` gives the harness's HumanEval and MBPP, with every program in the sandbox."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[Outcome]]]:
        """pass@k, averaged over problems, and every outcome; `references` are the tests."""
        outcomes = {
            number: [run(f"{candidate}\n{test}") for candidate in candidates]
            for number, (test, candidates) in enumerate(zip(references, predictions, strict=True))
        }
        passed = {
            f"pass@{chosen}": sum(pass_at_k(len(found), sum(one.passed for one in found), chosen)
                                  for found in outcomes.values()) / len(outcomes)
            for chosen in k
            if all(len(found) >= chosen for found in outcomes.values())
        }
        return passed, outcomes


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of `k` samples, drawn from `samples` of which `correct` pass, passes (arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


@contextlib.contextmanager
def code_eval_in_sandbox() -> Iterator[None]:
    """While it lasts, the harness's tasks get `CodeEval` where they ask for the Hub's `code_eval`."""
    import evaluate

    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval() if path == "code_eval" else original(path, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
