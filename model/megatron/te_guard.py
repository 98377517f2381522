"""Keep a Transformer Engine that cannot run here from breaking `import megatron.core`, or what Megatron does with it.

On a machine without CUDA the `transformer-engine` package raises RuntimeError or OSError when imported, and
megatron-core 0.16.1 catches ImportError only; where CUDA is and no GPU is visible it is imported, and Megatron gives it
the CPU's tensors. Every module that imports Megatron imports this one first. Megatron's
remarks that such extensions are absent are silenced too: here that is the plan. And without CUDA Megatron is imported
here, its fusions not wrapped by PyTorch's compiler, whose import takes seconds of every process: none of them runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from unittest.mock import patch

import torch


def usable_transformer_engine() -> bool:
    """Whether Transformer Engine works here; one that is installed and does not is hidden from later imports."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        if not torch.cuda.is_available():
            raise ImportError("no GPU is visible")
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]    # documented: imports then fail cleanly
        return False
    return True


TRANSFORMER_ENGINE = usable_transformer_engine()
warnings.filterwarnings("ignore", r"(Transformer Engine and )?Apex .* not installed", UserWarning)
warnings.filterwarnings("ignore", "full scope is deprecated", UserWarning)
if not torch.cuda.is_available():
    with patch.object(torch, "compile", lambda function, **_: function):
        importlib.import_module("megatron.core.jit")
