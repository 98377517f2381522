"""On a GPU: the cases in which a kernel once was wrong, and the sizes of the peers' own tests."""

import pytest
import torch
import torch.nn.functional as F
from test_causal_conv1d import reference

from kernels.causal_conv1d import causal_conv1d
from kernels.ssd import chunk_scan
from kernels.ssd.triton import CHUNK
from tests.closeness import relative_error
from tests.kernels import gpu_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
# causal-conv1d's and mamba_ssm's
LENGTHS = (1, 2, 8, 16, 32, 64, 128, 151, 256, 372, 512, 784, 1024, 1134, 2048, 4096)


@pytest.mark.parametrize("case", gpu_cases.cases(), ids=lambda case: case.name)
def test_what_once_was_wrong(case):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < case.gib * 2**30:
        pytest.skip(f"needs {case.gib} GiB of free memory")
    torch.manual_seed(0)
    result = case.run()
    if isinstance(result, str):
        assert result.startswith("refused"), result
    else:
        assert all(error < TOLERANCE[torch.bfloat16] for error in result.values()), result


def documents(batch: int, length: int) -> torch.Tensor:
    """Some boundaries, not the same in each sequence."""
    return torch.stack([torch.arange(length, device="cuda") // (37 + 20 * row) for row in range(batch)]).int()


def summands_of_dA(leaves: list[torch.Tensor], seq_idx: torch.Tensor | None, gradients: list[torch.Tensor]) -> float:
    """Norm of what a chunk adds to dA, from float64 inputs. A state is rounded once for all of its chunk, and where
    chunks' parts cancel their errors do not: a relative error of dA alone has no bound in bfloat16.

    With the input x step kept as it is, the log decay L = -step A is a variable of its own: x step / L with steps L and
    A = -1 is the same scan, and dA sums -step dL.
    """
    x, dt, A, B, C, D, dt_bias, *first = (leaf.detach() for leaf in leaves)
    step = F.softplus(dt + dt_bias)
    decay = (-step * A).requires_grad_()
    results = chunk_scan(x * step[..., None] / decay[..., None], decay + torch.log(-torch.expm1(-decay)),
                         -torch.ones_like(A), B, C, 0 * D, 0 * dt_bias, 64, *first or [None], seq_idx)
    (ddecay,) = torch.autograd.grad(results, decay, gradients)
    return float(F.pad(-step * ddecay, (0, 0, 0, -x.shape[1] % CHUNK)).unflatten(1, (-1, CHUNK)).sum(2).norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("has_first", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan(length, has_first, packed, dtype):
    torch.manual_seed(length)
    inputs = [tensor.to(dtype) if tensor.dim() > 1 else tensor
              for tensor in gpu_cases.scan_inputs(2, length, 8, 2, 64, 128)]
    if has_first:
        inputs.append(torch.randn(2, 8, 64, 128, device="cuda"))
    seq_idx = documents(2, length) if packed else None
    results = []
    for convert in (lambda tensor: tensor, lambda tensor: tensor.double()):
        leaves = [convert(tensor).detach().requires_grad_() for tensor in inputs]
        y, final = chunk_scan(*leaves[:7], 64, leaves[7] if has_first else None, seq_idx)
        torch.manual_seed(1)
        # By shape: `randn_like` draws in the order of memory, which is another one in float64's results.
        gradients = [torch.randn(tensor.shape, device="cuda").to(dtype).to(tensor.dtype) for tensor in (y, final)]
        results.append([y, final, *torch.autograd.grad((y, final), leaves, gradients)])
    for name, ours, true in zip((*gpu_cases.NAMES, "dinitial"), *results, strict=False):
        error = gpu_cases.error(ours, true)
        if name == "dA":
            norm = float(true.norm())
            error *= norm / max(norm, summands_of_dA(leaves, seq_idx, gradients))
        assert error < TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("has_first", [False, True])
@pytest.mark.parametrize("channels", [64, 4128])
@pytest.mark.parametrize("length", LENGTHS)
def test_convolution(length, channels, has_first, packed, dtype):
    torch.manual_seed(length)
    inputs = [torch.randn(*shape, device="cuda").to(dtype) for shape in (
        (2, length, channels), (channels, 4), (channels,), (2, 3, channels))]
    first = None if has_first else torch.zeros_like(inputs[3])
    if first is not None:
        inputs[3] = first
    seq_idx = documents(2, length) if packed else None
    ours = [tensor.requires_grad_() for tensor in inputs]
    true = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y, expected = causal_conv1d(*ours[:3], ours[3] if has_first else None, seq_idx), causal_conv1d(*true, seq_idx)
    assert relative_error(y, expected) < TOLERANCE[dtype]
    if not packed:
        assert relative_error(expected, reference(*true)) < 1e-12
    dy, count = torch.randn_like(y), 4 if has_first else 3
    mine, theirs = torch.autograd.grad(y, ours[:count], dy), torch.autograd.grad(expected, true[:count], dy.double())
    for a, b in zip(mine, theirs, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype]
