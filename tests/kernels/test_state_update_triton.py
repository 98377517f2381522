"""The CUDA kernels of the one-token updates against the recurrence and F.conv1d in float64."""

import pytest
import torch
from triton_device import DEVICE

# isort: split
from test_causal_conv1d import reference, tensors
from test_ssd import inputs, recurrence

from kernels import state_update
from kernels.state_update import triton as state_update_triton
from tests.closeness import relative_error

TOKENS = 6
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]     # the interpreter truncates


def steps(update, state: torch.Tensor, dtype: torch.dtype, tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    """y and the last state after updates by `tokens` strided slices, each followed by the recurrence's."""
    values = inputs(2, tokens, 4, state.shape[2], 2, state.shape[3], torch.float64)
    values["initial_state"] = state
    rounded = {name: values[name].to(dtype) for name in ("x", "dt", "B", "C")}
    y, last = recurrence(**(values | {name: value.double() for name, value in rounded.items()}))
    ours = state.to(DEVICE, copy=True)
    device = {name: value.to(DEVICE) for name, value in rounded.items()}
    fixed = [values[name].float().to(DEVICE) for name in ("A", "D", "dt_bias")]
    outputs = []
    for t in range(tokens):
        x, dt, B, C = (device[name][:, t] for name in ("x", "dt", "B", "C"))
        outputs.append(update(ours, x, dt, fixed[0], B, C, *fixed[1:]))
    assert outputs[0].dtype == dtype
    return torch.stack(outputs, 1).cpu(), y, ours.cpu(), last


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(8, 16), (12, 20)])
@pytest.mark.parametrize("tile", [256, 65536])
def test_the_scan_is_the_recurrence(dtype, rows, tile, monkeypatch):
    monkeypatch.setattr(state_update_triton, "SCAN", state_update_triton.SCAN._replace(bytes=tile))
    state = torch.randn(2, 4, *rows, generator=torch.Generator().manual_seed(2))
    y, expected, last, expected_last = steps(state_update_triton.advance_scan, state, dtype)
    assert relative_error(y, expected) < (1e-5 if dtype == torch.float32 else 6e-3)
    assert relative_error(last, expected_last) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bfloat16_state_is_rounded_once_a_token(dtype):
    """After one token the new state is the exact one rounded, and y comes from the unrounded one; on any device."""
    state = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    updates = [state_update.ssd_state_update]
    if DEVICE == "cuda":
        updates.append(state_update_triton.advance_scan)
    for update in updates:
        y, expected, last, expected_last = steps(update, state, dtype, 1)
        assert relative_error(y, expected) < (1e-5 if dtype == torch.float32 else 6e-3)
        assert (last == expected_last.bfloat16()).double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [2, 4])
def test_the_convolution_is_conv1d(dtype, taps, monkeypatch):
    monkeypatch.setattr(state_update_triton, "CONV_CHANNELS", 4)
    x, weight, bias, state = (tensor.detach() for tensor in tensors(dtype, TOKENS, taps))
    expected = reference(*(tensor.double() for tensor in (x, weight, bias, state)))
    carried = state.to(DEVICE, copy=True)
    device = [tensor.to(DEVICE) for tensor in (x, weight, bias)]
    outputs = [state_update_triton.advance_conv(carried, device[0][:, t], *device[1:]) for t in range(TOKENS)]
    assert relative_error(torch.stack(outputs, 1).cpu(), expected) < (1e-5 if dtype == torch.float32 else 6e-3)
    assert torch.equal(carried.cpu(), x[:, 1 - taps :])


def test_the_operators_are_well_registered():
    values = inputs(2, 1, 4, 8, 2, 16, torch.float32)
    state = values.pop("initial_state").to(DEVICE)
    x, dt, B, C = (values[name][:, 0].to(DEVICE) for name in ("x", "dt", "B", "C"))
    A, D, dt_bias = (values[name].to(DEVICE) for name in ("A", "D", "dt_bias"))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(state_update_triton.advance_scan, (state, x, dt, A, B, C, D, dt_bias), test_utils=checks)
    x, weight, bias, window = (tensor.detach().to(DEVICE) for tensor in tensors(torch.float32, 1))
    torch.library.opcheck(state_update_triton.advance_conv, (window, x[:, 0], weight, bias), test_utils=checks)
