"""Measure decoding speed and cache memory against context; count the published models' in closed form.

Reads  params.yaml (`benchmark`, `model`), runs/PROFILE/compress/model.json.
Writes runs/PROFILE/benchmark/decode.csv, metrics.json.

The hybrid, the Transformer and the compressed hybrid decode in turn with random BF16 weights and full caches of random
numbers: speed depends on neither. Run nothing beside it. The closed-form figures take BF16 weights, keys, values and
convolution states, and FP32 SSM states, at batch 1.
"""

from __future__ import annotations

from typing import Any

from stages.common import Progress, Stage, run_stage

PAPER_CONTEXT = 65_536           # tokens read before the paper's inference figures
COLUMNS = "model,context,tokens_per_second,seconds_per_token_spread,cache_mib"


def benchmark(stage: Stage) -> dict[str, Any]:
    import torch

    from model.config import ModelConfig
    from model.decode_benchmark import measure

    params, config = stage.params, stage.params.benchmark
    compressed = stage.record("compress", "model.json").read_text()
    models = {name: ModelConfig(**params.model[name].model_dump(), vocab_size=params.tokenizer.vocab_size)
              for name in ("hybrid", "transformer")}
    models["compressed"] = ModelConfig.model_validate_json(compressed)
    rows = list(measure(models, config.contexts, config.batch, config.decode_tokens, config.repeats, params.seed,
                        torch.bfloat16, Progress()))
    lines = [f"{row.model},{row.context},{row.tokens_per_second:.6g},{row.seconds_per_token_spread:.3g},"
             f"{row.cache_bytes / 2**20:.6g}" for row in rows]
    stage.write_record("decode.csv", "\n".join([COLUMNS, *lines]) + "\n")

    speed = {(row.model, row.context): row.tokens_per_second for row in rows}
    metrics: dict[str, Any] = {}
    for context in config.contexts:
        metrics[f"decode_ratio_{context}"] = speed["hybrid", context] / speed["transformer", context]
        metrics[f"compressed_decode_ratio_{context}"] = speed["compressed", context] / speed["hybrid", context]
    return metrics | published_models()


def published_models() -> dict[str, float]:
    """Parameters, weights and cache at the paper's context of Nemotron-H and the Transformers it is compared with."""
    from model.compression.config import MemoryBudget
    from model.config import ModelConfig
    from model.costs import GatedTransformer, memory, parameters
    from model.presets import PEERS, PRESETS

    bf16 = MemoryBudget(context=PAPER_CONTEXT, batch=1, weight_bytes=2, kv_bytes=2, ssm_bytes=4, conv_bytes=2,
                        budget_fraction=0.5)
    models: dict[str, ModelConfig | GatedTransformer] = {**PRESETS, **PEERS}
    figures: dict[str, float] = {}
    for name, model in models.items():
        needed = memory(model, bf16)
        figures[f"{name}_parameters"] = parameters(model)
        figures[f"{name}_weights_gib"] = needed.weights / 2**30
        figures[f"{name}_cache_mib_at_{PAPER_CONTEXT}"] = needed.cache / 2**20
    return figures


if __name__ == "__main__":
    run_stage(benchmark, __doc__, sections=("benchmark", "model", "tokenizer", "seed"))
