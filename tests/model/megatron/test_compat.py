from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROBE = """
from model.megatron.compat import TRANSFORMER_ENGINE
import megatron.core.optimizer
from megatron.core.extensions.transformer_engine import HAVE_TE
print(TRANSFORMER_ENGINE, HAVE_TE)
"""


def test_a_transformer_engine_that_cannot_be_imported_does_not_stop_megatron(tmp_path):
    """As PyPI's package behaves without CUDA: its import raises RuntimeError, which Megatron does not catch."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no cuDNN')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    probe = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    assert probe.returncode == 0, probe.stderr
    assert probe.stdout.split() == ["False", "False"]
    assert "Apex" not in probe.stderr
    unguarded = subprocess.run(
        [sys.executable, "-c", PROBE.replace("from model.megatron.compat import TRANSFORMER_ENGINE", "")],
        env=environment, capture_output=True, text=True,
    )
    assert "no cuDNN" in unguarded.stderr
