"""What a model's sizes are refused for, and that the message names the field and the remedy."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from tiny_engine import HYBRID, RECIPE, TRANSFORMER

from model.config import ModelConfig, ModelError
from model.megatron.distributed import ONE_COPY, Parallelism
from model.megatron.limits import check_cuda_graph, check_kernels, check_micro_batch, check_model
from model.megatron.precision import Precision
from model.presets import PRESETS

FP8 = Precision("fp8", 2, 2)
EMULATED = Precision("fp8", 2, 2, emulated=True)
WIDE = HYBRID.model_copy(update={"pattern": "M-M*-M-", "hidden_size": 64})


def message(error: pytest.ExceptionInfo[ModelError]) -> str:
    assert str(error.value).count("\n") == 1
    return str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_fit_for_fp8_and_the_kernels(name):
    config = PRESETS[name]
    for ranks in (1,) if name == "nemotron_h_4b" else (1, 2, 4, 8):     # 112 heads, cut in two, are no longer fit
        check_model(config, FP8, Parallelism(tensor=ranks, sequence=ranks > 1))
    check_micro_batch(config, FP8, 1)
    if "M" in config.pattern:
        check_kernels(config)


@pytest.mark.parametrize(("change", "ranks", "field"), [
    ({"hidden_size": 72}, 1, "hidden_size"),
    ({"mamba_num_heads": 8}, 1, "mamba_num_heads"),                     # 2 x 128 + 64 + 8 rows
    ({"ffn_hidden_size": 40}, 1, "ffn_hidden_size"),
    ({"num_attention_heads": 6, "num_query_groups": 3, "head_dim": 6}, 1, "head_dim"),
    ({"ffn_hidden_size": 48}, 2, "ffn_hidden_size"),                    # 24 on each
])
def test_fp8_wants_multiples_of_16(change, ranks, field):
    config = ModelConfig.model_validate(WIDE.model_dump() | {"mamba_num_heads": 16 * ranks} | change)
    with pytest.raises(ModelError, match="multiple of 16") as error:
        check_model(config, FP8, Parallelism(tensor=ranks))
    assert field in message(error).splitlines()[1]
    check_model(config, Precision("bf16"), Parallelism(tensor=ranks))
    check_model(config, EMULATED, Parallelism(tensor=ranks))            # emulation has no such limit


def test_layers_that_stay_bf16_may_have_any_size():
    config = WIDE.model_copy(update={"pattern": "M-*-M-", "mamba_num_heads": 8})
    check_model(config, Precision("fp8", 1, 2), ONE_COPY)
    with pytest.raises(ModelError, match="in_proj"):
        check_model(config, Precision("fp8", 0, 2), ONE_COPY)


@pytest.mark.parametrize("precision", [FP8, EMULATED])
def test_fp8_without_a_layer_in_fp8_is_an_error(precision):
    check_model(WIDE.model_copy(update={"pattern": "M-*-M"}), precision, ONE_COPY)
    with pytest.raises(ModelError, match="leave none of 4 layers") as error:
        check_model(WIDE.model_copy(update={"pattern": "M-*-"}), precision, ONE_COPY)
    assert "bf16 variant" in message(error).splitlines()[1]


def test_fp8_wants_tokens_in_multiples_of_16():
    config = WIDE.model_copy(update={"sequence_length": 40})
    with pytest.raises(ModelError, match="micro_batch_size") as error:
        check_micro_batch(config, FP8, 1)
    assert "sequence_length" in message(error).splitlines()[1]
    check_micro_batch(config, FP8, 2)
    check_micro_batch(config, EMULATED, 1)


def test_exchanges_of_pipeline_stages_cannot_be_captured():
    recipe = RECIPE.model_copy(update={"cuda_graph": True})
    check_cuda_graph(recipe, ONE_COPY)
    with pytest.raises(ModelError, match="exchanges between 2 pipeline stages"):
        check_cuda_graph(recipe, Parallelism(pipeline=2))


@pytest.mark.parametrize(("change", "field"), [
    ({"mamba_head_dim": 48}, "mamba_head_dim"), ({"mamba_state_dim": 512}, "mamba_state_dim"),
    ({"mamba_head_dim": 8}, "mamba_head_dim"), ({"conv_kernel": 3}, "conv_kernel"),
    ({"mamba_head_dim": 256, "mamba_state_dim": 256}, "mamba_head_dim x mamba_state_dim"),
])
def test_kernels_take_certain_sizes(change, field):
    check_kernels(HYBRID)
    with pytest.raises(ModelError, match=field) as error:
        check_kernels(HYBRID.model_copy(update=change))
    assert "Choose" in message(error).splitlines()[1]


@pytest.mark.parametrize(("config", "parallelism", "field"), [
    (HYBRID, Parallelism(tensor=4), "num_query_groups"), (HYBRID, Parallelism(pipeline=3), "4 layers"),
    (TRANSFORMER.model_copy(update={"sequence_length": 15}), Parallelism(tensor=2, sequence=True), "sequence_length"),
    (HYBRID.model_copy(update={"vocab_size": 65}), Parallelism(tensor=2), "vocab_size"),
    (HYBRID.model_copy(update={"mamba_num_groups": 1}), Parallelism(tensor=2), "mamba_num_groups"),
])
def test_a_model_that_cannot_be_split_is_an_error(config, parallelism, field):
    with pytest.raises(ModelError, match=field) as error:
        check_model(config, Precision("bf16"), parallelism)
    assert message(error)


@pytest.mark.parametrize(("change", "words"), [
    ({"pattern": ""}, "at least one layer"), ({"pattern": "M-X-"}, "layer 2 of the pattern is 'X'"),
    ({"num_query_groups": 3}, "num_query_groups"), ({"mamba_num_groups": 3}, "mamba_num_groups"),
    ({"mamba_state_dim": 0}, "mamba_state_dim"), ({"position_embedding": "rope", "head_dim": 7}, "head_dim"),
])
def test_a_geometry_that_is_none_says_why(change, words):
    with pytest.raises(ValidationError) as error:
        ModelConfig.model_validate(HYBRID.model_dump() | change)
    [item] = error.value.errors()
    what, remedy = item["msg"].split("\n")
    assert words in what and remedy
