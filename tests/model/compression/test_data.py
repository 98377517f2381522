"""Which tokens compression sees."""

from itertools import pairwise

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from model.compression.config import CompressConfig
from model.compression.data import last_phase, read_data
from tests.model.compression.markov import CONFIG, SYMBOLS


def documents(tokens, name):
    return {tuple(document.tolist()) for document in IndexedDataset(str(tokens / name))}


def test_all_samples_lie_in_the_last_phase(tokens, tmp_path):
    count = 400
    drawn = last_phase(tokens, CONFIG.sequence_length, count, 1, tmp_path)
    samples = torch.stack(list(drawn))
    assert drawn.indices[0] >= round(0.9 * len(drawn.dataset)) and samples.shape == (count, CONFIG.sequence_length + 1)
    odd = documents(tokens, "train/odd-high")
    text = [tuple(document) for document in samples_to_documents(samples)]
    share = sum(document in odd for document in text) / len(text)
    assert share == pytest.approx(0.75, abs=0.02)       # 0.075 over the whole run


def samples_to_documents(samples):
    """Whole documents inside the samples: what stands between two end-of-document ids."""
    for sample in samples.tolist():
        ends = [i for i, token in enumerate(sample) if token == SYMBOLS]
        for first, last in pairwise(ends):
            yield sample[first + 1 : last + 1]


def test_distillation_and_calibration_do_not_meet(tokens, config, tmp_path):
    data = read_data(tokens, CONFIG.sequence_length, config, 1, tmp_path)
    assert len(data.training) == 20 * config.micro_batch_size
    assert data.calibration.shape == (16, CONFIG.sequence_length)
    trained = {tuple(sequence[:-1].tolist()) for sequence in data.training}
    assert not trained & {tuple(sequence) for sequence in data.calibration.tolist()}


def test_validation_is_spread_over_the_domains(tokens, config, tmp_path):
    data = read_data(tokens, CONFIG.sequence_length, config, 1, tmp_path)
    assert data.validation.shape == (16, CONFIG.sequence_length + 1)
    first = [token for document in IndexedDataset(str(tokens / "validation/even")) for token in document.tolist()]
    assert data.validation[0].tolist() == first[: CONFIG.sequence_length + 1]
    assert data.validation_bytes == 2 * 16 * CONFIG.sequence_length


def test_no_more_samples_rank_than_there_are(config):
    with pytest.raises(ValueError, match=r"ranking_samples \(17\) must not exceed validation_samples \(16\)"):
        CompressConfig(**config.model_dump() | {"ranking_samples": 17})
