"""The model card (README.md) of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language:
- en
tags:
{tags}
---

# {title}

A base language model made by an open reproduction of *Nemotron-H: A Family of Accurate and Efficient Hybrid
Mamba-Transformer Models* (arXiv 2504.03624). It is no NVIDIA model and holds none of their weights.

## Architecture

{kind}

| | |
| --- | --- |
{architecture}

## Training

{training}

Documents followed one another, each ended by `</s>`, so `</s>` is also the token to begin with.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{placeholder}")
tokenizer = AutoTokenizer.from_pretrained("{placeholder}")
inputs = tokenizer("</s>def add(a, b):", return_tensors="pt", split_special_tokens=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

The tokenizer reads `</s>` inside text as text; `split_special_tokens=False` asks for the token.

## Limits

For research on training and inference only. The paper's models read 15 and 20 trillion tokens; next to that this one
has read little, and what it says is not to be relied on. It was not tuned to follow instructions or to be safe, it may
repeat text it was trained on, and contexts longer than {context:,} tokens were never trained.
"""


def model_card(config: ModelConfig, parameters: int, training: Mapping[str, Any], dtype: str) -> str:
    """Markdown with the Hub's front matter: what the model is, how it was trained, how to load it, its limits."""
    hybrid = "M" in config.pattern
    positions = "rotary positions" if config.position_embedding == "rope" else "no position embedding"
    kind = (
        f"{len(config.pattern)} layers, `{config.pattern}` (`M` Mamba-2, `*` self-attention, `-` feed-forward), with "
        f"RMSNorm before each, {positions}, grouped-query attention, squared ReLU, no biases in projections, and "
        "separate embedding and output weights."
    )
    rows = {
        "parameters": f"{parameters:,}",
        "hidden size": config.hidden_size,
        "feed-forward size": config.ffn_hidden_size,
        "attention heads (key-value)": f"{config.num_attention_heads} ({config.num_query_groups}) of {config.head_dim}",
    }
    if hybrid:
        rows["Mamba-2 heads"] = (
            f"{config.mamba_num_heads} of {config.mamba_head_dim}, state {config.mamba_state_dim}, "
            f"{config.mamba_num_groups} groups"
        )
    rows |= {"vocabulary": f"{config.vocab_size:,}", "context in training": f"{config.sequence_length:,} tokens"}
    precise = " (Mamba-2's A_log, D and dt_bias float32)" if hybrid and dtype != "float32" else ""
    rows["stored as"] = dtype + precise
    tags = ["nemotron-h-reproduction", *(["mamba2", "hybrid"] if hybrid else ["transformer"]), "research"]
    return CARD.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        title="Nemotron-H reproduction: " + ("hybrid Mamba-Transformer" if hybrid else "Transformer baseline"),
        kind=kind,
        architecture="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        training=_training_table(training),
        placeholder="path/to/this/directory",
        context=config.sequence_length,
    )


def _training_table(training: Mapping[str, Any]) -> str:
    if not training:
        return "The checkpoint says nothing about its training."
    rows = [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in training.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
