"""How much of a device's arithmetic a training run uses."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.costs import flops_per_token

# Dense BF16 products a second of NVIDIA's data sheets, by a part of the device's name.
_BF16_PEAK = {"H200": 989.4e12, "H100 PCIe": 756.0e12, "H100 NVL": 835.0e12, "H100": 989.4e12, "A100": 312.0e12}


def training_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward operations of a token in a full sequence; recomputation does not count."""
    return 3 * flops_per_token(config, (config.sequence_length + 1) // 2)


def bf16_peak(device: torch.device) -> float | None:
    """BF16 operations a second by the device's data sheet, or None where it is not known, as for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _BF16_PEAK.items() if part in name), None)


def flops_utilization(
    config: ModelConfig, tokens_per_second: float, devices: int, device: torch.device
) -> float | None:
    """Model FLOP utilization: operations of the model a second over those `devices` devices could do in BF16.

    An FP8 run is measured against the BF16 peak too, so that the two compare.
    """
    peak = bf16_peak(device)
    return training_flops_per_token(config) * tokens_per_second / (devices * peak) if peak else None
