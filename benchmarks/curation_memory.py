"""Peak memory of curation for a corpus and for one four times as large: it follows the shard, not the corpus.

    python -m benchmarks.curation_memory [--megabytes 16] [--shard 4] [--workers 1]

The corpus is real text: lines of installed Python files, put together anew in a seeded order so that documents differ.
Each stage runs as a user runs it; its processes are looked at every 20 ms, and the largest sum of resident memory that
belongs to one process alone (USS) is what counts, beside what the processes hold before any text is read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS_PER_FILE = 400


def write_corpus(directory: Path, megabytes: float) -> None:
    """JSONL of about so many megabytes: documents of 40 to 200 neighbouring lines from here and there."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = sorted(path for path in root.rglob("*.py") if 4_000 < path.stat().st_size < 100_000)
    chance = random.Random(1)
    chance.shuffle(files)
    directory.mkdir(parents=True)
    written, number = 0, 0
    while written < megabytes * 1e6:
        with (directory / f"{number:05d}.jsonl").open("w") as out:
            for _ in range(DOCUMENTS_PER_FILE):
                parts = []
                for file in chance.sample(files, 3):
                    lines = file.read_text(errors="replace").splitlines(keepends=True)
                    start = chance.randrange(len(lines))
                    parts += lines[start : start + chance.randrange(15, 70)]
                text = "".join(parts)
                written += len(text.encode())
                out.write(json.dumps({"text": text}) + "\n")
                if written >= megabytes * 1e6:
                    break
        number += 1


def measure(stage: str, out: Path, settings: list[str]) -> tuple[float, float, float]:
    """Seconds, and the peaks (MiB) of the stage's main process and of its largest worker."""
    command = [sys.executable, "-m", f"stages.{stage}", "--params", str(ROOT / "params.yaml"), "--out", "."]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=out, env=environment, stdout=subprocess.DEVNULL)
    main, worker = peaks(process)
    if process.returncode:
        raise SystemExit(f"{stage} failed; it says why above.")
    return time.monotonic() - started, main, worker


def peaks(process: subprocess.Popen[Any]) -> tuple[float, float]:
    """MiB that a process, to its end, and the largest of its workers hold for themselves at most."""
    watched = psutil.Process(process.pid)
    main = worker = 0
    while process.poll() is None:
        try:
            main = max(main, watched.memory_full_info().uss)
            for child in watched.children(recursive=True):
                worker = max(worker, child.memory_full_info().uss)
        except psutil.Error:
            continue
        time.sleep(0.02)
    return main / 2**20, worker / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curation_memory", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--megabytes", type=float, default=16, help="the smaller corpus; the other is 4 times as large")
    parser.add_argument("--shard", type=float, default=4, help="megabytes of text in a shard")
    parser.add_argument("--workers", type=int, default=2, help="processes; 1 works in the main process")
    options = parser.parse_args()
    print(f"{'corpus':>8} {'shard':>8} {'stage':<9} {'seconds':>8} {'main MiB':>9} {'worker MiB':>10}")
    for times in (1, 4):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            write_corpus(directory / "corpus", times * options.megabytes)
            source = {"kind": "files", "paths": [str(directory / "corpus")], "domain": "code"}
            settings = [
                f"annotate.sources={json.dumps([source])}", f"annotate.shard_megabytes={options.shard}",
                "annotate.held_out={fraction: 0.01, unit: document}", "annotate.substring.domains=[code]",
                f"runtime.workers={options.workers}",
            ]
            for stage in ("annotate", "curate"):
                seconds, main_peak, worker_peak = measure(stage, directory, settings)
                print(f"{times * options.megabytes:>6g} MB {options.shard:>5g} MB {stage:<9} {seconds:>8.1f} "
                      f"{main_peak:>9.0f} {worker_peak:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
