from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import cross_entropy, forward_kl, mixer
from model.config import ModelConfig, ModelError
from model.megatron.distributed import device, process_groups
from model.presets import PRESETS
from model.training import kernel_check
from model.training.kernel_check import check_kernels

# isort: split
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

CPU = torch.device("cpu")


def config(heads: int = 4, groups: int = 2, head_dim: int = 16, state: int = 16, length: int = 48) -> ModelConfig:
    return ModelConfig(
        pattern="M-M*-", hidden_size=32, ffn_hidden_size=64, num_attention_heads=2, num_query_groups=1, head_dim=16,
        mamba_num_heads=heads, mamba_head_dim=head_dim, mamba_state_dim=state, mamba_num_groups=groups, chunk_size=16,
        sequence_length=length, vocab_size=64)


@settings(max_examples=8, deadline=None)
@given(groups=st.sampled_from([1, 2, 4]), more=st.integers(4, 6), head_dim=st.sampled_from([8, 16, 32]),
       state=st.sampled_from([8, 32]), length=st.integers(64, 100), documents=st.booleans())
def test_the_reference_in_bf16_is_right_by_this_check(groups, more, head_dim, state, length, documents):
    with patch.object(kernel_check, "TIMES", 2):
        check_kernels(config(groups * more, groups, head_dim, state, length), 1, CPU, documents)


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_a_wrong_kernel_is_named(wrong, monkeypatch):
    right = mixer.mix

    def broken(projected, weights, *rest):
        y = right(projected, weights, *rest)
        if projected.dtype == torch.float64:
            return y
        return y * 1.08 if wrong == "value" else y + 0.08 * (y - y.detach())

    monkeypatch.setattr(mixer, "mix", broken)
    with pytest.raises(ModelError, match="values" if wrong == "value" else "gradient of projected") as caught:
        check_kernels(config(), 1, CPU)
    assert "4 Mamba heads of 16 in 2 groups, state 16" in str(caught.value) and len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("module", "name"), [(cross_entropy, "cross_entropy"), (forward_kl, "forward_kl")])
def test_a_wrong_loss_is_named(module, name, monkeypatch):
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda logits, other: right(logits, other) * (
        1 if logits.dtype == torch.float64 else 1.08))
    with pytest.raises(ModelError, match=r"the loss.* on this device: values off by .* at a vocabulary of 64"):
        check_kernels(config(), 1, CPU)


@pytest.mark.parametrize("wrong", ["values", "gradient of projected"])
def test_a_kernel_that_races_is_named(wrong, monkeypatch):
    """By one bit in the last place of one value, far within the limit."""
    right, calls = mixer.mix, count()

    def racing(projected, *rest):
        y = right(projected, *rest)
        if projected.dtype == torch.float64 or next(calls) != kernel_check.TIMES - 1:
            return y
        off = torch.zeros_like(y)
        off[0, 0, 0] = y.detach()[0, 0, 0] * 2**-7
        return y + off if wrong == "values" else y + off * (y - y.detach()) / y.detach()

    monkeypatch.setattr(mixer, "mix", racing)
    with pytest.raises(ModelError, match=rf"mixer on this device: {wrong} not the same in run 50 of 50, at 4 Mamba"):
        check_kernels(config(), 1, CPU)


@pytest.fixture
def rotary() -> Iterator[ModelConfig]:
    """Where there is a GPU, on it: Megatron's kernel would take a CPU's addresses for its own."""
    with process_groups():
        yield config().model_copy(update={"pattern": "*-", "position_embedding": "rope", "rope_theta": 500.0})


def test_rotary_positions_by_megatron_are_ours(rotary):
    check_kernels(rotary, 1, device())


@pytest.mark.parametrize("wrong", [
    lambda queries, angles, engine: queries,
    lambda queries, angles, engine: apply_rotary_pos_emb(queries, -angles, engine),
    lambda queries, angles, engine: apply_rotary_pos_emb(queries, angles, replace(engine, rotary_interleaved=True)),
])
def test_wrong_rotary_positions_are_named(wrong, rotary, monkeypatch):
    monkeypatch.setattr(kernel_check, "apply_rotary_pos_emb", wrong)
    with pytest.raises(ModelError, match=r"rotary positions on this device: values off by .* at 2 heads of 16"):
        check_kernels(rotary, 1, device())


def test_a_kernel_that_looks_into_other_documents_is_named(monkeypatch):
    right = mixer.mix

    def broken(projected, weights, *rest):
        *sizes, seq_idx = rest
        return right(projected, weights, *sizes, seq_idx if projected.dtype == torch.float64 else None)

    monkeypatch.setattr(mixer, "mix", broken)
    check_kernels(config(), 1, CPU)
    with pytest.raises(ModelError, match="values"):
        check_kernels(config(), 1, CPU, documents=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "ranks"), [("nemotron_h_8b", 1), ("nemotron_h_8b", 8), ("nemotron_h_56b", 8),
                                             ("nemotron_t_8b", 1)])
def test_the_kernels_are_right_at_the_published_sizes(name, ranks):
    with process_groups():
        check_kernels(PRESETS[name], ranks, torch.device("cuda"))
