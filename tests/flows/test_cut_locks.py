"""DVC rewrites its lock files in place: whatever a kill leaves of them, the next command goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from flows import dvc_graph, mend

WHOLE = "schema: '2.0'\nstages:\n" + "".join(f"""\
  {name}:
    cmd: echo {name}
    deps:
    - path: in-{name}
      hash: md5
      md5: a{number:031x}
      size: {number}
    outs:
    - path: out-{name}
      hash: md5
      md5: b{number:031x}.dir
      size: 1
""" for number, name in enumerate(("annotate", "pretrain@hybrid", "report"), start=1))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path(".dvc/tmp").mkdir(parents=True)
    return tmp_path


def test_asking_how_to_mend_mends_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_graph, "allow_no_git", lambda: pytest.fail("it began"))
    for argument in ("--help", "pretrain"):
        monkeypatch.setattr(sys, "argv", ["mend", argument])
        with pytest.raises(SystemExit):
            mend.main()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(WHOLE) - 1), kept=st.booleans())
@example(cut=13, kept=False)                    # between the schema and the stages: valid, and of no stage
def test_a_lock_cut_anywhere_can_be_read_again(here: Path, cut: int, kept: bool) -> None:
    dvc_graph.LOCK_COPY.unlink(missing_ok=True)
    if kept:
        dvc_graph.LOCK.write_text(WHOLE)
        dvc_graph.keep_lock()
    dvc_graph.LOCK.write_text(WHOLE[:cut])
    said = dvc_graph.mend_lock()
    if not dvc_graph.LOCK.exists():
        assert said and not kept
        return
    text = dvc_graph.LOCK.read_text()
    assert dvc_graph._is_whole(text.encode()) and text == (WHOLE if said else WHOLE[:cut])
    whole, stages = YAML(typ="safe").load(WHOLE)["stages"], YAML(typ="safe").load(text)["stages"]
    assert set(stages) <= set(whole)            # a stage less runs again; none is made up


@pytest.mark.parametrize("damage", [("hash: md5", "hash: mD5"), ("md5: a0", "md5: i0"), ("md5: a0", "md4: a0"),
                                    ("stages:", "<<<<<<< ours\nstages:")])
def test_a_lock_with_a_flipped_bit_or_a_conflict_is_no_lock(here: Path, damage: tuple[str, str]) -> None:
    """DVC reads the first, and ends with `unexpected error`."""
    dvc_graph.LOCK.write_text(WHOLE.replace(*damage, 1))
    assert dvc_graph.mend_lock() and not dvc_graph.LOCK.exists()


def test_a_damaged_lock_is_never_kept(here: Path) -> None:
    dvc_graph.LOCK.write_text(WHOLE)
    dvc_graph.keep_lock()
    dvc_graph.LOCK.write_text(WHOLE[: len(WHOLE) // 2 - 9])
    dvc_graph.keep_lock()
    for damage in (b"schema: '2.0'\nstages: [", b"\xff" + WHOLE.encode(), WHOLE.replace("size: 1", "size: x").encode()):
        dvc_graph.LOCK.write_bytes(damage)
        dvc_graph.keep_lock()
    assert dvc_graph._is_whole(dvc_graph.LOCK_COPY.read_bytes())
    assert dvc_graph.mend_lock() and dvc_graph.mend_lock() is None


RWLOCK = json.dumps({"write": {"out": {"pid": 1, "cmd": "dvc repro"}}, "read": {}}).encode()


@pytest.mark.parametrize("content", [*(RWLOCK[:cut] for cut in range(0, len(RWLOCK), 8)), b"\xff{}", b"[]",
                                     RWLOCK.replace(b"pid", b"qid"), RWLOCK.replace(b'"out": {', b'"out": [{') + b"]"])
def test_half_an_rwlock_goes_when_nobody_can_hold_it(here: Path, content: bytes) -> None:
    dvc_graph.RWLOCK.write_bytes(content)
    assert dvc_graph.busy() == {} and not dvc_graph.RWLOCK.exists()


def test_half_an_rwlock_stays_while_a_repro_lives(here: Path) -> None:
    dvc_graph.RWLOCK.write_text("{")
    waiting = subprocess.Popen([sys.executable, "-c", "input()", "dvc", "repro"], stdin=subprocess.PIPE)
    try:
        assert waiting.pid in dvc_graph.busy() and dvc_graph.RWLOCK.exists()
    finally:
        waiting.communicate(b"\n")
