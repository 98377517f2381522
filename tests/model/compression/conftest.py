"""A tiny parent that has learnt something: sequences of a random Markov chain."""

from pathlib import Path

import pytest

from model.compression.config import CompressConfig, MemoryBudget
from model.compression.data import Data
from tests.model.compression.markov import CONFIG, Weights, learnt, markov, write_tokens


@pytest.fixture(scope="session")
def parent() -> Weights:
    return learnt(CONFIG, "cpu", steps=60, batch_size=16, rate=1e-2)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory) -> Path:
    """A tokens directory, of whose held-out text the trainer makes its validation."""
    directory = tmp_path_factory.mktemp("tokens")
    write_tokens(directory)
    return directory


@pytest.fixture(scope="session")
def data() -> Data:
    validation = markov(16, 3)
    return Data(
        training=list(markov(96, 1)), calibration=markov(16, 2)[:, :-1], validation=validation,
        validation_bytes=validation[:, 1:].numel() * 2,
    )


@pytest.fixture(scope="session")
def config() -> CompressConfig:
    return CompressConfig(
        parent="hybrid", importance_samples=8, ffn_importance_samples=16, ffn_score="mean_then_l2",
        ffn_widths=[16, 24, 28, 32, 48], min_attention_layers=1, parameters_fraction=None,
        latency=None, ranked_by_task=3, task_items=16, random_draws=2, precision="bf16",
        memory=MemoryBudget(context=64, batch=1, weight_bits=16, kv_bits=16, ssm_bits=32, conv_bits=16,
                            budget_fraction=0.7),
        validation_samples=16, ranking_samples=8, ranked_by_agreement=3, finalists=2,
        short_distillation_tokens=4 * 4 * 32, distillation_tokens=20 * 4 * 32, learning_rate=2e-3,
        min_learning_rate=2e-4, warmup_fraction=0.1, global_batch_size=4, micro_batch_size=4, checkpoint_every=4,
    )
