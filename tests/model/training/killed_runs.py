"""Train one run in processes that are killed one after the other, and at last in one that is not.

    python -m tests.model.training.killed_runs JOB KILLS RESULT      # a job of tiny_engine.train_job, as JSON

Children are forked after the imports, so that an attempt is quick. Every other one dies within the writing of a resume
state: a moment after one of the files there is opened, renamed or removed; the others within a training step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def die_in(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))         # SIGALRM, unhandled, ends a process like SIGKILL


def arm_within_a_state(random_: random.Random) -> None:
    left = random_.randint(1, 30)

    def on_event(event: str, arguments: Any) -> None:
        nonlocal left
        if event in FILE_EVENTS and "/resume" in str(arguments[0]):
            left -= 1
            if left == 0:
                die_in(random_.uniform(0, 0.003))

    sys.addaudithook(on_event)


def arm_within_a_step(random_: random.Random) -> None:
    from model.training.trainer import Trainer

    original, left = Trainer.train_step, random_.randint(1, 5)

    def train_step(self: Trainer, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            die_in(random_.uniform(0, 0.02))
        return original(self, *arguments, **options)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def main() -> None:
    job, kills, result_file = json.loads(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    import torch

    import model.training.trainer  # noqa: F401    # now, not once a child
    from tests.tiny_engine import train_job

    torch.set_num_threads(1)
    for attempt in range(kills + 1):
        child = os.fork()
        if not child:
            if attempt < kills:
                (arm_within_a_state if attempt % 2 else arm_within_a_step)(random.Random(attempt))
            result_file.write_text(json.dumps(train_job(**job)))
            if attempt < kills:
                time.sleep(1)                                        # for a kill in the last step
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        if died != (attempt < kills):
            raise SystemExit(f"attempt {attempt}: status {status}")


if __name__ == "__main__":
    main()
