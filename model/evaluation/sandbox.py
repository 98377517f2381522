"""Programs that a model wrote, run apart: in namespaces of their own, with little time, memory and disk.

Such a program sees the file system read-only but for an empty directory in memory, no network and no process but its
own, which end with it. It can read what the user can read: run it on a machine that holds nothing secret. Where the
kernel lets users make no namespaces nothing is run.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import ModelError

NAMESPACES = ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child")
GIBIBYTE = 2**30
DISK_BYTES = 2**26
SECONDS_TO_START = 60.0

# The first process of the namespaces. It shuts the file system, gives up the rights that unshare lent it, and has a
# child run the program of standard input: signals do not end a first process. The child says that the program came to
# its end by the secret, which the program does not hold.
FIRST = """
def main():
    import ctypes, math, os, resource, signal, sys

    assert os.getpid() == 1                 # what follows is for new namespaces alone
    directory, disk, memory, seconds = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4])
    del sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)

    def check(what, failed):
        if failed:
            sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")

    try:                                    # no namespaces within, in which a tmpfs would have no limit
        with open("/proc/sys/user/max_user_namespaces", "w") as limit:
            limit.write("0")
    except OSError:                         # a container that keeps /proc/sys for itself
        pass
    read_only = (ctypes.c_uint64 * 4)(1 | 2)                                   # and no set-user-id, recursively
    check("mount_setattr", libc.syscall(442, -100, b"/", 0x8000, read_only, 32))
    options = f"size={disk},nr_inodes=4096".encode()
    check("mount tmpfs", libc.mount(b"tmpfs", directory.encode(), b"tmpfs", 2 | 4, options))
    os.chdir(directory)
    check("no new privileges", libc.prctl(38, 1, 0, 0, 0))
    check("capset", libc.capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)()))
    for what, limit in (
        (resource.RLIMIT_CPU, math.ceil(seconds)), (resource.RLIMIT_AS, memory), (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, 2**24), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    secret, program = sys.stdin.readline().strip(), sys.stdin.read()
    said = os.dup(1)
    os.write(said, b"ready\\n")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if child := os.fork():
        signal.signal(signal.SIGALRM, lambda *_: os._exit(124))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)
    exec(compile(program, "<program>", "exec"), {})     # as OpenAI's grader: no __main__, whose block would run
    os.write(said, secret.encode())

main()
"""


@dataclass(frozen=True)
class ProgramOutcome:
    """`passed`: the program came to its last line and ended with status 0; `reason`: why not, in a few words."""

    passed: bool
    reason: str


def run(program: str, seconds: float = 10.0, memory_bytes: int = 2 * GIBIBYTE) -> ProgramOutcome:
    """Run a Python program in an empty directory that is removed afterwards, with its output thrown away.

    Raises ModelError where no program can be run apart.
    """
    secret = secrets.token_hex()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        command = [*NAMESPACES, "--", sys.executable, "-I", "-X", "utf8", "-c", FIRST, directory, str(DISK_BYTES),
                   str(memory_bytes), str(seconds)]
        try:
            process = subprocess.Popen(
                command,
                env={"PATH": os.defpath, "HOME": directory, "TMPDIR": directory, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                encoding="utf-8", errors="surrogateescape", start_new_session=True,
            )
        except OSError as error:
            raise _refusal(str(error)) from None
        try:
            said, errors = process.communicate(f"{secret}\n{program}", seconds + SECONDS_TO_START)
        except subprocess.TimeoutExpired:
            said, errors = "", "no answer"
        finally:
            process.kill()                                      # and with it, by --kill-child, all it started
            process.wait()
    ready, _, proof = said.partition("\n")
    if ready != "ready":
        raise _refusal(errors)
    if process.returncode == 124:                               # as timeout(1) says it
        return ProgramOutcome(False, f"no end within {seconds:g} s")
    if process.returncode:
        return ProgramOutcome(False, f"status {process.returncode}")
    ended = proof.startswith(secret)                            # a program that forks says it twice
    return ProgramOutcome(ended, "" if ended else "ended before its last line")


def _refusal(why: str) -> ModelError:
    return ModelError(
        f"Programs of a model cannot be run apart here: {' '.join(why.split()) or 'unshare failed'}.\n"
        "Set evaluate.generation to text, or let users make namespaces (unshare of util-linux, Linux 5.12 or "
        "later; in a container, its seccomp profile)."
    )


class CodeEval:
    """What `evaluate.load("code_eval")` gives the harness's HumanEval and MBPP, with every program in the sandbox."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[ProgramOutcome]]]:
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
    """While it lasts, the harness's tasks get `CodeEval` where they ask for the Hub's `code_eval`.

    Raises ModelError where no program can be run apart: an item must not fail for that.
    """
    import evaluate

    run("")
    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval() if path == "code_eval" else original(path, *arguments, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
