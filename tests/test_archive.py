"""Two runs' results side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.archive import differences


def write(root: Path, **files: str) -> Path:
    for name, text in {"curate/metrics.json": json.dumps({"documents": 3, "train_seconds": 1.0}), **files}.items():
        path = root / "runs/smoke" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_results_are_equal_but_for_times(tmp_path: Path) -> None:
    old, new = write(tmp_path / "old"), write(tmp_path / "new")
    write(new, **{"curate/metrics.json": json.dumps({"documents": 3, "train_seconds": 2.0}),
                  "curate/provenance.json": "{}", "benchmark/decode.csv": "1"})
    assert differences(old, new) == []


def test_what_differs_or_is_missing_is_named(tmp_path: Path) -> None:
    old = write(tmp_path / "old", **{"curate/funnel.json": "[]", "tokenize/blend.json": "{}"})
    new = write(tmp_path / "new", **{"curate/funnel.json": "[1]"})
    write(new, **{"curate/metrics.json": json.dumps({"documents": 4})})
    assert differences(old, new) == [
        f"runs/smoke/{name}" for name in ("curate/funnel.json", "curate/metrics.json", "tokenize/blend.json")]


def test_directories_without_results_are_not_equal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no results.\nRun"):
        differences(tmp_path, tmp_path)
