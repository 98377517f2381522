"""Compress a pretrained hybrid with MiniPuzzle, and make its random control (paper section 3).

Reads  data/PROFILE/tokens, data/PROFILE/checkpoints/PARENT (compress.parent).
Writes data/PROFILE/checkpoints/compressed and compressed-random,
       runs/PROFILE/compress/{importance,candidates,ranking,task,short,final,controls,costs,model,metrics}.json,
       distillation.csv.

Layers and widths are scored by forward passes; every largest model within the budgets is a candidate; the best by kept
importance, then next-token accuracy and agreement with the parent, then a task, then a short distillation is distilled
in full. The controls have the same shape: drawn at random, one of them with the same distillation, and the least
important kept. A killed run goes on where it was. docs/compression.md has the details.
"""

from __future__ import annotations

from typing import Any

from stages.common import Progress, Stage, run_stage

DIRECTORIES = {"compressed": "compressed", "random": "compressed-random"}


def compress(stage: Stage) -> dict[str, Any]:
    """Compress the parent, and cut its random control; metrics."""
    import torch

    from model.checkpoint import load_weights, save_weights
    from model.compression import funnel
    from model.compression.data import read_data
    from model.compression.distill import check_memory
    from model.costs import parameters
    from model.megatron.distributed import bfloat16_products, device
    from stages.schema import DistillationRow, csv_text

    config, seed = stage.params.compress, stage.params.seed
    stage.run_only = {"compress.checkpoint_every"}
    torch.set_num_threads(stage.params.runtime.threads)
    tokens = stage.input("tokens")
    parent_config, state, training = load_weights(stage.input("checkpoints", config.parent))
    parent = funnel.Weights(parent_config, state)
    data = read_data(tokens, parent_config.sequence_length, config, seed, stage.scratch / "index")
    stage.take_gpus()
    check_memory(parameters(parent_config), config, device())
    with bfloat16_products():
        result = funnel.compress(parent, data, config, seed, stage.scratch, Progress())

    for name, weights in result.models.items():
        facts = {
            "parent": config.parent,
            "layers_kept": result.layers[name],
            "precision": "bf16" if torch.cuda.is_available() else "float32",
            "seed": seed,
            "distillation_tokens": result.metrics["distillation_tokens"],
            "validation_bits_per_byte": result.metrics[f"validation_bits_per_byte_{name}"],
            "parent_training": training,
        }
        with stage.output("checkpoints", DIRECTORIES[name]) as out:
            save_weights(out, *weights, facts)
    for name, content in result.records.items():
        stage.write_record(f"{name}.json", content)
    stage.write_record("model.json", result.models["compressed"].config.model_dump(mode="json"))
    rows = (DistillationRow(model=name, step=step, tokens=seen, kl=kl) for name, step, seen, kl in result.curve)
    stage.write_record("distillation.csv", csv_text(rows, digits=6))
    return result.metrics


if __name__ == "__main__":
    run_stage(compress, __doc__, sections=("compress", "seed"))
