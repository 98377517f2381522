"""What the benchmark of decisions decides about is what it says, and workers do not change it."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import curation_decisions
from benchmarks.curation_decisions import CLUSTERED, COPIES, decide, of_documents
from data_pipeline.annotate.dedup import deduplicate


def test_copies_have_the_bands_of_their_text():
    own = range(100_000)
    ids, bands = of_documents(len(own), "ids", own)[:, 0], of_documents(len(own), "band0", own)
    _, first, text = np.unique(ids, return_index=True, return_inverse=True)
    assert 0.3 * CLUSTERED * COPIES < 1 - len(first) / len(own) < CLUSTERED * COPIES
    assert (bands == bands[first][text]).all()
    assert len(np.unique(bands)) < 0.95 * len(first)
    part = range(5_000, 6_000)
    assert (of_documents(len(own), "band0", part) == bands[part.start : part.stop]).all()


@pytest.mark.parametrize("name", ["deduplicate", "decontaminate", "substring"])
def test_parts_change_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setattr(curation_decisions, "SHARD", 500)
    monkeypatch.setattr(curation_decisions, "SPANS", 5)
    found = []
    for part in (1 << 23, 700):
        monkeypatch.setattr(deduplicate, "PART_DOCUMENTS", part)
        (tmp_path / str(part)).mkdir()
        record = decide(name, 200 if name == "substring" else 4000, 1, 20, tmp_path / str(part))
        found.append((record["digest"], record["found"]))
    assert found[0] == found[1] and record["found"]


@pytest.mark.parametrize("digests", ["aa", "ab"])
def test_other_decisions_by_other_workers_are_a_failure(digests, tmp_path, monkeypatch):
    def decided(command, **_):
        record = dict.fromkeys(("wall", "cpu", "making", "disk", "found"), 1) | {
            "digest": digests[int(command[command.index("--workers") + 1]) - 1]}
        Path(command[-1], "record.json").write_text(json.dumps(record))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(curation_decisions, "subprocess", SimpleNamespace(Popen=decided))
    monkeypatch.setattr(curation_decisions, "peaks", lambda _: (0, 0))
    monkeypatch.setattr(sys, "argv", ["_", "substring", "1e3", "--scratch", str(tmp_path)])
    if digests == "aa":
        curation_decisions.main()
    else:
        with pytest.raises(SystemExit, match="1e\\+03: other decisions by another number of workers"):
            curation_decisions.main()
