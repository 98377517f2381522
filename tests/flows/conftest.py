"""A throw-away DVC repository of four short stages: `first` -> `second@left`, `second@right` -> `last` (exclusive)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows import curate_own
from tests import forked

ROOT = Path(__file__).resolve().parents[2]

# Counts to ten in its scratch file, one count a progress line, and goes on from there when it was killed.
WORK = """
import pathlib, sys, time
from stages.frame.common import die_with_flow
die_with_flow()
name, seconds, *inputs = sys.argv[1:]
if pathlib.Path(f"break-{name}").exists():
    sys.exit("values.csv: column `loss` is missing.\\nRun `dvc repro first` again.")
scratch = pathlib.Path(f"scratch-{name}")
done = int(scratch.read_text()) if scratch.exists() else 0
with open("history", "a") as history:
    history.write(f"{name} from {done} at {time.time()}\\n")
for step in range(done + 1, 11):
    time.sleep(float(seconds) / 10)
    pathlib.Path(f"new-{name}").write_text(str(step))
    pathlib.Path(f"new-{name}").replace(scratch)
    print(f"step {step}/10 loss {1 / step:.3f} eta 00:00:01", flush=True)
scratch.unlink()
text = name + "".join(pathlib.Path(path).read_text() for path in inputs)
pathlib.Path(f"{name}.txt").write_text(text)
with open("history", "a") as history:
    history.write(f"{name} end at {time.time()}\\n")
"""

STAGES = """
stages:
  first:
    cmd: python work.py first 0.2
    deps: [work.py]
    outs: [first.txt]
  second:
    foreach: [left, right]
    do:
      cmd: python work.py second-${item} 1.5 first.txt
      meta: {gpus: 1}
      deps: [first.txt]
      outs: ["second-${item}.txt"]
  last:
    cmd: python work.py last 0.2 second-left.txt
    deps: [second-left.txt]
    meta: {exclusive: true}
    outs: [last.txt]
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory for the test, with a blank and an é in its path: no git, no Prefect home of its own yet."""
    here = tmp_path / "my déjà-vu"
    (here / ".dvc").mkdir(parents=True)
    shutil.copy(ROOT / ".dvc/config", here / ".dvc/config")
    (here / "work.py").write_text(WORK)
    (here / "dvc.yaml").write_text(STAGES)
    params = YAML(typ="safe").load(ROOT / "params.yaml")
    params["runtime"]["slots"] = 2
    YAML().dump(params, here / "params.yaml")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return here


def without_prefect() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefect's, as its server makes it at the first start, which takes long: one for the flows of all slow tests."""
    home = tmp_path_factory.mktemp("prefect")
    subprocess.run([sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"], check=True,
                   env=without_prefect() | {"PREFECT_HOME": str(home)}, capture_output=True)
    return home / "prefect.db"


@pytest.fixture
def apart(repository: Path) -> dict[str, str]:
    """For a process here: this checkout's packages, a Prefect of its own, which has no record of runs yet."""
    (repository / ".prefect").mkdir()
    return without_prefect() | {"PREFECT_HOME": str(repository / ".prefect")}


@pytest.fixture
def environment(apart: dict[str, str], database: Path) -> dict[str, str]:
    """For a process that runs the flow."""
    shutil.copy(database, apart["PREFECT_HOME"])
    return apart


@pytest.fixture
def curate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python -m flows.curate_own ARGUMENTS` in `tmp_path`: in this process, its stages forked."""

    def stage(name: str, out: Path, params: Path, assignments: list[str]) -> int:
        settings = [word for assignment in assignments for word in ("--set", assignment)]
        done = forked.run(tmp_path, "-m", "tests.quick", f"stages.{name}", "--params", str(params), "--out", str(out),
                          "--settings", curate_own.SETTINGS, *settings, check=False)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["curate_own", *arguments])
        code: object = 0
        try:
            curate_own.main()
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        words = code if isinstance(code, str) else ""
        return subprocess.CompletedProcess(arguments, 1 if words else int(str(code)), said.out, said.err + words)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curate_own, "run", stage)
    return run
