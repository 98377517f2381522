"""Quality scores by a sequence-classification model of transformers: one of the Hub, or a local directory.

Nemotron-CC's own are such models, FineWeb-Edu's another: `annotate.scorers: [{model: NAME, revision: COMMIT}]`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.config import ClassifierConfig, DataError
from data_pipeline.text.words import Bool, Float64

CONTEXT = 512       # tokens read of a document, at most: what the models above were trained on


def check(config: ClassifierConfig) -> None:
    """Raises DataError where the model cannot be had here, or has no such output. Fetches its small files only."""
    from transformers import AutoConfig

    try:
        outputs = AutoConfig.from_pretrained(config.model, revision=config.revision).num_labels
    except (OSError, ValueError) as error:
        raise _unavailable(config, error) from None
    if not 0 <= config.label < outputs:
        raise DataError(
            f"annotate.scorers: {config.model} has {outputs} outputs, so `label: {config.label}` is none of them.\n"
            f"Give a label from 0 to {outputs - 1}."
        )


def scores(config: ClassifierConfig, texts: pa.ChunkedArray, scored: Bool) -> Float64:
    """The score of each document that is `scored`, NaN for the others: (documents,).

    A model of one output is a regression and its output the score; of several, the score is the log-odds of `label`.

    Raises:
        DataError: the model cannot be loaded, or a score of it is no number: that would rank above all others.
    """
    import torch

    tokenizer, model = _load(config)
    rows = np.flatnonzero(scored)
    encoded = tokenizer(texts.take(rows).to_pylist(), truncation=True, max_length=_context(tokenizer, model))
    result = np.full(len(scored), np.nan)
    by_length = sorted(range(len(rows)), key=lambda index: (len(encoded["input_ids"][index]), index))
    for start in range(0, len(rows), config.batch):
        members = by_length[start : start + config.batch]
        batch = tokenizer.pad({name: [values[index] for index in members] for name, values in encoded.items()},
                              return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits = model(**batch).logits.float()
        result[rows[members]] = _score(logits, config.label).cpu().numpy()
    if not np.isfinite(result[rows]).all():
        raise DataError(f"annotate.scorers: the classifier {_named(config)} gives scores that are no numbers.\n"
                        "Fetch its weights again, or take another model, in params.yaml.")
    return result


def _score(logits: Any, label: int) -> Any:
    if logits.shape[1] == 1:
        return logits[:, 0]
    others = [index for index in range(logits.shape[1]) if index != label]
    return logits[:, label] - logits[:, others].logsumexp(1)


@lru_cache(maxsize=2)
def _load(config: ClassifierConfig) -> tuple[Any, Any]:
    """Tokenizer and model, once a process, on a GPU where there is one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision)
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            config.model, revision=config.revision, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _unavailable(config, error) from None
    if drawn := sorted(loaded["missing_keys"]):     # which transformers fills with random numbers
        raise DataError(f"annotate.scorers: {_named(config)} is no classifier: it has no {', '.join(drawn[:3])}.\n"
                        "Name a model that was trained to classify or score text, in params.yaml.")
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _context(tokenizer: Any, model: Any) -> int:
    positions = getattr(model.config, "max_position_embeddings", CONTEXT)
    return min(CONTEXT, tokenizer.model_max_length, positions)


def _named(config: ClassifierConfig) -> str:
    return config.model if config.revision is None else f"{config.model} at {config.revision}"


def _unavailable(config: ClassifierConfig, error: Exception) -> DataError:
    return DataError(
        f"annotate.scorers: the classifier {_named(config)} cannot be loaded: {str(error).splitlines()[0]}\n"
        "Correct the name or revision, fetch it where there is a network (with HF_TOKEN set if it is gated), or give "
        "the path of a local directory."
    )
