"""Attention over caches against softmax(q K^T) V in float64: in pieces, one token at a time, and the CUDA kernels."""

import math

import pytest
import torch
from triton_device import DEVICE, PRECISIONS

# isort: split
from kernels.cached_attention import prompt_attention, token_attention
from kernels.cached_attention import triton as cached_attention_triton
from tests.closeness import relative_error


def random_tensors(batch, heads, groups, tokens, head_dim):
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    keys, values = torch.randn(2, batch, groups, tokens, head_dim, generator=generator)
    return q, keys, values


def exact(q, keys, values):
    """Causal attention of all tokens."""
    q, keys, values = (tensor.double() for tensor in (q, keys, values))
    keys, values = (tensor.repeat_interleave(q.shape[1] // keys.shape[1], 1) for tensor in (keys, values))
    scores = q @ keys.transpose(2, 3) / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values


@pytest.mark.parametrize("cut", [0, 1, 19, 36])
def test_a_piece_of_a_prompt(cut):
    q, keys, values = random_tensors(2, 6, 2, 37, 16)
    y = prompt_attention(q[:, :, cut:], keys, values)
    assert relative_error(y, exact(q, keys, values)[:, :, cut:]) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("cut", [0, 128, 513])
def test_a_piece_of_a_prompt_on_a_gpu(cut):
    q, keys, values = (tensor.bfloat16() for tensor in random_tensors(2, 8, 2, 700, 128))
    y = prompt_attention(*(tensor.cuda() for tensor in (q[:, :, cut:], keys, values)))
    assert relative_error(y.cpu(), exact(q, keys, values)[:, :, cut:]) < 6e-3


def at_positions(tensor, positions):
    """(batch, heads, tokens, head_dim) -> (batch, heads, head_dim), of each sequence the token at its position."""
    return tensor[torch.arange(len(positions)), :, positions]


@pytest.mark.parametrize("positions", [[0, 0], [1, 1], [30, 30], [36, 36], [36, 0], [1, 30]])
def test_one_token(positions):
    """Keys behind a sequence's position are there, and not seen."""
    q, keys, values = random_tensors(2, 6, 2, 37, 16)
    y = token_attention(at_positions(q, positions), keys, values, torch.tensor(positions))
    assert relative_error(y, at_positions(exact(q, keys, values), positions)) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("heads", [2, 6, 40])
@pytest.mark.parametrize("positions", [[0, 0], [15, 89], [16, 16], [69, 0], [89, 89]])
def test_splits(dtype, tolerance, heads, positions, monkeypatch):
    """Splits that are full, ragged and empty; groups of 1, 3 and 20 query heads."""
    monkeypatch.setattr(cached_attention_triton, "TILES",
                        cached_attention_triton.AttentionTiles(tokens=16, warps=4, stages=2, programs=12, splits=64))
    q, keys, values = (tensor.to(dtype) for tensor in random_tensors(2, heads, 2, 90, 32))
    token = (at_positions(q, positions), keys, values, torch.tensor(positions))
    y = cached_attention_triton.attend(*(tensor.to(DEVICE) for tensor in token))
    assert relative_error(y.cpu(), at_positions(exact(q, keys, values), positions)) < tolerance


def test_the_operator_is_well_registered():
    q, keys, values = (tensor.to(DEVICE, PRECISIONS[0][0]) for tensor in random_tensors(2, 4, 2, 20, 32))
    arguments = (q[:, :, 0].contiguous(), keys, values, torch.tensor([19, 19], device=DEVICE))
    torch.library.opcheck(cached_attention_triton.attend, arguments, test_utils=("test_schema", "test_faketensor"))
