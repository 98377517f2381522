"""What attention layers are for: recall tasks that separate Mamba-2 alone, hybrids and a Transformer, for the studies
`attention_share` and `long_context` (`benchmarks.studies`).

Each model is trained on a task itself and asked for what it cannot have learnt by heart:

    recall   multi-query associative recall (arXiv 2312.04927): pairs of a key and a value, then every key again in
             another order; accuracy of the values
    copy     tokens drawn at random, a mark, then the same tokens; accuracy of the copy

The models differ in how many of their mixers are attention: none, about 8 % and 25 % of the layers by the paper's rules
(`hybrid_pattern`), and all. Width, depth, batches, learning rates and steps are the same. Both tasks are given at a
length at which the state of the Mamba-2 layers is too small to hold everything.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from model.presets import hybrid_pattern

IGNORED = -100


class Sizes(NamedTuple):
    """Of models and tasks."""

    layers: int
    hidden: int
    state: int
    tokens: int                 # keys, and as many values; copied tokens are drawn from all of them
    pairs: int                  # of a recall sequence in the test; training mixes a quarter, half and all of them
    copied: int                 # tokens of a copy
    batch: int
    steps: int


CPU = Sizes(layers=13, hidden=64, state=4, tokens=16, pairs=8, copied=16, batch=32, steps=1500)
TINY = Sizes(layers=13, hidden=32, state=8, tokens=8, pairs=4, copied=6, batch=8, steps=8)
LEARNING_RATE, WARMUP = 2e-3, 0.1
TEST_BATCHES = 8


def patterns(layers: int) -> dict[str, str]:
    """Percent of attention -> pattern of so many layers; every model has as many FFN layers as mixers, or nearly."""
    return {
        "0": ("M-" * layers)[:layers],
        "8": hybrid_pattern(layers),
        "25": hybrid_pattern(layers, 0.25),
        "100": ("*-" * layers)[:layers],
    }


def model_config(pattern: str, sizes: Sizes) -> ModelConfig:
    """The Transformer has rotary positions, as the paper's baseline; hybrids have none."""
    head = min(64, sizes.hidden // 2)
    return ModelConfig(
        pattern=pattern, hidden_size=sizes.hidden, ffn_hidden_size=2 * sizes.hidden,
        num_attention_heads=sizes.hidden // head, num_query_groups=sizes.hidden // head, head_dim=head,
        mamba_num_heads=2 * sizes.hidden // head, mamba_head_dim=head, mamba_state_dim=sizes.state, mamba_num_groups=1,
        chunk_size=32, init_method_std=sizes.hidden**-0.5, position_embedding="none" if "M" in pattern else "rope",
        sequence_length=max(4 * sizes.pairs, 2 * sizes.copied + 1), vocab_size=2 * sizes.tokens + 1,
    )


def recall_batch(sizes: Sizes, pairs: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels (batch, 4 pairs): key value key value ..., then the keys in another order, each with its value."""
    keys = torch.stack([torch.randperm(sizes.tokens, generator=draw)[:pairs] for _ in range(sizes.batch)])
    values = torch.randint(sizes.tokens, keys.shape, generator=draw) + sizes.tokens
    order = torch.stack([torch.randperm(pairs, generator=draw) for _ in range(sizes.batch)])
    shown = torch.stack([keys, values], -1).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    ids = torch.cat([shown, asked], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 2 * pairs :: 2] = values.gather(1, order)         # at each key that is asked
    return ids, labels


def copy_batch(sizes: Sizes, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels (batch, 2 length + 1): tokens, a mark, the tokens again."""
    tokens = torch.randint(2 * sizes.tokens, (sizes.batch, length), generator=draw)
    mark = torch.full((sizes.batch, 1), 2 * sizes.tokens)
    ids = torch.cat([tokens, mark, tokens], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, length:-1] = tokens
    return ids, labels


TASKS = {"recall": recall_batch, "copy": copy_batch}


def lengths(task: str, sizes: Sizes) -> list[int]:
    longest = sizes.pairs if task == "recall" else sizes.copied
    return [max(1, longest // 4), max(1, longest // 2), longest]


def train_and_test(task: str, pattern: str, sizes: Sizes, seed: int, device: torch.device) -> float:
    """Accuracy at the longest length after training; chance is one in the number of tokens."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model, shape = HybridLM(model_config(pattern, sizes)).to(device), lengths(task, sizes)
    fit(model, task, sizes, shape, sizes.steps, LEARNING_RATE, draw, device)
    return accuracy(model, task, sizes, shape[-1], seed, device)


def fit(
    model: HybridLM, task: str, sizes: Sizes, shape: list[int], steps: int, rate: float, draw: torch.Generator,
    device: torch.device,
) -> None:
    """Train on the lengths of `shape` in turn, at a peak of `rate`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _shape(step / steps)
        ids, labels = TASKS[task](sizes, shape[step % len(shape)], draw)
        loss = F.cross_entropy(model(ids.to(device)).flatten(0, 1).float(), labels.flatten().to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def accuracy(model: HybridLM, task: str, sizes: Sizes, length: int, seed: int, device: torch.device) -> float:
    """Share of what is asked that the model answers rightly, in sequences of one length that training has not drawn."""
    right = asked = 0
    test = torch.Generator().manual_seed(10_000 + seed)
    for _ in range(TEST_BATCHES):
        ids, labels = TASKS[task](sizes, length, test)
        guesses = model(ids.to(device)).argmax(-1).cpu()
        right += int((guesses == labels).sum())
        asked += int((labels != IGNORED).sum())
    return right / asked


def _shape(progress: float) -> float:
    """Linear warmup, then a cosine to a tenth."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
