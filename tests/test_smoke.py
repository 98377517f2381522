"""The whole pipeline at toy size, as a person runs it: in an unpacked archive without git, twice."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.archive import reproduce


def metrics(archive: Path, *parts: str) -> dict[str, float]:
    return dict(json.loads(archive.joinpath("runs/smoke", *parts, "metrics.json").read_text()))


@pytest.mark.slow
@pytest.mark.timeout(900)      # 90 s alone on two cores; others may be at work
def test_every_stage_runs_and_then_none(smoke_run: tuple[Path, dict[str, str]]) -> None:
    archive, first = smoke_run
    assert set(first.values()) == {"ran"}
    params = YAML(typ="safe").load(archive / "params.yaml")
    assert len(first) == 9 + len(params["variants"]) + 2 * len(params["models"])

    for variant in params["variants"]:
        rows = list(csv.DictReader((archive / f"runs/smoke/pretrain/{variant}/training.csv").open()))
        assert len(rows) == metrics(archive, "pretrain", variant)["steps"]
        assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    compressed = metrics(archive, "compress")
    assert compressed["compressed_parameters"] < compressed["parent_parameters"]
    for model in params["models"]:
        assert 0 < metrics(archive, "evaluate", model)["bits_per_byte"] < 16
        assert (archive / f"data/smoke/hub/{model}/config.json").exists()
    assert "<svg" in (archive / "reports/smoke/index.html").read_text()
    assert metrics(archive, "report")["records_not_read"] == 0        # what the stages wrote is what the report reads

    second = reproduce(archive)
    assert second.keys() == first.keys()
    assert set(second.values()) == {"cached"}
