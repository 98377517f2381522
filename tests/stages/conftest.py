from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
GEOMETRY = {"pattern": "M-*M", "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
            "num_query_groups": 2, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_state_dim": 8,
            "mamba_num_groups": 2, "chunk_size": 8, "sequence_length": 16}
TRAINING = {"tokens": 64 * 24, "global_batch_size": 4, "micro_batch_size": 4, "evaluations": 3, "checkpoint_every": 9,
            "bf16_layers_at_start": 1, "bf16_layers_at_end": 1}


@pytest.fixture
def workplace(tmp_path, token_files):
    """A directory with parameters of a toy size and token files."""
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    values |= {"profile": "toy"}
    values["model"]["hybrid"] |= GEOMETRY
    values["pretrain"] |= TRAINING
    with (tmp_path / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(values, file)
    token_files(tmp_path / "data" / "toy" / "tokens")
    return tmp_path
