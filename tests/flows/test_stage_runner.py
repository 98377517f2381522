"""The bridge to DVC, on a repository made for the test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from flows import dvc_graph
from flows.dvc_graph import GpuTaken, GraphError, Node, ProgressLine, StageFailed, StageRunner
from tests import forked
from tests.namespaces import on_full


def ignore(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def found() -> dict[str, Node]:
    """Nodes that one test's repository had: they are those of every other."""
    return {}


@pytest.fixture
def nodes(repository: Path, found: dict[str, Node]) -> dict[str, Node]:
    dvc_graph.allow_no_git()
    if not found:
        found.update(dvc_graph.graph())
    return dict(found)


@pytest.fixture(scope="module")
def after_first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the repository of a test in which the first stage has run; empty until one has."""
    return tmp_path_factory.mktemp("after-first")


@pytest.fixture
def begun(repository: Path, nodes: dict[str, Node], after_first: Path) -> dict[str, Node]:
    """Nodes of a repository in which the first stage has run."""
    if any(after_first.iterdir()):
        subprocess.run(["cp", "-a", f"{after_first}/.", repository], check=True)
    else:
        StageRunner(2, 5).run(nodes["first"], ignore, ignore)
        subprocess.run(["cp", "-a", f"{repository}/.", after_first], check=True)
    return nodes


def run_all(nodes: dict[str, Node], runner: StageRunner) -> dict[str, str]:
    """Every stage in a thread that first waits for its needs, as the flow does."""
    outcomes: dict[str, str] = {}
    threads: dict[str, threading.Thread] = {}

    def work(node: Node) -> None:
        for need in node.needs:
            threads[need].join()
        outcomes[node.name] = runner.run(node, ignore, ignore)

    for name, node in nodes.items():
        threads[name] = threading.Thread(target=work, args=(node,))
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join()
    return outcomes


def history(repository: Path) -> dict[str, tuple[float, float]]:
    """Stage -> when its last run began and ended."""
    times: dict[str, list[float]] = {}
    for line in (repository / "history").read_text().splitlines():
        name, *_, moment = line.split()
        times.setdefault(name, []).append(float(moment))
    return {name: (moments[-2], moments[-1]) for name, moments in times.items()}


def test_graph_has_needs_priorities_and_exclusive_stages(nodes: dict[str, Node]) -> None:
    assert list(nodes) == ["first", "second@left", "second@right", "last"]
    assert nodes["last"].needs == {"second@left"}
    assert [node.exclusive for node in nodes.values()] == [False, False, False, True]
    assert [node.priority for node in nodes.values()] == [2, 1, 0, 0]


def test_a_target_brings_what_it_needs_and_a_group_its_members(nodes: dict[str, Node]) -> None:
    assert list(dvc_graph.select(nodes, ["last"])) == ["first", "second@left", "last"]
    assert list(dvc_graph.select(nodes, ["second"])) == ["first", "second@left", "second@right"]
    with pytest.raises(GraphError, match=r"secnd@left: no such stage\.\nDid you mean second@left\?"):
        dvc_graph.select(nodes, ["secnd@left"])


def test_stages_run_side_by_side_and_exclusive_ones_alone(
    repository: Path, nodes: dict[str, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc_graph, "dvc", forked.dvc)
    assert dvc_graph.stale(nodes) == set(nodes)
    assert set(run_all(nodes, StageRunner(2, 5)).values()) == {"ran"}
    times = history(repository)
    assert times["second-left"][0] < times["second-right"][1] and times["second-right"][0] < times["second-left"][1]
    assert times["last"][0] > max(times["second-left"][1], times["second-right"][1])
    assert dvc_graph.stale(nodes) == set()

    (repository / "work.py").write_text((repository / "work.py").read_text() + "# no change of results\n")
    assert dvc_graph.stale(nodes) == set(nodes)
    assert run_all(nodes, StageRunner(1, 5)) == {
        "first": "ran", "second@left": "cached", "second@right": "cached", "last": "cached"
    }


def test_what_dvc_did_is_not_read_from_words(repository: Path) -> None:
    """Nor does a stage that writes DVC's own pass for one that did nothing."""
    says = "Stage 'says' didn't change, skipping. Stage 'says' is cached - skipping run"
    stage = {"cmd": f'echo "{says}" | tee out', "deps": ["work.py"], "outs": ["out"]}
    (repository / "dvc.yaml").write_text(json.dumps({"stages": {"says": stage}}))
    dvc_graph.allow_no_git()
    node = Node("says", frozenset(), False, 0, 0)
    assert StageRunner(1, 5).run(node, ignore, ignore) == "ran"
    assert says in node.log.read_text()
    assert StageRunner(1, 5).run(node, ignore, ignore) == "cached"
    (repository / "out").unlink()
    assert StageRunner(1, 5).run(node, ignore, ignore) == "restored"


def test_slots_go_to_the_longest_way_first(nodes: dict[str, Node]) -> None:
    runner = StageRunner(1, 5)
    started: list[str] = []
    with runner._slot(nodes["first"]):
        waiting = []
        for name in ("second@right", "last", "second@left"):
            def take(node: Node = nodes[name]) -> None:
                with runner._slot(node):
                    started.append(node.name)
            waiting.append(threading.Thread(target=take))
            waiting[-1].start()
            while len(runner.waiting) < len(waiting):
                time.sleep(0.01)
    for thread in waiting:
        thread.join()
    assert started == ["second@left", "second@right", "last"]
    assert runner.free == 1


def test_the_first_to_come_does_not_take_the_turn_of_the_longest_way(nodes: dict[str, Node]) -> None:
    runner = StageRunner(1, 5)
    started: list[str] = []

    def take(node: Node) -> None:
        with runner._slot(node):
            started.append(node.name)

    waiting = [threading.Thread(target=take, args=(nodes[name],)) for name in ("second@right", "second@left")]
    for thread in waiting:
        thread.start()
        time.sleep(0.05)
    for thread in waiting:
        thread.join()
    assert started == ["second@left", "second@right"]


class Held:
    """Stages that each wait for their slot in a thread, and keep it until they are ended.

    Attributes:
        gpus: those given to the stages that have a slot, or had one.
    """

    def __init__(self, runner: StageRunner, nodes: list[Node]):
        self.runner = runner
        self.gpus: dict[str, list[str]] = {}
        self.ends = {node.name: threading.Event() for node in nodes}
        self.threads = [threading.Thread(target=self._take, args=(node,)) for node in nodes]

    def _take(self, node: Node) -> None:
        with self.runner._slot(node) as gpus:
            self.gpus[node.name] = gpus
            self.ends[node.name].wait(30)

    def are(self, *names: str) -> bool:
        """Whether these, and no others, come to have had a slot."""
        deadline = time.monotonic() + 10
        while set(self.gpus) != set(names) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        return set(self.gpus) == set(names)

    def end(self, *names: str) -> None:
        for name in names:
            self.ends[name].set()

    def end_all(self) -> None:
        self.end(*self.ends)
        for thread in self.threads:
            thread.join()


def test_a_stage_has_its_gpus_to_itself_and_those_without_run_beside() -> None:
    """Two GPUs, three stages that need one, one that needs none, one that needs both; all wait at once."""
    needs = {"a": 1, "both": 2, "b": 1, "none": 0, "c": 1}
    nodes = [Node(name, frozenset(), False, gpus, 9 - place) for place, (name, gpus) in enumerate(needs.items())]
    runner = StageRunner(5, 5, ["0", "3"])
    held = Held(runner, nodes)
    with runner._slot(Node("benchmark", frozenset(), True, 0, 0)) as gpus:
        assert gpus == ["0", "3"]               # all wait while it runs
        for number, thread in enumerate(held.threads, start=1):
            thread.start()
            while len(runner.waiting) < number:
                time.sleep(0.01)
        assert not held.gpus
    # "both" cannot have two while "a" has one; what comes after it must not keep it from them
    assert held.are("a", "none")
    assert held.gpus["a"] == ["0"] and held.gpus["none"] == []
    held.end("a")
    assert held.are("a", "none", "both") and held.gpus["both"] == ["0", "3"]
    held.end("both")
    assert held.are("a", "none", "both", "b", "c") and sorted(held.gpus["b"] + held.gpus["c"]) == ["0", "3"]
    held.end_all()
    assert runner.free == 5 and runner.queues == {"0": [], "3": []}
    with pytest.raises(StageFailed, match="needs 3 GPUs, this machine has 2"), \
            runner._slot(Node("all", frozenset(), False, 3, 0)):
        pass
    with StageRunner(5, 5)._slot(Node("all", frozenset(), False, 3, 0)) as gpus:       # a machine without any
        assert gpus == []


def test_while_a_stage_computes_the_next_ones_get_ready() -> None:
    """One GPU: two more start when the first has said that it has the GPU, the third of them has to wait."""
    runner = StageRunner(5, 5, ["0"])
    names = ("first", "second", "third", "fourth", "alone")
    nodes = {name: Node(name, frozenset(), name == "alone", 1, 9 - place) for place, name in enumerate(names)}
    held = Held(runner, list(nodes.values()))
    for thread in held.threads:
        thread.start()
    assert held.are("first")                    # it may have got no further than its imports
    runner._computes(nodes["first"])
    assert held.are(*names[:3]) and held.gpus["third"] == ["0"]
    held.end("first")
    assert held.are(*names[:3])                 # the GPU is the second's, which has not come to it yet
    runner._computes(nodes["third"])            # the third was there first
    assert [node.name for node in runner.queues["0"]] == ["third", "second"]
    assert held.are(*names[:4])
    held.end("second", "third")
    runner._computes(nodes["fourth"])
    assert held.are(*names[:4])                 # what must be alone does not get ready beside another
    held.end("fourth")
    assert held.are(*names)
    held.end_all()
    assert runner.queues == {"0": []} and runner.computing == [] and runner.free == 5


@pytest.mark.parametrize(("line", "expected"), [
    ("gpu 0 waited 12.3 s", GpuTaken("0", 12.3)), ("gpu 2,3 waited 0.0 s", GpuTaken("2,3", 0.0)),
    ("gpu 0 waits 1.0 s", None), ("step 120/2000 loss 3.412 lr 3.0e-04 tok/s 8123 eta 00:03:41", (120, 2000)),
    ("step 3/3", (3, 3)), ("steps 3/4 of the way", None), ("at step 3/4 eta 00:00:01", None),
])
def test_lines_of_a_stage(line: str, expected: GpuTaken | tuple[int, int] | None) -> None:
    progress = ProgressLine.parse(line)
    assert (GpuTaken.parse(line) or (progress and (progress.step, progress.total))) == expected


def test_time_in_which_another_stage_has_the_gpu_is_not_the_stages(
    repository: Path, begun: dict[str, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is shorter than the wait: the stage is ended only once the GPU is its own."""
    monkeypatch.setattr(dvc_graph, "SECONDS_BETWEEN_LOOKS", 0.1)
    work = repository / "work.py"
    work.write_text("import time\ntime.sleep(30)\n" + work.read_text())
    runner = StageRunner(5, 1.0 / 60, ["0"])
    other = Node("other", frozenset(), False, 1, 9)
    errors: list[StageFailed] = []

    def run() -> None:
        try:
            runner.run(begun["second@left"], ignore, ignore)
        except StageFailed as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    with runner._slot(other):
        runner._computes(other)
        thread.start()
        time.sleep(3)
        assert not errors
    thread.join(20)
    assert "took longer than" in str(errors[0])


def test_stages_get_ready_for_the_gpu_that_fewest_wait_for() -> None:
    runner = StageRunner(9, 5, ["0", "1"])
    zero, one, next_, after, last = (Node(name, frozenset(), False, 1, 0) for name in ("0", "1", "2", "3", "4"))
    with runner._slot(zero), runner._slot(one):
        assert runner._gpus(next_) is None
        runner._computes(zero)
        with runner._slot(next_) as gpus:
            assert gpus == ["0"]                    # nobody computes on the other yet
            assert runner._gpus(after) is None      # and yet it is the one to wait for
            runner._computes(one)
            with runner._slot(after) as gpus:
                assert gpus == ["1"]
                assert runner._gpus(last) == ["0"]  # on which a stage has computed for longer


def test_stages_that_wait_for_the_same_gpus_take_them_in_one_order() -> None:
    runner = StageRunner(5, 5, ["0", "1"])
    zero, one, both = (Node(name, frozenset(), False, gpus, 0) for name, gpus in (("zero", 1), ("one", 1), ("both", 2)))
    with runner._slot(zero), runner._slot(one):
        runner._computes(one)
        runner._computes(zero)
        with runner._slot(both) as gpus:
            assert gpus == ["0", "1"]


def test_a_stage_sees_its_own_gpus_only(repository: Path, nodes: dict[str, Node]) -> None:
    work = repository / "work.py"
    work.write_text("import os\nprint('sees', repr(os.environ.get('CUDA_VISIBLE_DEVICES')))\n" + work.read_text())
    assert [node.gpus for node in nodes.values()] == [0, 1, 1, 0]
    seen: list[str] = []
    runner = StageRunner(2, 5, ["2"])
    for name in ("first", "second@left"):
        runner.run(nodes[name], ignore, seen.append)
    assert [line for line in seen if line.startswith("sees")] == ["sees ''", "sees '2'"]


def test_gpus_are_those_cuda_is_to_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(dvc_graph, "NVIDIA_SMI", 1)
    assert dvc_graph.visible_gpus() == [] and capsys.readouterr().err == ""
    program = tmp_path / "nvidia-smi"
    for script, gpus, said in (
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-b)'", ["0", "1"], ""),
        ("echo 'Failed to initialize NVML'\nexit 18", [], "fails, so no GPU is used: Failed to initialize NVML"),
        ("while :; do :; done", [], "has not answered for 1 seconds"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert dvc_graph.visible_gpus() == gpus
        assert said in (found := capsys.readouterr().err) and bool(found) == bool(said)
    for chosen, expected in (("1", ["1"]), ("0, 2", ["0", "2"]), ("", []), ("-1", []), ("NoDevFiles", []),
                             ("3,-1,1", ["3"]), ("GPU-8932f937,MIG-1/2", ["GPU-8932f937", "MIG-1/2"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
        assert dvc_graph.visible_gpus() == expected


def test_lines_are_watched_and_a_watcher_that_breaks_does_no_harm(repository: Path, nodes: dict[str, Node]) -> None:
    seen: list[str] = []

    def watch(line: str) -> None:
        seen.append(line)
        raise ConnectionError

    assert StageRunner(2, 5).run(nodes["first"], ignore, watch) == "ran"
    steps = [progress.step for line in seen if (progress := ProgressLine.parse(line))]
    assert steps == list(range(1, 11))
    assert Path("logs/first.log").read_text().splitlines() == seen


def test_a_watcher_that_is_held_up_is_left_behind(
    repository: Path, nodes: dict[str, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Prefect's server. After the run it would log into a process that ends."""
    monkeypatch.setattr(dvc_graph, "SECONDS_TO_WATCH", 0.1)
    seen: list[str] = []
    answers = threading.Event()

    def watch(line: str) -> None:
        seen.append(line)
        answers.wait()

    before = set(threading.enumerate())
    assert StageRunner(2, 5).run(nodes["first"], ignore, watch) == "ran"
    [watcher] = set(threading.enumerate()) - before
    answers.set()
    watcher.join()
    assert len(seen) == 1 < len(Path("logs/first.log").read_text().splitlines())


def test_who_has_the_lock_that_dvc_waits_for_is_said(
    repository: Path, nodes: dict[str, Node], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dvc_graph, "SECONDS_BETWEEN_LOOKS", 0.1)
    hold = ("import sys, zc.lockfile; lock = zc.lockfile.LockFile('.dvc/tmp/lock'); print('held', flush=True)\n"
            "sys.stdin.read()")
    dvc_graph.DVC_LOCK.parent.mkdir(parents=True, exist_ok=True)
    seen: list[str] = []
    for calls in (lambda _: dvc_graph.dvc("dag"), lambda watch: StageRunner(2, 1).run(nodes["first"], ignore, watch)):
        with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdin and holder.stdout and holder.stdout.readline() == b"held\n"
            threading.Timer(3, holder.stdin.close).start()
            calls(seen.append)
            said = f"Waiting for .dvc/tmp/lock, which process {holder.pid} has: let it end, or `kill -9` it."
            assert [*capfd.readouterr().err.splitlines(), *(line for line in seen if "Waiting" in line)] == [said]


def test_a_failure_says_what_the_stage_said_and_where_to_look(repository: Path, nodes: dict[str, Node]) -> None:
    (repository / "break-first").touch()
    with pytest.raises(StageFailed) as caught:
        StageRunner(2, 5).run(nodes["first"], ignore, ignore)
    assert str(caught.value).splitlines() == [
        "first: values.csv: column `loss` is missing. Run `dvc repro first` again.",
        "Log: logs/first.log. Run the same command again: it resumes.",
    ]


def test_a_stage_that_a_signal_ends_says_so_and_goes_on(repository: Path, begun: dict[str, Node]) -> None:
    def strike(line: str) -> None:
        if line.startswith("step 3/"):
            for process in psutil.Process().children(recursive=True):
                if "work.py" in process.cmdline():
                    process.kill()

    runner = StageRunner(2, 5)
    with pytest.raises(StageFailed) as failed:
        runner.run(begun["second@left"], ignore, strike)
    assert str(failed.value).splitlines()[0] == "second@left: ended by SIGKILL, most likely for want of memory."
    assert runner.run(begun["second@left"], ignore, ignore) == "ran"
    began = re.findall(r"second-left from (\d+)", Path("history").read_text())
    assert began[0] == "0" and int(began[1]) >= 2
    log = "ERROR: failed to reproduce 'second@left': failed to run: python work.py, exited with -11\n"
    assert dvc_graph._last_words(log) == "ended by SIGSEGV."


FULL_CACHE = """
import sys
from flows import dvc_graph
first = dvc_graph.Node("first", frozenset(), False, 0, 0)
try:
    print(dvc_graph.StageRunner(1, 5).run(first, print, print))
except dvc_graph.StageFailed as failure:
    sys.exit(str(failure))
"""


def test_a_cache_that_is_full_is_told_and_nothing_is_lost(nodes: dict[str, Node]) -> None:
    """DVC's cache on a disk of its own, which is full before the first output is committed."""
    Path(".dvc/cache").mkdir()
    full = subprocess.run([*on_full(".dvc/cache", "8k"), sys.executable, "-c", FULL_CACHE], capture_output=True,
                          text=True)
    assert full.returncode == 1 and "No space left on device" in full.stderr, full
    assert full.stderr.splitlines()[-1] == "Log: logs/first.log. Run the same command again: it resumes."
    dvc_graph.mend(1e9)
    assert StageRunner(1, 5).run(nodes["first"], ignore, ignore) == "ran"
    assert dvc_graph.stale({"first": nodes["first"]}) == set()


def test_stop_ends_processes_frees_locks_and_the_stage_resumes(repository: Path, begun: dict[str, Node]) -> None:
    runner = StageRunner(2, 5)
    on_the_way = threading.Event()
    errors: list[StageFailed] = []
    before = set(psutil.Process().children())

    def work() -> None:
        try:
            runner.run(begun["second@left"], ignore, lambda line: on_the_way.set() if "step 3/" in line else None)
        except StageFailed as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert on_the_way.wait(30)
    started = set(psutil.Process().children()) - before
    tree = [child for dvc in started for child in (dvc, *dvc.children(recursive=True))]
    assert any("work.py" in child.cmdline() for child in tree)
    runner.stop()
    thread.join()
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in tree)
    assert "stopped" in str(errors[0])
    assert json.loads(dvc_graph.RWLOCK.read_text() or "{}") == {}
    with pytest.raises(StageFailed, match="not started"):
        runner.run(begun["second@right"], ignore, ignore)

    assert StageRunner(2, 5).run(begun["second@left"], ignore, ignore) == "ran"
    began = re.findall(r"second-left from (\d+)", Path("history").read_text())
    assert began[0] == "0" and int(began[1]) >= 3


def test_a_stage_over_its_time_is_ended(begun: dict[str, Node]) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(StageFailed, match=r"took longer than 0\.03 minutes"):
        StageRunner(2, 0.03).run(begun["second@left"], ignore, ignore)
    assert set(psutil.Process().children()) <= before


def test_locks_of_the_dead_are_dropped_and_those_of_the_living_kept(repository: Path) -> None:
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc", "repro"])
    try:
        dead = subprocess.Popen(["true"])
        dead.wait()
        dvc_graph.RWLOCK.parent.mkdir(parents=True)
        kept = {"pid": living.pid, "cmd": "dvc repro"}
        reused = {"pid": os.getpid(), "cmd": "dvc repro"}      # alive, but by now another program
        dvc_graph.RWLOCK.write_text(json.dumps({
            "write": {"a": {"pid": dead.pid, "cmd": "dvc repro"}, "b": reused, "c": kept},
            "read": {"d": [reused], "e": [reused, kept]},
        }))
        assert dvc_graph.busy() == {living.pid: "dvc repro"}
        assert json.loads(dvc_graph.RWLOCK.read_text()) == {"write": {"c": kept}, "read": {"e": [kept]}}
    finally:
        living.kill()
        living.wait()
    assert dvc_graph.busy() == {}


def test_one_flow_at_a_time(repository: Path) -> None:
    with dvc_graph.only_flow(), pytest.raises(GraphError, match=f"process {os.getpid()}"), dvc_graph.only_flow():
        pass
    with dvc_graph.only_flow():
        pass


def test_outside_a_repository_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraphError, match=r"no dvc\.yaml here"):
        dvc_graph.allow_no_git()
