"""Measure how fast models read prompts and decode, and their memory, against context; count the published models'.

Reads  params.yaml (`benchmark`, `model`), runs/PROFILE/compress/model.json.
Writes runs/PROFILE/benchmark/decode.csv, decode_repeats.csv, metrics.json.

The hybrid, the Transformer and the compressed hybrid decode in turn with random BF16 weights and full caches of random
numbers: speed depends on neither. Run nothing beside it. `benchmark.published` names pairs of the published models that
a GPU measures at their own geometry, as the paper does (`model.benchmark.serving`). The closed-form figures take BF16
weights, keys, values and convolution states, and FP32 SSM states, at batch 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.common import Progress, Stage, run_stage

if TYPE_CHECKING:
    import torch

PAPER_CONTEXT = 65_536           # tokens read before the paper's inference figures


def benchmark(stage: Stage) -> dict[str, Any]:
    """Time the models of the profile, and count the published ones; metrics."""
    import torch

    from model.benchmark.decode import Speed, measure
    from model.config import ModelConfig
    from stages.schema import DecodeRepeat, DecodeRow, csv_text

    params, config = stage.params, stage.params.benchmark
    compressed = stage.record("compress", "model.json").read_text()
    models = {name: ModelConfig(**params.model[name].model_dump(), vocab_size=params.tokenizer.vocab_size)
              for name in ("hybrid", "transformer")}
    models["compressed"] = ModelConfig.model_validate_json(compressed)
    stage.take_gpus()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    published = published_pairs(config.published, device)
    rows = list(measure(models, config.contexts, config.batch, config.decode_tokens, config.repeats,
                        config.longest_prompt, params.seed, torch.bfloat16, device, Progress()))

    def record(row: Speed) -> DecodeRow:
        first = row.prompt_seconds
        return DecodeRow(
            model=row.model, context=row.context, batch=row.batch, tokens_per_second=row.tokens_per_second,
            seconds_per_token_spread=row.seconds_per_token_spread, decode_of_floor=row.decode_of_floor,
            time_to_first_token_seconds=first, prefill_tokens_per_second=first and row.context / first,
            prefill_of_floor=row.prefill_of_floor,
            output_tokens_per_second=row.output_tokens_per_second(config.output_tokens),
            cache_mib=row.cache_bytes / 2**20, memory_gib=row.held_bytes / 2**30,
        )

    stage.write_record("decode.csv", csv_text(map(record, rows), digits=6))
    stage.write_record("decode_repeats.csv", csv_text((
        DecodeRepeat(model=row.model, context=row.context, repeat=repeat, seconds_per_token=value)
        for row in rows for repeat, value in enumerate(row.repeats)), digits=6))

    speed = {(row.model, row.context): row.tokens_per_second for row in rows}
    metrics: dict[str, Any] = {}
    for context in config.contexts:
        metrics[f"decode_ratio_{context}"] = speed["hybrid", context] / speed["transformer", context]
        metrics[f"compressed_decode_ratio_{context}"] = speed["compressed", context] / speed["hybrid", context]
    return metrics | published | published_models()


def published_pairs(names: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Throughput of the pairs of `model.benchmark.serving` with these names, at their own geometry, and its ratios.

    Raises ModelError without a GPU, which they need.
    """
    from model.benchmark.roofline import measure_ceilings
    from model.benchmark.serving import DTYPE, PAIRS, PAPER, release, serve_pair
    from model.config import ModelError

    if names and device.type != "cuda":
        raise ModelError(f"benchmark.published: {names[0]} needs a GPU, and none was found.\nSet it to [] on a CPU.")
    figures: dict[str, Any] = {}
    for name in names:
        ceilings = measure_ceilings(device, DTYPE, PAIRS[name].fp8)
        release()
        first, second = serve_pair(name, PAPER, device, ceilings)
        for row in (first, second):
            figures |= {f"{row.model}_served_{key}": value for key, value in row._asdict().items() if key != "model"}
        figures[f"output_ratio_{name}"] = first.output_tokens_per_second / second.output_tokens_per_second
        figures[f"served_decode_ratio_{name}"] = first.decode_tokens_per_second / second.decode_tokens_per_second
    return figures


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
