"""Every backend: order, laziness, failures, killed workers; and processes that end with their parent."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count, islice
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.config import DataError, ExecutorConfig
from data_pipeline.workers import clusters
from data_pipeline.workers.clusters import Dask, Slurm
from data_pipeline.workers.executor import InProcess, Workers, workers
from tests.namespaces import on_full
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[3]


def slow_square(value: int) -> int:
    time.sleep(0.05 * (value % 3 == 0))
    return value * value


def column_sum(values: list[int]) -> int:
    time.sleep(0.05 * (values[0] % 3 == 0))
    return pl.DataFrame({"x": values}).lazy().select(pl.col("x").sum()).collect().item()


def report_and_wait(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


def die_at_first(mark: str) -> str:
    """Killed the first time it is called, as by the kernel for want of memory."""
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def bad(value: int | str) -> int | str:
    """Some values cannot be worked on, each for another reason; a file's name stands for `die_at_first`."""
    if isinstance(value, str):
        return die_at_first(value)
    if value == 1:
        raise DataError("line 7: not JSON.\nCorrect it.")
    if value == 2:
        raise ZeroDivisionError("division")
    if value == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return -value


def slowly_bad(value: int) -> int:
    time.sleep(0.1 if value == 3 else 0.3)
    return bad(value)


def name(value: object) -> str:
    return f"shard {value}"


def config(executor: str, workers: int = 2, folder: str = "") -> ExecutorConfig:
    slurm = {"cluster": "local", "folder": folder, "timeout_minutes": 2}
    return ExecutorConfig.model_validate({"executor": executor, "workers": workers, "slurm": slurm})


@pytest.fixture(scope="module", params=["here", "local", "dask", "ray", "slurm"])
def pool(request, tmp_path_factory):
    """Workers of each kind; Slurm by submitit's stand-in for it, whose jobs start as processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
        executor, number = ("local", 1) if request.param == "here" else (request.param, 2)
        with workers(config(executor, number, str(tmp_path_factory.mktemp("slurm")))) as found:
            yield found


def results(pool: Workers, function, items) -> list:
    return [result for _, result in pool.all(function, items, name)]


def test_results_keep_the_order_of_items_and_polars_works_here_and_in_workers(pool):
    assert column_sum([1, 2]) == 3
    assert results(pool, column_sum, [[value, 1] for value in range(3)]) == [1, 2, 3]


def test_a_bad_shard_is_named_and_the_others_are_done(pool, capfd, tmp_path):
    """What is raised names the first; each of the others that failed is on stderr. Killed workers are replaced, with
    four deaths among two, and a shard that was killed is done again. (It takes submitit 30 seconds to notice.)"""
    killing = type(pool.backend) not in (InProcess, Slurm)
    mark = str(tmp_path / "mark")
    items, done = [0, 1, 2, *([3, mark] if killing else []), 4], []
    with pytest.raises(DataError) as raised:
        for item, result in pool.all(bad, items, name):
            done.append((item, result))
    assert done == [(0, 0), *([(mark, "survived")] if killing else []), (4, -4)]
    assert str(raised.value) == "shard 1: line 7: not JSON.\nCorrect it."
    said = capfd.readouterr().err
    assert "shard 2: ZeroDivisionError: division" in said and "Traceback" in said
    if killing:
        assert f"shard {mark}: its worker was killed; trying again (2 of 3)." in said
        assert "shard 3: its worker was killed; trying again (3 of 3)." in said
        assert "shard 3: its worker was killed 3 times, most likely for want of memory." in said


def test_a_shard_that_kills_its_worker_takes_no_other_with_it(pool):
    """A scheduler gives what waits to the worker that is left, while the dead one's successor starts."""
    if not isinstance(pool.backend, Dask):
        pytest.skip("a worker has one call by nature")
    items = [3, 4, 3, 5, 3, 6]
    assert [outcome.item for outcome in pool.map(slowly_bad, items, name) if outcome.error is None] == [4, 5, 6]


def test_a_cluster_without_workers_is_no_silent_wait(monkeypatch):
    monkeypatch.setattr(clusters, "WITHOUT_WORKERS", 1)
    with workers(config("dask", 1)) as pool:
        pool.backend.cluster.scale(0)
        with pytest.raises(DataError, match=r"the scheduler has had no worker for 1 seconds.\nStart workers"):
            results(pool, column_sum, [[1]])


@pytest.mark.slow
def test_a_killed_job_is_submitted_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}")
    with workers(config("slurm", 2, str(tmp_path / "slurm"))) as pool:
        assert results(pool, die_at_first, [str(tmp_path / "mark")]) == ["survived"]


def test_items_are_taken_as_workers_become_free():
    with workers(config("local")) as pool:
        taken = []
        items = (taken.append(value) or value for value in count())
        outcomes = list(islice(pool.map(slow_square, items, name), 3))
        assert [outcome.result for outcome in outcomes] == [0, 1, 4]
        assert len(taken) <= 3 + 4 * 2


def test_a_map_that_is_not_finished_does_not_disturb_the_next():
    with workers(config("local")) as pool:
        next(pool.map(slow_square, range(10), name))
        assert results(pool, slow_square, [7, 8]) == [49, 64]


def test_a_cluster_that_is_not_there():
    with pytest.raises(DataError, match=r"runtime\.slurm\.cluster.*\n.*sbatch"), workers(
        ExecutorConfig(executor="slurm", workers=1)
    ):
        pass


def test_full_shared_memory_is_not_needed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "from data_pipeline.workers.executor import workers\n"
        "from test_executor import column_sum, config, results\n"
        "if __name__ == '__main__':\n"
        "    with workers(config('local')) as pool:\n"
        "        print(results(pool, column_sum, [[1, 2], [3]]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    done = subprocess.run([*on_full("/dev/shm", "4k"), sys.executable, str(script)], env=environment,
                          capture_output=True, text=True)
    assert "No space left" in done.stderr and done.stdout == "[3, 3]\n", done


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from data_pipeline.workers.executor import workers\n"
        "from test_executor import config, name, report_and_wait\n"
        "if __name__ == '__main__':\n"
        "    with workers(config('local')) as pool:\n"
        "        list(pool.all(report_and_wait, [sys.argv[1]], name))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    worker_file = tmp_path / "worker"
    parent = subprocess.Popen([sys.executable, str(script), str(worker_file)], env=environment)
    worker = int(wait_for(lambda: worker_file.exists() and worker_file.read_text()))
    parent.kill()
    parent.wait()
    try:
        wait_for(lambda: not alive(worker), seconds=10)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
