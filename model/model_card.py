"""The model card (README.md) of an exported model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig

CARD = """\
---
license: {licence}
library_name: transformers
pipeline_tag: text-generation
language:
- en
tags:
{tags}
{index}---

# {title}

{about}

## Architecture

{kind}

| | |
| --- | --- |
{architecture}

## Training

{training}
{data}{results}
## Use

{versions}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{placeholder}")
tokenizer = AutoTokenizer.from_pretrained("{placeholder}")
{usage}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```
{limits}"""

ABOUT = """\
A base language model made by an open reproduction of *Nemotron-H: A Family of Accurate and Efficient Hybrid
Mamba-Transformer Models* (arXiv 2504.03624). It is no NVIDIA model and holds none of their weights."""

ABOUT_IMPORTED = """\
The weights of `{origin}`{changed}, read and written by an open reproduction of *Nemotron-H* (arXiv 2504.03624). The
licence and the model card of `{origin}` go on to apply."""

VERSIONS = """\
With `transformers>=5.15`. Versions 5.6 to 5.14 load this model without a word and, where they have no kernels of
mamba_ssm, compute other logits from token {chunk_size:,} on.

"""

USAGE = """\
inputs = tokenizer("</s>def add(a, b):", return_tensors="pt", split_special_tokens=False)"""

USAGE_IMPORTED = """\
inputs = tokenizer("def add(a, b):", return_tensors="pt")"""

DOCUMENTS = """
Documents followed one another, each ended by `</s>`, so `</s>` is also the token to begin with.
"""

LIMITS = """
The tokenizer reads `</s>` inside text as text; `split_special_tokens=False` asks for the token.

## Limits

For research on training and inference only. The paper's models read 15 and 20 trillion tokens; next to that this one
has read little, and what it says is not to be relied on. It was not tuned to follow instructions or to be safe, it may
repeat text it was trained on, and contexts longer than {context:,} tokens were never trained.
"""


@dataclass(frozen=True)
class CardScore:
    """One measured result: `control` is what no training at all reaches, as text; `stderr` is not known of one item."""

    measure: str
    value: float
    stderr: float | None
    control: str


@dataclass(frozen=True)
class Measured:
    """What was measured on a model, and of which text it was made.

    Attributes:
        data: by domain, documents, bytes and the names of the sources that trained it; empty where they are not known.
        items_digest: SHA-256 of what was asked.
    """

    scores: list[CardScore]
    data: Mapping[str, Mapping[str, Any]]
    items_digest: str


def model_card(
    config: ModelConfig, parameters: int, training: Mapping[str, Any], dtype: str, measured: Measured | None = None
) -> str:
    """Markdown with the Hub's front matter: what the model is, how it was trained, how to load it, its limits.

    With `measured`, also its scores beside their controls and the text it was trained on.
    """
    hybrid = "M" in config.pattern
    origin = imported_from(training)
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
    title = "Nemotron-H reproduction: " + ("hybrid Mamba-Transformer" if hybrid else "Transformer baseline")
    changed = "" if "imported_from" in training else ", compressed"
    return CARD.format(
        licence="other" if origin else "apache-2.0",
        tags="\n".join(f"- {tag}" for tag in tags),
        index=_model_index(title, measured) if measured else "",
        title=title,
        about=ABOUT_IMPORTED.format(origin=origin, changed=changed) if origin else ABOUT,
        kind=kind,
        architecture=_table(rows),
        training=_training_table(training) + ("" if origin else "\n" + DOCUMENTS),
        data=_data_section(measured) if measured and measured.data else "",
        results=_results_section(measured) if measured else "",
        versions=VERSIONS.format(chunk_size=config.chunk_size) if hybrid else "",
        usage=USAGE_IMPORTED if origin else USAGE,
        placeholder="path/to/this/directory",
        limits="" if origin else LIMITS.format(context=config.sequence_length),
    )


def imported_from(training: Mapping[str, Any]) -> str | None:
    """The model that these weights, or those they were made of, were imported from."""
    if "imported_from" in training:
        return str(training["imported_from"])
    parent = training.get("parent_training")
    return imported_from(parent) if isinstance(parent, Mapping) else None


def _model_index(title: str, measured: Measured) -> str:
    """The Hub's front matter for results."""
    lines = ["model-index:", f"- name: '{title}'", "  results:"]
    for score in measured.scores:
        lines += [
            "  - task: {type: text-generation}",
            "    dataset: {name: 'held-out text of the reproduction', type: held-out}",
            f"    metrics: [{{type: '{score.measure}', value: {score.value:.4f}}}]",
        ]
    return "\n".join(lines) + "\n"


def _results_section(measured: Measured) -> str:
    rows = "\n".join(
        f"| {score.measure} | {score.value:.3f}{'' if score.stderr is None else f' ± {score.stderr:.3f}'} "
        f"| {score.control} |" for score in measured.scores
    )
    return f"""
## Results

On held-out text of the reproduction, which shares no long run of words with the text it trains on; ± is the standard
error. The control is what no training reaches: by a compressor or the fewest tokens, and by a guess.
Digest of the items: `{measured.items_digest[:16]}`.

| measure | this model | no training |
| --- | --- | --- |
{rows}
"""


def _data_section(measured: Measured) -> str:
    rows = "\n".join(
        f"| {domain} | {entry['documents']:,} | {entry['bytes'] / 1e6:.1f} | {', '.join(entry['sources'])} |"
        for domain, entry in measured.data.items()
    )
    return f"""
The text, each document under its own licence:

| domain | documents | MB | sources |
| --- | --- | --- | --- |
{rows}
"""


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


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
