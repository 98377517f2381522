from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from model.config import ModelError
from model.megatron.compat import megatron_on_cpu
from model.megatron.distributed import (
    Parallelism,
    bfloat16_products_in_float32,
    is_main_process,
    main_process_first,
    process_groups,
)


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
    with megatron_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.ones(2).cuda().device.type == "cpu"
        assert torch.ones(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.equal(torch.ones(2).type(torch.float64), torch.ones(2, dtype=torch.float64))
        torch.cuda.synchronize()
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    assert torch.ones(2).type() == "torch.FloatTensor"


def test_bfloat16_products_in_float32_are_the_same_products():
    torch.manual_seed(0)
    x, weight = (torch.randn(64, 48).bfloat16().requires_grad_(), torch.randn(32, 48).bfloat16().requires_grad_())
    dy = torch.randn(64, 32).bfloat16()
    with bfloat16_products_in_float32():
        y = x @ weight.t()
        y.backward(dy)
        batched = torch.bmm(x.detach().view(4, 16, 48), weight.detach().view(2, 16, 48).repeat(2, 1, 1).transpose(1, 2))
        assert (torch.ones(2, 3) @ torch.ones(3, 2)).dtype is torch.float32
    exact = x.detach().double() @ weight.detach().double().t(), dy.double() @ weight.detach().double()
    exact += (dy.double().t() @ x.detach().double(),)
    for result, expected in zip((y, x.grad, weight.grad), exact, strict=True):
        assert result.dtype is torch.bfloat16
        assert (result.double() - expected).abs().max() < 2**-8 * expected.abs().max()      # one rounding to BF16
    assert batched.shape == (4, 16, 16) and torch.equal(batched[0], y.detach()[:16, :16])


@pytest.mark.parametrize("masked", [False, True])
def test_bfloat16_attention_in_float32_is_the_same_attention(masked):
    torch.manual_seed(0)
    mask = torch.ones(24, 24, dtype=torch.bool).tril() if masked else None
    q, k, v, dy = (torch.randn(2, heads, 24, 16).bfloat16() for heads in (4, 2, 2, 4))

    def attention(*inputs: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=not masked, enable_gqa=True)

    ours, exact = [[tensor.to(dtype, copy=True).requires_grad_() for tensor in (q, k, v)]
                   for dtype in (torch.bfloat16, torch.float64)]
    with bfloat16_products_in_float32():
        y = attention(*ours)
        found = (y, *torch.autograd.grad(y, ours, dy))
    expected = attention(*exact)
    for result, true in zip(found, (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True):
        assert result.dtype is torch.bfloat16
        assert (result.double() - true).abs().max() < 2**-7 * true.abs().max()      # k, v: sums of rounded parts
