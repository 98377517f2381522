from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_engine import train_job


@pytest.fixture(scope="session")
def unbroken(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A float32 run of 6 steps on one process that left its resume state after step 4."""
    directory = tmp_path_factory.mktemp("unbroken")
    run = train_job(str(tokens), str(directory / "out"), str(directory / "scratch"), {}, checkpoint_every=4)
    assert (directory / "scratch" / "resume" / "step-00000004").exists()
    return run | {"directory": directory}
