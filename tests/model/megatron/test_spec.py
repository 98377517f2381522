from __future__ import annotations

import pytest
import torch
from tiny_engine import HYBRID, TRANSFORMER
from torch.utils._python_dispatch import TorchDispatchMode

from model import checkpoint, costs
from model.hybrid_lm import HybridLM
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.engine_checkpoint import load_model
from model.megatron.precision import Precision
from model.megatron.spec import CausalAttention, build_model

FLOAT32 = Precision("float32")


@pytest.mark.parametrize("config", [
    HYBRID, TRANSFORMER, TRANSFORMER.model_copy(update={"rope_theta": 1.5}),
    *(config.model_copy(update={"norm_epsilon": 0.01}) for config in (HYBRID, TRANSFORMER)),
], ids=["hybrid", "transformer", "fractional rope_theta", "hybrid, norm_epsilon", "transformer, norm_epsilon"])
def test_logits_are_those_of_hybrid_lm(config, tmp_path):
    torch.manual_seed(0)
    reference = HybridLM(config)
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)         # nothing left at 0 or 1
    checkpoint.save_weights(tmp_path, config, reference.state_dict(), {})
    ids = torch.randint(0, config.vocab_size, (3, 21))
    with process_groups():
        model = build_model(config, FLOAT32, ONE_COPY, seed=1)
        load_model(tmp_path, model)
        logits = model(ids, None, None)
        loss = model(ids[:, :-1].contiguous(), None, None, labels=ids[:, 1:].contiguous())
    expected = reference(ids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    expected_loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss.mean(), expected_loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [HYBRID, TRANSFORMER], ids=["hybrid", "transformer"])
def test_has_the_parameters_and_spread_of_the_closed_form(config):
    with process_groups():
        model = build_model(config, FLOAT32, ONE_COPY, seed=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == costs.parameters(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("in_proj.weight", "linear_qkv.weight", "linear_fc1.weight", "output_layer.weight")):
            assert parameter.std().item() == pytest.approx(0.1, rel=0.1), name
        if name.endswith(("out_proj.weight", "linear_proj.weight", "linear_fc2.weight")):
            assert parameter.std().item() == pytest.approx(0.1 / len(config.pattern) ** 0.5, rel=0.1), name


def test_seed_decides_the_weights():
    with process_groups():
        states = [build_model(HYBRID, FLOAT32, ONE_COPY, seed).state_dict() for seed in (1, 1, 2)]
    for name, tensor in states[0].items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, states[1][name])
    assert not torch.equal(states[0]["output_layer.weight"], states[2]["output_layer.weight"])


def test_attention_is_megatrons():
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    with process_groups():
        config = build_model(TRANSFORMER, FLOAT32, ONE_COPY, seed=1).config
        megatron = DotProductAttention(config, 1, AttnMaskType.causal, "self")
        query, key, value = torch.randn(7, 2, 4, 8), torch.randn(7, 2, 2, 8), torch.randn(7, 2, 2, 8)
        later = torch.ones(7, 7, dtype=torch.bool).triu(1)[None, None]
        expected = megatron(query, key, value, later)
        torch.testing.assert_close(CausalAttention(config)(query, key, value, None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("config", [HYBRID, TRANSFORMER], ids=["hybrid", "transformer"])
def test_without_gradients_every_linear_layer_is_one_matrix_product(config, batch):
    """PyTorch's matmul takes an input of other than plain strides as a batch of products, here and on a GPU, where a
    layer's importance spent nine tenths of its time so."""
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            called.append(operation._schema.name)
            return operation(*args, **(kwargs or {}))

    called: list[str] = []
    ids = torch.randint(0, config.vocab_size, (batch, 16))
    with process_groups():
        model = build_model(config, FLOAT32, ONE_COPY, seed=1).requires_grad_(False)
        with torch.no_grad(), Products():
            model(ids, None, None)
    assert called.count("aten::mm") == 2 * len(config.pattern) + 1
