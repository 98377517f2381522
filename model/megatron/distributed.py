"""Process groups: torch.distributed and Megatron's model-parallel groups, on one process or under torchrun.

NCCL on a GPU, gloo on a CPU. Megatron's trainer names CUDA devices outright; where there is none, `megatron_on_cpu`
answers those names with the CPU, so that the same trainer, optimizer, schedules and checkpoints run there.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from model.megatron.compat import megatron_on_cpu  # before Megatron

# isort: split
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from model.config import ModelError
from model.processes import torch_processes


@dataclass(frozen=True)
class Parallelism:
    """How a model is spread over processes; what is left of the world size is data parallel.

    Attributes:
        tensor: processes a layer is split over.
        pipeline: stages the layers are split into; their number must divide the number of layers.
        sequence: also split norms and residuals along the sequence over the tensor-parallel processes.
    """

    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False


ONE_COPY = Parallelism()      # every process holds the whole model
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"       # PyTorch's


@contextlib.contextmanager
def bfloat16_products_in_float32() -> Iterator[None]:
    """A block in which a CPU's BF16 matrix products and attention are FP32 ones of the same values, rounded to BF16.

    For a CPU without BF16 instructions, where PyTorch's own products take ten to thirty times an FP32 product's time
    and the backward of its attention four times. Products multiply exactly and accumulate in FP32 either way; they
    differ in the order of the sum. Attention's weights stay in FP32 between its two products. Only these kernels are
    replaced: a dispatch mode would pass every operation through Python, a sixth to a third of a small model's step.
    """
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name in ("mm", "bmm", ATTENTION, f"{ATTENTION}_backward"):
            native = torch.library.get_kernel(getattr(torch.ops.aten, name).default, "CPU")
            library.impl(name, partial(_in_float32, name, native), "CPU", with_keyset=True, allow_override=True)
        yield


def _in_float32(name: str, native: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """What PyTorch's kernel `native` computes, BF16 inputs in FP32."""
    if args[0].dtype is not torch.bfloat16:
        return native.call_boxed(keys, *args, **kwargs)
    args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))      # a mask is named
    results = native.call_boxed(keys, *args, **kwargs)
    if name == ATTENTION:
        output, log_sum_exp = results           # the second is FP32 for BF16 inputs, too
        return output.bfloat16(), log_sum_exp
    return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, results)


def bfloat16_products() -> contextlib.AbstractContextManager[Any]:
    """A block in which BF16 products are as fast as this CPU allows."""
    native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return contextlib.nullcontext() if native else bfloat16_products_in_float32()


def device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def process_groups(parallelism: Parallelism = ONE_COPY) -> Iterator[None]:
    """Open torch.distributed and Megatron's groups for the block: torchrun's processes, or this one alone.

    Raises:
        ModelError: the number of processes is not a multiple of tensor x pipeline.
    """
    on_gpu = torch.cuda.is_available()
    with torch_processes(), contextlib.nullcontext() if on_gpu else megatron_on_cpu(), bfloat16_products():
        size = parallelism.tensor * parallelism.pipeline
        if dist.get_world_size() % size:
            raise ModelError(
                f"{dist.get_world_size()} processes cannot hold tensor {parallelism.tensor} x pipeline "
                f"{parallelism.pipeline} parallel copies of the model.\n"
                f"Start a multiple of {size} processes (torchrun --nproc-per-node)."
            )
        try:
            parallel_state.initialize_model_parallel(parallelism.tensor, parallelism.pipeline)
            # The tracker that draws nothing: there is no dropout, and weights are drawn on the CPU.
            initialize_rng_tracker(inference_rng_tracker=True)
            yield
        finally:
            parallel_state.destroy_model_parallel()


def is_main_process() -> bool:
    """Whether this process writes files: the first of a job, or any outside a job."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process runs the block before the others do: it fills a cache, they read it."""
    if not is_main_process():
        dist.barrier()
    yield
    if dist.is_initialized() and is_main_process():
        dist.barrier()
