"""Where Megatron's distributed optimizer finds a parameter's master weights and moments."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from tiny_engine import HYBRID, RECIPE

from model.megatron import optimizer as optimizer_module
from model.megatron.compat import optimizer_shards
from model.megatron.distributed import ONE_COPY, process_groups
from model.megatron.optimizer import build_optimizer
from model.megatron.precision import Precision
from model.megatron.spec import build_model


@pytest.fixture(params=[{}, {"overlap_grad_reduce": True, "bucket_size": 2000}], ids=["one bucket", "many buckets"])
def built(request, monkeypatch):
    """A model of BF16 and float32 parameters that share groups, each value another, and its distributed optimizer."""
    monkeypatch.setattr(optimizer_module, "uses_distributed_optimizer", lambda recipe: True)
    with process_groups():
        model = build_model(HYBRID, Precision("bf16"), ONE_COPY, 1)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.normal_(number, 0.1)
        distribution = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, **request.param
        )
        ddp = DistributedDataParallel(model.config, distribution, model)
        assert (sum(len(buffer.buckets) for buffer in ddp.buffers) > len(ddp.buffers)) == bool(request.param)
        whole = build_optimizer(RECIPE, ddp)
        [part] = whole.chained_optimizers
        assert isinstance(part, DistributedOptimizer)
        yield model, whole, part


def test_each_parameter_is_found_where_its_values_are(built):
    model, _, part = built
    dtypes = [{parameter.dtype for parameter in [*single, *half]} for single, half in
              zip(part.model_fp32_groups, part.model_float16_groups, strict=True)]
    assert {torch.float32, torch.bfloat16} in dtypes
    for name, parameter in model.named_parameters():
        group, place = part.model_param_group_index_map[parameter]
        master = part.optimizer.param_groups[group]["params"][place]
        assert torch.equal(master, parameter.detach().float().flatten()), name


def test_each_parameters_values_are_saved_as_its_own(built):
    """Under its name: its master weights, and moments that are multiples of them."""
    model, whole, part = built
    for group in part.optimizer.param_groups:
        for master in group["params"]:
            part.optimizer.state[master] = {
                "step": torch.tensor(3.0), "exp_avg": 2 * master.detach(), "exp_avg_sq": 3 * master.detach()
            }
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = model.sharded_state_dict(metadata=metadata)
    saved = optimizer_shards(whole, weights, False, metadata)["param_state"]
    assert len(saved) == len(list(model.parameters()))
    apply_factories(weights)                        # Mamba's input projection is saved in its parts
    values = {shard.key: shard.data for shard in nested_values(weights) if isinstance(shard, ShardedTensor)}
    found = list(nested_values(saved))
    assert len(found) == 3 * len(values)
    for shard in found:
        kind, name = shard.key.removeprefix("optimizer.state.").split(".", 1)
        multiple = {"param": 1, "exp_avg": 2, "exp_avg_sq": 3}[kind]
        assert torch.equal(shard.data, multiple * values[name].detach().float()), (kind, name)
