from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from tiny_engine import HYBRID

from model.config import ModelError
from model.megatron import precision as precision_module
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.precision import FP8Product, Precision, choose_precision, mark_quantized_layers
from model.megatron.spec import build_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def to_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Per-tensor current scaling by PyTorch's own casts, as float64."""
    scale = torch.finfo(dtype).max / x.abs().max().float()
    return (x.float() * scale).to(dtype).double() / scale.double()


def test_the_three_products_are_of_fp8_values():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32).bfloat16().requires_grad_()
    weight = torch.randn(16, 32).bfloat16().requires_grad_()
    dy = torch.randn(3, 5, 16).bfloat16()
    y = FP8Product.apply(x, weight, Precision("fp8", emulated=True))
    y.backward(dy)
    x8, weight8 = (to_fp8(t.detach(), torch.float8_e4m3fn) for t in (x, weight))
    dy8 = to_fp8(dy, torch.float8_e5m2)
    expected = (x8 @ weight8.T, dy8 @ weight8, dy8.flatten(0, 1).T @ x8.flatten(0, 1))
    for result, exact in zip((y, x.grad, weight.grad), expected, strict=True):
        assert result.dtype is torch.bfloat16
        error = (result.double() - exact).abs().max() / exact.abs().max()
        assert error < 2**-8                                            # two roundings to BF16
    unquantized = x.detach().double() @ weight.detach().double().T
    assert (expected[0] - unquantized).abs().max() / unquantized.abs().max() > 2**-7    # FP8 is coarser than that


@pytest.mark.parametrize(("start", "end"), [(0, 0), (1, 1), (2, 3)])
def test_bf16_ends_are_megatrons(start, end):
    config = Precision("fp8", start, end).engine_options()
    assert (config["fp8"], config["fp8_recipe"]) == ("hybrid", "tensorwise")
    with process_groups():
        engine = build_model(HYBRID, Precision("float32"), ONE_COPY, 1).config
    engine.num_layers = 8
    engine.first_last_layers_bf16 = config["first_last_layers_bf16"]
    engine.num_layers_at_start_in_bf16 = config["num_layers_at_start_in_bf16"]
    engine.num_layers_at_end_in_bf16 = config["num_layers_at_end_in_bf16"]
    for layer in range(8):
        assert Precision("fp8", start, end).quantizes(layer, 8) != is_first_last_bf16_layer(engine, layer)


def test_layers_between_the_ends_are_quantized_and_nothing_else():
    precision = choose_precision("fp8", CPU, 1, 1)
    assert precision.emulated and "fp8" not in precision.engine_options()
    with process_groups():
        model = build_model(HYBRID, precision, ONE_COPY, 1)
        assert mark_quantized_layers(model.decoder.layers, precision, 4) == 4      # two linear layers in each of `-*`
        quantized = {name for name, module in model.named_modules() if getattr(module, "precision", None)}
        assert quantized == {
            "decoder.layers.1.mlp.linear_fc1", "decoder.layers.1.mlp.linear_fc2",
            "decoder.layers.2.self_attention.linear_qkv", "decoder.layers.2.self_attention.linear_proj",
        }
        ids = torch.randint(0, 64, (2, 16))
        in_fp8 = model(ids, None, None)
        mark_quantized_layers(model.decoder.layers, Precision("bf16", emulated=True), 4)
        in_bf16 = model(ids, None, None)
        plain = build_model(HYBRID, Precision("bf16"), ONE_COPY, 1)(ids, None, None)
    assert torch.equal(in_bf16, plain)
    assert not torch.equal(in_fp8, plain)
    assert (in_fp8 - plain).abs().max() < 0.2 * plain.abs().max()


def test_a_model_of_which_no_layer_would_compute_in_fp8_is_not_built():
    with process_groups(), pytest.raises(ModelError, match="leave none of 4 layers to compute in FP8"):
        build_model(HYBRID, choose_precision("fp8", CPU, 3, 1), ONE_COPY, 1)


def test_fp8_without_transformer_engine_on_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(precision_module, "TRANSFORMER_ENGINE", False)
    with pytest.raises(ModelError, match="precision fp8") as error:
        choose_precision("fp8", GPU)
    assert str(error.value).count("\n") == 1
    assert choose_precision("bf16", GPU).dtype is torch.bfloat16


def test_fp8_on_a_gpu_without_fp8_products_is_an_error(monkeypatch):
    monkeypatch.setattr(precision_module, "TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ModelError, match="NVIDIA A100 has no FP8 products") as error:
        choose_precision("fp8", GPU)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(("scaling", "gradients", "expected"), [
    ("current", "e5m2", {"fp8": "hybrid", "fp8_recipe": "tensorwise", "first_last_layers_bf16": True,
                         "num_layers_at_end_in_bf16": 2}),
    ("current", "e4m3", {"fp8": "e4m3", "fp8_recipe": "tensorwise"}),
    ("unscaled", "e4m3", {"fp8": "e4m3", "fp8_recipe": "custom",
                          "fp8_quantizer_factory": "model.megatron.precision.quantizer_e4m3_gradients"}),
    ("unscaled", "e5m2", {"fp8": "hybrid", "fp8_recipe": "custom",
                          "fp8_quantizer_factory": "model.megatron.precision.quantizer_e5m2_gradients"}),
])
def test_the_alternatives_are_options_of_megatrons(monkeypatch, scaling, gradients, expected):
    monkeypatch.setattr(precision_module, "TRANSFORMER_ENGINE", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    precision = choose_precision("fp8", GPU, 2, 2, scaling, gradients)
    options = precision.engine_options()
    assert not precision.emulated
    assert {name: options[name] for name in expected} == expected
    with process_groups():
        engine = build_model(HYBRID, Precision("float32"), ONE_COPY, 1).config
    assert options.keys() <= {field.name for field in dataclasses.fields(engine)}


def emulated(scaling: str, gradients: str = "e5m2") -> Precision:
    return Precision("fp8", emulated=True, scaling=scaling, gradients=gradients)


def test_without_scales_values_are_cast_as_they_are():
    x = torch.tensor([1e-4, 1.0, 500.0, 1e6]).bfloat16()
    values, inverse = emulated("unscaled").quantize(x, "input")
    assert inverse == 1 and values.tolist() == [0.0, 1.0, 448.0, 448.0]
    assert emulated("unscaled").quantize(x, "gradient")[0].tolist()[2:] == [512.0, 57344.0]
    assert emulated("unscaled", "e4m3").quantize(x, "gradient")[0].tolist()[2:] == [448.0, 448.0]
