from __future__ import annotations

import shutil

import pytest

from model.config import ModelError
from model.training.run_log import RunLog


def test_rows_are_on_disk_at_once_and_keep_every_digit(tmp_path):
    log = RunLog(tmp_path)
    log.start(0, None)
    rows = [{"step": 1, "loss": 1 / 3, "domain": "code"}, {"step": 2, "loss": float("inf"), "domain": "all"}]
    for row in rows:
        log.append("training", row)
    assert (tmp_path / "training.csv").read_text().splitlines()[:2] == ["step,loss,domain", f"1,{1 / 3},code"]
    assert log.rows("training") == rows and log.rows("validation") == []
    log.close()


def test_a_run_goes_on_where_its_state_was_saved(tmp_path):
    log = RunLog(tmp_path)
    log.start(0, None)
    log.append("training", {"step": 1, "loss": 2.0})
    log.plot(1, {"training/loss": 2.0})
    state = tmp_path / "resume" / "step-00000001"
    state.mkdir(parents=True)
    for file in log.files():
        shutil.copy(file, state)
    log.append("training", {"step": 2, "loss": 9.0})
    log.append("validation", {"step": 2, "loss": 9.0})
    log.close()
    again = RunLog(tmp_path)
    (tmp_path / "training.csv").write_text("step,loss\n1,7.0\n")      # whatever became of it
    again.start(1, state)
    assert not (tmp_path / "validation.csv").exists()
    again.append("training", {"step": 2, "loss": 1.5})
    assert again.rows("training") == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    again.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    fresh = RunLog(tmp_path)
    fresh.start(0, None)
    assert fresh.rows("training") == []
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    fresh.close()


def test_a_log_that_something_else_changed_is_no_record(tmp_path):
    log = RunLog(tmp_path)
    log.start(0, None)
    log.append("training", {"step": 1, "loss": 2.0})
    assert log.files() and log.rows("training")
    (tmp_path / "training.csv").write_text("step,loss\n1,7.0\n")
    for read in (log.files, lambda: log.rows("training")):
        with pytest.raises(ModelError, match=r"training\.csv: changed by something else"):
            read()
    log.close()
