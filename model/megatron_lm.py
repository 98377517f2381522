"""Hybrid checkpoints of other people's Megatron: Megatron-LM's and Megatron-Bridge's torch_dist, read and written.

Read is what `pretrain_mamba.py`, `pretrain_hybrid.py` or Megatron-Bridge saved, at any parallel layout: a directory
`iter_0001000`, or the one above it with `latest_checkpointed_iteration.txt`. Weights are read one tensor at a time;
states of optimizer and generators stay where they are. What describes the model, `args` in `common.pt` or Bridge's
`run_config.yaml`, is read as plain values: no class but argparse.Namespace is ever made, and no code is run.

Written is what Megatron-LM calls a release: weights with args and no optimizer, to begin or to go on from.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML, YAMLError
from torch import Tensor

from model.checkpoint import INDEX, CheckpointReader, save_weights, tensors, to_engine, to_hub
from model.config import ModelConfig, ModelError, first_problem
from model.hybrid_lm import HybridLM, Shape, compare_shapes
from model.lazy_state import LazyState, Recipe, derive

TRACKER = "latest_checkpointed_iteration.txt"
ARGS, RUN_CONFIG = "common.pt", "run_config.yaml"
# What HybridLM computes, by the names of args and of run_config.yaml; absent means one of these values.
FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("none",), "normalization": ("RMSNorm",), "add_bias_linear": (False,),
    "add_qkv_bias": (False,), "apply_layernorm_1p": (False,), "layernorm_zero_centered_gamma": (False,),
    "swiglu": (False,), "gated_linear_unit": (False,), "squared_relu": (True,), "qk_layernorm": (False,),
    "multi_latent_attention": (False,), "attention_output_gate": (False,), "softmax_scale": (None,),
    "softmax_type": ("vanilla",), "window_size": (None,), "num_experts": (None, 0), "num_moe_experts": (None, 0),
    "mtp_num_layers": (None, 0), "apply_residual_connection_post_layernorm": (False,), "use_mup": (False,),
    # Megatron's gated norm has this epsilon whatever the others have; here and on the Hub they are one.
    "norm_epsilon": (1e-5,), "layernorm_epsilon": (1e-5,),
}
_STATE = re.compile(r"(chained_\d+\.)?(optimizer|opt_param_scheduler|rng_state|rerun_state_machine)\b")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(mixer\.in_proj|self_attention\.linear_qkv|mlp\.linear_fc1)\.weight\b")
_SYMBOLS = {"mixer.in_proj": "M", "self_attention.linear_qkv": "*", "mlp.linear_fc1": "-"}
# Norms of modules without Transformer Engine, under the names that it gives them.
_LOCAL = (
    (r"^(decoder\.layers\.\d+)\.norm\.weight$", r"\1.mixer.in_proj.layer_norm_weight"),
    (r"^(decoder\.layers\.\d+)\.input_layernorm\.weight$", r"\1.self_attention.linear_qkv.layer_norm_weight"),
    (r"^(decoder\.layers\.\d+)\.pre_mlp_layernorm\.weight$", r"\1.mlp.linear_fc1.layer_norm_weight"),
    (r"^decoder\.final_layernorm\.weight$", "decoder.final_norm.weight"),
)
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Imported:
    """What a Megatron checkpoint holds.

    Attributes:
        state: weights under Hub names, in their stored dtypes, each read when asked for.
        origin: run and iteration, by the names of their directories.
        padding_rows: rows of the vocabulary beyond the tokenizer's, which are left out.
        tied: whether embedding and head were one tensor; here they are two that are equal.
        left_out: entries that are no weights: the training's state and modules' `_extra_state`.
    """

    config: ModelConfig
    state: LazyState
    origin: str
    padding_rows: int
    tied: bool
    left_out: int


def open_megatron(directory: Path) -> Imported:
    """The model in a torch_dist directory of Megatron-LM or Megatron-Bridge. Names and shapes are checked here.

    Raises:
        ModelError: it is not one, is of a model that HybridLM does not compute, or lacks or has too many tensors. When
            a tensor is asked for: it cannot be read, or is not finite.
    """
    directory = _newest(Path(directory))
    reader = CheckpointReader(directory)
    source, options = _options(directory)
    entries = reader.index.state_dict_metadata
    stored = LazyState(
        {name: tensor for name, tensor in tensors(reader.index).items() if not _STATE.match(name)}, reader.read)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.skeleton.items()}
    names = {_engine_name(name): name for name in stored}
    if twice := sorted(set(stored) - set(names.values())):
        raise ModelError(
            f"{directory / INDEX}: {twice[0]} is there twice, the other as {_engine_name(twice[0])}.\n"
            "Take a checkpoint that one model has written."
        )
    config = _config(source, options, _pattern(directory, source, options, list(names)), shapes)
    tied = _HEAD not in names and _is_tied(options)
    if tied and _EMBEDDING in names:
        names[_HEAD] = names[_EMBEDDING]
    rows = _check(directory, config, {engine: shapes[name] for engine, name in names.items()})
    vocabulary = (_EMBEDDING, _HEAD)
    recipes: dict[str, Recipe] = {
        engine: _first_rows(name, config.vocab_size if engine in vocabulary else None)
        for engine, name in names.items()
    }
    state = to_hub(config, derive(stored, recipes))
    return Imported(config, state, f"{directory.parent.name}/{directory.name}", rows - config.vocab_size, tied,
                    len(entries) - len(stored))


def save_megatron(
    directory: Path, config: ModelConfig, state: Mapping[str, Tensor], training: Mapping[str, Any]
) -> None:
    """Write a release that Megatron-LM reads into the existing `directory`, by Transformer Engine's names.

    Its modules' `_extra_state` is not there: Megatron-LM wants `--dist-ckpt-strictness log_all`.

    Args:
        state, training: as in `checkpoint.save_weights`.

    Raises:
        ModelError: the state is not that of `config`, or Megatron's hybrid has no such layer.
    """
    if "M" not in config.pattern or config.position_embedding != "none" or config.norm_epsilon != 1e-5:
        raise ModelError(
            f"pattern {config.pattern}, positions {config.position_embedding}, norm_epsilon {config.norm_epsilon:g}: "
            "Megatron's hybrid has Mamba-2 layers, no positions here, and 1e-05 in its gated norm.\nConvert a hybrid."
        )
    if config.conv_kernel != 4 or config.chunk_size != 128:
        print(f"conv_kernel {config.conv_kernel}, chunk_size {config.chunk_size}: Megatron-LM has 4 and 128 outside of "
              "its args; set d_conv and chunk_size in the spec's mixer.", flush=True)
    release = directory / "release"
    release.mkdir()
    save_weights(release, config, state, training,
                 common={"args": Namespace(**_args(config)), "checkpoint_version": 3.0, "iteration": 0})
    (directory / TRACKER).write_text("release")


def _args(config: ModelConfig) -> dict[str, Any]:
    """The args that `--use-checkpoint-args` takes over."""
    return {
        "num_layers": len(config.pattern), "hybrid_override_pattern": config.pattern,
        "hybrid_layer_pattern": config.pattern, "is_hybrid_model": True,
        "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
        "hidden_size": config.hidden_size, "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads, "group_query_attention": True,
        "num_query_groups": config.num_query_groups, "kv_channels": config.head_dim,
        "mamba_state_dim": config.mamba_state_dim, "mamba_head_dim": config.mamba_head_dim,
        "mamba_num_groups": config.mamba_num_groups, "mamba_num_heads": config.mamba_num_heads,
        "mamba_chunk_size": config.chunk_size,          # for `open_megatron`
        "position_embedding_type": "none", "normalization": "RMSNorm", "norm_epsilon": config.norm_epsilon,
        "add_position_embedding": True, "add_bias_linear": False, "add_qkv_bias": False, "squared_relu": True,
        "swiglu": False, "apply_layernorm_1p": False, "untie_embeddings_and_output_weights": True,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": config.init_method_std,
        "seq_length": config.sequence_length, "max_position_embeddings": config.sequence_length,
        "vocab_size": config.vocab_size, "padded_vocab_size": config.vocab_size, "make_vocab_size_divisible_by": 1,
        "ckpt_format": "torch_dist", "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "expert_model_parallel_size": 1, "no_save_optim": True, "no_save_rng": True,
    }


def _newest(directory: Path) -> Path:
    """The directory of files: `directory`, or what its tracker names. Raises ModelError where it is not torch_dist."""
    tracker = directory / TRACKER
    if tracker.exists():
        name = tracker.read_text(errors="replace").strip()
        directory = directory / (f"iter_{int(name):07d}" if name.isdecimal() else name)
        if not (name.isdecimal() or name == "release") or not directory.is_dir():
            raise ModelError(f"{tracker}: names {name!r}, which is not there.\nGive one of the directories iter_*.")
    directory = directory.resolve()
    if found := sorted(directory.glob("mp_rank_*")):
        raise ModelError(
            f"{found[0]}: a file of Megatron's `torch` format, one a process.\n"
            "Let Megatron-LM write it again: --ckpt-convert-format torch_dist --ckpt-convert-save DIR."
        )
    form = directory / "metadata.json"
    try:
        backend = json.loads(form.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{form}: not what Megatron's distributed checkpoints begin with ({type(error).__name__}: {error}).\n"
            "Give a directory iter_* that Megatron-LM or Megatron-Bridge saved with --ckpt-format torch_dist, whole."
        ) from None
    if backend != "torch_dist":
        raise ModelError(f"{form}: sharded_backend is {backend!r}.\nSave it with --ckpt-format torch_dist.")
    return directory


def _options(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The file that describes the model, and what it says, by the names of Megatron-LM's args or of Bridge's model."""
    path = directory / RUN_CONFIG
    if path.exists():
        try:
            model = YAML(typ="safe", pure=True).load(path.read_text())["model"]
            options = {**model, **(model.get("transformer") or {})}
        except (OSError, YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{path}: no `model` of Megatron-Bridge can be read ({' '.join(str(error).split())[:200]}).\n"
                "Take the file from beside these weights again."
            ) from None
        activation = options.get("activation_func")
        name = activation.get("_target_") if isinstance(activation, dict) else activation
        return path, options | {"squared_relu": str(name).endswith("squared_relu")}
    return (path := directory / ARGS), vars(read_args(path))


class _Nothing:
    """Stands for an object of any class but Namespace: takes what a pickle gives it, and keeps none of it."""

    def __init__(self, *_: Any, **__: Any): ...
    def __call__(self, *_: Any, **__: Any) -> _Nothing: return self
    def __setstate__(self, _: Any) -> None: ...
    def __setitem__(self, _: Any, __: Any) -> None: ...
    def append(self, _: Any) -> None: ...
    def extend(self, _: Any) -> None: ...
    def add(self, _: Any) -> None: ...


class _ArgsUnpickler(pickle.Unpickler):
    """Makes plain values and argparse.Namespace; of anything else, which might be code, nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return Namespace if (module, name) == ("argparse", "Namespace") else _Nothing

    def persistent_load(self, _: Any) -> Any:
        return _Nothing()


def read_args(path: Path) -> Namespace:
    """Megatron-LM's args in a checkpoint's common.pt. Enumerations, dtypes and tensors in it are passed over.

    Raises:
        ModelError: there is no such file, or it has no args.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
            with archive.open(name) as stream:
                args = _ArgsUnpickler(stream).load()["args"]
        assert isinstance(args, Namespace), f"args is a {type(args).__name__}"
        return args
    except Exception as error:              # of a damaged pickle, any
        raise ModelError(
            f"{path}: no args of Megatron-LM can be read ({type(error).__name__}: {error}), and there is no "
            f"{RUN_CONFIG} of Megatron-Bridge.\nGive a checkpoint as one of these saved it, whole."
        ) from None


def _engine_name(name: str) -> str:
    for pattern, replacement in _LOCAL:
        name = re.sub(pattern, replacement, name)
    return name


def _is_tied(options: Mapping[str, Any]) -> bool:
    return bool(options.get("share_embeddings_and_output_weights")) or (
        options.get("untie_embeddings_and_output_weights") is False)


def _pattern(directory: Path, source: Path, options: Mapping[str, Any], names: list[str]) -> str:
    """A symbol a layer, by the tensors, with which what is said must agree. Raises ModelError."""
    layers: dict[int, set[str]] = {}
    for match in filter(None, map(_LAYER.match, names)):
        layers.setdefault(int(match[1]), set()).add(_SYMBOLS[match[2]])
    if not any("M" in symbols for symbols in layers.values()):
        raise ModelError(
            f"{directory / INDEX}: has no Mamba-2 layer (decoder.layers.N.mixer.in_proj.weight): a GPT, or another "
            "family.\nGive a hybrid of Megatron's MambaModel or HybridModel."
        )
    if several := sorted(layer for layer, symbols in layers.items() if len(symbols) > 1):
        raise ModelError(
            f"{directory / INDEX}: layer {several[0]} is of more than one kind.\n"
            "Give a hybrid of Megatron's MambaModel or HybridModel."
        )
    found = "".join("".join(layers.get(layer, "?")) for layer in range(max(layers) + 1))
    name = "hybrid_layer_pattern" if options.get("hybrid_layer_pattern") else "hybrid_override_pattern"
    said = str(options.get(name) or found).split("/")[0].replace("|", "")
    if said != found:
        raise ModelError(
            f"{source}: {name} is {said}; the layers of {INDEX} are {found}.\n"
            "Take both files from one and the same checkpoint; other layers than M, * and - have no place here."
        )
    return found


def _config(source: Path, options: Mapping[str, Any], pattern: str, shapes: Mapping[str, Shape]) -> ModelConfig:
    """The geometry that `options` describe. Raises ModelError."""
    for name, allowed in FIXED.items():
        if options.get(name, allowed[0]) not in allowed:
            raise ModelError(
                f"{source}: {name} is {options[name]!r}; the model here is made for {allowed[0]!r}.\n"
                "Take a model without it."
            )
    if "squared_relu" not in options:
        raise ModelError(f"{source}: squared_relu is missing, without which it is GELU.\nTake a Nemotron-H.")
    try:
        hidden, heads, head_dim = (options[name] for name in ("hidden_size", "num_attention_heads", "mamba_head_dim"))
        groups = options.get("num_query_groups") if options.get("group_query_attention", True) else None
        vocabulary = options.get("vocab_size") or shapes.get(_EMBEDDING, (0,))[0]
        [kernel] = {shape[-1] for name, shape in shapes.items() if name.endswith("mixer.conv1d.weight.x")}
        return ModelConfig(
            pattern=pattern,
            hidden_size=hidden,
            ffn_hidden_size=options.get("ffn_hidden_size") or 4 * hidden,
            num_attention_heads=heads,
            num_query_groups=groups or heads,
            head_dim=options.get("kv_channels") or hidden // heads,
            mamba_num_heads=options.get("mamba_num_heads") or 2 * hidden // head_dim,
            mamba_head_dim=head_dim,
            mamba_state_dim=options["mamba_state_dim"],
            mamba_num_groups=options["mamba_num_groups"],
            conv_kernel=kernel,
            chunk_size=options.get("mamba_chunk_size") or 128,
            norm_epsilon=1e-5,
            init_method_std=options.get("init_method_std", 0.02),
            sequence_length=options["seq_length"],
            vocab_size=vocabulary,
        )
    except KeyError as error:
        raise ModelError(f"{source}: {error} is missing.\nGive a checkpoint with all its args.") from None
    except ValidationError as error:
        raise ModelError(f"{source}: {first_problem(error)}.\nGive a checkpoint with all its args.") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{source}: not the sizes of a hybrid ({error}).\nGive a checkpoint with all its args.") \
            from None


def _check(directory: Path, config: ModelConfig, shapes: Mapping[str, Shape]) -> int:
    """Rows of the stored vocabulary. Raises ModelError unless `shapes` are those of `config`, but for more rows."""
    skeleton = to_engine(config, HybridLM.skeleton(config).state_dict()).skeleton
    rows = max(shapes.get(_EMBEDDING, (0,))[0], config.vocab_size)
    expected = {name: (rows if name in (_EMBEDDING, _HEAD) else tensor.shape[0], *tensor.shape[1:])
                for name, tensor in skeleton.items()}
    compare_shapes(
        expected, shapes, f"{directory / INDEX}: not the weights of pattern {config.pattern} as described beside it",
        "Take weights and description from one and the same checkpoint; a model with more parts has no form here.")
    return rows


def _first_rows(name: str, rows: int | None) -> Recipe:
    return lambda get: get(name)[:rows]
