"""Weights on disk: megatron-core's distributed format under Megatron's names, read and written by Hub names.

A checkpoint directory holds `torch_dist` files, which Megatron loads at any parallel layout, and `model.json`. The same
files are PyTorch's own distributed checkpoints, so these functions need no process group and no Megatron.
Tensor-parallel packed tensors are stored section by section (`in_proj.weight.z`, ...), as Megatron's mixer stores them.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from model.config import ModelConfig, ModelError
from model.hybrid_lm import HybridLM, check_shapes, compare_shapes
from model.integrity import check_finite, check_sums, write_sums
from model.lazy_state import LazyState, Recipe, State, derive, skeleton

INDEX = ".metadata"
_FILE = "__0_0.distcp"                                      # PyTorch's name for the first file of the first process

# What Megatron reads first to know how the rest is stored.
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
           "common_backend_version": 1}


def save_weights(
    directory: Path, config: ModelConfig, state: Mapping[str, Tensor], training: Mapping[str, Any],
    common: Mapping[str, Any] | None = None,
) -> None:
    """Write `state` (Hub names, any float dtype, kept) and model.json to the existing `directory`.

    One tensor after the other: of a lazy `state` a few are in memory at a time.

    Args:
        common: Megatron's unsharded state, which others than this project read.

    Raises:
        ModelError: `state` is not that of `config`; nothing is written.
    """
    check_shapes(config, {name: tuple(tensor.shape) for name, tensor in skeleton(state).items()}, str(directory))
    stored = to_engine(config, state)
    planner = DefaultSavePlanner()
    planner.set_up_planner(stored.skeleton, is_coordinator=True)
    [plan], index = planner.create_global_plan([planner.create_local_plan()])
    written = []
    with (directory / _FILE).open("wb") as stream:          # FileSystemWriter would keep all it has written
        for item in plan.items:
            tensor, start = stored[item.index.fqn].detach().cpu(), stream.tell()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:      # all of which would be written
                tensor = tensor.clone()
            torch.save(tensor, stream)
            place = _StorageInfo(_FILE, start, stream.tell() - start)
            written.append(WriteResult(item.index, tensor.nbytes, place))
    FileSystemWriter(directory).finish(index, [written])
    with (directory / "common.pt").open("wb") as stream:
        torch.save(dict(common or {}), stream)              # by its path, bytes would depend on that being ASCII
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))
    describe(directory, config, training)


def load_weights(directory: Path) -> tuple[ModelConfig, State, dict[str, Any]]:
    """What `open_weights` opens, read into memory as float32 CPU tensors. Raises what that and its tensors raise."""
    config, state, training = open_weights(directory)
    return config, {name: tensor.float() for name, tensor in state.items()}, training


def open_weights(directory: Path) -> tuple[ModelConfig, LazyState, dict[str, Any]]:
    """The model's configuration, its weights under Hub names and its training record.

    The weights are CPU tensors in their stored dtypes, each read when asked for, whatever layout wrote it, and checked
    to be finite then. Digests, names and shapes are checked here.

    Raises:
        ModelError: `directory` is no checkpoint, or not one of the model its model.json describes; a file is not the
            one that was written. When a tensor is asked for: it cannot be read, or is not finite. Nothing of
            `directory` is ever executed.
    """
    config, training = read_description(directory)
    check_sums(directory)
    reader = CheckpointReader(directory)
    stored = LazyState(tensors(reader.index), reader.read)
    _check_names(directory, config, stored.skeleton)
    return config, to_hub(config, stored), training


def check_names(directory: Path, config: ModelConfig) -> None:
    """Raise ModelError unless the checkpoint `directory` holds the tensors of `config` and no others."""
    _check_names(directory, config, tensors(read_index(directory)))


def _check_names(directory: Path, config: ModelConfig, stored: State) -> None:
    wanted = {name: tuple(tensor.shape)
              for name, tensor in to_engine(config, HybridLM.skeleton(config).state_dict()).skeleton.items()}
    compare_shapes(wanted, {name: tuple(tensor.shape) for name, tensor in stored.items()},
                   f"{directory / INDEX}: not the weights of the model in model.json",
                   "Use the weights and the model.json of one and the same checkpoint.")


def tensors(index: Metadata) -> State:
    """What a checkpoint holds, on the meta device; its other entries are Megatron's empty `_extra_state` objects. A
    tensor of which a part is missing, which loaders would leave as the memory was, is not held."""
    return {name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in index.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
            and sum(part.sizes.numel() for part in entry.chunks) >= entry.size.numel()}


def read_description(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's configuration and training record in a checkpoint's model.json. Raises ModelError."""
    description = directory / "model.json"
    try:
        content = json.loads(description.read_text())
        return ModelConfig(**content["model"]), dict(content["training"])
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{description}: not found.\nGive a training checkpoint, such as pretrain, compress or "
                         "`python -m stages.export --from-hub` writes.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{description}: not a model description ({' '.join(str(error).split())[:200]}).\n"
            "Run the stage that writes this checkpoint again (pretrain or compress)."
        ) from None


def describe(directory: Path, config: ModelConfig, training: Mapping[str, Any]) -> None:
    """Complete saved weights with model.json: the geometry, and what is true of the weights on every run; and seal
    them with their digests.

    PyTorch marks each save with a random id and lists tensors as its threads finish: the id goes and the list is
    sorted, so that the same weights are the same files.
    """
    metadata = read_index(directory)
    metadata.storage_meta = None
    metadata.storage_data = dict(sorted(metadata.storage_data.items(), key=lambda entry: str(entry[0])))
    (directory / INDEX).write_bytes(pickle.dumps(metadata))
    content = {"model": config.model_dump(mode="json"), "training": dict(training)}
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


class CheckpointReader(FileSystemReader):
    """One tensor after the other. PyTorch's own would unpickle whatever the index names, for every load again."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.directory, self.index = directory, read_index(directory)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, as it was read."""
        return self.index

    def read(self, name: str) -> Tensor:
        """The whole tensor of a name, from all files that hold a part. Raises ModelError."""
        entry = self.index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")             # PyTorch remarks that no process group is open
                distributed_checkpoint.load({name: tensor}, storage_reader=self, no_dist=True)
        except (CheckpointException, Exception) as error:   # of a damaged file, any
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            files = {info.relative_path for part, info in self.index.storage_data.items() if part.fqn == name}
            raise ModelError(
                f"{self.directory}: {name} cannot be read from {', '.join(sorted(files))} "
                f"({' '.join(str(cause).split())[:200]}).\n"
                "Restore the file, or run the stage that writes this checkpoint again (pretrain or compress)."
            ) from None
        check_finite(tensor, name, self.directory)
        return tensor


def to_engine(config: ModelConfig, state: Mapping[str, Tensor]) -> LazyState:
    """Weights under Megatron's names, as stored, from those under Hub names, all of which must be there."""
    recipes = {engine: _same(hub) for engine, hub in _ENDS.items()}
    for engine, hub, symbol in _layers(config):
        recipes[engine + _NORM[symbol]] = _same(f"{hub}norm.weight")
        for ours, theirs in _SAME_SHAPE[symbol].items():
            recipes[engine + ours] = _same(hub + theirs)
        if symbol == "M":
            for name, sections in _packed(config).items():
                for place, section in enumerate(sections):
                    rows = list(sections.values())
                    recipes[f"{engine}mixer.{name}.{section}"] = _section(f"{hub}mixer.{name}", rows, place)
        elif symbol == "*":
            parts = [f"{hub}mixer.{name}_proj.weight" for name in "qkv"]
            recipes[f"{engine}self_attention.linear_qkv.weight"] = _by_group(parts, config.num_query_groups)
    return derive(state, recipes)


def to_hub(config: ModelConfig, stored: Mapping[str, Tensor]) -> LazyState:
    """The inverse of `to_engine`."""
    recipes = {hub: _same(engine) for engine, hub in _ENDS.items()}
    for engine, hub, symbol in _layers(config):
        recipes[f"{hub}norm.weight"] = _same(engine + _NORM[symbol])
        for ours, theirs in _SAME_SHAPE[symbol].items():
            recipes[hub + theirs] = _same(engine + ours)
        if symbol == "M":
            for name, sections in _packed(config).items():
                recipes[f"{hub}mixer.{name}"] = _joined([f"{engine}mixer.{name}.{section}" for section in sections])
        elif symbol == "*":
            for place, name in enumerate("qkv"):
                recipes[f"{hub}mixer.{name}_proj.weight"] = _of_groups(
                    f"{engine}self_attention.linear_qkv.weight", config, place)
    return derive(stored, recipes)


def _same(name: str) -> Recipe:
    return lambda get: get(name)


def _section(name: str, rows: list[int], place: int) -> Recipe:
    return lambda get: get(name).split(rows)[place]


def _joined(names: list[str]) -> Recipe:
    return lambda get: torch.cat([get(name) for name in names])


def _by_group(names: list[str], groups: int) -> Recipe:
    """Rows of q, k and v by query group: the queries of a group, its key, its value."""
    return lambda get: torch.cat([get(name).unflatten(0, (groups, -1)) for name in names], 1).flatten(0, 1)


def _of_groups(name: str, config: ModelConfig, place: int) -> Recipe:
    rows = [config.attention_size // config.num_query_groups, config.head_dim, config.head_dim]
    return lambda get: get(name).unflatten(0, (config.num_query_groups, -1)).split(rows, 1)[place].flatten(0, 1)


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
