"""Weights as a Hugging Face directory: config.json, safetensors, generation_config.json, model card.

Hybrids are written as `nemotron_h` with a config.json by hand, since the one transformers 5 saves lacks what vLLM,
SGLang, MLX and llama.cpp read. Two of its values are not obvious: `time_step_min` is 1e-9 because transformers takes it
as a floor for dt when it reads a prompt (and no other loader, nor our model, has one), and no mixture-of-experts key is
written because one alone makes llama.cpp expect experts. The Transformer baseline is an `arcee` model (RMSNorm, RoPE,
grouped-query attention, ungated squared ReLU), which differs in names alone.

In memory both have the names of `HybridLM`: `backbone.layers.0.mixer.in_proj.weight`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig, ModelError
from model.hybrid_lm import FLOAT32_PARAMETERS, HybridLM
from model.model_card import model_card

EOD_ID, PAD_ID = 2, 3       # `</s>`, which begins and ends documents, and `<pad>`: data_pipeline.tokenizer's ids
LAYER_TYPES = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-"}
State = dict[str, Tensor]


def save(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    training: Mapping[str, Any],
    dtype: Literal["float32", "bfloat16"],
) -> None:
    """Write `state` and its description into `directory`, which may exist.

    Args:
        state: every parameter of HybridLM(config) by name, any float type.
        training: what is true of the weights (checkpoint's model.json), for the model card.
        dtype: of the stored tensors; A_log, D and dt_bias are float32 in any file, for loaders that keep them so.

    Raises:
        ModelError: the state is not that of `config`, or no Hub architecture has this geometry.
    """
    architecture = _architecture(config)
    check_state(config, state, "The weights to export")
    names = _arcee_names(config) if architecture == "arcee" else {name: name for name in state}
    stored = {
        names[name]: tensor.detach().to(         # a copy: views of one fused weight cannot be stored
            torch.float32 if name.endswith(FLOAT32_PARAMETERS) else getattr(torch, dtype),
            copy=True, memory_format=torch.contiguous_format,
        )
        for name, tensor in state.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(stored, directory, metadata={"format": "pt"})
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_method_std,
        "max_position_embeddings": config.sequence_length,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    special = {"bos_token_id": EOD_ID, "eos_token_id": EOD_ID, "pad_token_id": PAD_ID}
    own = _arcee_config(config) if architecture == "arcee" else _nemotron_h_config(config)
    _write_json(directory / "config.json", own | shared | special)
    _write_json(directory / "generation_config.json", special)
    parameters = sum(tensor.numel() for tensor in stored.values())
    (directory / "README.md").write_text(model_card(config, parameters, training, dtype))


def load(directory: Path | str) -> tuple[ModelConfig, State]:
    """The geometry and the weights (float32, CPU, HybridLM's names) of a Hub directory.

    Reads what `save` wrote, and what transformers' `save_pretrained` makes of it.

    Raises:
        ModelError: a file is missing or broken, the model is of another type, or weights and config.json differ.
    """
    directory = Path(directory)
    path = directory / "config.json"
    values = _read_json(path)
    try:
        if values.get("model_type") == "nemotron_h":
            config = _from_nemotron_h(values)
        elif values.get("model_type") == "arcee":
            config = _from_arcee(values)
        else:
            raise ModelError(
                f"{path}: model_type is {values.get('model_type')!r}, known are 'nemotron_h' and 'arcee'.\n"
                "Give a directory that the `export` stage wrote."
            )
    except KeyError as error:
        raise ModelError(f"{path}: {error} is missing.\nExport the model again.") from None
    except ValidationError as error:
        item = error.errors()[0]
        where = ".".join(map(str, item["loc"])) or "geometry"
        raise ModelError(f"{path}: {where}: {item['msg']}.\nExport the model again.") from None
    stored = _read_tensors(directory)
    if values["model_type"] == "arcee":
        internal = {name: ours for ours, name in _arcee_names(config).items()}
        stored = {internal.get(name, name): tensor for name, tensor in stored.items()}
    check_state(config, stored, str(directory))
    return config, {name: tensor.float() for name, tensor in stored.items()}


def check_state(config: ModelConfig, state: Mapping[str, Tensor], what: str) -> None:
    """Raise ModelError, naming the tensors, unless `state` has exactly the names and shapes of HybridLM(config)."""
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in HybridLM(config).state_dict().items()}
    problems = [f"missing {name}" for name in expected if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ModelError(
            f"{what}: not the weights of pattern {config.pattern}: {shown}.\n"
            "Use the configuration that was written with these weights."
        )


def _architecture(config: ModelConfig) -> Literal["nemotron_h", "arcee"]:
    """The transformers model type with this geometry. Raises ModelError."""
    if config.position_embedding == "none":
        return "nemotron_h"
    if not re.fullmatch(r"(\*-)+", config.pattern):
        raise ModelError(
            f"pattern {config.pattern} with rotary positions: no Hub architecture has it.\n"
            "Use position_embedding none, or alternate attention and feed-forward layers (*-*-...)."
        )
    if config.hidden_size % config.num_attention_heads:
        raise ModelError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}, "
            "which transformers' arcee wants.\nChange one of them."
        )
    return "arcee"


def _nemotron_h_config(config: ModelConfig) -> dict[str, Any]:
    """Keys of nemotron_h beside the shared ones; where loaders disagree on a name, both stand here."""
    return {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": len(config.pattern),
        "mlp_hidden_act": "relu2",
        "attention_head_dim": config.head_dim,
        "sliding_window": None,
        "mamba_num_heads": config.mamba_num_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "ssm_state_size": config.mamba_state_dim,
        "n_groups": config.mamba_num_groups,
        "mamba_n_groups": config.mamba_num_groups,
        "conv_kernel": config.conv_kernel,
        "chunk_size": config.chunk_size,
        "expand": max(1, config.mamba_inner_size // config.hidden_size),
        "use_conv_bias": True,
        "use_bias": False,
        "mamba_proj_bias": False,
        "mamba_hidden_act": "silu",
        "mamba_ssm_cache_dtype": "float32",
        "time_step_min": 1e-9,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "layer_norm_epsilon": config.norm_epsilon,
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "hidden_dropout": 0.0,
        "num_logits_to_keep": 1,
    }


def _arcee_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["ArceeForCausalLM"],
        "model_type": "arcee",
        "num_hidden_layers": len(config.pattern) // 2,
        "hidden_act": "relu2",
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _from_nemotron_h(values: dict[str, Any]) -> ModelConfig:
    if "hybrid_override_pattern" in values:
        pattern = values["hybrid_override_pattern"]
    else:       # what transformers saves
        pattern = "".join(LAYER_TYPES.get(name, name) for name in values["layers_block_type"])
    return ModelConfig(
        pattern=pattern,
        mamba_num_heads=values["mamba_num_heads"],
        mamba_head_dim=values["mamba_head_dim"],
        mamba_state_dim=values["ssm_state_size"],
        mamba_num_groups=values["n_groups"],
        conv_kernel=values["conv_kernel"],
        chunk_size=values["chunk_size"],
        norm_epsilon=values["layer_norm_epsilon"],
        position_embedding="none",
        **_shared_fields(values),
    )


def _from_arcee(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        pattern="*-" * values["num_hidden_layers"],
        norm_epsilon=values["rms_norm_eps"],
        position_embedding="rope",
        rope_theta=values["rope_parameters"]["rope_theta"],
        **_shared_fields(values),
    )


def _shared_fields(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "ffn_hidden_size": values["intermediate_size"],
        "num_attention_heads": values["num_attention_heads"],
        "num_query_groups": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "init_method_std": values["initializer_range"],
        "sequence_length": values["max_position_embeddings"],
    }


def _arcee_names(config: ModelConfig) -> dict[str, str]:
    """HybridLM's parameter names -> ArceeForCausalLM's: a layer there is an attention and a feed-forward one here."""
    names = {
        "backbone.embeddings.weight": "model.embed_tokens.weight",
        "backbone.norm_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for index in range(len(config.pattern) // 2):
        attention, ffn = f"backbone.layers.{2 * index}", f"backbone.layers.{2 * index + 1}"
        there = f"model.layers.{index}"
        names[f"{attention}.norm.weight"] = f"{there}.input_layernorm.weight"
        names[f"{ffn}.norm.weight"] = f"{there}.post_attention_layernorm.weight"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            names[f"{attention}.mixer.{part}.weight"] = f"{there}.self_attn.{part}.weight"
        for part in ("up_proj", "down_proj"):
            names[f"{ffn}.mixer.{part}.weight"] = f"{there}.mlp.{part}.weight"
    return names


def _read_tensors(directory: Path) -> State:
    """Tensors of model.safetensors, or of the shards its index names. Raises ModelError."""
    index = directory / "model.safetensors.index.json"
    files = sorted(set(_read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    state: State = {}
    for file in files:
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                state |= {name: tensors.get_tensor(name) for name in tensors.keys()}     # noqa: SIM118
        except (FileNotFoundError, SafetensorError) as error:
            raise ModelError(f"{directory / file}: cannot be read: {error}.\nExport the model again.") from None
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: not found.\nGive a directory that the `export` stage wrote.") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON ({error}).\nExport the model again.") from None
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
