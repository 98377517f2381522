"""The frame of a stage, through its command line as a user meets it."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from flows.dvc_graph import GpuTaken
from stages.frame import common
from stages.frame.common import Progress, Stage, StageError, plain_errors, run_stage
from stages.frame.params import load_params
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["annotate", "curate", "tokenizer", "tokenize", "pretrain", "compress", "export", "evaluate", "benchmark",
          "report"]


def run(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", f"stages.{name}", *arguments], cwd=cwd, env=environment,
                          capture_output=True, text=True)


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Stage:
    monkeypatch.chdir(tmp_path)
    return Stage("tokenizer", load_params(ROOT / "params.yaml"), None, None, ("tokenizer", "seed"))


def test_help_loads_nothing_heavy():
    code = f"import sys, runpy\nfor name in {STAGES}:\n" \
           " sys.argv = [name, '--help']\n" \
           " try: runpy.run_module(f'stages.{name}', run_name='__main__')\n" \
           " except SystemExit as end: assert not end.code\n" \
           " heavy = {'torch', 'polars', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)\n" \
           " assert not heavy, (name, heavy)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m stages.") == len(STAGES)


def test_missing_input_names_the_stage_to_run(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    done = run("tokenizer", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "data/cpu/curated: not found; stage `curate` writes it.", "Run `dvc repro curate` first."
    ]


def test_set_needs_out_and_unknown_variants_are_listed():
    assert "Add --out DIR" in run("tokenizer", "--set", "seed=2").stderr
    wrong = run("export", "--variant", "nothing")
    assert wrong.returncode == 1 and wrong.stderr.startswith("--variant nothing: unknown.\n")
    assert "hybrid-fp8" in wrong.stderr


def test_a_setting_without_effect_is_refused(tmp_path):
    def tried(stage, *settings, member=None):
        settings = [word for one in settings for word in ("--set", one)] + (["--variant", member] if member else [])
        return forked.run(tmp_path, "-m", f"stages.{stage}", *settings, "--out", "out", "--params",
                          str(ROOT / "params.yaml"), check=False).stderr

    assert tried("tokenizer", "pretrain.tokens=8") == (
        "--set pretrain.tokens=8: no effect on tokenizer.\nIt reads: seed, tokenizer, profile, runtime.\n")
    assert "no effect on curate" in tried("curate", "annotate.shard_megabytes=1")
    assert "no effect on evaluate.\nIt reads: seed, evaluate.context_tokens, " in tried(
        "evaluate", "evaluate.items_per_task=5", member="hybrid-fp8")
    assert "no effect on reference" in tried("reference", "evaluate.generation=code")
    assert "no effect on tokenize" in tried("tokenize", "pretrain.learning_rate=1e-3")
    assert "items.json: not found" in tried("evaluate", "evaluate.generation=code", member="hybrid-fp8")
    assert "curated: not found" in tried("tokenizer", "tokenizer.vocab_size=512", "runtime.workers=1", "seed=2")
    sources = "annotate.sources=[{kind: files, paths: [x.jsonl], domain: web, license: MIT}]"
    assert "x.jsonl" in tried("annotate", sources, "annotate.substring.domains=[web]",      # of a domain that needs:
                              "curate.language.domains=[web]", "curate.rules={web: {set: web, labels: [low]}}")


def test_output_appears_whole_or_not_at_all(stage):
    with pytest.raises(RuntimeError), stage.output("tokenizer") as out:
        (out / "half").write_text("x")
        raise RuntimeError
    assert not stage.data_root.joinpath("tokenizer").exists()
    for content in ("first", "second"):
        with stage.output("tokenizer") as out:
            (out / content).write_text(content)
    assert [file.name for file in stage.data_root.joinpath("tokenizer").iterdir()] == ["second"]
    assert [path.name for path in stage.data_root.iterdir()] == ["tokenizer"]


def test_under_out_what_lies_there_comes_first(stage, capsys):
    """Data and records alike: else one would be of another model than the other. What does not is said."""
    apart = Stage("benchmark", stage.params, None, Path("mine"), ("benchmark",))
    for place, look in (("data/cpu", apart.input), ("runs/cpu", apart.record), ("mine/data", apart.input),
                        ("mine/runs", apart.record)):
        file = Path(place, "items", "items.json")
        file.parent.mkdir(parents=True)
        file.touch()
        assert look("items", "items.json") == file
    assert capsys.readouterr().out.splitlines() == [
        f"Reads {kind}/cpu/items/items.json: there is no mine/{kind}/items/items.json." for kind in ("data", "runs")]


@pytest.mark.parametrize("place", ["file", "file/mine/deeper"])
def test_a_file_is_no_place_for_results(place, tmp_path):
    (tmp_path / "file").touch()
    for command in (["stages.tokenizer"], ["stages.export", "--from-hub", "hub"], ["flows.curate_own", "file"]):
        done = forked.run(tmp_path, "-m", *command, "--out", place, check=False)
        assert done.returncode == 2 and "argument --out: file is a file, not a directory" in done.stderr


def pretraining(*overrides: str) -> Stage:
    """A stage that has read its tokens."""
    stage = Stage("pretrain", load_params(ROOT / "params.yaml", overrides), "hybrid-fp8", None, ("pretrain",))
    stage.run_only = {"pretrain.checkpoint_every"}
    stage.input("tokens")
    return stage


@pytest.fixture
def tokens(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tokens = Path("data/cpu/tokens")
    tokens.mkdir(parents=True)
    (tokens / "blend.json").write_text("1")
    return tokens


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """A copy of what stages are made of, for the test to change."""
    for name in ("model", "kernels", "stages"):
        shutil.copytree(ROOT / name, tmp_path / "code" / name)
    for name in ("dvc.yaml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path / "code")
    monkeypatch.setattr(common, "ROOT", tmp_path / "code")
    return tmp_path / "code"


def test_resume_state_outlives_what_no_result_depends_on(tokens, code):
    before = pretraining().scratch
    os.utime(tokens / "blend.json", (1, 1))
    assert pretraining().scratch == before
    assert pretraining("pretrain.checkpoint_every=7", "runtime.threads=2", "evaluate.recall_pairs=9",
                       "variants.other={architecture: transformer, precision: bf16, seed: 5}").scratch == before
    for file in ("model/training/trainer.py", "stages/report/figures.py", "model/evaluation/sandbox.py"):
        with (code / file).open("a") as source:
            source.write("# a remark\n" if file.endswith("trainer.py") else "more = 1\n")
    assert pretraining().scratch == before


def test_another_variant_costs_compress_neither_result_nor_resume_state(tokens):
    def depends(*overrides: str) -> dict:
        params = load_params(ROOT / "params.yaml", overrides)
        return Stage("compress", params, None, None, ("compress", "pretrain", "variants")).depends()

    assert depends("variants.other={architecture: transformer, precision: bf16, seed: 5}") == depends()
    assert depends("variants.hybrid-fp8.fp8_recipe=unscaled", "variants.hybrid-fp8-unscaled.seed=4") != depends()


def test_why_an_older_resume_state_is_not_used_is_said(tokens, code, capsys):
    before = pretraining().scratch
    assert capsys.readouterr().out == ""
    (tokens / "blend.json").write_text("2")
    with (code / "model/training/trainer.py").open("a") as source:
        source.write("more = 1\n")
    rate = load_params(ROOT / "params.yaml").pretrain.learning_rate
    assert pretraining("pretrain.learning_rate=0.5").scratch != before
    assert capsys.readouterr().out == (f"{before} is not gone on from: pretrain.learning_rate was {rate}, is 0.5; "
                                       "data/cpu/tokens changed; model/training/trainer.py changed.\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metrics_are_finite_or_there_are_none(stage, monkeypatch, value):
    def tokenizer(stage: Stage) -> dict[str, float]:
        return {"good": 1.0, "bytes_per_token": value}

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["tokenizer", "--params", str(ROOT / "params.yaml")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(StageError, match=r"metrics\.json: bytes_per_token would be") as error:
        run_stage(tokenizer, "", ("tokenizer",))
    assert str(error.value).count("\n") == 1 and not (stage.records / "metrics.json").exists()


def test_a_shallow_clone_knows_its_commit(tmp_path, monkeypatch):
    def git(*arguments) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", tmp_path / "whole")
    for content in "ab":
        (tmp_path / "whole/file").write_text(content)
        git("-C", tmp_path / "whole", "add", "file")
        git("-C", tmp_path / "whole", "commit", "-qm", content)
    git("clone", "-q", "--depth", "1", f"file://{tmp_path / 'whole'}", tmp_path / "shallow")
    monkeypatch.setattr(common, "ROOT", tmp_path / "shallow")
    assert common._commit() == git("-C", tmp_path / "whole", "rev-parse", "HEAD")
    (tmp_path / "shallow/file").write_text("c")
    assert common._commit().endswith("+changes")


def test_full_disk_is_two_lines():
    with pytest.raises(StageError) as error, plain_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "data/x.bin")
    assert str(error.value).splitlines()[0] == "No space left on the disk while writing data/x.bin."
    with pytest.raises(ConnectionError), plain_errors():
        raise ConnectionError(errno.ECONNRESET, "reset by peer")


def test_second_run_of_the_same_stage_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    hold = "import fcntl, time, pathlib; pathlib.Path('.scratch').mkdir(); f = open('.scratch/tokenizer.lock', 'w')\n" \
           "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert "already running" in run("tokenizer", cwd=tmp_path).stderr
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("of_dvc", [True, False])
def test_a_stage_ends_with_the_dvc_that_started_it_and_not_with_a_shell(of_dvc: bool, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(
        "import time; from stages.frame.common import run_stage\n"
        "def toy(stage): print('begun', flush=True); time.sleep(60)\n"
        "run_stage(toy, 'A stage.', ())\n"
    )
    starts = "import subprocess, sys; subprocess.run([sys.executable, 'toy.py', '--out', '.'])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "STAGE_FLOW": str(os.getpid())}
    environment |= {"DVC_STAGE": "toy"} if of_dvc else {}
    (tmp_path / "params.yaml").symlink_to(ROOT / "params.yaml")
    parent = subprocess.Popen([sys.executable, "-c", starts], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert parent.stdout and parent.stdout.readline() == b"begun\n"
    [toy] = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([toy], timeout=10 if of_dvc else 0.5)
    assert bool(alive) != of_dvc
    for process in alive:
        process.kill()
    if of_dvc:                                          # the flow ended before the stage could ask for a signal
        flow = subprocess.Popen(["true"])
        os.waitid(os.P_PID, flow.pid, os.WEXITED | os.WNOWAIT)                              # and is not reaped yet
        late = subprocess.run([sys.executable, "toy.py", "--out", "."], cwd=tmp_path, capture_output=True,
                              env=environment | {"STAGE_FLOW": str(flow.pid)})
        assert (late.returncode, late.stdout) == (-signal.SIGKILL, b"")
        assert psutil.pid_exists(flow.pid) and flow.wait() == 0


def test_a_stage_waits_for_its_gpus_and_has_them_until_it_ends(stage, capsys, monkeypatch):
    Path(".scratch").mkdir()
    hold = "import fcntl, time; f = open('.scratch/gpu-MIG-a-1.lock', 'w'); f.write('17'); f.flush()\n" \
           "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(1.5)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    for nothing in ("", None):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if nothing is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        stage.take_gpus()
        assert stage.waited < 0.1 and capsys.readouterr().out == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, MIG-a/1")
    stage.take_gpus()
    assert holder.wait() == 0 and 1 < stage.waited < 10
    assert capsys.readouterr().out.splitlines() == [
        "Waiting for GPU MIG-a/1, which another stage has (process 17).", f"gpu 0,MIG-a/1 waited {stage.waited:.1f} s"
    ]
    assert GpuTaken.parse(f"gpu 0,MIG-a/1 waited {stage.waited:.1f} s") is not None
    assert {lock.read_text() for lock in Path(".scratch").glob("gpu-*")} == {str(os.getpid())}
    with Path(".scratch/gpu-0.lock").open("w") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_time_spent_waiting_for_a_gpu_is_not_the_stages(stage, monkeypatch):
    def tokenizer(stage: Stage) -> dict[str, float]:
        stage.waited = 3600.0
        return {}

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["tokenizer", "--params", str(ROOT / "params.yaml")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    before = time.time()
    run_stage(tokenizer, "", ("tokenizer",))
    record = json.loads((stage.records / "provenance.json").read_text())
    assert -3600 <= record["wall_seconds"] < -3500
    assert datetime.fromisoformat(record["started"]).timestamp() >= int(before) + 3600


def test_progress_line(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    progress = Progress(seconds_between_lines=0)
    progress(0, 4, loss=3.4121, lr=3e-4)
    time.sleep(0.01)
    progress(4, 4, loss=3.4121, lr=3e-4, **{"tok/s": 8123.4})
    assert capsys.readouterr().out.splitlines() == [
        "step 0/4 loss 3.412 lr 3.0e-04 eta 00:00:00",
        "step 4/4 loss 3.412 lr 3.0e-04 tok/s 8123 eta 00:00:00",
    ]


def test_progress_starts_anew_with_another_loop(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    progress = Progress(seconds_between_lines=0)
    progress(1, 3)
    time.sleep(1.1)
    progress(2, 3)
    progress(2, 80)
    progress(3, 80)
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "00:00:00", "00:00:01", "00:00:00", "00:00:00"
    ]
