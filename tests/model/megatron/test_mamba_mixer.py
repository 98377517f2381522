from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny_engine import HYBRID

from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.precision import Precision
from model.megatron.spec import build_model


def mixer_of(precision: str, seed: int = 1):
    return build_model(HYBRID, Precision(precision), ONE_COPY, seed).decoder.layers[0].mixer


def test_scan_parameters_stay_float32_and_in_mambas_ranges():
    with process_groups():
        mixers = [mixer_of("bf16", seed) for seed in range(20)]
    assert mixers[0].in_proj.weight.dtype is torch.bfloat16
    decay = torch.cat([mixer.A_log for mixer in mixers]).exp()
    step = F.softplus(torch.cat([mixer.dt_bias for mixer in mixers]))
    assert decay.dtype is torch.float32 and step.dtype is torch.float32
    assert 1 <= decay.min() < 4 and 12 < decay.max() <= 16.0001
    assert 0.99e-3 <= step.min() < 3e-3 and 3e-2 < step.max() <= 0.1001
    assert all((mixer.D == 1).all() for mixer in mixers)


def test_packed_weights_are_stored_section_by_section():
    with process_groups():
        shards = mixer_of("float32").sharded_state_dict("mixer.")
        parts = shards["mixer.in_proj.weight"].build()
    assert [(part.key.rpartition(".")[2], part.global_shape[0]) for part in parts] == [
        ("z", 256), ("x", 256), ("B", 32), ("C", 32), ("dt", 16)]
    assert {part.key.rpartition(".")[0] for part in parts} == {"mixer.in_proj.weight"}
