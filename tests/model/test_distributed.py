from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from model.config import ModelError
from model.distributed import MegatronOnCpu, Parallelism, is_main_process, main_process_first, process_groups


def test_groups_open_and_close_again_and_again():
    for _ in range(2):
        with process_groups():
            assert dist.get_world_size() == 1
            assert parallel_state.get_tensor_model_parallel_world_size() == 1
            assert parallel_state.get_data_parallel_world_size() == 1
            assert is_main_process()
            with main_process_first():
                pass
        assert not dist.is_initialized()
        assert not parallel_state.model_parallel_is_initialized()
    assert is_main_process()


def test_too_few_processes_are_an_error_and_leave_nothing_open():
    with pytest.raises(ModelError, match="2 x pipeline 2") as error, process_groups(Parallelism(2, 2)):
        pass
    assert str(error.value).count("\n") == 1
    assert not dist.is_initialized()


def test_cuda_names_mean_the_cpu_only_inside():
    before = torch.cuda.current_device, torch.cuda.synchronize
    with MegatronOnCpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.ones(2).cuda().device.type == "cpu"
        assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.equal(torch.ones(2).type(torch.float64), torch.ones(2, dtype=torch.float64))
        torch.cuda.synchronize()
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    assert torch.ones(2).type() == "torch.FloatTensor"
