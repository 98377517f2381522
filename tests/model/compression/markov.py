"""A tiny geometry and random Markov chains it can learn, also as token files."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.tokenize.indexed_dataset import IndexedDatasetWriter
from model.checkpoint import save_weights
from model.config import ModelConfig
from model.hybrid_lm import HybridLM

CONFIG = ModelConfig(
    pattern="M-M*-M-", hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, num_query_groups=1, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, mamba_state_dim=8, mamba_num_groups=2, chunk_size=8, sequence_length=32,
    vocab_size=64,
)
SYMBOLS = 48                # of the chain; the next id ends documents, further ones never come


class Weights(NamedTuple):
    """A model: its geometry, and tensors by Hub name."""

    config: ModelConfig
    state: dict[str, Tensor]

    def save(self, directory: Path) -> Path:
        """As a checkpoint in `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        save_weights(directory, *self, {})
        return directory


def markov(count: int, seed: int) -> Tensor:
    """(count, sequence_length + 1) tokens, each drawn from a distribution that the two before it set."""
    table = torch.randn(2, SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(0)).mul(2.5)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SYMBOLS, (count, 2), generator=generator)
    for _ in range(CONFIG.sequence_length - 1):
        chance = table[tokens[:, -2] % 2, tokens[:, -1]].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chance, 1, generator=generator)], 1)
    return tokens


def learnt(config: ModelConfig, device: str, steps: int, batch_size: int, rate: float) -> Weights:
    """A model that has learnt the chain, on `device`."""
    torch.manual_seed(0)
    model = HybridLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        batch = markov(batch_size, 1000 + step).to(device)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Weights(config, {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()})


def write_tokens(directory: Path, bytes_a_token: int = 2) -> None:
    """A tokens directory: a first phase of `even-high`, a last phase of both domains, one part to three."""
    files = {}
    names = {"train/even-high": 11, "train/odd-high": 12, "validation/even": 13, "validation/odd": 14}
    for name, seed in names.items():
        documents = markov(240, seed)[:, :15]       # so short that every sample holds a whole one
        with IndexedDatasetWriter(directory / name, CONFIG.vocab_size) as writer:
            for document in documents.tolist():
                writer.add([*document, SYMBOLS])
        tokens = documents.numel() + len(documents)
        files[name] = {"documents": len(documents), "tokens": tokens, "bytes": bytes_a_token * tokens}
    np.save(directory / "token_bytes.npy", np.full(CONFIG.vocab_size, bytes_a_token, np.uint16))
    (directory / "tokens.json").write_text(json.dumps({
        "vocab_size": CONFIG.vocab_size, "eod_id": SYMBOLS, "dtype": "uint16", "tokenizer_digest": "0",
        "corpus_digest": "0", "files": files,
    }))
    (directory / "blend.json").write_text(json.dumps({"phases": [
        {"until": 0.9, "weights": {"train/even-high": 1.0}},
        {"until": 1.0, "weights": {"train/even-high": 0.25, "train/odd-high": 0.75}},
    ]}))


def silent(*_: object, **__: object) -> None:
    """A progress that shows nothing."""
