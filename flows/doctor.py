"""Say what is installed, what is missing and how to mend it.

    python -m flows.doctor

Exits 1 only when `make reproduce` cannot work here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

LOCK = Path("requirements.lock")
GIB = 2**30
ENOUGH_MEMORY_GIB = 8
ENOUGH_DISK_GIB = 10
LEAST_DISK_GIB = 2


@dataclass(frozen=True)
class Finding:
    """One line of the table. `missing` keeps the pipeline from working, `warning` does not."""

    name: str
    state: Literal["ok", "warning", "missing"]
    detail: str
    cure: str = ""


def python() -> Iterator[Finding]:
    good = (3, 11) <= sys.version_info < (3, 13)
    yield Finding("python", "ok" if good else "missing", f"{sys.version.split()[0]} ({sys.executable})",
                  "Remove .venv and run `make setup PYTHON=python3.11`.")


def locked_versions(lock: str) -> dict[str, str]:
    """Package -> version of a requirements file with hashes, for this platform."""
    from packaging.requirements import Requirement

    found = {}
    for line in re.findall(r"^[A-Za-z0-9].*?(?= \\$|$)", lock, flags=re.MULTILINE):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            found[requirement.name] = next(iter(requirement.specifier)).version
    return found


def packages() -> Iterator[Finding]:
    missing, other = [], []
    locked = locked_versions(LOCK.read_text())
    for name, wanted in locked.items():
        try:
            if version(name) != wanted:
                other.append(f"{name} {version(name)} instead of {wanted}")
        except PackageNotFoundError:
            missing.append(name)
    good = len(locked) - len(missing) - len(other)
    if missing:
        yield Finding("packages", "missing", f"not installed: {', '.join(missing)}", "make setup")
    if other:
        yield Finding("packages", "warning", "; ".join(other), "Results may differ; `rm -rf .venv && make setup`.")
    yield Finding("packages", "ok", f"{good} of {len(locked)} as locked")


def engine() -> Iterator[Finding]:
    """PyTorch, its device, and Transformer Engine, which helps on a GPU and harms without one."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
    yield Finding("torch", "ok", f"{torch.__version__} on {device}")
    if not cuda and _output("nvidia-smi", "-L"):
        yield Finding("cuda", "warning", "there is a GPU, but this PyTorch cannot use it", "rm -rf .venv && make setup")
    try:
        found = version("transformer-engine")
    except PackageNotFoundError:
        if cuda:
            yield Finding("transformer engine", "warning", "not installed: no FP8 on this GPU",
                          ".venv/bin/python -m pip install --no-build-isolation -e '.[gpu]'")
        else:
            yield Finding("transformer engine", "ok", "not needed on a CPU: FP8 is emulated")
    else:
        if cuda:
            major, minor = torch.cuda.get_device_capability()
            state: Literal["ok", "warning"] = "ok" if (major, minor) >= (8, 9) else "warning"
            yield Finding("transformer engine", state, f"{found}, compute capability {major}.{minor}",
                          "FP8 needs 8.9 or later; use variants with precision bf16.")
        else:
            yield Finding("transformer engine", "missing", f"{found} breaks megatron-core where there is no GPU",
                          ".venv/bin/python -m pip uninstall transformer-engine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core

    yield Finding("megatron-core", "ok", megatron.core.__version__)


def machine() -> Iterator[Finding]:
    import psutil

    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count()
    yield Finding("cores", "ok", str(cores))
    memory = psutil.virtual_memory().available / GIB
    yield Finding("memory", "ok" if memory >= ENOUGH_MEMORY_GIB else "warning", f"{memory:.1f} GiB available",
                  f"The default profile wants {ENOUGH_MEMORY_GIB} GiB; set runtime.slots and runtime.workers to 1.")
    disk = shutil.disk_usage(".").free / GIB
    state: Literal["ok", "warning", "missing"] = (
        "ok" if disk >= ENOUGH_DISK_GIB else "warning" if disk >= LEAST_DISK_GIB else "missing"
    )
    yield Finding("disk", state, f"{disk:.1f} GiB free", "Free some space; `dvc gc --workspace` drops old results.")


def prefect() -> Iterator[Finding]:
    """Importing the server shows what its version number hides: a FastAPI it cannot work with."""
    import prefect.server.api.server

    yield Finding("prefect", "ok", f"{prefect.__version__}, at home in {os.environ['PREFECT_HOME']}")


def pages() -> Iterator[Finding]:
    from flows import server

    if url := server.running():
        yield Finding("pages", "ok", f"served at {url}")
        return
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", server.PORT)) == 0
    yield Finding("pages", "warning" if taken else "ok", f"port {server.PORT} is {'in use' if taken else 'free'}",
                  f"make ui PORT={server.PORT + 1}")


def repository() -> Iterator[Finding]:
    """git, params.yaml, the graph and its state."""
    from flows import dvc_graph
    from stages.frame.params import load_params

    dvc_graph.allow_no_git()
    yield Finding("git", "ok", _output("git", "log", "-1", "--format=%h %s") or "none: provenance records no commit")
    params = load_params()
    yield Finding("params.yaml", "ok", f"profile {params.profile}")
    holders = dvc_graph.busy()
    if flow := dvc_graph.holder_of(dvc_graph.FLOW_LOCK):
        yield Finding("locks", "warning", f"a flow is running (process {flow})", "Wait for it, or stop it.")
    if holders:
        yield Finding("locks", "warning", f"stages are running: processes {sorted(holders)}", "They end by themselves.")
    else:
        for line in dvc_graph.mend(params.runtime.verify_bytes):
            yield Finding("outputs", "warning", line, "Mended; `make reproduce` does the rest.")
        nodes = dvc_graph.graph()
        dvc_graph.look()
        stale = dvc_graph.stale(nodes)
        yield Finding("stages", "ok", f"{len(nodes)}, of which {len(nodes) - len(stale)} up to date")


def _output(*command: str) -> str:
    """What a command printed; empty when it failed, hangs or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


CHECKS: list[Callable[[], Iterator[Finding]]] = [python, packages, engine, prefect, machine, repository, pages]


def examine() -> Iterator[Finding]:
    """Every check; one that breaks is a finding too."""
    for check in CHECKS:
        try:
            yield from check()
        except ImportError as error:
            yield Finding(check.__name__, "missing", f"{type(error).__name__}: {error}", "make setup")
        except (Exception, SystemExit) as error:
            what, _, cure = str(error).partition("\n")
            yield Finding(check.__name__, "missing", what or type(error).__name__, cure or "Mend what it names.")


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m flows.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    worst = "ok"
    for finding in examine():
        print(f"{finding.state:<8} {finding.name:<20} {finding.detail}", flush=True)
        if finding.state != "ok":
            print(f"{'':<30}-> {finding.cure}")
            worst = "missing" if "missing" in (worst, finding.state) else "warning"
    print({"ok": "All there.", "warning": "It will work.", "missing": "`make reproduce` cannot work yet."}[worst])
    sys.exit(worst == "missing")


if __name__ == "__main__":
    main()
