"""Processes of torch.distributed, and those of them that one layer and the vocabulary are split over.

Nothing here knows of Megatron: training's groups (`model.megatron.distributed`) and evaluation's are opened alike.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LONGEST_WAIT = timedelta(hours=1)       # for another process: the first cuts a model of a hundred gigabytes meanwhile


@contextlib.contextmanager
def torch_processes() -> Iterator[None]:
    """Open torch.distributed for the block: torchrun's processes, each on its GPU, or this one alone; NCCL on a GPU,
    gloo on a CPU."""
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    if "RANK" in os.environ:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    try:
        yield
    finally:
        if on_gpu:                  # a process group does not close while a graph holds its collectives
            # By type: to ask an object of PyTorch's for its class may warn of the object.
            for graph in [thing for thing in gc.get_objects() if issubclass(type(thing), torch.cuda.CUDAGraph)]:
                graph.reset()
        dist.destroy_process_group()


def job_processes() -> contextlib.AbstractContextManager[None]:
    """A block in which torchrun's processes, if this is one of them, can reach each other."""
    return torch_processes() if "RANK" in os.environ else contextlib.nullcontext()


def release_memory() -> None:
    """Give a device's memory back that models gone by now have held: some, as Megatron's, refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class TensorRanks:
    """The processes that a layer and the vocabulary are split over, seen from one of them; at first there is no other.

    Attributes:
        tensor_rank, tensor_ranks: this process's place among them, and how many.
        tensor_group: they as torch.distributed has them.
    """

    tensor_rank, tensor_ranks = 0, 1
    tensor_group: dist.ProcessGroup | None = None

    def split_over(self, group: dist.ProcessGroup) -> None:
        """Take the processes of `group`, of which this is one."""
        self.tensor_group, self.tensor_rank, self.tensor_ranks = group, group.rank(), group.size()

    @classmethod
    def of_job(cls) -> TensorRanks:
        """All processes of this job."""
        ranks = cls()
        if world := dist.is_initialized() and dist.group.WORLD:
            ranks.split_over(world)
        return ranks

    def over_tensor_ranks(self, value: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
        """`value` (changed) reduced over the processes a layer is split over."""
        if self.tensor_ranks > 1:
            dist.all_reduce(value, op=operation, group=self.tensor_group)
        return value

    def whole_units(self, units: Tensor) -> Tensor:
        """(..., this process's units) -> (..., all units)."""
        if self.tensor_ranks == 1:
            return units
        parts = [torch.empty_like(units) for _ in range(self.tensor_ranks)]
        dist.all_gather(parts, units.contiguous(), group=self.tensor_group)
        return torch.cat(parts, -1)

    def of_first(self, value: Any) -> Any:
        """What the first of them gives as `value`, anything that can be pickled."""
        if self.tensor_ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.tensor_group, group_src=0)
        return box[0]

    # --- Next-token distributions, of which a process may hold a part of the vocabulary -------------------------------

    def normalised(self, logits: Tensor) -> Tensor:
        """(tokens, this process's vocabulary) -> log-probabilities, float32 or better; may change `logits`."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.tensor_ranks == 1:
            return logits.log_softmax(-1)
        logits -= self.over_tensor_ranks(logits.amax(-1, keepdim=True), dist.ReduceOp.MAX)
        return logits - self.over_tensor_ranks(logits.exp().sum(-1, keepdim=True)).log()

    def likeliest(self, logs: Tensor) -> Tensor:
        """(tokens,) ids of the largest of `normalised`'s; of equals on several processes the first."""
        values, ids = logs.max(-1)                      # a CPU's argmax takes three times as long
        if self.tensor_ranks == 1:
            return ids
        most = self.over_tensor_ranks(values.clone(), dist.ReduceOp.MAX)
        ids = torch.where(values == most, ids + self._first_id(logs), self.tensor_ranks * logs.shape[-1])
        return self.over_tensor_ranks(ids, dist.ReduceOp.MIN)

    def at(self, logs: Tensor, ids: Tensor) -> Tensor:
        """(tokens,) of `normalised`'s at `ids` (tokens,)."""
        place = ids - self._first_id(logs)
        here = (place >= 0) & (place < logs.shape[-1])
        found = logs.gather(-1, place.clamp(0, logs.shape[-1] - 1)[:, None]).squeeze(-1)
        return self.over_tensor_ranks(torch.where(here, found, 0.0))

    def _first_id(self, logs: Tensor) -> int:
        return self.tensor_rank * logs.shape[-1]


ONE_PROCESS = TensorRanks()
