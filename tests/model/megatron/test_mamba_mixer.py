from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny_engine import HYBRID

from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.precision import Precision
from model.megatron.spec import build_model


def mixer_of(precision: str, seed: int = 1):
    return build_model(HYBRID, Precision(precision), ONE_COPY, seed).decoder.layers[0].mixer


def sequential(mixer, hidden: torch.Tensor) -> torch.Tensor:
    """The mixer in float64, token by token (arXiv 2405.21060 section 2; Megatron's packing of in_proj)."""
    weights = {name: parameter.detach().double() for name, parameter in mixer.named_parameters()}
    inner, states, heads, groups, head_dim = 256, 32, 16, 2, 16
    z, xBC, dt = (hidden.double() @ weights["in_proj.weight"].T).split([inner, inner + 2 * states, heads], -1)
    padded = F.pad(xBC.permute(1, 2, 0), (3, 0))
    xBC = F.silu(F.conv1d(padded, weights["conv1d.weight"], weights["conv1d.bias"], groups=xBC.shape[-1]))
    x, B, C = xBC.permute(2, 0, 1).split([inner, states, states], -1)
    step = F.softplus(dt + weights["dt_bias"])
    decay = torch.exp(-step * weights["A_log"].exp())
    state = torch.zeros(hidden.shape[1], heads, head_dim, states // groups, dtype=torch.float64)
    rows = []
    for t in range(hidden.shape[0]):
        values = x[t].unflatten(-1, (heads, head_dim))
        into, out = (m[t].unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 1) for m in (B, C))
        state = decay[t][..., None, None] * state + (step[t][..., None] * values)[..., None] * into[:, :, None]
        rows.append(((state @ out[..., None]).squeeze(-1) + weights["D"][:, None] * values).flatten(1))
    gated = (torch.stack(rows) * F.silu(z)).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + HYBRID.norm_epsilon)
    return (normed.flatten(-2) * weights["norm.weight"]) @ weights["out_proj.weight"].T


def test_is_the_recurrence_in_float64():
    with process_groups():
        mixer = mixer_of("float32")
        hidden = torch.randn(21, 2, 32)
        output, bias = mixer(hidden)
    assert bias is None
    torch.testing.assert_close(output.double(), sequential(mixer, hidden), rtol=1e-4, atol=1e-5)


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
