"""Compression on a GPU: the kernels in the plain model, the loss kernel's gradient in training, the whole funnel."""

import pytest
import torch

from kernels.forward_kl import forward_kl
from kernels.mixer import triton as mixer_triton
from model.compression import latency
from model.compression.config import LatencyBudget
from model.compression.data import Data
from model.compression.funnel import compress
from model.compression.importance import layer_importance, rank_correlation
from model.compression.width_importance import width_importance
from model.hybrid_lm import HybridLM
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.layerwise import MegatronLayerwise
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from tests.model.compression.markov import CONFIG, Weights, learnt, markov, silent
from tests.model.compression.plain import PlainLayerwise
from tests.tiny_engine import RECIPE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = CONFIG.model_copy(update={
    "pattern": "M-M*-M-M-M-", "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4,
    "num_query_groups": 2, "head_dim": 16, "mamba_num_heads": 16, "mamba_state_dim": 16,
})


@pytest.fixture(scope="module")
def trained() -> Weights:
    return learnt(GPU, "cuda", steps=150, batch_size=32, rate=4e-3)


def test_the_plain_model_runs_the_kernels_and_is_close_to_float64(trained, monkeypatch):
    calls, real = [], mixer_triton.mix
    monkeypatch.setattr(mixer_triton, "mix", lambda *arguments: (calls.append(1), real(*arguments))[1])
    ids = markov(4, 3)[:, :-1]
    exact = HybridLM.from_state(*trained, torch.float64)(ids)
    model = HybridLM.from_state(*trained, torch.bfloat16).cuda()
    logits = model(ids.cuda())
    assert len(calls) == GPU.pattern.count("M")
    assert (logits.cpu().double() - exact).norm() < 0.03 * exact.norm()
    forward_kl(logits.flatten(0, 1), logits.detach().flatten(0, 1).roll(1, 0)).backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_whole_funnel_with_a_latency_budget(trained, config, tokens, tmp_path, precision, monkeypatch):
    """Distillation in both number formats, by Transformer Engine; scores are BF16's. Tests beside it on the same GPU
    change what layers take, so that their times need not add up."""
    monkeypatch.setattr(latency, "LARGEST_ERROR", float("inf"))
    held_out = markov(32, 3)
    data = Data(list(markov(2048, 1)), markov(32, 2)[:, :-1], held_out, held_out[:, 1:].numel() * 2)
    gpu = config.model_copy(update={
        "ffn_widths": [64, 96, 128], "memory": config.memory.model_copy(update={"budget_fraction": 0.9}),
        "latency": LatencyBudget(context=512, batch=8, decode_tokens=8, repeats=3, budget_fraction=0.9),
        "global_batch_size": 16, "micro_batch_size": 16, "distillation_tokens": 60 * 16 * 32, "checkpoint_every": 30,
        "precision": precision,
    })
    parent = trained.save(tmp_path / "parent")

    def run():
        with process_groups():
            return compress(parent, tokens, data, gpu, RECIPE, 1, tmp_path / "scratch", silent)

    result = run()
    metrics = result.metrics
    assert metrics["kl_parent_compressed"] < metrics["kl_parent_cut"] < metrics["kl_parent_random_cut_mean"]
    assert metrics["parameters_prediction_error"] == 0 and metrics["cache_bytes_prediction_error"] == 0
    assert metrics["weight_bytes_prediction_error"] < 0.02
    assert all(candidate.decode_milliseconds > 0 for candidate in result.records["candidates"])
    assert run().records == result.records and (tmp_path / "scratch" / "resumed").exists()


def test_scores_by_the_engine_are_near_the_plain_models_in_float32(trained, tokens, tmp_path):
    """Rank correlations of layers and neurons; BF16 kernels beside float32 on a CPU."""
    samples = markov(16, 2)[:, :-1]
    plain = PlainLayerwise(HybridLM.from_state(*trained))
    with process_groups():
        model = build_model(GPU, Precision("bf16"), ONE_COPY, 1, start=trained.save(tmp_path)).cuda()
        engine = MegatronLayerwise(model.requires_grad_(False), GPU)
        layers, widths = layer_importance(engine, samples, 8, silent), width_importance(engine, samples, 8, silent)
    expected = layer_importance(plain, samples, 8, silent)
    assert (layers.mean(1) / expected.mean(1) - 1).abs().max() < 0.1
    for index, neurons in width_importance(plain, samples, 8, silent).neurons.items():
        assert rank_correlation(widths.neurons[index], neurons) > 0.97
