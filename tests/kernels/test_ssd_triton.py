"""The CUDA kernels of the chunk scan: under Triton's interpreter on a CPU, compiled on a GPU."""

import pytest
import torch
from triton_device import DEVICE, PRECISIONS

# isort: split
from test_ssd import NAMES, gradients, inputs, recurrence

from kernels import launch
from kernels.ssd import hopper
from kernels.ssd import triton as ssd_triton
from tests.closeness import relative_error

REPEATS = 100       # a race showed in 10 of 300
SMALL = {"SHARED_GRADIENTS": 16, "STATE_WALK": 16, "GRADIENT_WALK": 16}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that a short sequence fills several of."""
    monkeypatch.setattr(ssd_triton, "CHUNK", 32)
    for name, size in SMALL.items():
        monkeypatch.setattr(ssd_triton, name, getattr(ssd_triton, name)._replace(size=size))


def compare(values: dict[str, torch.Tensor], tolerance: float) -> None:
    ours = {name: value.to(DEVICE).requires_grad_() for name, value in values.items()}
    exact = {name: value.double().requires_grad_() for name, value in values.items()}
    y, state = recurrence(**exact)
    mine, last, *_ = ssd_triton.scan(
        *(ours[name] for name in NAMES[:7]), ours["initial_state"].transpose(2, 3).contiguous(), None
    )
    last = last.transpose(2, 3)
    assert relative_error(mine.cpu(), y) < tolerance
    assert relative_error(last.cpu(), state) < tolerance
    for name, a, b in zip(NAMES, gradients((mine.cpu(), last.cpu()), ours), gradients((y, state), exact), strict=True):
        assert relative_error(a.cpu(), b) < tolerance, name


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("length, groups, axis", [(64, 2, 65_535), (75, 1, 1), (7, 4, 65_535), (33, 2, 65_535)])
def test_values_and_gradients_equal_the_recurrence(small_tiles, monkeypatch, dtype, tolerance, length, groups, axis):
    """The second one's chunks are more than an axis of the grid has room for."""
    monkeypatch.setattr(launch, "LARGEST_AXIS", axis)
    compare(inputs(2, length, 4, 16, groups, 32, dtype), tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_tiles_as_tuned_at_8b_width(dtype, tolerance):
    compare(inputs(1, 300, 32, 64, 2, 128, dtype), tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not hopper.is_hopper(torch.device(DEVICE)), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype, _", PRECISIONS)
@pytest.mark.parametrize("length, heads, head_dim, groups, state_dim, own", [
    (300, 4, 64, 2, 128, 77), (130, 4, 32, 1, 64, None), (257, 2, 64, 2, 64, 77), (1, 1, 16, 1, 16, None),
    (700, 6, 64, 1, 128, 40), (256, 16, 64, 2, 128, None), (513, 8, 64, 8, 128, None), (1024, 16, 32, 1, 16, 500),
])
@pytest.mark.parametrize("has_states", [False, True])
def test_hoppers_kernels_give_what_the_others_do(
    monkeypatch, dtype, _, length, heads, head_dim, groups, state_dim, own, has_states
):
    """Each time the same bits, and to within rounding: dx of a chunk's first half they round once, the others twice.
    `own` tokens a document."""
    values = {name: value.to(DEVICE)
              for name, value in inputs(2, length, heads, head_dim, groups, state_dim, dtype).items()}
    x, dt, A, B, C, D, bias = (values[name] for name in NAMES[:7])
    initial = values["initial_state"].transpose(2, 3).contiguous() if has_states else None
    documents = None if own is None else (torch.arange(length, device=DEVICE) // own).int().expand(2, -1).contiguous()

    def run() -> dict[str, torch.Tensor]:
        y, final, step, decay, states = ssd_triton.scan(x, dt, A, B, C, D, bias, initial, documents)
        gradients = ssd_triton.scan_backward(
            x, final if has_states else None, x, dt, A, B, C, D, step, decay, states, documents
        )
        named = zip(("dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias", "dinitial"), gradients, strict=True)
        return {"y": y, "final": final, "states": states, **dict(named)}

    assert ssd_triton._is_specialised(x, B)
    specialised = run()
    for _ in range(REPEATS):
        assert all(torch.equal(value, again) for value, again in zip(specialised.values(), run().values(), strict=True))
    monkeypatch.setattr(ssd_triton, "_is_specialised", lambda *_: False)
    errors = {name: relative_error(specialised[name], other) for name, other in run().items()}
    assert not {name: error for name, error in errors.items() if error >= (
        1e-4 if specialised[name].dtype == torch.float32 else torch.finfo(dtype).eps / (2 if name == "dx" else 16))}


@pytest.mark.parametrize("dtype, _", PRECISIONS)
def test_a_step_of_nothing_leaves_the_state(small_tiles, dtype, _):
    """Padding behind a sequence, which dt of minus infinity marks."""
    values = inputs(2, 75, 4, 16, 2, 32, dtype)
    values["dt"][:, 40:] = -torch.inf
    padded = [values[name].to(DEVICE) for name in NAMES[:7]]
    whole = [value[:, :40].contiguous() if value.ndim > 1 else value for value in padded]
    initial = values["initial_state"].transpose(2, 3).contiguous().to(DEVICE)
    (y, state, *_), (cut, last, *_) = (ssd_triton.scan(*arguments, initial, None) for arguments in (padded, whole))
    assert torch.equal(state, last) and torch.equal(y[:, :40], cut) and y.isfinite().all()


def test_the_operator_is_well_registered(small_tiles):
    values = inputs(1, 5, 4, 16, 2, 32, PRECISIONS[0][0])
    arguments = [values[name].to(DEVICE).requires_grad_() for name in NAMES[:7]]
    torch.library.opcheck(ssd_triton.scan.registered, (*arguments, None, None),
                          test_utils=("test_schema", "test_faketensor"))
