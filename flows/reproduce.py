"""Run the pipeline as a Prefect flow: what changed runs, what did not is shown as Cached, what failed can be resumed.

    python -m flows.reproduce                       everything
    python -m flows.reproduce --profile smoke       under a profile of profiles/
    python -m flows.reproduce --stages compress     a stage and what it needs; `pretrain` stands for all its members

The graph is DVC's: one task a stage, its needs first, independent ones side by side. Reports to the server of `make ui`
when that runs, to PREFECT_API_URL if it is set, else to a private temporary server. Exits 1 when a stage failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import httpx
from prefect import flow, get_client, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Crashed

from flows import artifacts, dvc_graph, server
from flows.console import Console, clock, table
from flows.dvc_graph import GpuTaken, GraphError, Node, ProgressLine, StageFailed, StageRunner
from flows.profile import apply, resolve
from stages.frame.common import _commit, die_with_parent
from stages.frame.params import ParamsError, load_params

SECONDS_TO_STOP = 9.0     # after which a run that was interrupted ends at once, its stages and its server with it


class Run:
    """One run of the flow: what its tasks share, and what became of each stage, whatever Prefect managed to record."""

    def __init__(self, profile: str | None, stages: list[str] | None):
        try:
            if profile:
                apply(profile)
            params = load_params()
        except ParamsError as error:              # a SystemExit, which a flow must not raise
            raise GraphError(str(error)) from None
        self.profile = params.profile
        self.console = Console()
        while holders := dvc_graph.busy():
            self.console.line(f"Waiting for the stages an earlier run left: processes {sorted(holders)}")
            time.sleep(3)
        for line in dvc_graph.mend(params.runtime.verify_bytes):
            self.console.line(line)
        nodes = dvc_graph.graph()
        dvc_graph.look()
        for name, node in nodes.items():
            if name.startswith(("pretrain@", "compress")):
                nodes[name] = replace(node, gpus=params.runtime.launcher.gpus_here)
            elif name.startswith("evaluate@"):              # the benchmark has the machine to itself
                nodes[name] = replace(node, gpus=params.runtime.one_model.gpus_here)
        self.nodes = dvc_graph.select(nodes, stages) if stages else nodes
        self.stale = dvc_graph.stale(self.nodes)
        gpus = dvc_graph.visible_gpus()
        if gpus:
            self.console.line(f"GPUs: {', '.join(gpus)}; a stage has its own to itself while the next ones get ready.")
        self.runner = StageRunner(params.runtime.slots, params.runtime.stage_timeout_minutes, gpus)
        self.outcomes: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.failures: list[StageFailed] = []

    def finish(self, stage: str, outcome: str, seconds: float = 0.0) -> None:
        self.outcomes[stage], self.seconds[stage] = outcome, seconds

    def summary(self) -> str:
        """A table of all stages; then either where the report is, or what failed."""
        rows = [
            {
                "stage": name,
                "result": self.outcomes.get(name, "not run"),
                "time": clock(self.seconds[name]) if self.seconds.get(name) else "",
            }
            for name in self.nodes
        ]
        text = "\n" + table(rows)
        for failure in self.failures:
            text += f"\n\n{failure}"
        if self.report:
            text += f"\n\nReport: {(self.report / 'index.html').absolute()}"
        return text

    @property
    def report(self) -> Path | None:
        """Where the report is, when this run brought it up to date."""
        done = "report" in self.nodes and "report" not in self.failed
        return Path("reports", self.profile) if done else None

    @property
    def failed(self) -> list[str]:
        return [name for name in self.nodes if self.outcomes.get(name) not in ("ran", "restored", "cached")]


RUNS: list[Run] = []      # those of this process; `main` reads its verdict here and not from Prefect


@task(cache_policy=NO_CACHE, persist_result=False)
def run_stage(run: Run, node: Node) -> State:
    """Bring one stage up to date; its state is Cached when there was nothing to do, Cancelled when the run was
    stopped."""
    if node.name not in run.stale:
        run.finish(node.name, "cached")
        return Completed(name="Cached", message="Code, parameters, inputs and outputs are unchanged.")
    logger = get_run_logger()
    bar = artifacts.ProgressBar(node.name)
    started = time.monotonic()

    def on_start() -> None:
        nonlocal started
        started = time.monotonic()
        run.console.start(node.name)

    def on_line(line: str) -> None:
        nonlocal started
        logger.info(line)
        if taken := GpuTaken.parse(line):
            started += taken.waited
            run.console.say(node.name, f"has GPU {taken.gpus}")
        elif line.startswith("Waiting for "):      # a GPU, a lock, other nodes, Slurm: else it would look hung
            run.console.say(node.name, line)
        if progress := ProgressLine.parse(line):
            run.console.progress(node.name, line)
            bar.update(progress)

    try:
        outcome = run.runner.run(node, on_start, on_line)
    except Exception as error:
        failure = (error if isinstance(error, StageFailed)
                   else dvc_graph.failure(node, f"{type(error).__name__}: {error}"))
        outcome = "stopped" if run.runner.stopped else "failed"
        run.finish(node.name, outcome, time.monotonic() - started)
        run.failures.append(failure)
        run.console.end(node.name, f"{outcome}; log: {node.log}")
        if outcome == "stopped":
            return Cancelled(message=str(failure))
        raise failure from error
    seconds = time.monotonic() - started
    run.finish(node.name, outcome, seconds)
    run.console.end(node.name, f"{outcome} in {clock(seconds)}")
    if outcome == "ran":
        return Completed(message=f"Ran in {seconds:.0f} s.")
    return Completed(name="Cached", message=f"DVC: {outcome}.")


def run_name() -> str:
    """`smoke-7c8ec24`: profile and commit."""
    try:
        profile = runtime.flow_run.parameters["profile"] or load_params().profile
    except ParamsError:                           # which the flow itself reports
        profile = "params.yaml"
    head, _, changes = (_commit() or "").partition("+")
    return "-".join(filter(None, [profile, head[:7], changes]))


@flow(flow_run_name=run_name)
def reproduce(profile: str | None = None, stages: list[str] | None = None) -> None:
    """Reproduce Nemotron-H: bring every stage of dvc.yaml up to date.

    Args:
        profile: write params.yaml for this profile first (`smoke`, `cpu`, ...); none leaves it as it is.
        stages: only these and what they need; none means all.
    """
    if runtime.deployment.id:                     # started from the pages: it ends with them
        die_with_parent()
    with dvc_graph.only_flow():
        run = Run(profile, stages)
        RUNS.append(run)
        unchanged = len(run.nodes) - len(run.stale)
        run.console.line(f"Profile {run.profile}: {len(run.nodes)} stages, {unchanged} unchanged.")
        with best_effort():
            artifacts.publish_plan(run.nodes, run.stale)
        futures: dict[str, PrefectFuture[State]] = {}
        try:
            for name, node in run.nodes.items():
                named = run_stage.with_options(name=name, task_run_name=name)
                needs = [futures[other] for other in node.needs & futures.keys()]
                futures[name] = named.submit(run, node, wait_for=needs, return_state=False)
            for name, future in futures.items():
                future.wait()
                if name not in run.outcomes and (future.state.is_failed() or future.state.is_crashed()):
                    # ended by Prefect, outside of the stage: it could not record it, where a disk is full
                    run.failures.append(dvc_graph.failure(run.nodes[name], f"Prefect: {future.state.message}"))
        except BaseException:                     # cancelled: threads do not see the signal, processes must
            run.runner.stop()
            raise
        with best_effort():
            artifacts.publish_metrics(dvc_graph.metrics(), run.profile)
            if run.report:
                artifacts.publish_report(run.report)
        if run.failed:
            raise StageFailed(f"{len(run.failed)} of {len(run.nodes)} stages did not finish: {', '.join(run.failed)}.")


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Publishing must not fail a run whose work is done: log what went wrong."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("Not published: %s", error)


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """While it lasts Prefect reports to the server of `make ui`, to PREFECT_API_URL, or to a temporary server."""
    url = server.running()
    if not url and (theirs := PREFECT_API_URL.value()):
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
        if isinstance(error, httpx.TransportError):
            raise GraphError(f"PREFECT_API_URL={theirs}: no server answers ({error}).\n"
                             "Start it, or unset PREFECT_API_URL: the run then has a server of its own.")
        yield
        return
    print(f"Watch this run at {url}" if url else "Starting a temporary Prefect server ...", flush=True)
    with temporary_settings({PREFECT_API_URL: f"{url or server.start()}/api"}):
        mark_crashed()
        yield


def mark_crashed() -> None:
    """Unless a flow runs here: what Prefect's record has as running are runs of processes that are gone. It says so."""
    gone = {"state": {"type": {"any_": ["RUNNING", "CANCELLING", "PENDING"]}}}
    with contextlib.suppress(GraphError), dvc_graph.only_flow(), get_client(sync_client=True) as client:
        state: State = Crashed(message="Its process was killed.")
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(gone)):
            client.set_flow_run_state(run.id, state, force=True)
        for task_run in client.read_task_runs(task_run_filter=TaskRunFilter.model_validate(gone)):
            client.set_task_run_state(task_run.id, state, force=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flows.reproduce", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", help="write params.yaml for this profile first")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these and what they need")
    options = parser.parse_args()
    if options.profile:
        resolve(options.profile)                  # a wrong name need not wait for Prefect
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:      # as nohup has it
            signal.signal(number, _interrupt)
    try:
        dvc_graph.check_places()
        with reporting():
            reproduce(options.profile, options.stages, return_state=True).result()
    except GraphError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not RUNS:
            raise
        if not isinstance(error, StageFailed):
            print(f"Prefect could not record the run ({type(error).__name__}: {error}); DVC's record stands.")
    print(RUNS[-1].summary(), flush=True)
    sys.exit(1 if RUNS[-1].failed else 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind as by Ctrl-C: stages are ended, the run is recorded, the temporary server goes. What is left after
    SECONDS_TO_STOP ends with this process."""
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    with contextlib.suppress(OSError):            # the terminal may be gone
        os.write(1, b"\nStopping. Run the same command again: it resumes.\n")
    last = threading.Timer(SECONDS_TO_STOP, os._exit, [130])
    last.daemon = True
    last.start()
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
