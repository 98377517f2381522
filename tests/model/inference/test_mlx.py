"""Referee: MLX on a CPU, which shares no code with transformers or with us, on the same exported directory.

Not in the lock, for its size. `pip install "mlx[cpu]" mlx-lm`, then `python -m pytest tests/model/test_mlx.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import hub
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder
from tests.model.test_hub import HYBRID, random_state, transformers_model

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")
utils = pytest.importorskip("mlx_lm.utils")

LARGER = HYBRID.model_copy(update={
    "pattern": "M-M-M-M*-M-M-M-M-M-", "hidden_size": 96, "mamba_num_heads": 12, "mamba_num_groups": 4,
    "mamba_head_dim": 32, "vocab_size": 512, "conv_kernel": 4, "norm_epsilon": 1e-5})


@pytest.fixture(params=[HYBRID, LARGER], ids=["small", "larger"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelConfig, Path]:
    hub.save(tmp_path, request.param, random_state(request.param), {}, "float32")
    return request.param, tmp_path


def of_mlx(directory: Path) -> Any:
    model, _ = utils.load_model(directory)
    mx.set_default_device(mx.cpu)
    return model


def worst(ours: torch.Tensor, theirs: Any) -> float:
    """Largest difference over the largest logit."""
    other = np.array(theirs.astype(mx.float32), dtype=np.float64)
    return float(np.abs(ours.double().numpy() - other).max() / np.abs(other).max())


def test_mlx_computes_our_logits_and_decodes_as_it_reads(exported: tuple[ModelConfig, Path]) -> None:
    config, directory = exported
    ids = torch.randint(0, config.vocab_size, (1, 53), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = HybridLM.from_state(*hub.load(directory))(ids)
    model = of_mlx(directory)
    assert worst(ours, model(mx.array(ids.numpy()))) < 1e-5
    cache = model.make_cache()
    steps = [model(mx.array(ids[:, :40].numpy()), cache=cache)]
    steps += [model(mx.array(ids[:, place : place + 1].numpy()), cache=cache) for place in range(40, 53)]
    assert worst(ours, mx.concatenate(steps, axis=1)) < 1e-5


def test_three_engines_write_the_same_text(exported: tuple[ModelConfig, Path]) -> None:
    """Greedy, 24 tokens after a prompt of 9."""
    config, directory = exported
    prompt = torch.randint(4, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(4))
    ours = Decoder(HybridLM.from_state(*hub.load(directory)), 64).generate(prompt, 24)[0].tolist()
    reference = transformers_model(directory).generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    model, ids = of_mlx(directory), prompt[0].tolist()
    cache = model.make_cache()
    logits = model(mx.array([ids]), cache=cache)
    theirs: list[int] = []
    for _ in range(24):
        theirs.append(int(mx.argmax(logits[0, -1])))
        logits = model(mx.array([[theirs[-1]]]), cache=cache)
    assert ours == theirs == reference[0, 9:].tolist()
