from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
from tiny_engine import HYBRID, RECIPE

from model.megatron import optimizer
from model.megatron.compat import optimizer_shards
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from tests import forked

# isort: split
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values

ROOT = Path(__file__).resolve().parents[3]
PROBE = """
import os
import torch

if not os.fork():
    try:
        import megatron.core.optimizer
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
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
    assert probe.stdout.splitlines() == ["no cuDNN", "False False"]
    assert "Apex" not in probe.stderr


CUDNN = """
import ctypes, sys
import torch
from model.megatron import compat
torch.cuda.is_available = lambda: True
sys.modules.pop("transformer_engine", None)     # one installed was hidden as compat was imported: no GPU was visible
ctypes.CDLL(sys.argv[1] + "/torch/libcudnn.so.9")
print(compat.usable_transformer_engine(), *sorted(f"{p.parent.name}/{p.name}" for p in compat._mapped("libcudnn")))
"""


@pytest.mark.parametrize("of_pytorch, succeeds", [(("", "_graph", "_ops"), True), (("",), False)])
def test_transformer_engine_brings_no_second_cudnn(tmp_path, of_pytorch, succeeds):
    """Its first part is looked for in CUDNN_HOME, or is the machine's; the others are found as the linker finds them,
    one that is loaded already, or the machine's. Any library will do for cuDNN's."""
    for place, parts in (("torch", of_pytorch), ("machine", ("", "_graph", "_ops"))):
        (tmp_path / place).mkdir()
        for part in parts:
            shutil.copy(next(Path(xxhash.__file__).parent.glob("*.so")), tmp_path / place / f"libcudnn{part}.so.9")
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import ctypes, os, pathlib\n"
        f"machine = {str(tmp_path / 'machine')!r}\n"
        "ctypes.CDLL(os.environ.get('CUDNN_HOME', machine) + '/libcudnn.so.9', mode=ctypes.RTLD_GLOBAL)\n"
        "loaded = pathlib.Path('/proc/self/maps').read_text()\n"
        "for part in ('_graph', '_ops'):\n"
        "    if f'libcudnn{part}.so.9' not in loaded:\n"
        "        ctypes.CDLL(machine + f'/libcudnn{part}.so.9', mode=ctypes.RTLD_GLOBAL)\n")
    (package / "pytorch.py").touch()
    (tmp_path / "probe.py").write_text(CUDNN)
    probe = forked.run(tmp_path, "-m", "probe", str(tmp_path), check=False)
    if succeeds:
        assert probe.stdout.split() == ["True", *(f"torch/libcudnn{part}.so.9" for part in ("", "_graph", "_ops"))]
    else:
        assert f"cuDNN from {tmp_path}/machine and from {tmp_path}/torch." in probe.stderr


def test_a_spread_optimizers_state_is_no_view_of_buffers_of_all_parameters(monkeypatch):
    """Saving clones views, which with the buffers they are of held the state twice in the host's memory."""
    monkeypatch.setattr(optimizer, "uses_distributed_optimizer", lambda recipe: recipe.distributed_optimizer)
    recipe = RECIPE.model_copy(update={"distributed_optimizer": True})
    with process_groups():
        model = build_model(HYBRID, Precision("float32"), ONE_COPY, seed=1)
        spread = optimizer.build_optimizer(recipe, optimizer.data_parallel(recipe, model, 1))
        spread.step()
        groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        weights = model.sharded_state_dict(metadata=groups)
        shards = [value for value in nested_values(optimizer_shards(spread, weights, False, groups))
                  if isinstance(value, ShardedTensor)]
    assert sum(shard.data.numel() for shard in shards) == 3 * sum(value.numel() for value in model.parameters())
    for shard in shards:
        assert shard.data.untyped_storage().nbytes() == shard.data.nbytes, shard.key
