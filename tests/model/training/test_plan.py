"""The planner: what it counts against a real model's tensors, the paper's layouts, and what cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelError, PretrainConfig
from model.costs import parameters
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from model.presets import PRESETS
from model.training.plan import (
    MACHINES,
    Layout,
    forward_seconds,
    held_parameters,
    inference_seconds,
    kept_bytes,
    memory,
    nearest_that_fits,
    nvidia_setup,
    plan,
    step_time,
    writing_seconds,
)

RECIPE = PretrainConfig(
    tokens=20_000_000_000_000, global_batch_size=768, micro_batch_size=1, learning_rate=4e-4, min_learning_rate=4e-6,
    warmup_fraction=0.00125, decay_style="cosine", weight_decay=0.1, adam_betas=(0.9, 0.95),
    clip_grad=1.0, bf16_layers_at_start=2, bf16_layers_at_end=2, evaluations=1, checkpoint_every=500,
)
H100 = MACHINES["h100"]
PAPER_56B = Layout(6144, tensor=8, sequence=True, distributed_optimizer=True)
SMALL = PRESETS["nemotron_h_8b"].model_copy(update={
    "pattern": "M-*-", "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2,
    "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 2,
    "vocab_size": 128, "sequence_length": 256,
})


def test_weights_gradients_and_moments_are_18_bytes_a_parameter() -> None:
    found = memory(SMALL, RECIPE, False, Layout(), H100)
    with process_groups():
        model = build_model(SMALL, Precision("bf16"), ONE_COPY, seed=1)
        stored = sum(parameter.numel() for parameter in model.parameters())
    assert parameters(SMALL) == stored
    assert found.weights + found.gradients + found.optimizer == 18 * stored
    assert found.fp8_copies == 0
    spread = memory(SMALL, RECIPE, False, Layout(4, distributed_optimizer=True), H100)
    assert spread.optimizer == found.optimizer / 4 and spread.gradients == found.gradients


def test_an_ffn_layer_keeps_what_autograd_keeps() -> None:
    """Norm, fc1, squared ReLU, fc2 and the residual in plain PyTorch: four tensors, each once."""
    tokens, hidden, ffn = 32, SMALL.hidden_size, SMALL.ffn_hidden_size
    up, down = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
                for shape in ((ffn, hidden), (hidden, ffn)))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[:1] == (tokens,):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    class KeepsInput(torch.autograd.Function):           # as the kernels of norm and activation do
        @staticmethod
        def forward(ctx, x, function):
            ctx.save_for_backward(x)
            return function(x)

    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        normed = KeepsInput.apply(x, lambda x: F.rms_norm(x, (hidden,)))
        y = x + KeepsInput.apply(normed @ up.t(), lambda x: F.relu(x) ** 2) @ down.t()
    assert y.requires_grad
    assert sum(kept.values()) == tokens * kept_bytes(SMALL, "-", False, Layout())


def test_the_papers_layouts_fit_and_others_are_told_the_nearest() -> None:
    big = plan(PRESETS["nemotron_h_56b"], RECIPE, True, PAPER_56B, H100)
    assert big.fits and big.memory.total > 0.8 * H100.memory
    assert big.gpu_hours == pytest.approx(big.days * 24 * 6144)
    assert big.days == pytest.approx(20e12 / big.tokens_per_second / 86400)
    assert 0.1 < big.utilization < 0.6

    crowded = plan(PRESETS["nemotron_h_8b"], RECIPE, False, Layout(768, distributed_optimizer=True), H100)
    assert not crowded.fits
    nearest = nearest_that_fits(crowded)
    assert nearest is not None and nearest.fits and nearest.layout.processes == 768
    assert nearest.memory.total <= H100.memory < crowded.memory.total
    alone = plan(PRESETS["nemotron_h_56b"], RECIPE, True, Layout(), H100)
    assert nearest_that_fits(alone) is None


def test_each_means_of_saving_memory_saves_what_it_says() -> None:
    config = PRESETS["nemotron_h_8b"]
    base = memory(config, RECIPE, False, Layout(8), H100)
    split = memory(config, RECIPE, False, Layout(8, tensor=2, sequence=True), H100)
    assert split.weights == pytest.approx(base.weights / 2, rel=1e-4)
    assert split.activations == pytest.approx(base.activations / 2)
    whole_residuals = memory(config, RECIPE, False, Layout(8, tensor=2), H100)
    assert split.activations < whole_residuals.activations < base.activations
    for fewer, more in (("-", ""), ("M-", "-"), ("M*-", "M-")):
        assert memory(config, RECIPE, False, Layout(8, recompute=fewer), H100).activations < memory(
            config, RECIPE, False, Layout(8, recompute=more), H100).activations
    staged = memory(config, RECIPE, False, Layout(8, pipeline=4), H100)
    assert staged.weights < base.weights / 2        # a quarter of the layers, and an embedding
    wide = SMALL.model_copy(update={"pattern": "M*----M*", "ffn_hidden_size": 2**20})     # within: no embedding
    assert memory(wide, RECIPE, False, Layout(4, pipeline=4), H100).weights > 4 * SMALL.hidden_size * 2**20
    in_fp8 = memory(config, RECIPE, True, Layout(8), H100)
    assert in_fp8.activations < base.activations
    body = parameters(config) - 2 * config.vocab_size * config.hidden_size
    assert 0.9 * body < in_fp8.fp8_copies / 2 < body


def test_time_adds_up_and_answers_to_layout() -> None:
    config = PRESETS["nemotron_h_8b"]
    one = step_time(config, RECIPE, False, Layout(8), H100)
    two = step_time(config, RECIPE, False, Layout(8, tensor=2, sequence=True), H100)
    assert one.tensor_parallel == 0 < two.tensor_parallel and one.pipeline == 0
    assert two.layers == pytest.approx(one.layers, rel=0.1)             # half the work a micro-batch, twice as many
    assert step_time(config, RECIPE, True, Layout(8), H100).layers < 0.75 * one.layers
    # 768 micro-batches over 4 stages: each waits for three, and for what travels
    staged = step_time(config, RECIPE, False, Layout(4, pipeline=4), H100)
    assert staged.pipeline / (staged.layers + staged.head) == pytest.approx(3 / 768, rel=1)
    again = step_time(config, RECIPE, False, Layout(8, recompute="M*-"), H100)
    assert again.layers == pytest.approx(one.layers * 4 / 3)
    eager = step_time(SMALL, RECIPE, False, Layout(8), H100)
    assert eager.layers == pytest.approx(96 * 4 * H100.launch_seconds)        # Python is the slower
    graph = RECIPE.model_copy(update={"cuda_graph": True})
    assert step_time(SMALL, graph, False, Layout(8), H100).layers < eager.layers / 5
    # what the backward does not cover: nothing but the last bucket of 40 million weights while there are many
    # micro-batches' worth of work, all of it out of a graph
    all_of_it = step_time(config, graph, False, Layout(8), H100).data_parallel
    assert all_of_it == pytest.approx(7 / 8 * parameters(config) * 8 / H100.link)
    assert one.data_parallel == pytest.approx(all_of_it * 40e6 / parameters(config))
    apart = step_time(config, RECIPE, True, Layout(768, distributed_optimizer=True), H100)
    whole = step_time(config, graph, True, Layout(768, distributed_optimizer=True), H100)
    hidden = apart.layers + apart.head          # gradients beside the backward, weights beside the forward
    assert whole.data_parallel - apart.data_parallel == pytest.approx(hidden) and apart.layers == whole.layers


def test_gradients_in_bf16_are_half_and_travel_half() -> None:
    config, half = PRESETS["nemotron_h_8b"], RECIPE.model_copy(update={"grad_reduce_in_fp32": False})
    apart = Layout(768, tensor=2, distributed_optimizer=True)
    whole, rounded = (memory(config, recipe, False, apart, H100) for recipe in (RECIPE, half))
    assert rounded == whole._replace(gradients=whole.gradients / 2)
    slow, fast = (step_time(config, recipe, False, apart, H100) for recipe in (RECIPE, half))
    assert fast.data_parallel < slow.data_parallel and fast.update < slow.update and fast.layers == slow.layers


def test_the_official_step_of_the_56b_comes_out() -> None:
    """NVIDIA/dgxc-benchmarking, nemotron-h: 128 H100, 384 sequences of 8,192, FP8: 11.874 s a step; and each part of
    its setup takes something off ours."""
    recipe = RECIPE.model_copy(update={"global_batch_size": 384, "bf16_layers_at_start": 4, "bf16_layers_at_end": 4})
    layout, config = Layout(128, 8, True, distributed_optimizer=True), PRESETS["nemotron_h_56b"]
    ours, theirs = plan(config, recipe, True, layout, H100), plan(config, *nvidia_setup(recipe, True, layout), H100)
    assert theirs.time.total == pytest.approx(11.874, rel=0.2) and theirs.fits
    assert theirs.time.tensor_parallel == pytest.approx(ours.time.tensor_parallel / 8)
    assert theirs.memory.gradients == ours.memory.gradients / 2 and theirs.memory.weights < 0.1 * ours.memory.weights
    for part in ("layers", "update", "tensor_parallel", "data_parallel"):
        assert getattr(theirs.time, part) < getattr(ours.time, part)


def test_a_distillation_is_pretraining_with_a_teacher_beside() -> None:
    parent = PRESETS["nemotron_h_8b"]
    student = parent.model_copy(update={"ffn_hidden_size": 16384})
    for layout in (Layout(8, 2, True), Layout(8, 2, True, pipeline=4)):
        alone = plan(student, RECIPE, True, layout, H100)
        taught = plan(student, RECIPE, True, layout, H100, parent)
        for part in ("weights", "fp8_copies", "gradients", "optimizer", "activations"):
            assert getattr(taught.memory, part) == getattr(alone.memory, part)
        held, quantized = held_parameters(parent, RECIPE, True, layout, 0)
        assert taught.memory.teacher > 2 * held + quantized and taught.memory.total > alone.memory.total
        batches = 768 // layout.data
        assert taught.time.teacher > batches * forward_seconds(parent, RECIPE, True, layout, H100)
        assert alone.time.total + taught.time.teacher < taught.time.total      # a divergence costs more than a loss
    assert taught.time.pipeline > 1.5 * alone.time.pipeline         # both hidden states travel, stages wait for both
    with pytest.raises(ModelError, match="52 layers cannot be split into 5 pipeline stages"):
        plan(student.model_copy(update={"pattern": "M-" * 25}), RECIPE, True, Layout(5, pipeline=5), H100, parent)
    crowded = plan(student, RECIPE, True, Layout(8, 2, True), H100, parent)
    nearest = nearest_that_fits(crowded)
    assert not crowded.fits and nearest is not None and nearest.fits and nearest.teacher == parent


@pytest.mark.parametrize(("layout", "said"), [
    (Layout(6, tensor=4), "6 GPUs are not a multiple of tensor 4 x pipeline 1"),
    (Layout(32, tensor=16), "tensor parallelism over 16 GPUs leaves a node of 8"),
    (Layout(5), "global_batch_size \\(768\\) is not a multiple of micro_batch_size \\(1\\) x 5"),
    (Layout(5, pipeline=5), "52 layers cannot be split into 5 pipeline stages"),
])
def test_layouts_that_cannot_be(layout: Layout, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        plan(PRESETS["nemotron_h_8b"], RECIPE, False, layout, H100)


def test_what_training_refuses_is_no_plan() -> None:
    """FP8 products of sizes that two processes halve, and a captured step over pipeline stages: neither is proposed."""
    narrow, recipe = SMALL.model_copy(update={"ffn_hidden_size": 48, "pattern": "M-M-M-M-"}), RECIPE.model_copy(
        update={"bf16_layers_at_start": 1, "bf16_layers_at_end": 1, "global_batch_size": 8})
    plan(narrow, recipe, False, Layout(2, tensor=2), H100)
    with pytest.raises(ModelError, match="on each of 2 tensor-parallel processes"):
        plan(narrow, recipe, True, Layout(2, tensor=2), H100)
    with pytest.raises(ModelError, match="2 pipeline stages cannot be captured"):
        plan(SMALL, recipe.model_copy(update={"cuda_graph": True}), False, Layout(2, pipeline=2), H100)


def test_evaluation_over_several_gpus_takes_less_of_each_and_less_time() -> None:
    config = PRESETS["nemotron_h_56b"]
    alone, eight = (inference_seconds(config, 1e6, H100, tensor) for tensor in (1, 8))
    assert alone / 8 < eight < alone / 3                    # what travels between them is waited for
    whole = writing_seconds(config, 100, 8192, H100)
    assert writing_seconds(config, 100, 8192, H100, 8) == whole / 8
    weights = 100 * 2 * parameters(config) / 0.8 / H100.copy
    assert weights < whole < 1.03 * weights                 # and caches of 8,192 tokens
