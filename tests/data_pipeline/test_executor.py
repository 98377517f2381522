"""Processes: results in order, laziness, a killed worker, a killed parent."""

import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import polars as pl
import pytest

from data_pipeline.config import DataError
from data_pipeline.executor import ordered_map, worker_pool

ROOT = Path(__file__).resolve().parents[2]


def slow_square(value: int) -> int:
    time.sleep(0.05 * (value % 3 == 0))
    return value * value


def column_sum(values: list[int]) -> int:
    return pl.DataFrame({"x": values}).lazy().select(pl.col("x").sum()).collect().item()


def die(value: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def report_and_wait(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(60)


@pytest.fixture(scope="module")
def pool():
    with worker_pool(2) as executor:
        yield executor


def test_results_keep_the_order_of_items(pool):
    for executor in (pool, None):
        assert list(ordered_map(executor, slow_square, range(12))) == [value * value for value in range(12)]
        assert list(islice(ordered_map(executor, slow_square, count()), 3)) == [0, 1, 4]        # items without end


def test_polars_works_here_and_in_workers(pool):
    assert column_sum([1, 2]) == 3
    assert list(ordered_map(pool, column_sum, [[1, 2], [3], [4, 5]])) == [3, 3, 9]


def test_a_killed_worker_is_explained():
    with pytest.raises(DataError, match=r"killed.*\n.*runtime\.workers"), worker_pool(2) as executor:
        list(ordered_map(executor, die, range(3)))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        "from data_pipeline.executor import ordered_map, worker_pool\n"
        "from test_executor import report_and_wait\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(2) as pool:\n"
        "        list(ordered_map(pool, report_and_wait, [sys.argv[1]]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    worker_file = tmp_path / "worker"
    parent = subprocess.Popen([sys.executable, str(script), str(worker_file)], env=environment)
    while not (worker_file.exists() and worker_file.read_text()):
        time.sleep(0.05)
    worker = int(worker_file.read_text())
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not alive(worker):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker was still there ten seconds after its parent")


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
