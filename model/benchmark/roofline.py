"""What a machine does at best, measured: the ceilings of the least time inference can take (`model.costs`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from model.costs import Ceilings

_CALLS, _ROUNDS = 5, 3


def measure_ceilings(device: torch.device, dtype: torch.dtype, fp8: bool = False, devices: int = 1) -> Ceilings:
    """Fastest of a few copies and square matrix products, large for the device; of `devices` like it together."""
    on_gpu = device.type == "cuda"
    source = torch.ones((2**30 if on_gpu else 2**24) // dtype.itemsize, device=device, dtype=dtype)
    copy = 2 * source.nbytes / fastest(partial(torch.empty_like(source).copy_, source), device)
    size = 8192 if on_gpu else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rate = 2 * size**3 / fastest(lambda: a @ b, device)
    layer_rate = rate
    if fp8 and on_gpu:
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        layer_rate = 2 * size**3 / fastest(lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one,
                                                                    out_dtype=torch.bfloat16), device)
    return Ceilings(devices * copy, devices * rate, devices * layer_rate)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of a call, the device's work included."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds a call takes in the fastest of some rounds of calls, after one that is not counted."""
    def round_of_calls() -> None:
        for _ in range(_CALLS):
            run()

    return min([seconds(round_of_calls, device) for _ in range(_ROUNDS + 1)][1:]) / _CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
