"""Outputs that are damaged, in the repository DVC keeps: what a stage, a flow and plain `dvc repro` make of them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import dvc_graph
from flows.dvc_graph import StageRunner
from stages.frame import outputs
from stages.frame.common import Stage, StageError
from stages.frame.params import load_params
from tests import forked

ROOT = Path(__file__).resolve().parents[2]
STAGES = """
stages:
  tokenize:
    cmd: mkdir -p data/cpu/tokens && echo one > data/cpu/tokens/a.bin && echo two > data/cpu/tokens/b.bin
    params: [seed]
    outs: [data/cpu/tokens]
  evaluate:
    cmd: mkdir -p runs/cpu/evaluate/x && cat data/cpu/tokens/* > runs/cpu/evaluate/x/metrics.json
    deps: [data/cpu/tokens]
    outs: [runs/cpu/evaluate/x/metrics.json]
"""
FILES = {"data/cpu/tokens/a.bin": b"one\n", "data/cpu/tokens/b.bin": b"two\n",
         "runs/cpu/evaluate/x/metrics.json": b"one\ntwo\n"}
RECORD = Path("runs/cpu/evaluate/x/metrics.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    (directory / ".dvc").mkdir()
    (directory / ".dvc/config").write_text((ROOT / ".dvc/config").read_text())
    (directory / "dvc.yaml").write_text(STAGES)
    (directory / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        dvc_graph.allow_no_git()
        forked.dvc("repro")
    return directory


@pytest.fixture
def repository(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    subprocess.run(["cp", "-a", f"{finished}/.", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dvc_graph, "SECONDS_TO_GATHER", 0)          # one stage after the other
    monkeypatch.setattr(dvc_graph, "dvc", forked.dvc)
    outputs._cache.cache_clear()
    return tmp_path


def copy_of(content: bytes) -> Path:
    digest = hashlib.md5(content).hexdigest()
    return Path(".dvc/cache/files/md5", digest[:2], digest[2:])


def damage(path: Path) -> None:
    """Another byte, and the times that were: as a disk forgets."""
    times = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    path.chmod(times.st_mode)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def good() -> bool:
    whole = all(Path(name).read_bytes() == content for name, content in FILES.items())
    return whole and outputs.verify(outputs.recorded(), 1e9) == []


graph = functools.cache(dvc_graph.graph)         # that of one test's repository is that of every other


def mend() -> list[str]:
    """What the flow does: look at everything, then run what DVC finds changed. Outcomes."""
    outputs.verify(outputs.recorded(), 1e9)
    nodes = graph()
    stale = dvc_graph.stale(nodes)
    runner = StageRunner(1, 5)
    return [runner.run(node, lambda: None, lambda line: None) for name, node in nodes.items() if name in stale]


def test_half_a_lock_names_what_it_holds(repository: Path) -> None:
    whole, text = {output.path for output in outputs.recorded()}, outputs.LOCK.read_bytes()
    for end in range(0, len(text), 3):
        for content in (text[:end], text[:end] + b"\xff" + text[end + 1 :]):
            outputs.LOCK.write_bytes(content)
            assert {output.path for output in outputs.recorded()} <= whole


def test_a_finished_run_is_right(repository: Path) -> None:
    assert {str(output.path) for output in outputs.recorded()} == {"data/cpu/tokens", str(RECORD)}
    assert good() and dvc_graph.stale(graph()) == set()


def test_an_edited_record_is_put_back_and_leaves_the_cache_alone(repository: Path) -> None:
    with RECORD.open("r+") as file:         # in place, through whatever link there is
        file.write("0.123")
    assert copy_of(FILES[str(RECORD)]).read_bytes() == FILES[str(RECORD)]
    assert mend() == ["restored"] and good()


@pytest.mark.parametrize("which", ["output", "copy", "both"])
def test_a_flipped_bit_is_found_whatever_the_times_say(repository: Path, which: str) -> None:
    name = "data/cpu/tokens/b.bin"
    if which != "copy":
        damage(Path(name))
    if which != "output":
        damage(copy_of(FILES[name]))
    outcomes = mend()
    assert good() and outcomes[:1] == {"output": ["restored"], "copy": [], "both": ["ran"]}[which]


def test_a_damaged_copy_is_not_restored(repository: Path) -> None:
    damage(copy_of(FILES[str(RECORD)]))
    RECORD.unlink()
    assert mend() == ["ran"] and good()


def test_a_damaged_copy_is_not_restored_where_the_lock_lost_a_stage(repository: Path) -> None:
    """A dvc.lock that ends between two stages is whole: of the others DVC would commit whatever its cache holds."""
    tokens = Path("data/cpu/tokens/a.bin")
    copy = outputs._copy(outputs._md5(tokens))
    copy.chmod(0o644)
    copy.write_bytes(b"onf\n")
    copy.chmod(outputs.READ_ONLY)
    tokens.unlink()
    lock = yaml.safe_load(outputs.LOCK.read_text())
    del lock["stages"]["tokenize"]
    outputs.LOCK.write_text(yaml.safe_dump(lock))
    dvc_graph.mend(1e9)
    assert not copy.exists()
    forked.dvc("repro")
    assert tokens.read_bytes() == b"one\n"


def test_the_runner_makes_again_what_was_restored_from_a_damaged_copy(repository: Path) -> None:
    """Of results no longer in dvc.lock nobody has looked at the copies."""
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params.replace("\nseed: ", "\nseed: 1"))
    assert mend()[0] == "ran"
    Path("params.yaml").write_text(params)
    Path("data/cpu/tokens/a.bin").write_bytes(b"other")
    copy = copy_of(FILES["data/cpu/tokens/a.bin"])
    copy.chmod(0o644)
    copy.write_bytes(b"bad\n")
    copy.chmod(0o444)
    runner = StageRunner(1, 5)
    lines: list[str] = []
    assert runner.run(graph()["tokenize"], lambda: None, lines.append) == "ran"
    assert any(line.startswith("data/cpu/tokens/a.bin: not the file that stage tokenize wrote") for line in lines)
    assert good()


@pytest.mark.parametrize("harm", [lambda listing: listing.unlink(), damage])
def test_a_directorys_listing_is_made_anew_from_whole_files(repository: Path, harm) -> None:
    [output] = [output for output in outputs.recorded() if output.md5.endswith(".dir")]
    listing = outputs._copy(output.md5)
    whole = listing.read_bytes()
    harm(listing)
    assert good() and listing.read_bytes() == whole
    harm(listing)
    damage(Path("data/cpu/tokens/b.bin"))
    assert mend()[0] == "ran" and good()


def test_a_stage_refuses_a_damaged_input_and_the_cure_it_names_works(repository: Path) -> None:
    damage(Path("data/cpu/tokens/a.bin"))
    damage(copy_of(b"one\n"))
    stage = Stage("pretrain", load_params(), "hybrid-fp8", None, ("pretrain",))
    with pytest.raises(StageError, match=r"^data/cpu/tokens/a\.bin: .*\n.*`dvc repro tokenize` ") as error:
        stage.input("tokens")
    assert str(error.value).count("\n") == 1
    forked.dvc("repro", "tokenize")
    stage.input("tokens")
    damage(RECORD)
    with pytest.raises(StageError, match="stage evaluate"):
        stage.verify(Path("runs/cpu"))


@pytest.mark.parametrize("harm", [lambda tokens: (tokens / "b.bin").unlink(),
                                  lambda tokens: (tokens / "c.bin").write_bytes(b"three")])
def test_a_stage_refuses_a_directory_that_lacks_a_file_or_has_one_more(repository: Path, harm) -> None:
    harm(Path("data/cpu/tokens"))
    stage = Stage("pretrain", load_params(), "hybrid-fp8", None, ("pretrain",))
    with pytest.raises(StageError, match=r"tokens/(b\.bin: gone|c\.bin: not the file).*\n`dvc repro tokenize`"):
        stage.input("tokens")
    forked.dvc("repro", "tokenize")
    stage.input("tokens")
    assert good()


def test_files_beyond_the_setting_are_taken_for_right(repository: Path) -> None:
    damage(RECORD)
    assert outputs.verify(outputs.recorded(), len(FILES[str(RECORD)]) - 1) == []
    assert len(outputs.verify(outputs.recorded(), len(FILES[str(RECORD)]))) == 1


def test_without_a_lock_all_copies_are_looked_at(repository: Path) -> None:
    outputs.LOCK.unlink()
    damage(copy_of(b"one\n"))
    RECORD.unlink()
    copies = set(Path(".dvc/cache/files").rglob("*"))
    dvc_graph.mend(1e9)
    assert copies - set(Path(".dvc/cache/files").rglob("*")) == {copy_of(b"one\n")}
    forked.dvc("repro")
    assert good()


def test_half_an_entry_of_the_run_cache_is_dropped(repository: Path) -> None:
    entries = sorted(Path(".dvc/cache/runs").glob("*/*/*"))
    outputs.drop_damaged_runs()
    assert len(entries) == 2 and all(entry.exists() for entry in entries)
    text = entries[0].read_text()
    for damage in ("", text[: text.index("outs:")], text.replace("cmd", "cmb"), text.replace("size: ", "size: x"), "["):
        entries[0].parent.mkdir(exist_ok=True)
        entries[0].write_text(damage)
        outputs.drop_damaged_runs()
        assert entries[0].exists() is ("size: x" in damage) and entries[1].exists()


def test_an_empty_directory_of_the_run_cache_is_dropped(repository: Path) -> None:
    """DVC looks for the newest entry in it, finds none, and the stage fails with `join() argument must be str`."""
    entry = next(Path(".dvc/cache/runs").glob("*/*/*"))
    entry.unlink()
    outputs.drop_damaged_runs()
    assert not entry.parent.exists() and len(list(Path(".dvc/cache/runs").glob("*/*/*"))) == 1


def test_a_lock_that_is_being_written_is_looked_at_again(repository: Path) -> None:
    lock = outputs.LOCK.read_text()
    last = json.dumps(lock)[1:-1]
    digest = next(output.md5 for output in outputs.recorded() if output.path == RECORD)
    outputs.LOCK.write_text(lock[: lock.index(digest) + 20])      # half a hash
    later = f"import time; time.sleep(0.7); open('dvc.lock', 'w').write(\"{last}\")"
    writing = subprocess.Popen([sys.executable, "-S", "-c", later])
    assert outputs.damaged(RECORD, 1e9) == []
    writing.wait()


def test_damage_is_seen_while_the_lock_does_not_name_the_output_yet(repository: Path) -> None:
    damage(RECORD)
    lock = outputs.LOCK.read_text()
    outputs.LOCK.write_text("")
    later = f"import time; time.sleep(0.3); open('dvc.lock', 'w').write(\"{json.dumps(lock)[1:-1]}\")"
    writing = subprocess.Popen([sys.executable, "-S", "-c", later])
    assert [found.path for found in outputs.damaged(RECORD, 1e9)] == [RECORD]
    writing.wait()
