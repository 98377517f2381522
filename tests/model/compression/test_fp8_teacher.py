"""An FP8 teacher is close to its BF16 self, and FP8 only where the recipe says."""

import pytest
import torch

from model.compression.comparison import compare
from model.compression.fp8_teacher import fp8_teacher
from model.config import ModelError
from model.hybrid_lm import HybridLM
from model.inference.fp8_weights import FP8Linear
from tests.model.compression.markov import CONFIG, silent


def test_the_inner_layers_are_fp8_and_the_distribution_hardly_moves(data):
    torch.manual_seed(0)
    parent = HybridLM(CONFIG.model_copy(update={"mamba_num_heads": 16, "mamba_head_dim": 8, "init_method_std": 0.2}))
    teacher = fp8_teacher(parent)
    found = {name for name, module in teacher.named_modules() if isinstance(module, FP8Linear)}
    inner = {f"backbone.layers.{index}.mixer.{name}" for index, names in {
        2: ("in_proj", "out_proj"), 3: ("q_proj", "k_proj", "v_proj", "o_proj"), 4: ("up_proj", "down_proj")}.items()
        for name in names}
    assert found == inner
    close = compare(parent, {"fp8": teacher}, data.validation[:4], 4, silent)["fp8"]
    assert 0 < close.kl < 0.02 and close.agreement > 0.9


def test_sizes_that_fp8_does_not_take_are_an_error(parent):
    with pytest.raises(ModelError, match="multiples of 16"):
        fp8_teacher(HybridLM.from_state(*parent))
