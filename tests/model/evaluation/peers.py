"""Small models as Hub directories, and what the harness's own adapter for transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenize import fast_tokenizer, tokenizer
from model import hub
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from tests.data_pipeline.small_corpus import write_curated

CONFIG = {
    "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8,
    "sequence_length": 64, "vocab_size": 512, "init_method_std": 0.2,
}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_state_dim": 8, "mamba_num_groups": 2, "chunk_size": 16}
CONFIGS = {
    "hybrid": ModelConfig(pattern="M-M*-", **CONFIG, **MAMBA),
    "transformer": ModelConfig(pattern="*-*-", position_embedding="rope", **CONFIG),
}


def export(root: Path, configs: dict[str, ModelConfig]) -> dict[str, Path]:
    """Hub directories of random models of one vocabulary, with a tokenizer trained on the standard library."""
    curated = write_curated(root / "curated", train=["logging"], held_out=["json"])
    size = next(iter(configs.values())).vocab_size
    tokenizer.train(curated, TokenizerConfig(vocab_size=size, training_megabytes=1), 1, root)
    torch.manual_seed(3)
    for name, config in configs.items():
        hub.save(root / name, config, HybridLM(config).state_dict(), {}, "float32")
        fast_tokenizer.export(root / "tokenizer.model", root / name)
    return {name: root / name for name in configs}


def harness_adapter(directory: Path, window: int, batch_size: int = 1) -> HFLM:
    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(directory, local_files_only=True),
        tokenizer=AutoTokenizer.from_pretrained(directory, local_files_only=True),
        batch_size=batch_size,
        logits_cache=False,     # in 0.4.13 it mixes up requests with the same tokens split at another place
        max_length=window,
    )


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=values, idx=0) for values in arguments]
