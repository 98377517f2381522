"""The running engine on disk: final weights, and the state a killed run resumes from.

Everything goes through megatron-core's distributed checkpointing, so that what one parallel layout wrote another reads.
Resume directories are written under another name and renamed, so one that can be seen is whole.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model import te_guard  # noqa: F401    # before Megatron

# isort: split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.models.mamba import MambaModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from model.distributed import is_main_process


def save_model(directory: Path, model: MambaModel) -> None:
    """Write the weights of all processes' parts of `model`, in their dtypes, to `directory` (made if absent)."""
    _save({"model": model.sharded_state_dict(metadata=_groups())}, directory)


def load_model(directory: Path, model: MambaModel) -> None:
    """Read weights into `model`, whatever layout wrote them.

    Linear layers' `_extra_state`, where Transformer Engine keeps scales of its own, is left out, because
    `checkpoint.save_weights` writes none. (For Megatron-LM's loader that is `--dist-ckpt-strictness log_all`.)
    """
    weights = model.sharded_state_dict(metadata=_groups())
    weights = {name: shard for name, shard in weights.items() if not name.endswith("_extra_state")}
    model.load_state_dict(dist_checkpointing.load({"model": weights}, str(directory))["model"])


class ResumeState:
    """The latest state of an unfinished run under `scratch`.

    Attributes:
        model, optimizer, scheduler: what is saved and restored.
    """

    def __init__(
        self, scratch: Path, model: MambaModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
    ):
        self.directory = scratch / "resume"
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler

    def save(self, step: int, records: dict[str, Any]) -> None:
        """Keep the state after `step` and what was recorded so far; drop older states."""
        partial = self.directory / ".partial"
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        _save(self._contents(loading=False) | {"step": step, "records": records, "random": torch.get_rng_state()},
              partial)
        if is_main_process():
            older = self._saved()
            partial.rename(self.directory / f"step-{step:08d}")
            for directory in older:
                shutil.rmtree(directory)
        dist.barrier()

    def restore(self) -> tuple[int, dict[str, Any]] | None:
        """Restore the latest state. Returns its step and records, or None where there is none."""
        saved = self._saved()
        if not saved:
            return None
        with torch.no_grad():
            loaded = dist_checkpointing.load(self._contents(loading=True), str(saved[-1]))
            self.model.load_state_dict(loaded["model"])
            self.optimizer.load_state_dict(loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["scheduler"])
        torch.set_rng_state(loaded["random"])
        return loaded["step"], loaded["records"]

    def _saved(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"))

    def _contents(self, loading: bool) -> dict[str, Any]:
        groups = _groups()
        weights = self.model.sharded_state_dict(metadata=groups)
        contents = {"model": weights, "optimizer": _optimizer_shards(self.optimizer, weights, loading, groups)}
        return contents if loading else contents | {"scheduler": self.scheduler.state_dict()}


def _optimizer_shards(
    optimizer: MegatronOptimizer, weights: dict[str, Any], loading: bool, groups: dict[str, Any]
) -> dict[str, Any]:
    """Master weights and Adam moments, sharded as the model's weights.

    Follows Float16OptimizerWithFloat16Params.sharded_state_dict of megatron-core 0.16.1, which takes every parameter to
    be BF16 and gives shards to the wrong ones where some are float32, as A_log, D and dt_bias are here.
    """
    [inner] = optimizer.chained_optimizers
    if not isinstance(inner, Float16OptimizerWithFloat16Params):
        return inner.sharded_state_dict(weights, is_loading=loading, metadata=groups)
    if loading:
        inner.init_state_fn(inner.optimizer, inner.config)
    master_groups = inner.fp32_from_float16_groups
    model_of = {
        id(master): parameter
        for parameters, masters in zip(inner.float16_groups, master_groups, strict=True)
        for parameter, master in zip(parameters, masters, strict=True)
    }
    tracked = inner.get_parameters()
    shards = get_param_id_to_sharded_param_map(weights, [model_of.get(id(item), item) for item in tracked])
    position = {id(item): index for index, item in enumerate(tracked)}
    state = inner.state_dict()
    state["fp32_from_fp16_params"] = [
        [make_sharded_optimizer_tensor(shards[position[id(master)]], master, "optimizer.state.fp32_param")
         for master in masters]
        for masters in master_groups
    ]
    step = inner._extract_common_per_param_step(state["optimizer"])
    optim_state_to_sharding_state(state["optimizer"], shards, exclude_keys=("step",))
    if step is not None:
        state["optimizer"]["state"]["common_step"] = step
    return state


def _groups() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _save(contents: dict[str, Any], directory: Path) -> None:
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(contents, str(directory))
