"""What megatron-core 0.16.1 and what it stands on cannot do here, mended in one place.

0.16.1 is the last release for Python 3.11: from 0.17 on Megatron asks for 3.12. What is mended, and until when:

    load_cudnn                  Transformer Engine takes the machine's cuDNN where PyTorch brings one of its own
    usable_transformer_engine   `import megatron.core` dies of a Transformer Engine that cannot be imported, since it
                                catches ImportError only; no upstream issue known
    the import without CUDA     Megatron wraps its fusions by torch.compile as they are imported: seconds a process
    megatron_on_cpu             "cuda" is written out in trainer, optimizer and checkpoints; 0.19.2 needs stubs of CUDA
                                streams besides
    parameter_places            DistributedOptimizer saves moments as another parameter's where a group mixes dtypes
    optimizer_shards            the optimizer with FP32 masters takes every parameter to be BF16 when it is saved; the
                                distributed one's states are gathered and read whole by every process, and from a second
                                bucket on mixed up (NVIDIA/Megatron-LM#5077)
    ThreadedSave                checkpoints are written by forked processes, which may hang
    save_common                 torch.save names its records after a path if that is ASCII: other bytes elsewhere
    keep_quantized_inputs       with FP8 of a custom recipe Megatron asks for inputs that its quantisers do not keep
    forget_quantized_weights    Transformer Engine's FP8 weights outlive a CUDA graph's capture
    accumulate_in_products      Megatron's linear layers have Apex add weights' gradients to the buffers, or nobody

Some stand where they are used, as they are part of what is built there: the stack's final norm, attention without
Transformer Engine and squared ReLU without a compiler (`spec`), packed tensors saved by section without Triton
(`mamba_mixer`), recomputation, which MambaStack does not read (`recompute`), and `fully_reshardable` as the form of the
distributed optimizer's states, since the default raises (`optimizer_shards`). Without Transformer Engine's FusedAdam
the distributed optimizer restores a wrong Adam step, and is off (`optimizer.uses_distributed_optimizer`).

Every module that imports Megatron imports this one first. Parts of Megatron that few need are imported by what needs
them.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import logging
import os
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

from durable import sha256
from model.config import ModelError

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

FACTORIES = ("empty", "empty_like", "ones", "tensor", "zeros")      # those that Megatron calls with device="cuda"


def _mapped(name: str) -> set[Path]:
    """This process's shared libraries whose names begin so."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {Path(line.split(maxsplit=5)[5]) for line in lines if f"/{name}" in line}


def load_cudnn() -> None:
    """Load all of the cuDNN that PyTorch loaded a part of, and let Transformer Engine look nowhere else.

    It is linked with every part by name. One that is not there yet comes from wherever the linker looks; where that is
    another version, PyTorch's own attention runs in it. With 9.14 behind 9.19, gradients of 16 tokens out of a CUDA
    graph were wrong or not finite, or the access was illegal, and nothing said so (H200).
    """
    torch.backends.cudnn.version()          # loads the first part, if nothing has
    for library in _mapped("libcudnn.so"):
        os.environ["CUDNN_HOME"] = str(library.parent)
        parts = library.parent.glob(library.name.replace("libcudnn", "libcudnn_*"))
        for part in sorted(parts, key=lambda part: ("_graph" not in part.name, "_ops" not in part.name)):
            ctypes.CDLL(str(part), mode=ctypes.RTLD_GLOBAL)         # these two first: the others are linked with them


def usable_transformer_engine() -> bool:
    """Whether Transformer Engine works here; one that is installed and does not is hidden from later imports.

    Without CUDA its import raises RuntimeError or OSError. Where CUDA is and no GPU is visible it can be imported, and
    Megatron would give it the CPU's tensors.

    Raises:
        ModelError: it brought a second cuDNN into the process.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    if torch.cuda.is_available():
        load_cudnn()
    try:
        if not torch.cuda.is_available():
            raise ImportError("no GPU is visible")
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]    # documented: imports then fail cleanly
        return False
    if len(folders := {str(library.parent) for library in _mapped("libcudnn")}) > 1:
        raise ModelError(
            f"Transformer Engine: this process has parts of cuDNN from {' and from '.join(sorted(folders))}.\n"
            "What they compute together is not to be trusted. Import nothing that loads Transformer Engine before "
            "model.megatron, or let LD_LIBRARY_PATH name PyTorch's cuDNN alone."
        )
    return True


TRANSFORMER_ENGINE = usable_transformer_engine()
# That such extensions are absent is the plan here. The rest is the libraries' own, once a layer or a load on a GPU.
warnings.filterwarnings("ignore", r"(Transformer Engine and )?Apex .* not installed", UserWarning)
warnings.filterwarnings("ignore", "full scope is deprecated", UserWarning)
warnings.filterwarnings("ignore", r"barrier\(\): using the device under current context", UserWarning)
warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: "Unknown MLP type" not in record.getMessage())
if not torch.cuda.is_available():
    with patch.object(torch, "compile", lambda function, **_: function):
        importlib.import_module("megatron.core.jit")


# --- A CPU ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """A block in which `device="cuda"` means the CPU, for megatron-core 0.16.1 on a machine without CUDA.

    What Megatron takes for granted: `torch.cuda.current_device()` and `synchronize()`, `device="cuda"` in factory
    functions, `Tensor.cuda()`, and optimizer parameters whose `type()` begins with `torch.cuda.`. Only these names are
    replaced: a TorchFunctionMode would pass every operation through Python, a twentieth of a small model's step.
    """
    _device_constructors()          # `with torch.device(...)` remembers them at first use: PyTorch's own, not these
    own = torch.Tensor.type
    factories: Any = {name: partial(_on_cpu, getattr(torch, name)) for name in FACTORIES}
    with (
        patch.multiple(torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda *_: None),
        patch.multiple(torch, **factories),
        patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        patch.object(torch.Tensor, "type", lambda tensor, *to, **options:
                     own(tensor, *to, **options) if to or options else own(tensor).replace("torch.", "torch.cuda.")),
    ):
        yield


def _on_cpu(factory: Callable[..., Tensor], *args: Any, device: Any = None, **options: Any) -> Tensor:
    return factory(*args, device="cpu" if str(device).startswith("cuda") else device, **options)


# --- The optimizer on disk --------------------------------------------------------------------------------------------


def parameter_places(
    fp32_groups: Iterable[list[Tensor]], bf16_groups: Iterable[list[Tensor]]
) -> dict[Tensor, tuple[int, int]]:
    """Each parameter's group in the inner optimizer of Megatron's DistributedOptimizer, and its place there.

    The inner optimizer holds a group's float32 parameters before the others. DistributedOptimizer 0.16.1 counts them as
    gradient buffers hold them, so where a group has both, as norms with A_log, D and dt_bias here, it saves a
    parameter's moments as another's, or fails.
    """
    return {
        parameter: (group, place)
        for group, parts in enumerate(zip(fp32_groups, bf16_groups, strict=True))
        for place, parameter in enumerate(chain(*parts))
    }


def optimizer_shards(
    optimizer: MegatronOptimizer, weights: dict[str, Any], loading: bool, groups: dict[str, Any]
) -> dict[str, Any]:
    """Master weights and Adam moments, sharded as the model's `weights`.

    Follows Float16OptimizerWithFloat16Params.sharded_state_dict of megatron-core 0.16.1, which takes every parameter to
    be BF16 and gives shards to the wrong ones where some are float32, as A_log, D and dt_bias are here.
    """
    from megatron.core.dist_checkpointing.optimizer import (
        get_param_id_to_sharded_param_map,
        make_sharded_optimizer_tensor,
        optim_state_to_sharding_state,
    )
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    [inner] = optimizer.chained_optimizers
    if isinstance(inner, DistributedOptimizer):
        # Whole parameters, so that any layout reads them. Of Megatron's other ways one cannot be reshaped over tensor
        # and pipeline parallel processes, and its default raises on flattened ranges in 0.16.1.
        states = _states_by_parameter(inner, _Room if loading else _Gathered)
        with patch.object(inner, "get_parameter_state_dp_zero", lambda **_: states):
            spread = inner.sharded_state_dict(
                weights, is_loading=loading, metadata=groups | {"distrib_optim_sharding_type": "fully_reshardable"}
            )
        if loading:
            parts, order = _parts(inner), chain.from_iterable(buffer.param_index_map for buffer in inner.buffers)
            spread["param_state"] = {number: tensors for (number, tensors), parameter in
                                     zip(spread["param_state"].items(), order, strict=True) if parameter in parts}
        else:
            _give_storage_of_their_own(spread)
        return spread
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


def _parts(inner: Any) -> dict[Tensor, Any]:
    """Of which parameters this process holds states, and which of their elements."""
    return {parameter: ranges["param"]
            for buffer in inner.gbuf_ranges for buckets in buffer.values() for bucket in buckets
            for parameter, ranges in bucket["param_map"].items()}


def _states_by_parameter(inner: Any, of: type[_States]) -> dict[int, dict[Any, dict[str, _States]]]:
    """In place of DistributedOptimizer.get_parameter_state_dp_zero of megatron-core 0.16.1: master weights and moments
    of each buffer, a parameter at a time.

    Megatron's gathers all parameters in one array beside each process's part of it: 36 bytes of the host's memory a
    parameter, of which 12 are saved. Saving Nemotron-H-8B on two H200s was killed for it, with 256 GiB. To read them it
    has each process make room for all, of which it then takes its part.
    """
    parts = _parts(inner)
    return {
        number: {dtype: {key: of(inner, buffer, parts, key) for key in ("param", "exp_avg", "exp_avg_sq")}
                 for dtype in ranges}
        for number, (buffer, ranges) in enumerate(zip(inner.buffers, inner.gbuf_ranges, strict=True))
    }


class _States:
    """One state of all parameters of a buffer, float32; [span] is that of the parameter there, (elements,)."""

    def __init__(self, inner: Any, buffer: Any, parts: dict[Tensor, Any], key: str):
        self.inner, self.key, self.parts, self.group = inner, key, parts, inner.data_parallel_group
        self.parameters = {span[:2]: parameter for parameter, span in buffer.param_index_map.items()}


class _Gathered(_States):
    """To be saved: in the first data parallel process; in others zeros that take no memory."""

    def __getitem__(self, span: slice) -> Tensor:
        """All processes ask for it together."""
        parameter = self.parameters[span.start, span.stop]
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        if part := self.parts.get(parameter):
            whole[part.start : part.end] = self.inner._get_main_param_and_optimizer_states(parameter)[self.key]
        torch.distributed.reduce(whole, group=self.group, group_dst=0)
        return whole.cpu() if self.group.rank() == 0 else torch.zeros(1).expand(len(whole))


class _Room(_States):
    """To be read into, of a parameter that this process holds a part of; of others it takes no memory."""

    def __getitem__(self, span: slice) -> Tensor:
        parameter = self.parameters[span.start, span.stop]
        return torch.empty(parameter.numel() if parameter in self.parts else 1).expand(parameter.numel())


def _give_storage_of_their_own(contents: dict[str, Any]) -> None:
    """Let each tensor of a state that is to be saved have its storage alone: of views Megatron would save copies, and
    keep what they are views of beside them."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    apply_factories(contents)           # Mamba's input projection is saved in its parts
    for shard in nested_values(contents):
        if isinstance(shard, ShardedTensor) and 0 < shard.data.nbytes < shard.data.untyped_storage().nbytes():
            shard.data = shard.data.clone()


class ThreadedSave:
    """A checkpoint's files of this process: planned by Megatron, copied to the host's memory, written by a thread.

    Megatron would write with processes: one it spawns for the answers, which imports the main module again, and one it
    forks for each file. A forked process that dies or waits for a lock some thread of its parent held leaves the parent
    waiting for ever (`count_queue.join()` in `FileSystemWriterAsync.write_preloaded_data_multiproc`); CUDA, NCCL and
    Transformer Engine all keep threads. Here the same function writes the same files in a thread of this process.

    Attributes:
        digests: SHA-256 by name, of the files it has written.

    Raises:
        OSError, RuntimeError: the directory cannot be written, or contents are not what Megatron can save.
    """

    def __init__(self, contents: dict[str, Any], directory: Path):
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

        TorchCommonSaveStrategy.save_common = save_common
        filesystem_async._results_queue = queue.Queue()         # in place of one in a process of its own
        self.digests: dict[str, str] = {}
        self.request = dist_checkpointing.save(contents, str(directory), async_sharded_save=True)

    def start(self, in_background: bool) -> None:
        """Copy everything to the host's memory, a copy where training goes on, and start writing."""
        self.thread = threading.Thread(target=self._write, args=(self._files(in_background),))
        self.thread.start()

    def finish(self) -> None:
        """Wait for the thread and write the index. Raises CheckpointException, OSError or RuntimeError where a file
        could not be written."""
        self.thread.join()
        for finalize in self.request.finalize_fns:
            finalize()

    def _files(self, in_background: bool) -> list[Any]:
        """Paths and contents of this process's files, in the host's memory; a copy where training goes on."""
        if self.request.async_fn is None:
            return []
        if torch.cuda.is_available():
            return self.request.preload_fn()
        files = self.request.async_fn_args[1]
        if not in_background:
            return files
        return [
            (path, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (objects, tensors) in files
        ]

    def _write(self, files: list[Any]) -> None:
        """Write `files` one after the other, and leave Megatron what it asks for: results by number, or an error."""
        if self.request.async_fn is None:
            return
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        transforms, results = self.request.async_fn.args[0], self.request.async_fn_args[2]
        written: dict[int, Any] = {}
        for number, file in enumerate(files):
            outcome: queue.Queue[Any] = queue.Queue()
            done: queue.Queue[int] = queue.Queue()
            done.put(number)
            FileSystemWriterAsync.write_preloaded_data(
                transforms, number, file, outcome, done, use_fsync=True
            )
            written[number] = outcome.get()[1]
            if isinstance(written[number], Exception):
                results.put(written[number])
                return
            self.digests[Path(file[0]).name] = sha256(Path(file[0]))
        results.put(written)


def save_common(strategy: Any, common_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
    """TorchCommonSaveStrategy.save_common, by a stream: its records are named alike whatever the path."""
    if torch.distributed.get_rank() == 0:
        with Path(checkpoint_dir, "common.pt").open("wb") as stream:
            torch.save(common_state_dict, stream)


# --- Transformer Engine -----------------------------------------------------------------------------------------------


def keep_quantized_inputs(model: nn.Module) -> None:
    """Let linear layers of FP8 without scales keep their inputs as they quantised them, not as they got them: Megatron
    asks Transformer Engine for the latter, which quantisers of a custom recipe cannot give."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "save_original_input"):
            module.save_original_input = False


def forget_quantized_weights(model: nn.Module) -> None:
    """Empty Transformer Engine's caches of FP8 weights before and after a capture, so that the graph has its own: a
    validation run frees the transposes of those in the caches, where the graph would go on writing."""
    for module in model.modules():
        getattr(module, "_fp8_workspaces", {}).clear()


# --- Gradients --------------------------------------------------------------------------------------------------------


def accumulate_in_products(model: nn.Module) -> None:
    """Let the products that give weights' gradients add them to the buffers of Megatron's DDP, which `model` has, on a
    GPU: a gradient in BF16, and the pass that adds it, then exist for the other parameters only.

    Layers that recompute are left as they are: PyTorch's checkpoint gives their backward weights that are parameters no
    more, and Megatron's hook, which waits for a gradient of the parameter, would get none.
    """
    from megatron.core.tensor_parallel import layers

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(        # Apex's names, of FP32 and of BF16 buffers
        wgrad_gemm_accum_fp32=_add_product, wgrad_gemm_accum_fp16=_add_product)
    recompute = {module for layer in model.modules() if getattr(layer, "recomputes", False)
                 for module in layer.modules()}
    for module in model.modules():          # Megatron's and ours; Transformer Engine's
        for switch in ("gradient_accumulation_fusion", "fuse_wgrad_accumulation"):
            if hasattr(module, switch) and module not in recompute:
                setattr(module, switch, True)


def _add_product(x: Tensor, dy: Tensor, out: Tensor) -> None:
    """out (outputs, inputs) += dy^T x; x (tokens, inputs), dy (tokens, outputs)."""
    torch.addmm(out, dy.t(), x, out_dtype=out.dtype, out=out)
