import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import mixer
from model.config import ModelConfig, ModelError
from model.presets import PRESETS
from model.training.kernel_check import check_kernels

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
@pytest.mark.parametrize(("name", "ranks"), [("nemotron_h_8b", 1), ("nemotron_h_8b", 8), ("nemotron_h_56b", 8)])
def test_the_kernels_are_right_at_the_published_sizes(name, ranks):
    check_kernels(PRESETS[name], ranks, torch.device("cuda"))
