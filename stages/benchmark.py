"""Measure how fast models read prompts and decode, and their memory, against context; count the published models'.

Reads  params.yaml (`benchmark`, `model`), runs/PROFILE/compress/model.json.
Writes runs/PROFILE/benchmark/decode.csv, decode_repeats.csv, metrics.json.

The hybrid, the Transformer and the compressed hybrid decode in turn with random BF16 weights and full caches of random
numbers: speed depends on neither. Run nothing beside it. With `runtime.parallel.tensor` each is split over so many
processes, and its bytes are those of all of them. `benchmark.published` names pairs of the published models that
a GPU measures at their own geometry, as the paper does (`model.benchmark.serving`). The closed-form figures take BF16
weights, keys, values and convolution states, and FP32 SSM states, at batch 1.
"""

from __future__ import annotations

from typing import Any

from stages.frame.common import Stage, run_stage

PAPER_CONTEXT = 65_536           # tokens read before the paper's inference figures


def benchmark(stage: Stage) -> dict[str, Any]:
    """Time the models of the profile, and count the published ones; metrics."""
    from model.benchmark.schema import DecodeRepeat, DecodeRow
    from model.config import ModelConfig
    from stages.frame.schema import csv_text

    params, config = stage.params, stage.params.benchmark
    compressed = stage.record("compress", "model.json").read_text()
    models = {name: ModelConfig(**params.model[name].model_dump(), vocab_size=params.tokenizer.vocab_size)
              for name in ("hybrid", "transformer")}
    models["compressed"] = ModelConfig.model_validate_json(compressed)
    result = stage.run_job({
        "task": "benchmark", "models": {name: model.model_dump() for name, model in models.items()},
        "benchmark": config.model_dump(), "seed": params.seed,
    }, one_model=True)
    rows = [DecodeRow(**row) for row, _ in result["rows"]]
    stage.write_record("decode.csv", csv_text(rows, digits=6))
    stage.write_record("decode_repeats.csv", csv_text((
        DecodeRepeat(model=row["model"], context=row["context"], repeat=repeat, seconds_per_token=value)
        for row, repeats in result["rows"] for repeat, value in enumerate(repeats)), digits=6))

    speed = {(row.model, row.context): row.tokens_per_second for row in rows}
    metrics: dict[str, Any] = result["metrics"]
    for context in config.contexts:
        metrics[f"decode_ratio_{context}"] = speed["hybrid", context] / speed["transformer", context]
        metrics[f"compressed_decode_ratio_{context}"] = speed["compressed", context] / speed["hybrid", context]
    return metrics | published_models()


def published_models() -> dict[str, float]:
    """Parameters, weights and cache at the paper's context of Nemotron-H and the Transformers it is compared with."""
    from model.config import ModelConfig
    from model.costs import Deployment, GatedTransformer, memory, parameters
    from model.presets import PEERS, PRESETS

    models: dict[str, ModelConfig | GatedTransformer] = {**PRESETS, **PEERS}
    figures: dict[str, float] = {}
    for name, model in models.items():
        needed = memory(model, Deployment.of(PAPER_CONTEXT))
        figures[f"{name}_parameters"] = parameters(model)
        figures[f"{name}_weights_gib"] = needed.weights / 2**30
        figures[f"{name}_cache_mib_at_{PAPER_CONTEXT}"] = needed.cache / 2**20
    return figures


if __name__ == "__main__":
    run_stage(benchmark, __doc__, sections=("benchmark", "model", "tokenizer", "seed"))
