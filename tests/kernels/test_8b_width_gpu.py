"""The kernels with the tiles they are launched with at 8B width, against float64 on the device.

Every kernel has one configuration, no tuning at run time: these are all of them.
"""

import pytest
import torch

from kernels.cross_entropy import cross_entropy
from kernels.fp8_quantize import quantize
from kernels.gated_norm import rms_norm
from kernels.mixer import MixerWeights, mix
from kernels.squared_relu import squared_relu
from kernels.squared_relu_fp8 import squared_relu_backward_quantize, squared_relu_quantize
from kernels.state_update import ssd_state_update
from tests.closeness import relative_error
from tests.kernels.gpu_cases import mixer_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
HEADS, HEAD_DIM, GROUPS, STATE, EPSILON = 128, 64, 8, 128, 1e-5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def compare(ours, exact, inputs: list[torch.Tensor], names: list[str], tolerance: float = 8e-3) -> None:
    """Value and every gradient of `ours` against those of `exact` in float64."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    true = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y, expected = ours(*leaves), exact(*true)
    dy = torch.randn_like(y)
    mine, theirs = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, true, dy.double())
    for name, a, b in zip(["value", *names], [y, *mine], [expected, *theirs], strict=True):
        assert relative_error(a, b) < tolerance, name


def test_mixer():
    """Convolution, scan and gated norm, over chunk boundaries and a last chunk that is cut."""
    def run(projected, *weights):
        return mix(projected, MixerWeights(*weights), GROUPS, STATE, 64, EPSILON)

    compare(run, run, mixer_inputs(2, 600, HEADS, GROUPS, HEAD_DIM, STATE), ["projected", *MixerWeights._fields],
            tolerance=1.2e-2)


def test_norm_and_activation():
    compare(lambda x, w: rms_norm(x, w, EPSILON), lambda x, w: rms_norm(x, w, EPSILON),
            [normal(300, 4096), normal(4096)], ["x", "weight"])
    compare(squared_relu, lambda x: x.relu().square(), [normal(300, 21_504)], ["x"])


def test_squared_relu_to_fp8():
    h, dy = normal(512, 21_504), normal(512, 21_504)
    for (values, transposed, inverse), exact, format in (
        (squared_relu_quantize(h), h.relu().square(), "e4m3"),
        (squared_relu_backward_quantize(dy, h), (dy * h.relu()).mul_(2), "e5m2"),
    ):
        expected, scale = quantize(exact, format)
        assert torch.equal(values.bfloat16(), expected) and torch.equal(transposed.bfloat16(), expected.t())
        assert float(inverse) == float(scale)


def test_cross_entropy():
    labels = torch.randint(131_072, (64,), device="cuda")

    def exact(logits):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    compare(lambda logits: cross_entropy(logits.clone(), labels), exact, [normal(64, 131_072)], ["logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_update(dtype):
    state = normal(32, HEADS, HEAD_DIM, STATE, dtype=dtype)
    token = [normal(32, HEADS, HEAD_DIM), normal(32, HEADS), -torch.rand(HEADS, device="cuda") * 15 - 1,
             normal(32, GROUPS, STATE), normal(32, GROUPS, STATE), torch.ones(HEADS, device="cuda"),
             normal(HEADS, dtype=torch.float32) - 4]
    exact = state.double()
    expected = ssd_state_update(exact, *(tensor.double() for tensor in token))
    y = ssd_state_update(state, *token)
    assert relative_error(y, expected) < 8e-3 and relative_error(state, exact) < 8e-3
