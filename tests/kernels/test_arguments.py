"""What no kernel can take is refused on a CPU as on a GPU, in two lines that name the argument and its sizes."""

import pytest
import torch
from test_ssd import NAMES, inputs

from kernels.arguments import ArgumentError
from kernels.cached_attention import prompt_attention, token_attention
from kernels.causal_conv1d import causal_conv1d, final_conv_state
from kernels.cross_entropy import cross_entropy
from kernels.forward_kl import forward_kl
from kernels.fp8_linear import fp8_linear, quantize_rows
from kernels.gated_norm import gated_rms_norm, rms_norm
from kernels.mixer import MixerWeights, mix
from kernels.squared_relu_fp8 import squared_relu_backward_quantize
from kernels.ssd import chunk_scan
from kernels.state_update import conv_state_update, ssd_state_update

DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")])]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def scan(**changes):
    values = inputs(2, 10, 4, 16, 2, 16, torch.bfloat16) | {"seq_idx": None, "chunk_size": 8} | changes
    return lambda on: chunk_scan(*(on(values[name]) for name in NAMES[:7]), values["chunk_size"],
                                 on(values["initial_state"]), on(values["seq_idx"]))


def mixer(projected: int = 2 * 64 + 2 * 32 + 4, groups: int = 2, **changes):
    weights = MixerWeights(zeros(128, 4), zeros(128), zeros(4), zeros(4), zeros(4), zeros(64))._replace(**changes)
    return lambda on: mix(on(zeros(2, 5, projected)), MixerWeights(*map(on, weights)), groups, 16, 8, 1e-5)


def state(**changes):
    values = {"state": zeros(2, 4, 8, 16), "x": zeros(2, 4, 8), "dt": zeros(2, 4), "A": zeros(4), "B": zeros(2, 2, 16),
              "C": zeros(2, 2, 16), "D": zeros(4), "dt_bias": zeros(4)} | changes
    return lambda on: ssd_state_update(*map(on, values.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("run", "words"), [
    (scan(B=zeros(2, 10, 3, 16, dtype=torch.bfloat16), C=zeros(2, 10, 3, 16, dtype=torch.bfloat16)),
     r"heads \(4\) cannot be divided among groups \(3\)"),
    (scan(C=zeros(2, 10, 2, 32, dtype=torch.bfloat16)), r"C has the shape \(2, 10, 2, 32\)"),
    (scan(B=zeros(2, 10, 2, 16), C=zeros(2, 10, 2, 16)), "B is torch.float32, x is torch.bfloat16"),
    (scan(dt=zeros(2, 9, 4)), r"dt has the shape \(2, 9, 4\)"), (scan(A=zeros(5)), r"A has the shape \(5,\)"),
    (scan(seq_idx=zeros(10, 2, dtype=torch.int32)), r"seq_idx has the shape \(10, 2\)"),
    (scan(initial_state=zeros(1, 4, 16, 16)), "initial_state has the shape"), (scan(chunk_size=0), "chunk_size is 0"),
    (lambda on: scan(**{k: v[:, :0] for k, v in inputs(2, 1, 4, 16, 2, 16, torch.bfloat16).items()
                        if k in ("x", "dt", "B", "C")})(on), "x, of the shape .* is empty"),
    (mixer(projected=190), r"projected has the shape \(2, 5, 190\)"), (mixer(groups=3), r"heads \(4\).* groups \(3\)"),
    (mixer(conv_bias=zeros(127)), "conv_bias has the shape"),
    (lambda on: causal_conv1d(on(zeros(2, 5, 6)), on(zeros(7, 4)), on(zeros(6))), r"weight has the shape \(7, 4\)"),
    (lambda on: causal_conv1d(on(zeros(2, 5, 6)), on(zeros(6, 4)), on(zeros(6)), on(zeros(2, 4, 6))), "initial_state"),
    (lambda on: final_conv_state(on(zeros(2, 5, 6)), 4, on(zeros(1, 3, 6))), "initial_state has the shape"),
    (lambda on: final_conv_state(on(zeros(2, 0, 6)), 4, on(zeros(2, 3, 6))), "x, of the shape .* is empty"),
    (lambda on: gated_rms_norm(on(zeros(3, 100)), on(zeros(3, 100)), on(zeros(100)), 3, 1e-5),
     r"channels \(100\) cannot be divided among groups \(3\)"),
    (lambda on: gated_rms_norm(on(zeros(3, 8)), on(zeros(3, 8).bfloat16()), on(zeros(8)), 2, 1e-5), "gate is"),
    (lambda on: rms_norm(on(zeros(3, 8)), on(zeros(4)), 1e-5), r"weight has the shape \(4,\)"),
    (state(B=zeros(2, 3, 16), C=zeros(2, 3, 16)), r"heads \(4\).* groups \(3\)"), (state(x=zeros(1, 4, 8)), "x has"),
    (state(state=zeros(4, 2, 8, 16).transpose(0, 1)), "not contiguous"),
    (lambda on: conv_state_update(on(zeros(2, 4, 6)), on(zeros(2, 6)), on(zeros(6, 4)), on(zeros(6))), "state has"),
    (lambda on: cross_entropy(on(zeros(3, 8)), on(zeros(4).long())), r"labels has the shape \(4,\)"),
    (lambda on: forward_kl(on(zeros(3, 8)), on(zeros(3, 9))), "teacher has"),
    (lambda on: forward_kl(on(zeros(3, 8)), on(zeros(3, 8).double())), "teacher is torch.float64"),
    (lambda on: token_attention(on(zeros(2, 5, 16)), on(zeros(2, 2, 7, 16)), on(zeros(2, 2, 7, 16)),
                                on(torch.tensor([3, 3]))), r"heads \(5\).* groups \(2\)"),
    (lambda on: token_attention(on(zeros(2, 4, 16)), on(zeros(2, 2, 7, 16)), on(zeros(2, 2, 7, 16)),
                                on(torch.tensor(3))), r"positions has the shape \(\)"),
    (lambda on: prompt_attention(on(zeros(1, 2, 5, 8)), on(zeros(1, 2, 3, 8)), on(zeros(1, 2, 3, 8))),
     "q has 5 new tokens, keys have 3 in all"),
    (lambda on: prompt_attention(on(zeros(2, 4, 3, 16)), on(zeros(2, 2, 7, 8)), on(zeros(2, 2, 7, 8))), "keys has"),
    (lambda on: squared_relu_backward_quantize(on(zeros(3, 8)), on(zeros(3, 9))), "dy has"),
    (lambda on: fp8_linear(on(zeros(3, 8)), quantize_rows(on(zeros(4, 9)))), "weight has"),
])
def test_what_is_refused(device, run, words):
    with pytest.raises(ArgumentError, match=words) as error:
        run(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value)
    assert str(error.value).count("\n") == 1


def test_a_label_out_of_range_is_an_error_where_nothing_waits_for_it():
    for label in (-1, 8, -99):
        with pytest.raises(ArgumentError, match="labels lie between"):
            cross_entropy(torch.randn(3, 8), torch.tensor([0, label, 1]))


@pytest.mark.parametrize("device", DEVICES)
def test_ignored_labels_are_as_pytorchs(device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 40, generator=generator).to(device).requires_grad_()
    labels = torch.randint(40, (12,), generator=generator).to(device)
    labels[[0, 5, 11]] = -100
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    dlosses = torch.randn(12, generator=generator).to(device)
    (true,) = torch.autograd.grad(expected, logits, dlosses)
    losses = cross_entropy(logits * 1, labels)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.autograd.grad(losses, logits, dlosses)[0], true)


def test_the_final_state_of_a_long_sequence_keeps_float32s_precision():
    """Decays over thousands of chunks are differences of prefix sums, which grow with the sequence."""
    generator = torch.Generator().manual_seed(0)
    x, dt, B, C = (torch.randn(1, 65_537, *shape, generator=generator) for shape in ((2, 4), (2,), (1, 4), (1, 4)))
    shared = torch.tensor([-1.0, -0.3]), B, C, torch.ones(2), torch.zeros(2)
    _, state = chunk_scan(x, dt, *shared, 128)
    _, exact = chunk_scan(x.double(), dt.double(), *(tensor.double() for tensor in shared), 128)
    assert ((state - exact).norm() / exact.norm()).item() < 3e-6
