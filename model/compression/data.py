"""The tokens compression works on: the last phase of the training blend, and held-out text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset

from model.compression.config import CompressConfig
from model.training.token_data import TrainingData, domains, validation


@dataclass(frozen=True)
class Data:
    """Token ids, int64.

    Attributes:
        training: (sequence_length + 1,) each, for distillation, in order.
        calibration: (n, sequence_length), for importance; none of them is in `training`.
        validation: (n, sequence_length + 1), held out.
        validation_bytes: UTF-8 bytes the predicted tokens of `validation` stand for.
    """

    training: Subset[Tensor]
    calibration: Tensor
    validation: Tensor
    validation_bytes: int


def read_data(tokens: Path, sequence_length: int, config: CompressConfig, seed: int, cache: Path) -> Data:
    """Samples of the blend's last phase for distillation and calibration, and `validation_samples` held-out sequences.

    The held-out sequences are spread equally over the domains.

    Raises:
        ModelError: the tokens directory is not what blend.json and tokens.json say.
    """
    per_batch = config.global_batch_size * sequence_length
    longest = max(config.distillation_tokens, config.short_distillation_tokens)
    distillation = math.ceil(longest / per_batch) * config.global_batch_size
    calibration = max(config.importance_samples, config.ffn_importance_samples)
    samples = last_phase(tokens, sequence_length, distillation + calibration, seed, cache)
    names = domains(tokens)
    per_domain = math.ceil(config.validation_samples / len(names))
    held_out = [validation(tokens, name, sequence_length).first(per_domain) for name in names]
    return Data(
        training=Subset(samples, range(distillation)),
        calibration=torch.stack([samples[distillation + number] for number in range(calibration)])[:, :-1],
        validation=torch.cat([domain.sequences for domain in held_out]),
        validation_bytes=sum(domain.bytes for domain in held_out),
    )


def last_phase(tokens: Path, sequence_length: int, count: int, seed: int, cache: Path) -> Subset[Tensor]:
    """The last `count` samples of a training run so long that all of them lie in its last phase."""
    phases = json.loads((tokens / "blend.json").read_text())["phases"]
    begins = phases[-2]["until"] if len(phases) > 1 else 0.0
    data = TrainingData(tokens, sequence_length, math.ceil((count + 1) / (1 - begins)), seed, cache)
    return Subset(data, range(len(data) - count, len(data)))
