"""Where Megatron's distributed optimizer finds a parameter's master weights and moments."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from tiny_engine import HYBRID, RECIPE

from model import optimizer as optimizer_module
from model.distributed import ONE_COPY, process_groups
from model.optimizer import build_optimizer
from model.precision import Precision
from model.spec import build_model


@pytest.mark.parametrize("buckets", [{}, {"overlap_grad_reduce": True, "bucket_size": 2000}], ids=["one", "many"])
def test_each_parameter_is_found_where_its_values_are(buckets, monkeypatch):
    """BF16 and float32 parameters share a group; every value of the model differs."""
    monkeypatch.setattr(optimizer_module, "uses_distributed_optimizer", lambda recipe: True)
    with process_groups():
        model = build_model(HYBRID, Precision("bf16"), ONE_COPY, 1)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.normal_(number, 0.1)
        distribution = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, **buckets
        )
        ddp = DistributedDataParallel(model.config, distribution, model)
        assert (sum(len(buffer.buckets) for buffer in ddp.buffers) > len(ddp.buffers)) == bool(buckets)
        [part] = build_optimizer(RECIPE, ddp).chained_optimizers
        assert isinstance(part, DistributedOptimizer)
        dtypes = [{parameter.dtype for parameter in [*single, *half]} for single, half in
                  zip(part.model_fp32_groups, part.model_float16_groups, strict=True)]
        assert {torch.float32, torch.bfloat16} in dtypes
        for name, parameter in model.named_parameters():
            group, place = part.model_param_group_index_map[parameter]
            master = part.optimizer.param_groups[group]["params"][place]
            assert torch.equal(master, parameter.detach().float().flatten()), name
