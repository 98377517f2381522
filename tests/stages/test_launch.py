"""Pretraining on several processes: torchrun for real, Slurm by programs on PATH that stand in for its own."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.config import ModelError
from model.training.trainer import train
from stages.frame import launch
from stages.frame.launch import LauncherConfig, SlurmJob
from stages.frame.params import ParamsError, load_params
from tests.forked import run
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
TWO = LauncherConfig(kind="slurm", nodes=2, processes_per_node=8,
                     slurm=SlurmJob(minutes=30, partition="batch", directives=["--exclusive"], setup=["export SITE=x"]))

# sbatch starts the script in the background; its environment is what Slurm gives a job. sacct says what a file says.
PROGRAMS = {
    "sbatch": """
        if [ -e refuse ]; then echo "sbatch: error: invalid partition specified: batch" >&2; exit 1; fi
        echo "$@" >> sbatch-calls; number=$((41 + $(wc -l < sbatch-calls)))
        log=$(sed -n "s/^#SBATCH --output=//p" "$2" | sed "s/%j/$number/")
        export SLURM_JOB_ID=$number SLURM_JOB_NODELIST=node[1-2]
        (echo RUNNING > state-$number
        if bash "$2" > "$log" 2>&1; then echo COMPLETED; else cat how-it-ends || echo FAILED; fi > state-$number.new
        mv state-$number.new state-$number) > /dev/null 2>&1 &
        echo "$number;cluster"
    """,
    "sacct": 'cat state-$2',
    "scancel": 'echo "$1" >> cancelled; echo "CANCELLED by 0" > state-$1',
    "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": 'shift; exec "$@"',
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with a Slurm of scripts on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in PROGRAMS.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "SECONDS_BETWEEN_LOOKS", 0.05)
    return tmp_path


def worker(monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    """Let `shell` be what torchrun would have started; $1 is the job file."""
    monkeypatch.setattr(launch, "torchrun_command",
                        lambda launcher, job, rendezvous, identity: ["bash", "-c", shell, "worker", str(job)])


def test_slurm_script_asks_for_what_the_parameters_say(slurm: Path) -> None:
    script = launch.slurm_script(TWO, slurm / "job.json", "pretrain-hybrid-fp8")
    for line in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--time=30", "--partition=batch",
                 "--exclusive", "--job-name=pretrain-hybrid-fp8", f"--chdir={slurm}"):
        assert f"#SBATCH {line}\n" in script
    assert "--account" not in script and script.index("SITE=x") < script.index("srun")
    assert '--rdzv-endpoint="$first":29400 --rdzv-id="$SLURM_JOB_ID" -m stages.frame.worker' in script
    assert "--nnodes=2 --nproc-per-node=8" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_slurm_job_is_waited_for_and_its_log_shown(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    worker(monkeypatch, 'echo "step 1/2 loss 3.0"; sleep 0.3; cp "$1" "${1%.json}-result.json"; echo "on $first"')
    assert launch.launch(TWO, {"answer": 42}, slurm, "toy") == {"answer": 42}
    shown = capfd.readouterr().out
    assert "Waiting for Slurm job 42 (" in shown and "step 1/2 loss 3.0" in shown


@pytest.mark.parametrize("failure", ["echo 'Connection refused' >&2; exit 1", "sleep 9"])
def test_a_job_outlives_an_accounting_that_fails_for_a_while(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], failure: str
) -> None:
    monkeypatch.setattr(launch, "ANSWER", 0.5)
    (slurm / "tools/sacct").write_text(
        f"#!/bin/bash\necho >> asked; case $(wc -l < asked) in 2|3) {failure};; esac\n{PROGRAMS['sacct']}\n")
    worker(monkeypatch, 'while [ $(wc -l < asked) -lt 4 ]; do sleep 0.1; done; cp "$1" "${1%.json}-result.json"')
    assert launch.launch(TWO, {"answer": 7}, slurm, "toy") == {"answer": 7}
    assert capfd.readouterr().err.count("sacct does not answer, the job is waited for all the same: ") == 1


def test_a_job_that_ran_out_of_time_goes_on_in_another(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm / "how-it-ends").write_text("TIMEOUT\n")
    worker(monkeypatch, '[ -e second ] || { touch second; exit 1; }; cp "$1" "${1%.json}-result.json"')
    assert launch.launch(TWO, {"answer": 1}, slurm, "toy") == {"answer": 1}
    assert len((slurm / "sbatch-calls").read_text().splitlines()) == 2


def test_jobs_that_run_out_of_time_with_nothing_to_go_on_from_are_an_error(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm / "how-it-ends").write_text("TIMEOUT\n")
    worker(monkeypatch, "[ -e resume/step-2 ] || mkdir -p resume/step-$(ls resume | wc -l); touch events.$$; exit 1")
    with pytest.raises(ModelError, match=r"ran out of 30 minutes with nothing new .*\n.*checkpoint_every"):
        launch.launch(TWO, {}, slurm, "toy")
    assert len((slurm / "sbatch-calls").read_text().splitlines()) == 4


def test_a_job_that_failed_says_how_and_is_not_tried_again(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (slurm / "how-it-ends").write_text("OUT_OF_MEMORY\n")
    worker(monkeypatch, "exit 1")
    with pytest.raises(ModelError, match=r"16 processes ended without a result: Slurm job 42 ended as OUT_OF_MEMORY"):
        launch.launch(TWO, {}, slurm, "toy")
    assert len((slurm / "sbatch-calls").read_text().splitlines()) == 1
    (slurm / "refuse").touch()
    with pytest.raises(ModelError, match=r"sbatch refused .*invalid partition.*\n.*runtime\.launcher"):
        launch.launch(TWO, {}, slurm, "toy")
    (slurm / "refuse").unlink()
    (slurm / "tools/sacct").write_text("#!/bin/bash\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
    with pytest.raises(ModelError, match="what became of Slurm job 43: Slurm accounting storage is disabled"):
        launch.launch(TWO, {}, slurm, "toy")
    monkeypatch.setattr(launch, "SILENT", 0.2)
    (slurm / "tools/sacct").write_text("#!/bin/bash\n")           # as of a job that it never hears of
    with pytest.raises(ModelError, match="what became of Slurm job 43: it knows none of that number"):
        launch.launch(TWO, {}, slurm, "toy")


def stop(code: str, directory: Path, started: Path, number: signal.Signals) -> None:
    """Run a program in `directory`; once `started` is there, a signal ends it as it should."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=directory, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.3)                 # it waits by now
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()


STAGE = (
    "from pathlib import Path; from stages.frame import launch; "
    "launch.torchrun_command = lambda *_: ['sleep', '30']; "
    "launch.launch(launch.LauncherConfig(kind='slurm', nodes=2), {}, Path.cwd(), 'toy')"
)


def test_a_stage_that_is_stopped_cancels_its_job(slurm: Path) -> None:
    stop(STAGE, slurm, slurm / "job.slurm", signal.SIGTERM)
    assert (slurm / "cancelled").read_text() == "42\n" and not (slurm / "job.slurm").exists()


def test_a_job_is_cancelled_though_the_stage_is_killed_meanwhile(slurm: Path) -> None:
    """As a flow kills all that its stage started, where Slurm takes long to answer."""
    (slurm / "tools/scancel").write_text(f"#!/bin/bash\ntouch told; sleep 1\n{PROGRAMS['scancel']}\n")
    process = subprocess.Popen([sys.executable, "-c", STAGE], cwd=slurm, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for((slurm / "job.slurm").exists)
    time.sleep(0.3)                     # it waits by now
    process.terminate()
    wait_for((slurm / "told").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for((slurm / "cancelled").exists)


def test_a_job_that_a_killed_stage_left_ends_before_another_begins(
    slurm: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (slurm / "state-41").write_text("RUNNING")
    (slurm / "job.slurm").write_text("41")
    worker(monkeypatch, 'cp state-41 found; cp "$1" "${1%.json}-result.json"')
    assert launch.launch(TWO, {"answer": 1}, slurm, "toy") == {"answer": 1}
    assert (slurm / "cancelled").read_text() == "41\n" and (slurm / "found").read_text() == "CANCELLED by 0\n"
    assert "Cancelling Slurm job 41, which a stage that was killed left." in capfd.readouterr().out
    assert launch.launch(TWO, {"answer": 2}, slurm, "toy") == {"answer": 2}         # nothing is left of one that ended
    assert (slurm / "cancelled").read_text() == "41\n"
    (slurm / "job.slurm").write_text("40")
    (slurm / "tools/scancel").write_text("#!/bin/bash\nexit 1\n")
    assert launch.launch(TWO, {"answer": 3}, slurm, "toy") == {"answer": 3}
    assert "scancel did not take Slurm job 40" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_is_stopped_ends_its_torchrun_and_itself(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "from pathlib import Path; from stages.frame import launch; "
        "shell = 'trap \"echo > ended; exit\" TERM; echo > up; sleep 9 & wait'; "
        "launch.torchrun_command = lambda *_: ['bash', '-c', shell]; "
        "launch.launch(launch.LauncherConfig(kind='torchrun', processes_per_node=2), {}, Path.cwd(), 'toy')"
    )
    stop(code, tmp_path, tmp_path / "up", number)
    assert (tmp_path / "ended").exists()


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match=r"launcher is slurm, and sbatch, sacct, scancel cannot be found"):
        launch.launch(TWO, {}, tmp_path, "toy")


def test_nodes_of_torchrun_need_a_place_to_meet(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"torchrun on 2 nodes needs `rendezvous`"):
        launch.launch(LauncherConfig(kind="torchrun", nodes=2), {}, tmp_path, "toy")


def test_a_layout_must_fit_the_processes() -> None:
    changes = ("runtime.launcher.kind=torchrun", "runtime.launcher.processes_per_node=4", "runtime.parallel.tensor=2")
    params = load_params(ROOT / "params.yaml", changes)
    assert params.runtime.launcher.processes == 4
    assert (params.runtime.parallel.tensor, params.runtime.parallel.pipeline) == (2, 1)      # two copies
    with pytest.raises(ParamsError, match=r"starts 4 processes, parallel\.tensor \(2\) x pipeline \(3\) = 6"):
        load_params(ROOT / "params.yaml", (*changes, "runtime.parallel.pipeline=3"))


def test_torchrun_of_two_processes_gives_the_losses_of_one(workplace: Path, tmp_path: Path) -> None:
    short = ("tokenizer.vocab_size=512", "pretrain.tokens=384")
    settings = (*short, "runtime.launcher={kind: torchrun, processes_per_node: 2}",
                "runtime.parallel={tensor: 2, sequence: true}")
    split = run(workplace, "-m", "stages.pretrain", "--variant", "hybrid-bf16", "--out", "split",
                *(word for setting in settings for word in ("--set", setting)), check=False)
    assert split.returncode == 0, split.stderr
    params = load_params(workplace / "params.yaml", short)
    alone = train(params.model_of("hybrid-bf16"), params.pretrain, "hybrid", "bf16", 1, workplace / "data/toy/tokens",
                  tmp_path / "alone", tmp_path / "scratch", lambda *_, **__: None)
    with (workplace / "split/runs/pretrain/hybrid-bf16/training.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses == pytest.approx([row["loss"] for row in alone.training], rel=2e-3)       # BF16
    assert split.stdout.count("step 6/6") == 1
    metrics = json.loads((workplace / "split/runs/pretrain/hybrid-bf16/metrics.json").read_text())
    assert metrics["processes"] == 2
    assert (workplace / "split/data/checkpoints/hybrid-bf16/model.json").exists()


def test_what_a_worker_refuses_is_what_the_stage_says(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = load_params(workplace / "params.yaml", ("tokenizer.vocab_size=512", "pretrain.tokens=10"))
    job = {"task": "pretrain", "model": params.model_of("hybrid-bf16").model_dump(mode="json"), "parallelism": {},
           "recipe": params.pretrain.model_dump(mode="json"), **params.variants["hybrid-bf16"].model_dump(),
           "tokens": str(workplace / "data/toy/tokens"), "out": "out", "scratch": str(workplace), "threads": 1}

    def torchrun(launcher: LauncherConfig, file: Path, name: str) -> str:
        done = run(workplace, "-m", "stages.frame.worker", str(file), check=False)
        return f"ended with {done.returncode}"

    monkeypatch.setattr(launch, "_by_torchrun", torchrun)
    with pytest.raises(ModelError, match=r"pretrain\.tokens \(10\)"):
        launch.launch(LauncherConfig(kind="torchrun"), job, workplace, "toy")
    assert (workplace / "job-error.txt").exists()
