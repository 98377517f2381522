"""`python -m MODULE` in a process forked from one that has imported what stages need: it saves each of them seconds.

Where an import could have touched a GPU they are processes of their own, as in `tests.tiny_engine`.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

from flows.dvc_graph import ENVIRONMENT
from tests.tiny_engine import PROCESSES, ROOT


def start(directory: Path, *command: str, said: str = os.devnull, errors: str = os.devnull) -> BaseProcess:
    """`-m MODULE ARGUMENTS` in `directory`; what it prints goes to the files `said` and `errors`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = PROCESSES.Process(target=_main, args=(directory, environment, command, said, errors))
    process.start()
    return process


def run(directory: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The same, waited for."""
    with tempfile.TemporaryDirectory() as outputs:
        said, errors = Path(outputs, "said"), Path(outputs, "errors")
        process = start(directory, *command, said=str(said), errors=str(errors))
        try:
            process.join()
        finally:
            process.kill()                          # where the test's time is over
        done = subprocess.CompletedProcess(command, process.exitcode or 0, said.read_text(), errors.read_text())
    assert not check or done.returncode == 0, done.stderr
    return done


def dvc(*arguments: str) -> str:
    """What DVC prints, called here as the flow calls it."""
    with patch.dict(os.environ, ENVIRONMENT):
        return run(Path.cwd(), "-m", "dvc", *arguments).stdout


def _main(directory: Path, environment: dict[str, str], command: tuple[str, ...], said: str, errors: str) -> None:
    for number, file in ((0, os.devnull), (1, said), (2, errors)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(directory)
    os.environ |= environment
    sys.path.insert(0, str(directory))
    _, module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__", alter_sys=True)
