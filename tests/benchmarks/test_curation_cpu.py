"""What datatrove is asked in the curation benchmark is what our own stage does."""

from __future__ import annotations

from pathlib import Path

from benchmarks.curation_cpu import WhiteSpace, datatrove_seconds
from data_pipeline.config import MinHashConfig


def test_datatrove_takes_as_many_bands_and_rows_as_we(tmp_path: Path) -> None:
    texts = [f"document {number} has a few words of its own, and some that others have too." for number in range(3)]
    datatrove_seconds(texts, WhiteSpace(), MinHashConfig(shingle_characters=24, bands=3, rows=2), tmp_path)
    bands = sorted((tmp_path / "signatures").iterdir())
    assert [band.name for band in bands] == [f"bucket_{number:03d}" for number in range(3)]
    sizes = {file.stat().st_size for band in bands for file in band.iterdir()}
    assert sizes == {3 * (2 * 8 + 4)}           # of each document two hashes and its number
