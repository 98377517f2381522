from __future__ import annotations

import os
from pathlib import Path

import pytest

import durable


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went to the disk and what was renamed, in order."""
    happened: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(descriptor: int) -> None:
        happened.append(f"disk {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def moved(how):
        def move(source: Path, target: Path) -> Path:
            happened.append(f"rename {target.name}")
            return how(source, target)
        return move

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", moved(replace))
    monkeypatch.setattr(Path, "rename", moved(rename))
    return happened


def test_contents_are_on_the_disk_before_the_name(tmp_path: Path, order: list[str]) -> None:
    durable.write(tmp_path / "metrics.json", "{}\n")
    durable.write_checked(tmp_path / "piece.pt", b"scores")
    for name in ("curated", ".curated.partial"):        # of a run before, and of one that was killed
        (tmp_path / name).mkdir()
        (tmp_path / name / "before").touch()
    with durable.new_directory(tmp_path / "curated") as directory:
        (directory / "train").mkdir()
        (directory / "train/part.parquet").write_bytes(b"PAR1")
    assert order == [
        "disk .metrics.json.partial", "rename metrics.json", "disk .piece.pt.partial", "rename piece.pt",
        "disk part.parquet", "rename curated"]
    assert (tmp_path / "metrics.json").read_text() == "{}\n"
    assert durable.read_checked(tmp_path / "piece.pt") == b"scores"
    assert [path.name for path in (tmp_path / "curated").iterdir()] == ["train"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "metrics.json"
    durable.write(target, "before")
    with pytest.raises(OSError, match="full"), durable.replacing(target) as partial:
        partial.write_text("half")
        raise OSError("full")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"] and target.read_text() == "before"


@pytest.mark.parametrize("damage", [b"", b"sc0res", b"score", None])
def test_what_is_checked_comes_back_whole_or_not_at_all(tmp_path: Path, capsys, damage: bytes | None) -> None:
    path = tmp_path / "piece.pt"
    durable.write_checked(path, b"scores")
    whole = path.read_bytes()
    path.write_bytes(whole[:-6] + damage if damage else whole[:6] if damage is None else b"")
    assert durable.read_checked(path) is None and not path.exists() and durable.read_checked(path) is None
    assert capsys.readouterr().out == f"{path}: damaged; made again.\n"


def test_damaged_and_unfinished_pieces_are_removed_and_damage_is_said(tmp_path: Path, capsys) -> None:
    for name in ("whole", "flipped", "cut", "sealed otherwise", "not sealed"):
        (tmp_path / "below").mkdir(exist_ok=True)
        durable.write(tmp_path / "below" / name, name)
        if name != "not sealed":
            durable.seal(tmp_path / "below" / name)
    (tmp_path / "below/flipped").write_text("flippee")
    (tmp_path / "below/cut").write_text("")
    (tmp_path / "below/.sealed otherwise.sha256").write_text("0" * 64)
    durable.drop_damaged(tmp_path)
    assert [path.name for path in (tmp_path / "below").iterdir() if path.name[0] != "."] == ["whole"]
    damaged = [tmp_path / "below" / name for name in ("cut", "flipped", "sealed otherwise")]
    assert capsys.readouterr().out.splitlines() == [f"{path}: damaged; made again." for path in damaged]
    durable.drop_damaged(tmp_path / "nowhere")
