"""Faults injected into the smoke profile, each followed by the same command: is the result that of an undisturbed run?

    python -m tests.chaos [--faults 200] [--seed 1] [--minutes 30] [--archive DIR] [--page FILE] [--aim PLACE] [--plain]

A round damages files of a finished run, removes an output of a stage that keeps something to go on from, and starts
`python -m flows.reproduce`. It kills that as soon as there is such a state or piece, damages it, starts the command
again, kills what that started or cuts what it writes, and gives the same command until it ends well. Then every result
must be that of the undisturbed run, byte for byte, every output and DVC's copy of it the one in dvc.lock, and no
process may be left.

With `--filesystem MB` the archive lies in a tmpfs of that size (which takes root), and some strikes fill it to the last
byte until the command has ended.

A fault is *survived* then; *refused* where the command does not end well but says what to do; *wrong* otherwise. A
command that does not end is wrong too, by the processor time it took or did not take, not by the clock: another program
may have the processors. The archive (made where DIR has none) is put back after a round that is not survived.
`--aim` strikes one kind of what stages go on from, each time as some of it is written. `--plain` gives another command,
`python -m flows.mend && dvc repro`, which is several times quicker. Exits 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from flows.dvc_graph import DVC, ENVIRONMENT
from stages.frame import outputs
from stages.frame.common import DEPENDS
from tests.archive import COMMAND, command_environment, reproduce, results, unpack

AT_REST = 30                    # faults a round, before the command
ATTEMPTS = 5                    # at the same command; the first may be disturbed
KILLED_MAY_LEAVE = 120.0        # seconds until processes that end by themselves have, on a busy machine too
CPU_SECONDS = 2000.0            # that a command may take, the server apart
IDLE_SECONDS, SOME_CPU_SECONDS = 600.0, 12.0        # of those, a command that does not hang takes so many in that time
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
BALLAST = "ballast"             # what fills a disk
PLACES: dict[str, tuple[str, ...]] = {          # where a file can be damaged: patterns below the archive
    "data": ("data/**/*",),
    "record": ("runs/**/*",),
    "report": ("reports/**/*",),
    "cache": (".dvc/cache/files/**/*",),
    "run cache": (".dvc/cache/runs/**/*",),
    "dvc.lock": ("dvc.lock",),
    "copy of dvc.lock": (".dvc/tmp/dvc.lock.whole",),
    "rwlock": (".dvc/tmp/rwlock",),
}
KEEPS = {"resume state": ("pretrain", "compress", "evaluate"), "scratch piece": ("annotate", "curate", "tokenize")}
SCRATCH: dict[str, tuple[str, ...]] = {         # the same, of what these stages go on from
    "resume state": (".scratch/pretrain-*/resume/**/*", ".scratch/compress-*/*.pt", ".scratch/evaluate-*/*.json"),
    "training's files": (".scratch/pretrain-*/*.csv", ".scratch/pretrain-*/index/*"),
    "scratch piece": tuple(f".scratch/{stage}-*/**/*" for stage in KEEPS["scratch piece"]),
}
ROLES: dict[str, Callable[[str], bool]] = {
    "stage": lambda command: "-m stages." in command and "/bin/sh" not in command,
    "DVC": lambda command: "-m dvc" in command,
    "shell": lambda command: command.startswith("/bin/sh -c"),
    "worker": lambda command: "multiprocessing" in command,
    "server": lambda command: "uvicorn" in command or "prefect server" in command,
    "flow": lambda command: "-m flows." in command and "/bin/sh" not in command,
    "all": lambda command: True,
}
WEIGHTS = (4, 4, 2, 2, 1, 2, 4)         # how often each is the victim


class Fault(NamedTuple):
    kind: str
    detail: str


def flip(path: Path, random_: random.Random) -> str:
    """One bit, the times kept: as a disk forgets."""
    content, status = bytearray(path.read_bytes()), path.stat()
    place, bit = random_.randrange(len(content)), random_.randrange(8)
    content[place] ^= 1 << bit
    write_over(path, bytes(content), status)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return f"bit {bit} of byte {place}"


def cut(path: Path, random_: random.Random) -> str:
    place = random_.randrange(path.stat().st_size)
    write_over(path, path.read_bytes()[:place], path.stat())
    return f"cut at {place}"


def edit(path: Path, random_: random.Random) -> str:
    """Another digit, in place, as with an editor."""
    content = path.read_bytes()
    digits = [match.start() for match in re.finditer(rb"[0-9]", content)] or [0]
    place = random_.choice(digits)
    write_over(path, content[:place] + b"7" + content[place + 1 :] + b" ", path.stat())
    return f"edited at {place}"


def remove(path: Path, random_: random.Random) -> str:
    path.unlink()
    return "removed"


HARMS = {"bit flipped": flip, "cut": cut, "edited": edit, "removed": remove}


def write_over(path: Path, content: bytes, status: os.stat_result) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    path.chmod(status.st_mode)


def files(archive: Path, place: str) -> list[Path]:
    found = []
    with contextlib.suppress(FileNotFoundError):            # a stage removes it meanwhile
        for path in (path for pattern in (PLACES | SCRATCH)[place] for path in archive.glob(pattern)):
            if path.is_file() and path.stat().st_size and path.name not in (".gitignore", DEPENDS):
                found.append(path)
    return sorted(found)


def damage(archive: Path, random_: random.Random, place: str) -> Fault | None:
    """One file of `place`, in one way; nothing where there is none."""
    there = files(archive, place)
    if not there:
        return None
    path, harm = random_.choice(there), random_.choice(list(HARMS))
    how = HARMS[harm](path, random_)
    return Fault(f"{place}: {harm}", f"{path.relative_to(archive)} {how}")


def forget(archive: Path, random_: random.Random, place: str) -> Fault | None:
    """An output and DVC's copies of it are gone: its stage, one that keeps something in `place`, must run again."""
    with contextlib.chdir(archive):
        outputs._cache.cache_clear()
        stages = sorted({output.stage for output in outputs.recorded()
                         if output.stage.partition("@")[0] in KEEPS[place]})
        stage = random_.choice(stages or [""])
        output = random_.choice(outputs.of_stage(stage) if stage else [None])
        if output is None:
            return None
        for path in (output.path, outputs._copy(output.md5)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return Fault("output and its copy removed", str(output.path))


def processes(archive: Path) -> list[psutil.Process]:
    """Those that work in the archive, or below one that does."""
    found = {}
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] and Path(process.info["cwd"]).is_relative_to(archive):
            found[process.pid] = process
            with contextlib.suppress(psutil.Error):
                found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


def of_role(archive: Path, role: str) -> list[psutil.Process]:
    found = []
    for process in processes(archive):
        with contextlib.suppress(psutil.Error):
            if ROLES[role](" ".join(process.cmdline())):
                found.append(process)
    return found


def outlast(archive: Path, command: subprocess.Popen[bytes]) -> str:
    """Wait for the command to end, however long; or say why it never will."""
    spent: dict[int, float] = {}            # processor seconds by process; the server polls, and is no sign of life
    before, since = 0.0, time.monotonic()
    while command.poll() is None:
        for process in processes(archive):
            with contextlib.suppress(psutil.Error):
                if not ROLES["server"](" ".join(process.cmdline())):
                    spent[process.pid] = sum(process.cpu_times()[:2])
        total = sum(spent.values())
        if total > CPU_SECONDS:
            return f"the command did not end in {CPU_SECONDS:.0f} seconds of processor time"
        if total > before + SOME_CPU_SECONDS:
            before, since = total, time.monotonic()
        if time.monotonic() > since + IDLE_SECONDS:
            return f"the command hung: hardly any processor time in {IDLE_SECONDS:.0f} seconds"
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(1)
    return ""


def moments(archive: Path, random_: random.Random, aim: str | None) -> tuple[str, Callable[[], bool]]:
    """When to strike, in words and as a question asked often: at a time, or aimed at a write."""
    at, sizes = time.monotonic() + random_.uniform(2, 45), {}
    if aim:
        known, left = dict[Path, int](), random_.randint(1, 9)

        def is_written() -> bool:
            """Another file of it is there, or one has grown: the so many'th time."""
            nonlocal known, left
            with contextlib.suppress(FileNotFoundError):
                now = {path: path.stat().st_size for path in files(archive, aim)}
                left -= any(known.get(path) != size for path, size in now.items())
                known = now
            return left <= 0

        return f"as a {aim} is written", is_written

    def shrinks(path: Path) -> bool:
        """Just now: it is written in place."""
        size = path.stat().st_size if path.exists() else 0
        before, sizes[path] = sizes.get(path, size), size
        return size < before

    choices: dict[str, Callable[[], bool]] = {
        "at any time": lambda: time.monotonic() > at,
        "as dvc.lock is written": lambda: shrinks(archive / "dvc.lock"),
        "as the rwlock is written": lambda: shrinks(archive / ".dvc/tmp/rwlock"),
        "as a stage runs": lambda: bool(of_role(archive, "stage")),
        "once there is something to go on from": lambda: any(files(archive, place) for place in SCRATCH),
    }
    name = random_.choice(list(choices))
    return name, choices[name]


def strike(
    archive: Path, random_: random.Random, command: subprocess.Popen[bytes], aim: str | None = None
) -> Fault | None:
    """Wait for a moment and kill, or let no file of DVC and its stage grow beyond some size, or fill a disk of its own;
    None if the moment never came."""
    when, now = moments(archive, random_, aim)
    if archive.parent.is_mount() and (aim or random_.random() < 0.6):
        while command.poll() is None:
            if now():
                fill(archive.parent / BALLAST)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.wait(60)
                return Fault("disk filled", when)
            time.sleep(0.003)
        return None
    [role], number = random_.choices(list(ROLES), WEIGHTS), random_.choice(SIGNALS)
    limit = int(2 ** random_.uniform(9, 18)) if random_.random() < 0.2 else None
    if limit:
        when, now = "as DVC runs", lambda: bool(of_role(archive, "DVC"))
    while command.poll() is None:
        if now():
            victims = of_role(archive, "DVC" if limit else role)
            for process in victims:
                with contextlib.suppress(psutil.Error, OSError):
                    if limit:
                        process.rlimit(resource.RLIMIT_FSIZE, (limit, limit))
                    else:
                        process.send_signal(number)
            if victims and limit:
                return Fault("writes cut", f"at {limit} bytes, {when}")
            if victims:
                return Fault(f"{signal.Signals(number).name} of {role}", when)
        time.sleep(0.003)
    return None


def spoil(archive: Path, random_: random.Random, command: subprocess.Popen[bytes], aim: str) -> list[Fault]:
    """Kill everything, in whatever way, soon after a stage keeps something in the place `aim`, and damage what there is
    to go on from; nothing where none ever does."""
    while command.poll() is None:
        if files(archive, aim):
            time.sleep(random_.choice((0, 0.1, 0.5, 1, 2)))        # a few seconds later it is gone
            number, victims = random_.choice(SIGNALS), processes(archive)
            for process in victims:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                command.wait(60)
            _, alive = psutil.wait_procs([process for process in victims if process.pid != command.pid], 60)
            found = [] if alive or command.poll() is None else [
                damage(archive, random_, place) for place in SCRATCH for _ in range(random_.choice((1, 2, 3)))]
            return [Fault(f"{number.name} of all", f"once there is a {aim}"), *filter(None, found)]
        time.sleep(0.003)
    return []


def fill(ballast: Path) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))


PLAIN = ["/bin/sh", "-c", f"{sys.executable} -m flows.mend && {' '.join(DVC)} repro"]


def run(archive: Path, log: Path, command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=archive, env=command_environment(archive) | ENVIRONMENT,
                            stdin=subprocess.DEVNULL, stdout=log.open("wb"), stderr=subprocess.STDOUT,
                            start_new_session=True, preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))


class Round(NamedTuple):
    faults: list[Fault]
    verdict: str                # survived, refused or wrong
    because: str
    seconds: float


def one_round(
    archive: Path, expected: dict[str, object], random_: random.Random, command_line: list[str],
    aim: str | None = None,
) -> Round:
    started, log = time.monotonic(), archive / "chaos.log"
    place = aim or random_.choice(list(KEEPS))
    chosen = [forget(archive, random_, place)]
    chosen += [damage(archive, random_, random_.choice(list(PLACES))) for _ in range(AT_REST)]
    faults = [fault for fault in chosen if fault]
    status, said = -1, ""
    for attempt in range(ATTEMPTS):
        command = run(archive, log, command_line)
        if attempt == 0:
            faults += spoil(archive, random_, command, place)
        elif attempt == 1 and (aim or random_.random() < 0.7) and (fault := strike(archive, random_, command, aim)):
            faults.append(fault)
        if (archive.parent / BALLAST).exists() and command.poll() is None:
            os.killpg(command.pid, signal.SIGTERM)          # it waits for room
        (archive.parent / BALLAST).unlink(missing_ok=True)
        if because := outlast(archive, command):
            os.killpg(command.pid, signal.SIGKILL)
            return Round(faults, "wrong", because, time.monotonic() - started)
        status, said = command.returncode, log.read_text(errors="replace")
        if status == 0:
            break
    return Round(faults, *verdict(archive, expected, status, said), time.monotonic() - started)


def verdict(archive: Path, expected: dict[str, object], status: int, said: str) -> tuple[str, str]:
    end = " / ".join(said.strip().splitlines()[-3:])[:300]
    if status:
        plain = "Traceback" not in said and re.search(r"`(make|dvc) |[Rr]un |[Ff]ree ", end)
        return ("refused" if plain else "wrong"), f"status {status}: {end}"
    found = results(archive)
    if differ := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        return "wrong", f"other results: {', '.join(differ[:5])}"
    with contextlib.chdir(archive):
        outputs._cache.cache_clear()
        if bad := outputs.verify(outputs.recorded(), float("inf")):
            return "wrong", str(bad[0])
    deadline = time.monotonic() + KILLED_MAY_LEAVE
    while (left := processes(archive)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if left:
        return "wrong", f"processes left: {' '.join(left[0].cmdline())[:200]}"
    return "survived", ""


def chaos(
    archive: Path, pristine: Path, seed: int, wanted: int, seconds: float, command: list[str] = COMMAND,
    aim: str | None = None,
) -> Iterator[Round]:
    """Rounds until so many faults, or so much time."""
    expected, started, done, number = results(archive), time.monotonic(), 0, seed
    while done < wanted and time.monotonic() - started < seconds:
        print(f"seed {number}:", end=" ", flush=True)
        outcome = one_round(archive, expected, random.Random(number), command, aim)
        print(outcome.verdict, f"{len(outcome.faults)} faults in {outcome.seconds:.0f} s {outcome.because}", flush=True)
        for fault in outcome.faults:
            print(f"    {fault.kind}: {fault.detail}", flush=True)
        yield outcome
        done, number = done + len(outcome.faults), number + 1
        if outcome.verdict != "survived":
            for process in processes(archive):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            place = Path(tempfile.gettempdir()) if archive.parent.is_mount() else archive.parent
            keep(archive, place / f"{archive.name}-seed-{number - 1}")
            keep(pristine, archive)


def keep(source: Path, target: Path) -> None:
    """Copy a whole archive, times too."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-a", source, target], check=True)


def page(rounds: list[Round], seed: int) -> str:
    """The counts as Markdown."""
    counts: dict[str, Counter[str]] = {}
    for outcome in rounds:
        for fault in outcome.faults:
            counts.setdefault(fault.kind, Counter())[outcome.verdict] += 1
    names = ("survived", "refused", "wrong")
    total = Counter(outcome.verdict for outcome in rounds for _ in outcome.faults)
    lines = [f"| {kind} | " + " | ".join(str(counts[kind][name]) for name in names) + " |" for kind in sorted(counts)]
    bad = [f"- seed {seed + number}: {outcome.verdict}, {outcome.because}; " + "; ".join(map(" ".join, outcome.faults))
           for number, outcome in enumerate(rounds) if outcome.verdict != "survived"]
    return "\n".join([
        "| fault | survived | refused with a cure | wrong |", "| --- | ---: | ---: | ---: |", *lines,
        "| **all** | " + " | ".join(f"**{total[name]}**" for name in names) + " |", "",
        f"{len(rounds)} rounds, seeds {seed} to {seed + len(rounds) - 1}, "
        f"{sum(outcome.seconds for outcome in rounds) / 60:.0f} minutes.", *bad, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--archive", type=Path, help="a finished run to damage, made if absent (default: temporary)")
    parser.add_argument("--page", type=Path, help="where the table goes too")
    parser.add_argument("--filesystem", type=int, metavar="MB", help="a disk of its own, that fills")
    parser.add_argument("--aim", choices=list(KEEPS), help="strike as some of this is written")
    parser.add_argument("--plain", action="store_true", help="by DVC alone, as `make repro-plain`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as ended:
        made = (options.archive or Path(temporary, "archive")).resolve()
        if not made.exists():
            made.mkdir(parents=True)
            reproduce(unpack(made), "--profile", "smoke")
        pristine, archive = Path(temporary, "pristine"), made
        keep(made, pristine)
        if options.filesystem:
            archive = Path(temporary, "disk", "archive")
            archive.parent.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={options.filesystem}m", "chaos", archive.parent],
                           check=True)
            ended.callback(subprocess.run, ["umount", "--lazy", archive.parent], check=True)
            keep(made, archive)
        rounds: list[Round] = []
        try:
            for outcome in chaos(archive, pristine, options.seed, options.faults, 60 * options.minutes,
                                 PLAIN if options.plain else COMMAND, options.aim):
                rounds.append(outcome)
        finally:
            table = page(rounds, options.seed)
            print(table)
            if options.page:
                options.page.write_text(table)
    sys.exit(any(outcome.verdict == "wrong" for outcome in rounds))


if __name__ == "__main__":
    main()
