"""DVC forked from this process, which has imported it: as a program it takes a second to begin, and tests begin many.

All else is as of the program: a process of its own, with the environment, files, session and limits it was to have.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

IMPORTED = (            # by `dag`, `status` and `repro`, at their beginning or later
    "dvc.cli.parser", "dvc.data_cloud", "dvc.dirs", "dvc.dvcfile", "dvc.lock", "dvc.repo.datasets", "dvc.repo.index",
    "dvc.repo.plots", "dvc.repo.reproduce", "dvc.repo.status", "dvc.rwlock", "dvc.scm", "dvc.utils.strictyaml",
    "dvc_data.hashfile.db.local", "dvc_render", "configobj", "networkx", "pydot", "ruamel.yaml",
)
PROGRAM = [sys.executable, "-m", "dvc"]
LAST_FILE = 1024                        # of those this process may have open, which a program would not get


class Popen(subprocess.Popen[Any]):
    """What is done before a program takes a forked process over does not end where the program is DVC."""

    def __init__(self, args: Any, *rest: Any, env: Any = None, preexec_fn: Callable[[], Any] | None = None,
                 **options: Any):
        if isinstance(args, list) and args[:3] == PROGRAM:
            for name in IMPORTED:
                importlib.import_module(name)
            preexec_fn = partial(_be_dvc, args[3:], env, preexec_fn)
        super().__init__(args, *rest, env=env, preexec_fn=preexec_fn, **options)


def _be_dvc(arguments: list[str], environment: dict[str, str] | None, before: Callable[[], Any] | None) -> None:
    status = 255
    try:
        if before:
            before()
        os.closerange(3, LAST_FILE)     # the pipe among them in which the parent waits for the program to begin
        if environment is not None:
            os.environ.clear()
            os.environ.update(environment)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "w" if number else "r") for number in range(3))
        for name in ("dvc", "dvc_objects", "dvc_data"):
            logging.getLogger(name).handlers.clear()
        import dvc.logger
        from dvc.cli import main

        dvc.logger.setup()
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
