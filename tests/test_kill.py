"""SIGKILL in every stage in turn, in odd surroundings: the pipeline goes on and ends with the results of an unbroken
run."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import psutil
import pytest

from tests.archive import command_environment, oddly_surrounded, reproduce, results, start, unpack

VICTIMS = ["annotate", "curate", "tokenizer", "tokenize", "pretrain@hybrid-fp8", "pretrain@transformer-bf16",
           "compress", "export@compressed", "items", "evaluate@hybrid-fp8", "benchmark", "report"]


def kill_in(archive: Path, environment: dict[str, str], stage: str, seconds: float) -> bool:
    """Run the flow up to `stage` and kill all its processes `seconds` into that. Whether the stage had started."""
    flow = start(archive, "--profile", "smoke", "--stages", stage, environment=environment)
    assert flow.stdout is not None
    started = any(line.split()[1:3] == [stage, "started"] for line in flow.stdout)
    if started:
        time.sleep(seconds)
    for process in [*psutil.Process(flow.pid).children(recursive=True), psutil.Process(flow.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    flow.communicate()
    return started


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_in_every_stage(tmp_path: Path, smoke_run: tuple[Path, dict[str, str]]) -> None:
    unbroken, _ = smoke_run
    expected, seconds = results(unbroken), {}
    for record in unbroken.glob("runs/smoke/**/provenance.json"):
        values = json.loads(record.read_text())
        name = f"{values['stage']}@{values['variant']}" if values["variant"] else values["stage"]
        seconds[name] = values["wall_seconds"]
    archive = tmp_path / "my déjà-vu"
    archive.mkdir()
    unpack(archive)
    with oddly_surrounded(command_environment(archive)) as environment:
        for stage in VICTIMS:
            assert kill_in(archive, environment, stage, 1.0 + 0.6 * seconds[stage]), f"{stage} had nothing left to do"
        resumed = reproduce(archive, environment=environment)
    assert set(resumed.values()) <= {"ran", "cached", "restored"}
    assert results(archive) == expected
