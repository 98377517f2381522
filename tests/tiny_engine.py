"""Models and recipes small enough for the engine's tests, and worker processes that train in parallel."""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from model.config import ModelConfig, PretrainConfig
from model.hybrid_lm import HybridLM

ROOT = Path(__file__).resolve().parents[1]

HYBRID = ModelConfig(            # sizes that FP8 products and the CUDA kernels take
    pattern="M-*M", hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    mamba_num_heads=16, mamba_head_dim=16, mamba_state_dim=16, mamba_num_groups=2, chunk_size=8, sequence_length=16,
    init_method_std=0.1, vocab_size=64,
)
TRANSFORMER = ModelConfig(
    pattern="*-*-", hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, head_dim=8,
    position_embedding="rope", sequence_length=16, init_method_std=0.1, vocab_size=64,
)
RECIPE = PretrainConfig(
    tokens=4 * 16 * 6, global_batch_size=4, micro_batch_size=2, learning_rate=1e-2, min_learning_rate=1e-4,
    warmup_fraction=0.2, decay_style="cosine", weight_decay=0.1, adam_betas=(0.9, 0.95),
    clip_grad=1.0, bf16_layers_at_start=1, bf16_layers_at_end=1, evaluations=2, checkpoint_every=100,
)


def random_model(config: ModelConfig) -> HybridLM:
    """Weights large enough that every part of the model, and what caches hold, matters to the logits."""
    torch.manual_seed(3)
    model = HybridLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


# Processes are forked from one that has imported what they need, which takes each of them seconds; where an import may
# have touched a GPU, which no forked process can use then, each is its own.
PROCESSES = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
PROCESSES.set_forkserver_preload(["tests.preloaded"])


def run_processes(count: int, jobs: list[dict[str, Any]], directory: Path) -> list[dict[str, Any]]:
    """Run each of `jobs` on `count` gloo processes: arguments of `train_job`, or of the `function` it names. Results of
    the first process, in order."""
    results = directory / "results.json"
    stores = [TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in jobs]     # torchrun's part
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    logs = [directory / f"rank-{rank}.txt" for rank in range(count)]
    processes = [
        PROCESSES.Process(target=_work, args=(
            environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, log, jobs, [store.port for store in stores],
            results))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    try:
        while None in (codes := [process.exitcode for process in processes]) and not any(codes):
            time.sleep(0.05)                                            # where one fails the others would wait for it
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert not any(process.exitcode for process in processes), [log.read_text() for log in logs]
    return json.loads(results.read_text())


def _work(environment: dict[str, str], log: Path, jobs: list[dict[str, Any]], ports: list[int], results: Path) -> None:
    """A worker process: does all jobs, the first process writes the results. One that hangs says where.

    Between replicas gradients travel in several buckets, as those of large models do."""
    os.environ |= environment
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    warnings.simplefilter("ignore")
    from model.megatron import optimizer

    optimizer.DistributedDataParallelConfig = partial(optimizer.DistributedDataParallelConfig, bucket_size=2000)
    if not torch.cuda.is_available():
        optimizer.uses_distributed_optimizer = lambda recipe: recipe.distributed_optimizer
        _let_adamw_be_restored()
    faulthandler.dump_traceback_later(240, exit=True)

    torch.set_num_threads(1)
    done = []
    for port, job in zip(ports, jobs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        function = job.get("function", f"{__name__}.train_job")
        module, _, name = function.rpartition(".")
        arguments = {key: value for key, value in job.items() if key != "function"}
        done.append(getattr(importlib.import_module(module), name)(**arguments))
    if environment["RANK"] == "0":
        results.write_text(json.dumps(done))


def _let_adamw_be_restored() -> None:
    """Megatron's distributed optimizer takes PyTorch's AdamW up again only once it has made a step, gives all
    parameters one count of steps, which each then adds to, and looks for counts in the checkpoint. It does none of that
    with Transformer Engine's."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    shards, fill = DistributedOptimizer.sharded_state_dict, DistributedOptimizer._set_main_param_and_optimizer_states

    def sharded_state_dict(self: Any, *arguments: Any, is_loading: bool, **options: Any) -> Any:
        if is_loading:
            self._init_optimizer_states_with_dummy_values()
        return shards(self, *arguments, is_loading=is_loading, **options)

    def set_states(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, place = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        state["step"] = state["step"].clone()
        fill(self, parameter, tensors | {"step": state["step"]})

    DistributedOptimizer.sharded_state_dict = sharded_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def train_job(tokens: str, out: str, scratch: str, parallelism: dict[str, Any], precision: str = "float32",
              tokens_to_train_on: int = RECIPE.tokens, **changes: Any) -> dict[str, Any]:
    """One training run of the hybrid, as JSON; `changes` to the recipe."""
    from model.megatron.distributed import Parallelism
    from model.training.trainer import train

    recipe = RECIPE.model_copy(update=changes | {"tokens": tokens_to_train_on})
    run = train(
        HYBRID, recipe, "hybrid", precision, 1, Path(tokens), Path(out), Path(scratch),
        lambda *_, **__: None, Parallelism(**parallelism),
    )
    return {"training": run.training, "validation": run.validation, "metrics": run.metrics,
            "resumed_from": run.resumed_from}


def optimizer_state(scratch: Path, step: int, prefix: str = "optimizer.state.") -> dict[str, Any]:
    """Adam's moments after `step` in a resume state, whole, whatever layout wrote them: `exp_avg.PARAMETER`, ...; with
    the prefix "" all tensors, weights by their own names."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    from model.megatron.distributed import process_groups

    with process_groups():
        tensors = load_plain_tensors(str(scratch / "resume" / f"step-{step:08d}"))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
