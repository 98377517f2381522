"""A tiny parent that has learnt something: sequences of a random Markov chain."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.compression.config import CompressConfig, MemoryBudget
from model.compression.data import Data
from model.compression.funnel import Weights
from model.config import ModelConfig
from model.hybrid_lm import HybridLM

CONFIG = ModelConfig(
    pattern="M-M*-M-", hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, num_query_groups=1, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, mamba_state_dim=8, mamba_num_groups=2, chunk_size=8, sequence_length=32,
    vocab_size=48,
)


def markov(count: int, seed: int) -> Tensor:
    """(count, sequence_length + 1) tokens, each drawn from a distribution that the two before it set."""
    table = torch.randn(2, CONFIG.vocab_size, CONFIG.vocab_size, generator=torch.Generator().manual_seed(0)).mul(2.5)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CONFIG.vocab_size, (count, 2), generator=generator)
    for _ in range(CONFIG.sequence_length - 1):
        chance = table[tokens[:, -2] % 2, tokens[:, -1]].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chance, 1, generator=generator)], 1)
    return tokens


@pytest.fixture(scope="session")
def parent() -> Weights:
    torch.manual_seed(0)
    model = HybridLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    for step in range(120):
        batch = markov(16, 1000 + step)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Weights(CONFIG, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


@pytest.fixture(scope="session")
def data() -> Data:
    validation = markov(16, 3)
    return Data(
        training=list(markov(96, 1)), calibration=markov(16, 2)[:, :-1], validation=validation,
        validation_bytes=validation[:, 1:].numel() * 2,
    )


@pytest.fixture
def config() -> CompressConfig:
    return CompressConfig(
        parent="hybrid", importance_samples=8, ffn_importance_samples=16, ffn_widths=[16, 24, 28, 32, 48],
        min_attention_layers=1,
        memory=MemoryBudget(context=64, batch=1, weight_bytes=2, kv_bytes=2, ssm_bytes=4, conv_bytes=2,
                            budget_fraction=0.7),
        validation_samples=16, ranking_samples=8, ranked_by_agreement=3, finalists=2,
        short_distillation_tokens=4 * 4 * 32, distillation_tokens=20 * 4 * 32, learning_rate=2e-3,
        min_learning_rate=2e-4, warmup_fraction=0.1, micro_batch_size=4, checkpoint_every=4,
    )


def silent(*_: object, **__: object) -> None:
    """A progress that shows nothing."""
