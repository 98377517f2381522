"""The running engine on disk: final weights, and the states a killed run resumes from.

Everything goes through megatron-core's distributed checkpointing, so that what one parallel layout wrote another reads.
A state is written under another name, sealed with its files' digests and renamed; a run goes on from the latest that is
as it was written. On a GPU the files are written by a thread while training goes on (`model.megatron.compat`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.megatron.compat import ThreadedSave, optimizer_shards  # before Megatron

# isort: split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.mamba import MambaModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from durable import write
from model.checkpoint import read_index
from model.config import ModelError
from model.integrity import check_sums, write_sums
from model.megatron.distributed import device, is_main_process


def save_model(directory: Path, model: MambaModel) -> None:
    """Write the weights of all processes' parts of `model`, in their dtypes, to `directory` (made if absent)."""
    _Writing({"model": model.sharded_state_dict(metadata=_groups())}, directory, in_background=False).finish()


def load_model(directory: Path, model: MambaModel) -> None:
    """Read weights into `model`, whatever layout wrote them.

    Linear layers' `_extra_state`, where Transformer Engine keeps scales of its own, is left out, because
    `checkpoint.save_weights` writes none. (For Megatron-LM's loader that is `--dist-ckpt-strictness log_all`.)

    Raises:
        ModelError: the checkpoint lacks a tensor of the model, or has it in another shape.
    """
    read_index(directory)                   # refuses one that would have Megatron run code
    weights = model.sharded_state_dict(metadata=_groups())
    weights = {name: shard for name, shard in weights.items() if not name.endswith("_extra_state")}
    try:
        loaded = dist_checkpointing.load({"model": weights}, str(directory))["model"]
    except (KeyError, CheckpointException, CheckpointingException) as error:
        while isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        what = str(error).strip("'\"").partition(" in state dict: [")[0]
        raise ModelError(
            f"{directory}: not the weights of this model: {' '.join(what.split())[:300]}.\n"
            "Use the model.json that was written with these weights."
        ) from None
    lacking, _ = model.load_state_dict(loaded, strict=False)
    assert all(name.endswith("_extra_state") for name in lacking), lacking


class ResumeState:
    """The latest states of an unfinished run under `scratch`.

    Args:
        scratch: the run's directory.
        model, optimizer, scheduler: what is saved and restored.
        kept: states kept, the latest included.
        in_background: whether files are written while training goes on.
    """

    def __init__(
        self, scratch: Path, model: MambaModel, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler,
        kept: int, in_background: bool,
    ):
        self.directory = scratch / "resume"
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.kept, self.in_background = kept, in_background
        self._writing: _Writing | None = None
        self._step = 0                          # of the state that is being written

    def save(self, step: int, records: dict[str, Any], files: Sequence[Path] = ()) -> None:
        """Keep the state after `step`, with `records` and copies of `files`, which the run goes on from too. Older go.

        In the background this returns once everything is copied to the host's memory; `collect` ends it.

        Raises:
            ModelError: the state, or the one before it, could not be written; `latest` still names the last good one.
        """
        self.collect(wait=True)
        partial = self.directory / ".partial"
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        dist.barrier()
        contents = self._contents(loading=False) | {"step": step, "records": records}
        self._writing, self._step = _Writing(contents, partial, self.in_background, files), step
        self.collect(wait=not self.in_background)

    def collect(self, wait: bool) -> None:
        """Make a state whose files are written the latest; every process calls this at the same steps.

        Args:
            wait: for files that are still being written.
        """
        if self._writing is None or not (wait or self._writing.is_done()):
            return
        writing, self._writing = self._writing, None
        writing.finish()
        writing.seal()
        if is_main_process():
            name = f"step-{self._step:08d}"
            try:
                shutil.rmtree(self.directory / name, ignore_errors=True)
                writing.directory.rename(self.directory / name)
                write(self.directory / "latest", name + "\n")
                for older in sorted(self.directory.glob("step-*"))[:-self.kept]:
                    shutil.rmtree(older)
            except OSError as error:
                raise writing._failure(error) from error
        dist.barrier()

    def restore(self, check: Callable[[dict[str, Any]], None]) -> tuple[int, dict[str, Any], Path] | None:
        """Restore the latest state that is whole, unless `check` raises on its records; those after it go. Returns its
        step, its records and the directory with its files, or None where there is none."""
        states = sorted(self.directory.glob("step-*"), reverse=True)
        latest = next((state for state in states if self._is_whole(state)), None)
        if latest is None:
            return None
        check(dist_checkpointing.load_common_state_dict(str(latest))["records"])
        self._check_optimizer(latest)
        with torch.no_grad():
            # Of a spread optimizer's states a process reads those it holds a part of: no replica reads them all.
            loaded = dist_checkpointing.load(self._contents(loading=True), str(latest), validate_access_integrity=False)
            self.model.load_state_dict(loaded["model"])
            self.optimizer.load_state_dict(loaded["optimizer"])
        self.scheduler.load_state_dict(loaded["scheduler"])
        return loaded["step"], loaded["records"], latest

    def _check_optimizer(self, state: Path) -> None:
        """Raise ModelError where `state` holds master weights in the other of Megatron's two forms."""
        spread = any(isinstance(part, DistributedOptimizer) for part in self.optimizer.chained_optimizers)
        held = any(name.startswith("optimizer.state.param.") for name in read_index(state).state_dict_metadata)
        if spread != held:
            raise ModelError(
                f"{state}: written {'with' if held else 'without'} the distributed optimizer, whose states have a form "
                f"of their own.\nSet pretrain.distributed_optimizer to {str(held).lower()} to go on from it, or give "
                "this run a directory of its own.")

    def _is_whole(self, state: Path) -> bool:
        """Whether all files of `state` are those that were written, of which every process looks at its share."""
        damage = ""
        try:
            check_sums(state, slice(dist.get_rank(), None, dist.get_world_size()))
        except ModelError as error:
            damage = str(error).partition("\n")[0]
            print(f"{damage}\nThis state is left out: the run goes on from the one before, or the start.", flush=True)
        damaged = torch.tensor([int(bool(damage))], device=device())
        dist.all_reduce(damaged)
        if damaged.item() and is_main_process():
            shutil.rmtree(state)
        return not damaged.item()

    def _contents(self, loading: bool) -> dict[str, Any]:
        groups = _groups()
        weights = self.model.sharded_state_dict(metadata=groups)
        contents = {"model": weights, "optimizer": optimizer_shards(self.optimizer, weights, loading, groups)}
        return contents if loading else contents | {"scheduler": self.scheduler.state_dict()}


def _groups() -> dict[str, Any]:
    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


class _Writing:
    """A checkpoint on its way to the disk, `compat.ThreadedSave` of every process.

    Attributes:
        directory: where to.
    """

    def __init__(self, contents: dict[str, Any], directory: Path, in_background: bool, files: Sequence[Path] = ()):
        self.directory = directory
        try:
            if is_main_process():
                directory.mkdir(parents=True, exist_ok=True)
            dist.barrier()
            self.files = ThreadedSave(contents, directory)
            for file in files if is_main_process() else ():
                shutil.copy(file, directory)
        except (OSError, RuntimeError) as error:
            raise self._failure(error) from error
        self.files.start(in_background)

    def is_done(self) -> bool:
        """Whether every process has written its files."""
        alive = torch.tensor([int(self.files.thread.is_alive())], device=device())
        dist.all_reduce(alive)
        return not alive.item()

    def finish(self) -> None:
        """Wait for all files and write the index. Raises ModelError where a file could not be written."""
        try:
            self.files.finish()
        except (CheckpointException, OSError, RuntimeError) as error:
            raise self._failure(error) from error

    def seal(self) -> None:
        """Write the digests of all files of all processes. Raises ModelError where that cannot be."""
        written: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(written, self.files.digests)
        try:
            if is_main_process():
                write_sums(self.directory, {name: digest for digests in written for name, digest in digests.items()})
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> ModelError:
        """`error` told to the user, of several processes' the first; the files go, which hold the missing space."""
        if is_main_process():
            shutil.rmtree(self.directory, ignore_errors=True)
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        return ModelError(
            f"{self.directory}: the checkpoint could not be written ({' '.join(str(error).split())[:300]}).\n"
            "Free some space and give the same command again; the run goes on from its latest whole state."
        )
