"""What surrounds a run: locale, proxies, user names, outer repositories, full disks, servers that are gone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from flows import dvc_graph, server
from flows.console import Console
from flows.dvc_graph import GraphError
from tests.namespaces import MOUNTS, ORDINARY, unshare

ROOT = Path(__file__).resolve().parents[2]
STAGE = """
import getpass, pathlib
from stages.frame.common import run_stage

def toy(stage):
    pathlib.Path("café.txt").write_text("naïve")
    print("café", getpass.getuser(), pathlib.Path.home())
    return {}

run_stage(toy, "A stage.", ())
"""


def run_toy(*before: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    Path("toy.py").write_text(STAGE, encoding="utf-8")
    kept = {key: value for key, value in os.environ.items() if key not in ("USER", "LOGNAME", "HOME", "PYTHONUTF8")}
    return subprocess.run([*before, sys.executable, "toy.py", "--out", "."], capture_output=True,
                          env=kept | {"PYTHONPATH": str(ROOT)} | environment)


def test_files_and_output_are_utf8_whatever_the_locale(repository: Path) -> None:
    done = run_toy(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert "café".encode() in done.stdout
    assert (repository / "café.txt").read_bytes() == "naïve".encode()


def test_a_user_without_a_name_runs_stages(repository: Path) -> None:
    done = run_toy(*unshare(*ORDINARY))
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip().split(" ", 2)[1:] == ["54321", str(repository / ".cache")]


@pytest.mark.parametrize(("name", "value", "others"), [
    ("HTTP_PROXY", None, "http"), ("http_proxy", None, "socks5"), ("NO_PROXY", "corp.example", "http"),
    ("no_proxy", "corp.example", "socks5"), ("no_proxy", "*", "http"), ("no_proxy", "", "http"),
])
def test_no_proxy_is_asked_for_this_machine(name: str, value: str | None, others: str) -> None:
    proxy = "http://192.0.2.1:9"
    environment = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "HTTP_PROXY": proxy,
                   "ALL_PROXY": f"{others}://192.0.2.1:9"}
    environment |= {name: proxy if value is None else value}
    program = ("import flows.dvc_graph as graph, httpx, os, urllib.request as asked\n"
               "assert (os.environ | graph.ENVIRONMENT)['ALL_PROXY'].endswith('://192.0.2.1:9')\n"
               "print([bool(asked.proxy_bypass(host)) for host in ('127.0.0.1', 'localhost', 'corp.example', 'a.b')])\n"
               "print(type(httpx.Client()._transport_for_url(httpx.URL('http://127.0.0.1:1'))._pool).__name__)")
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    bypassed, pool = done.stdout.splitlines()
    theirs = value in ("corp.example", "*")
    assert bypassed == str([True, True, theirs, value == "*"]) and pool == "ConnectionPool"


@pytest.fixture
def inside(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository unpacked in a folder that an outer one ignores."""
    here = repository / "outer/build/unpacked"
    shutil.copytree(repository, here, ignore=shutil.ignore_patterns("outer"))
    subprocess.run(["git", "init", "-q", repository / "outer"], check=True)
    (repository / "outer/.gitignore").write_text("build/\n")
    monkeypatch.chdir(here)
    return here


def test_a_folder_that_an_outer_repository_ignores_is_one_without_git(inside: Path) -> None:
    dvc_graph.allow_no_git()
    assert len(dvc_graph.graph()) == 4


def test_a_graph_that_git_hides_is_not_an_empty_one(inside: Path) -> None:
    (inside / ".dvc/config.local").touch()
    dvc_graph.allow_no_git()
    with pytest.raises(GraphError, match=r"ignores this folder\.\n`rm \.dvc/config\.local`"):
        dvc_graph.graph()


@pytest.mark.parametrize("name", ["logs", ".scratch", ".dvc/tmp", ".prefect"])
def test_what_cannot_be_written_is_named_before_anything_starts(
    name: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvc_graph, "PREFECT_HOME", Path(".prefect"))
    dvc_graph.check_places()
    shutil.rmtree(name)
    Path(name).touch()
    with pytest.raises(GraphError, match=rf"^{name}: cannot be written \(File exists\)\.\nMake it a directory"):
        dvc_graph.check_places()


def test_a_full_disk_is_named_before_anything_starts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_graph, "PREFECT_HOME", Path(".prefect"))
    monkeypatch.setattr(dvc_graph, "BYTES_TO_START", shutil.disk_usage(repository).total)
    with pytest.raises(GraphError, match=r"^\.prefect: cannot be written \(No space left on device\)\.\nFree some"):
        dvc_graph.check_places()


@pytest.mark.parametrize("name", ["logs", ".scratch", ".dvc/tmp", ".prefect"])
def test_directories_that_may_not_be_written_are_named_and_their_files_left(
    name: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an archive is unpacked, or another user leaves a checkout: for root they are as others."""
    monkeypatch.setattr(dvc_graph, "PREFECT_HOME", Path(".prefect"))
    dvc_graph.check_places()
    Path(name, "kept").write_text("kept")
    Path(name).chmod(0o555)
    program = ("from pathlib import Path\nfrom flows import dvc_graph\ndvc_graph.PREFECT_HOME = Path('.prefect')\n"
               "dvc_graph.check_places()")
    done = subprocess.run([*unshare(*ORDINARY), sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-2:] == [
        f"flows.dvc_graph.GraphError: {name}: cannot be written (Permission denied).",
        "Make it a directory in which this user may write, and run the same command again; finished work is kept.",
    ]
    if os.geteuid() == 0:
        dvc_graph.check_places()
    Path(name).chmod(0o755)
    assert Path(name, "kept").read_text() == "kept"


# From the end of the first stage's work on all room is taken, that of a file which is written in place too: DVC can
# neither commit nor rewrite its locks, and the flow not log.
FILLER = """
import os, pathlib, time
while not pathlib.Path("scratch-first").exists():
    time.sleep(0.001)
while pathlib.Path("scratch-first").exists():
    time.sleep(0.001)
ballast, block = os.open("ballast", os.O_CREAT | os.O_WRONLY), bytes(2**20)       # of which is written what fits
while pathlib.Path("fill").exists():
    try:
        os.write(ballast, block)
    except OSError:
        time.sleep(0.0001)
os.unlink("ballast")
"""
ON_A_DISK = """
mount -t tmpfs -o size=24m disk "$1"
cp -a . "$1" && cd "$1" && touch fill
"$0" -c "$2" &
"$0" -m flows.reproduce; echo "status $?"
rm fill; wait; "$0" -m flows.reproduce; echo "status $?"
cat last.txt
"""


@pytest.mark.slow
def test_a_disk_that_fills_ends_the_run_and_with_room_the_same_command_goes_on(
    repository: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """All of a checkout on it: outputs, DVC's cache and locks, logs, Prefect's database."""
    (tmp_path / "disk").mkdir()
    environment["PREFECT_HOME"] = str(tmp_path / "disk/.prefect")
    command = ["sh", "-c", ON_A_DISK, sys.executable, str(tmp_path / "disk"), FILLER]
    done = subprocess.run([*unshare(*MOUNTS), *command], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    full, freed, last = re.split(r"^status (?=\d$)", done.stdout, flags=re.MULTILINE)
    assert full.splitlines()[-2].endswith("cannot be written (No space left on device)."), full
    assert full.splitlines()[-1] == "Free some space and run the same command again; finished work is kept."
    assert freed.startswith("1") and last == "0\nlastsecond-leftfirst", done.stdout
    assert re.findall(r"^(first|last) .* (?:ran|restored)", freed, flags=re.MULTILINE) == ["first", "last"]


def test_a_log_that_may_not_be_written_is_made_anew(repository: Path) -> None:
    dvc_graph.allow_no_git()
    log = repository / "logs/first.log"
    log.parent.mkdir()
    log.symlink_to("/proc/version")             # which nobody writes, root included
    node = dvc_graph.graph()["first"]
    assert dvc_graph.StageRunner(1, 5).run(node, lambda: None, lambda line: None) == "ran"
    assert "step 10/10" in log.read_text()


def test_a_record_of_runs_that_cannot_be_used_says_so(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PREFECT_HOME", repository)
    monkeypatch.setattr(server, "SECONDS_FOR_DATABASE", 0.1)
    server.check_database()
    with contextlib.closing(sqlite3.connect(repository / "prefect.db")) as database:
        database.execute("begin exclusive")
        with pytest.raises(SystemExit, match=r"prefect\.db: database is locked\.\nEnd the process that has it"):
            server.check_database()
    (repository / "prefect.db").write_bytes(b"no database" * 999)
    with pytest.raises(SystemExit, match=r"prefect\.db: file is not a database\.\n.*`rm -r"):
        server.check_database()


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make reproduce | head -1`"""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        console = Console()
        console.start("first")
        console.end("first", "ran")
        print("the table", flush=True)
