"""Where the Triton kernels are tested: compiled on a GPU, else under Triton's interpreter on the CPU (conftest.py).

The interpreter's matrix products of bfloat16 are wrong, so it gets float32; on a GPU both half precisions are run.
"""

import pytest
import torch

pytest.importorskip("triton", reason="`make test` installs Triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISIONS = [(torch.bfloat16, 6e-3), (torch.float16, 1e-3)] if DEVICE == "cuda" else [(torch.float32, 1e-4)]
