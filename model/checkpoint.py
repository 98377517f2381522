"""Weights on disk: megatron-core's distributed format under Megatron's names, read and written by Hub names.

A checkpoint directory holds `torch_dist` files, which Megatron loads at any parallel layout, and `model.json`. The same
files are PyTorch's own distributed checkpoints, so these functions need no process group and no Megatron.
Tensor-parallel packed tensors are stored section by section (`in_proj.weight.z`, ...), as Megatron's mixer stores them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import sys
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from pydantic import ValidationError
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from model.config import ModelConfig, ModelError
from model.integrity import check_finite, check_sums, write_sums

State = dict[str, Tensor]
INDEX = ".metadata"

# What Megatron reads first to know how the rest is stored.
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
           "common_backend_version": 1}


def save_weights(directory: Path, config: ModelConfig, state: State, training: dict[str, Any]) -> None:
    """Write `state` (Hub names, any float dtype, kept) and model.json to the existing `directory`.

    Raises:
        ModelError: `state` lacks a weight of `config`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # PyTorch remarks that no process group is open
        distributed_checkpoint.save(
            to_engine(config, state), storage_writer=FileSystemWriter(directory), no_dist=True
        )
    torch.save({}, directory / "common.pt")                 # Megatron's unsharded state: there is none
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))
    describe(directory, config, training)


def load_weights(directory: Path) -> tuple[ModelConfig, State, dict[str, Any]]:
    """The model's configuration, its weights as float32 CPU tensors under Hub names, and its training record.

    Raises:
        ModelError: `directory` is no checkpoint, or not one of the model its model.json describes; a file is not the
            one that was written; a weight is not finite. Nothing of it is ever executed.
    """
    description = directory / "model.json"
    try:
        content = json.loads(description.read_text())
        config = ModelConfig(**content["model"])
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise ModelError(
            f"{description}: not a model description ({' '.join(str(error).split())[:200]}).\n"
            "Run the stage that writes this checkpoint again (pretrain or compress)."
        ) from None
    check_sums(directory)
    reader = _Reader(directory)
    stored: State = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)         # the others are Megatron's empty `_extra_state` objects
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            distributed_checkpoint.load(stored, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            why = next((failure for failure, _ in error.failures.values()), error)
            raise ModelError(f"{directory}: its weights cannot be read ({type(why).__name__}: {str(why)[:200]}).\n"
                             "Take a checkpoint that this project or Megatron wrote, whole.") from None
    for name, tensor in stored.items():
        check_finite(tensor, name, directory)
    state = to_hub(config, {name: tensor.float() for name, tensor in stored.items()})
    return config, state, content["training"]


def describe(directory: Path, config: ModelConfig, training: dict[str, Any]) -> None:
    """Complete saved weights with model.json: the geometry, and what is true of the weights on every run; and seal
    them with their digests.

    PyTorch marks each save with a random id and lists tensors as its threads finish: the id goes and the list is
    sorted, so that the same weights are the same files.
    """
    metadata = read_index(directory)
    metadata.storage_meta = None
    metadata.storage_data = dict(sorted(metadata.storage_data.items(), key=lambda entry: str(entry[0])))
    (directory / INDEX).write_bytes(pickle.dumps(metadata))
    content = {"model": config.model_dump(mode="json"), "training": training}
    (directory / "model.json").write_text(json.dumps(content, indent=1) + "\n")
    write_sums(directory)


class _Unpickler(pickle.Unpickler):
    """Makes what a checkpoint's index is made of. All else might be code of whoever wrote the file."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(sys.modules.get(module), name, None)
        record = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum))
        if module.startswith("torch.distributed.checkpoint.") and record:
            return found
        if isinstance(found, torch.dtype) or found in (torch.Size, torch.serialization._get_layout, PosixPath):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_index(directory: Path) -> Metadata:
    """PyTorch's index of a checkpoint. Raises ModelError where it is not one, or asks for anything else."""
    try:
        with (directory / INDEX).open("rb") as stream:
            index = _Unpickler(stream).load()
        assert isinstance(index, Metadata), f"a {type(index).__name__}"
        return index
    except Exception as error:              # of a damaged pickle, any
        raise ModelError(
            f"{directory / INDEX}: not the index of a checkpoint ({type(error).__name__}: {error}).\n"
            "Take a checkpoint that this project or Megatron wrote, whole."
        ) from None


class _Reader(FileSystemReader):
    """PyTorch's own would unpickle whatever the index names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


def to_engine(config: ModelConfig, state: State) -> State:
    """Weights under Megatron's names, as stored, from those under Hub names. Raises ModelError where one is missing."""
    stored: State = {}
    with _names_the_missing():
        for engine, hub in _ENDS.items():
            stored[engine] = state[hub]
        for engine, hub, symbol in _layers(config):
            stored[engine + _NORM[symbol]] = state[f"{hub}norm.weight"]
            for ours, theirs in _SAME_SHAPE[symbol].items():
                stored[engine + ours] = state[hub + theirs]
            if symbol == "M":
                for name, sections in _packed(config).items():
                    parts = state[f"{hub}mixer.{name}"].split(list(sections.values()))
                    for section, part in zip(sections, parts, strict=True):
                        stored[f"{engine}mixer.{name}.{section}"] = part.contiguous()
            elif symbol == "*":
                q, k, v = (state[f"{hub}mixer.{name}_proj.weight"].unflatten(0, (config.num_query_groups, -1))
                           for name in "qkv")
                stored[f"{engine}self_attention.linear_qkv.weight"] = torch.cat([q, k, v], 1).flatten(0, 1)
    return stored


def to_hub(config: ModelConfig, stored: State) -> State:
    """The inverse of `to_engine`."""
    state: State = {}
    with _names_the_missing():
        for engine, hub in _ENDS.items():
            state[hub] = stored[engine]
        for engine, hub, symbol in _layers(config):
            state[f"{hub}norm.weight"] = stored[engine + _NORM[symbol]]
            for ours, theirs in _SAME_SHAPE[symbol].items():
                state[hub + theirs] = stored[engine + ours]
            if symbol == "M":
                for name, sections in _packed(config).items():
                    state[f"{hub}mixer.{name}"] = torch.cat(
                        [stored[f"{engine}mixer.{name}.{section}"] for section in sections]
                    )
            elif symbol == "*":
                groups = stored[f"{engine}self_attention.linear_qkv.weight"].unflatten(0, (config.num_query_groups, -1))
                query_rows = config.attention_size // config.num_query_groups
                parts = groups.split([query_rows, config.head_dim, config.head_dim], 1)
                for name, part in zip("qkv", parts, strict=True):
                    state[f"{hub}mixer.{name}_proj.weight"] = part.flatten(0, 1)
    return state


# Megatron fuses a layer's input norm into the linear layer after it; on the Hub it belongs to the block.
_NORM = {
    "M": "mixer.in_proj.layer_norm_weight",
    "*": "self_attention.linear_qkv.layer_norm_weight",
    "-": "mlp.linear_fc1.layer_norm_weight",
}
_ENDS = {
    "embedding.word_embeddings.weight": "backbone.embeddings.weight",
    "decoder.final_norm.weight": "backbone.norm_f.weight",
    "output_layer.weight": "lm_head.weight",
}
_SAME_SHAPE = {
    "M": {f"mixer.{name}": f"mixer.{name}" for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight")},
    "*": {"self_attention.linear_proj.weight": "mixer.o_proj.weight"},
    "-": {"mlp.linear_fc1.weight": "mixer.up_proj.weight", "mlp.linear_fc2.weight": "mixer.down_proj.weight"},
}


def _layers(config: ModelConfig) -> list[tuple[str, str, str]]:
    """Megatron's prefix, the Hub's prefix and the symbol of every layer."""
    return [
        (f"decoder.layers.{index}.", f"backbone.layers.{index}.", symbol) for index, symbol in enumerate(config.pattern)
    ]


def _packed(config: ModelConfig) -> dict[str, dict[str, int]]:
    """Rows of each section of the mixer's packed tensors."""
    states = config.mamba_num_groups * config.mamba_state_dim
    convolved = {"x": config.mamba_inner_size, "B": states, "C": states}
    return {
        "in_proj.weight": {"z": config.mamba_inner_size, **convolved, "dt": config.mamba_num_heads},
        "conv1d.weight": convolved,
        "conv1d.bias": convolved,
    }


@contextlib.contextmanager
def _names_the_missing() -> Iterator[None]:
    try:
        yield
    except KeyError as error:
        raise ModelError(
            f"weights: {error.args[0]} is missing, which the model's configuration asks for.\n"
            "Use the weights and the model.json of one and the same checkpoint."
        ) from None
