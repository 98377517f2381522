"""Weights as a Hugging Face directory and back: config.json, safetensors, generation_config.json, training.json, card.

Hybrids are written as `nemotron_h` with a config.json by hand, since the one transformers 5 saves lacks what vLLM,
SGLang, MLX and llama.cpp read. Two of its values are not obvious: `time_step_min` is 1e-9 because transformers takes it
as a floor for dt when it reads a prompt (and no other loader, nor our model, has one), and no mixture-of-experts key is
written because one alone makes llama.cpp expect experts. The Transformer baseline is an `arcee` model (RMSNorm, RoPE,
grouped-query attention, ungated squared ReLU), which differs in names alone.

In memory both have the names of `HybridLM`: `backbone.layers.0.mixer.in_proj.weight`. training.json holds what the
checkpoint says of its training, which no loader reads: an export that is imported and exported again is the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from model.config import PADDING, ModelConfig, ModelError, first_problem
from model.hybrid_lm import FLOAT32_PARAMETERS, Shape, check_shapes
from model.integrity import SUMS, check_finite, check_sums
from model.lazy_state import LazyState, Recipe, State, derive, skeleton
from model.model_card import model_card

EOD_ID, PAD_ID = 2, 3       # `</s>`, which begins and ends documents, and `<pad>`: the tokenizer's ids
SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": EOD_ID, "eos_token_id": EOD_ID, "pad_token_id": PAD_ID}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "tokenizer.model")
POINTER = b"version https://git-lfs"
FORMAT = {"format": "pt"}   # said in every file and in the index
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_GIGABYTES = 5.0       # transformers' own
LAYER_TYPES = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-"}
# What HybridLM computes, whatever the file says of it: another value would be another model. Absent means this value.
# The second names of a bias and of the limits of dt are those that transformers prefers.
FIXED = {
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "use_conv_bias": True, "mamba_conv_bias": True,
    "use_bias": False, "mamba_proj_bias": False, "mlp_bias": False, "attention_bias": False,
    "tie_word_embeddings": False, "sliding_window": None, "hidden_act": "relu2", "rope_scaling": None,
    "is_causal": True,
}
LIMITS = ("time_step_limit", "mamba_dt_limit")
NO_LIMIT = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])      # of dt; the second as transformers 5 writes it


def save(
    directory: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    training: Mapping[str, Any],
    dtype: Literal["float32", "bfloat16"],
    *,
    special_tokens: Mapping[str, Any] = SPECIAL_TOKENS,
    shard_gigabytes: float = SHARD_GIGABYTES,
) -> None:
    """Write `state` and its description into `directory`, which may exist. One file of weights is in memory at a time.

    Args:
        state: every parameter of HybridLM(config) by name, any float type.
        training: what is true of the weights (checkpoint's model.json), for the model card.
        dtype: of the stored tensors; A_log, D and dt_bias are float32 in any file, for loaders that keep them so.
        special_tokens: content of generation_config.json: ids of the tokenizer that is to stand beside.
        shard_gigabytes: weights beyond it are several files and an index (10**9 bytes).

    Raises:
        ModelError: the state is not that of `config`, or no Hub architecture has this geometry.
    """
    architecture = _architecture(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton(state).items()}
    _check_homogeneous(config, shapes)
    check_shapes(config, shapes, "The weights to export")
    names = _arcee_names(config) if architecture == "arcee" else {name: name for name in state}
    stored = derive(state, {names[name]: _as_stored(name, getattr(torch, dtype)) for name in state})
    directory.mkdir(parents=True, exist_ok=True)
    _write_shards(directory, stored, int(shard_gigabytes * 1e9))
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
    special = {name: special_tokens.get(name) for name in SPECIAL_TOKENS}
    own = _arcee_config(config) if architecture == "arcee" else _nemotron_h_config(config)
    _write_json(directory / "config.json", own | shared | special)
    _write_json(directory / "generation_config.json", dict(special_tokens))
    _write_json(directory / "training.json", dict(training))
    parameters = sum(tensor.numel() for tensor in stored.skeleton.values())
    (directory / "README.md").write_text(model_card(config, parameters, training, dtype))


def load(directory: Path | str, dtype: torch.dtype | None = torch.float32) -> tuple[ModelConfig, State]:
    """What `open_weights` opens, read into memory, in `dtype` or, if None, as stored. Raises what that and its tensors
    raise."""
    config, state = open_weights(directory)
    return config, {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in state.items()}


def open_weights(directory: Path | str) -> tuple[ModelConfig, LazyState]:
    """The geometry and the weights (CPU, HybridLM's names, stored dtypes) of a Hub directory, each read when asked for.

    Reads what `save` wrote, what transformers' `save_pretrained` makes of it, and Nemotron-H as NVIDIA publishes it;
    names may begin with `backbone.` or `model.`. Names and shapes are checked before digests and any tensor.

    Raises:
        ModelError: a file is missing or broken, or not the one that SHA256SUMS, where there is one, says; the model is
            of another type, or weights and config.json differ. When a tensor is asked for: it is not finite.
    """
    directory = Path(directory)
    config = read_config(directory)
    state = check_files(directory, config)
    if (directory / SUMS).exists():         # others publish without
        check_sums(directory)
    return config, state


def _read(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file. The file is open, and in memory as far as it is read, as long as the tensor."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file}: {name} cannot be read: {error}.\nExport or download the model again."
        ) from None
    check_finite(tensor, name, file)
    return tensor


def dtype_of(state: LazyState) -> Literal["float32", "bfloat16"]:
    """The dtype in which `save` rounds nothing of `state`. Raises ModelError where each rounds something."""
    if wide := next((name for name, tensor in state.skeleton.items() if tensor.dtype == torch.float64), None):
        raise ModelError(f"{wide} is float64, which an export rounds.\nSay to what: --dtype float32, or bfloat16.")
    held = {tensor.dtype for name, tensor in state.skeleton.items() if not name.endswith(FLOAT32_PARAMETERS)}
    return "bfloat16" if held == {torch.bfloat16} else "float32"


def _as_stored(name: str, dtype: torch.dtype) -> Recipe:
    """A copy, for views of one fused weight cannot be stored."""
    return lambda get: get(name).detach().to(torch.float32 if name.endswith(FLOAT32_PARAMETERS) else dtype,
                                             copy=True, memory_format=torch.contiguous_format)


def _write_shards(directory: Path, state: LazyState, most: int) -> None:
    """Write files of at most `most` bytes and, of several, their index, as huggingface_hub's `save_torch_state_dict`
    does with a state in memory. Files of another such writing go."""
    split = split_torch_state_dict_into_shards(state.skeleton, max_shard_size=most)
    for old in directory.iterdir():
        if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", old.name):
            old.unlink()
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, directory / file, metadata=FORMAT)
    if split.is_sharded:
        index = {"metadata": split.metadata | FORMAT, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2))


def read_config(directory: Path) -> ModelConfig:
    """The geometry in config.json. Raises ModelError where it is not one that HybridLM computes."""
    path = directory / "config.json"
    values = read_json(path)
    readers = {"nemotron_h": _from_nemotron_h, "arcee": _from_arcee}
    try:
        if values.get("model_type") not in readers:
            raise ModelError(
                f"{path}: model_type is {values.get('model_type')!r}, known are 'nemotron_h' and 'arcee'.\n"
                "Give a Nemotron-H, or a directory that the `export` stage wrote."
            )
        for name, expected in FIXED.items():
            if values.get(name, expected) != expected:
                raise ModelError(
                    f"{path}: {name} is {values[name]!r}; the model here is made for {expected!r}.\n"
                    "Take a model without it."
                )
        if limited := [name for name in LIMITS if values.get(name, NO_LIMIT[0]) not in NO_LIMIT]:
            raise ModelError(
                f"{path}: {limited[0]} is {values[limited[0]]}; the model here puts no limits to dt.\n"
                "Take a model without it."
            )
        rope = values.get("rope_parameters") or {}
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":       # "type": the older name
            raise ModelError(
                f"{path}: rope_type is {kind!r}; the model here turns by plain frequencies.\nTake a model without it."
            )
        return readers[values["model_type"]](values)
    except KeyError as error:
        raise ModelError(f"{path}: {error} is missing.\nExport or download the model again.") from None
    except ValidationError as error:
        raise ModelError(f"{path}: {first_problem(error)}.\nExport or download the model again.") from None
    except (TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: holds a value of another kind ({error}).\nExport or download the model again.") from None


def check_files(directory: Path, config: ModelConfig) -> LazyState:
    """The weights of the directory, as `open_weights`, of which only headers have been compared with `config`. Raises
    ModelError."""
    index = directory / INDEX
    placed = _places(index) if index.exists() else {}
    files = sorted(set(placed.values())) or [WEIGHTS]
    if WEIGHTS not in files and (directory / WEIGHTS).exists():
        raise ModelError(
            f"{directory / WEIGHTS}: stands beside {INDEX}, which does not name it; loaders take either.\n"
            "Remove the one that is not the model, or download it again."
        )
    names = names_there(config)
    skeleton: State = {}
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        try:
            with safe_open(directory / file, framework="pt") as tensors:
                rows = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                found = {name: torch.empty(shape, dtype=(of[:0] if shape else of[...]).dtype, device="meta")
                         for name, of in rows.items() for shape in [of.get_shape()]}
        except (OSError, RuntimeError, SafetensorError) as error:       # RuntimeError: FP4
            raise ModelError(
                f"{directory / file}: cannot be read: {_why(directory / file, error)}.\n"
                "Export or download the model again."
            ) from None
        if placed and (misplaced := [name for name in found if placed.get(name) != file]):
            raise ModelError(
                f"{directory / file}: holds {misplaced[0]}, which {index.name} places elsewhere.\n"
                "Export or download the model again; two versions may be mixed."
            )
        for name, tensor in found.items():
            if names(name) in skeleton:
                raise ModelError(
                    f"{directory / file}: {name} is there twice, under another name that means the same.\n"
                    "Export or download the model again; two versions may be mixed."
                )
            skeleton[names(name)], places[names(name)] = tensor, (directory / file, name)
    if lacking := [name for name in placed if names(name) not in places]:
        raise ModelError(
            f"{index}: places {lacking[0]} in {placed[lacking[0]]}, which does not hold it.\n"
            "Export or download the model again; two versions may be mixed."
        )
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in skeleton.items()}, str(directory))
    return LazyState(skeleton, lambda name: _read(*places[name]))


def _places(index: Path) -> dict[str, str]:
    """File names by tensor. Raises ModelError unless they are names of files beside `index`."""
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{index}: has no weight_map.\nExport or download the model again.")
    for name, file in placed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index}: weight_map places {name} in {file!r}, which is no .safetensors file beside it.\n"
                "Export or download the model again."
            )
    return placed


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError."""
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(
            f"{path}: not found.\nGive a directory that `export` wrote or that was downloaded whole; in the Hub's "
            "cache it is snapshots/COMMIT."
        ) from None
    except (OSError, ValueError, RecursionError) as error:      # UnicodeDecodeError too
        raise ModelError(f"{path}: not JSON ({_why(path, error)}).\nExport or download the model again.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: no JSON object.\nExport or download the model again.")
    return values


def _why(path: Path, error: Exception) -> str:
    """Why `path` cannot be read, in a line."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            return "it is a pointer of Git LFS: the file itself was not fetched"
    return " ".join(str(error).split())[:200]


def special_tokens(directory: Path, vocab_size: int) -> dict[str, Any]:
    """Content of generation_config.json, and the special ids that it does not name, by config.json.

    Raises:
        ModelError: an id is none, or one that begins or ends texts is not below `vocab_size`; a file is not JSON.
    """
    config, own = directory / "config.json", directory / "generation_config.json"
    values = read_json(own) if own.exists() else {}
    also = read_json(config) if config.exists() or not values else {}       # beside a tokenizer alone there is none
    for name in SPECIAL_TOKENS:
        path = own if name in values else config
        values.setdefault(name, also.get(name))
        _ids(path, name, values[name], None if name == "pad_token_id" else vocab_size)      # padding may be -1
    return values


def begin_id(directory: Path, vocab_size: int) -> int | None:
    """Id that begins a text, if any, by config.json. Raises ModelError where it is none of `vocab_size`."""
    path = directory / "config.json"
    return next(iter(_ids(path, "bos_token_id", read_json(path).get("bos_token_id"), vocab_size)), None)


def end_ids(directory: Path, vocab_size: int) -> list[int]:
    """Ids any of which ends a text: those of generation_config.json, as in transformers, else of config.json.

    Raises ModelError where one is none of `vocab_size` (transformers would stop at none of them and say nothing).
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        if path.exists() and "eos_token_id" in (values := read_json(path)):
            return _ids(path, "eos_token_id", values["eos_token_id"], vocab_size)
    return []


def _ids(path: Path, name: str, found: Any, vocab_size: int | None) -> list[int]:
    ids = found if isinstance(found, list) and name == "eos_token_id" else [] if found is None else [found]
    if wrong := [each for each in ids if type(each) is not int]:
        several = " or a list of them" if name == "eos_token_id" else ""
        raise ModelError(f"{path}: {name} holds {wrong[0]!r}, which is no id.\nWrite a number{several} there.")
    if vocab_size and (outside := [each for each in ids if not 0 <= each < vocab_size]):
        raise ModelError(f"{path}: {name} holds {outside[0]}, and the model has ids below {vocab_size}.\n"
                         "Write the tokenizer's id there.")
    return ids


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`, for texts as they are: what the file says of cutting and filling them is left out,
    as in transformers. Raises ModelError."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"{path}: not found.\nExport the model again, or download the whole directory.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises no other class
        raise ModelError(
            f"{path}: not a tokenizer ({_why(path, error)}).\nExport or download the model again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_vocabulary(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in `directory`. Raises ModelError unless it is one for a model of `vocab_size` ids, of which up to
    PADDING may be no token's, and a file that goes with it can be read."""
    tokenizer, path = read_tokenizer(directory), directory / "tokenizer.json"
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if not vocab_size - PADDING < size <= vocab_size:
        raise other_vocabulary(str(path), size, vocab_size)
    for name in TOKENIZER_FILES[1:]:
        if (file := directory / name).exists() and file.suffix == ".json":
            read_json(file)
        elif file.exists():
            try:
                if file.suffix == ".jinja":
                    file.read_text()
                elif file.read_bytes().startswith(POINTER):
                    raise ValueError
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"{file}: not readable ({_why(file, error)}).\nExport or download the model again.") from None
    return tokenizer


def other_vocabulary(what: str, size: int, vocab_size: int) -> ModelError:
    """The error of a tokenizer `what` of `size` ids for a model of another number."""
    return ModelError(
        f"{what}: a tokenizer of {size:,} ids, the model has {vocab_size:,}.\n"
        "Give the tokenizer that the model was trained with."
    )


def _check_homogeneous(config: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    """Raise ModelError where layers of a kind differ in width: config.json has one width a kind."""
    for kind, symbol, name in (
        ("feed-forward", "-", "up_proj"), ("Mamba-2", "M", "in_proj"), ("attention", "*", "q_proj"),
        ("attention key-value", "*", "k_proj"),
    ):
        tensors = [f"backbone.layers.{layer}.mixer.{name}.weight" for layer, found in enumerate(config.pattern)
                   if found == symbol]
        widths = [shapes[tensor][0] for tensor in tensors if tensor in shapes]
        if len(set(widths)) > 1:
            raise ModelError(
                f"{kind} layers of this model have {len(set(widths))} widths ({_listed(widths)}): no Hub architecture "
                "has layers that differ.\nCompress to one width a kind (MiniPuzzle), or keep it a training checkpoint."
            )


def _listed(widths: Iterable[int]) -> str:
    return ", ".join(str(width) for width in sorted(set(widths)))


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


def names_there(config: ModelConfig) -> Callable[[str], str]:
    """The function from a name in the file to HybridLM's; names it does not know stay as they are."""
    if config.position_embedding == "rope":
        internal = {name: ours for ours, name in _arcee_names(config).items()}
        return lambda name: internal.get(name, name)
    return lambda name: re.sub(r"^model\.", "backbone.", name)      # transformers' modules, NVIDIA's later releases


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
        mamba_num_groups=values["n_groups"] if "n_groups" in values else values["mamba_n_groups"],
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
        "head_dim": values["head_dim"] if "head_dim" in values else values["attention_head_dim"],
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


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
