"""The training step on one GPU, ours beside stock megatron-core + Transformer Engine + mamba_ssm, in one run.

    python -m benchmarks.step_gpu [--only 8b,222m] [--kernels stock,ours] [--precisions bf16,fp8] [--out FILE.json]

Stock is `mamba_stack_spec` as Megatron's own pretraining builds it, and needs mamba_ssm and causal_conv1d. Ours is
`model.megatron.spec` with `model.megatron.step_graph`, which replays forward and backward as one CUDA graph. Both
compute the same model on the same batch, with the same layers in FP8: per-tensor current scaling, one layer at each end
in BF16 (19 layers are a third of the 8B model: nearer to its two of 52 than two at each end would be).

Two columns of time, medians: forward and backward alone, gradients in BF16 as autograd leaves them; and the whole step
with Megatron's DDP, whose FP32 gradients the products of both add to, and AdamW with FP32 master weights. Memory is the
most that PyTorch held allocated. A variant that fails is reported and left out of the ratios. `--tiny` runs small
sizes, to see whether all works.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inference_gpu import SMALL
from model import costs
from model.config import ModelConfig, PretrainConfig
from model.megatron.distributed import ONE_COPY, Parallelism, device, process_groups
from model.megatron.optimizer import build_optimizer, data_parallel
from model.megatron.precision import choose_precision
from model.megatron.spec import build_model, transformer_config
from model.megatron.step_graph import StepGraph
from stages.frame.common import out_file

# isort: split
from megatron.core.distributed import finalize_model_grads

GEOMETRIES: dict[str, tuple[ModelConfig, int]] = {          # and sequences in a batch
    "8b": (ModelConfig(
        pattern=SMALL.pattern, hidden_size=4096, ffn_hidden_size=21_504, num_attention_heads=32, num_query_groups=8,
        head_dim=128, mamba_num_heads=128, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=8,
        sequence_length=8192, vocab_size=131_072), 1),
    "222m": (SMALL, 8),
}
TINY = {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 64,
        "mamba_num_heads": 16, "sequence_length": 512, "vocab_size": 1024}
RECIPE = PretrainConfig(
    tokens=1, global_batch_size=1, micro_batch_size=1, learning_rate=1e-5, min_learning_rate=1e-6, warmup_fraction=0.0,
    decay_style="cosine", weight_decay=0.1, adam_betas=(0.9, 0.95), clip_grad=1.0,
    bf16_layers_at_start=1, bf16_layers_at_end=1, evaluations=1, checkpoint_every=1,
)
WARMUPS, STEPS = 3, 10          # the third of ours captures


def our_model(
    config: ModelConfig, precision: str, parallelism: Parallelism = ONE_COPY, recompute: str = ""
) -> nn.Module:
    recipe = choose_precision(precision, device(), RECIPE.bf16_layers_at_start, RECIPE.bf16_layers_at_end)
    with no_drawing():
        model = build_model(config, recipe, parallelism, seed=0, recompute=recompute)
    return model.to(device())


def stock_model(config: ModelConfig, precision: str, parallelism: Parallelism = ONE_COPY) -> nn.Module:
    """Megatron's own layers, with the fusions its pretraining has on by default."""
    from megatron.core.activations import squared_relu
    from megatron.core.models.mamba import MambaModel
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

    recipe = choose_precision(precision, device(), RECIPE.bf16_layers_at_start, RECIPE.bf16_layers_at_end)
    engine = replace(
        transformer_config(config, recipe, parallelism), activation_func=squared_relu, bias_dropout_fusion=True,
        masked_softmax_fusion=True, persist_layer_norm=True, use_cpu_initialization=False,
    )
    with no_drawing():
        model = MambaModel(
            engine, mamba_stack_spec, vocab_size=config.vocab_size, max_sequence_length=config.sequence_length,
            hybrid_override_pattern=config.pattern, position_embedding_type="none",
        )
    return model.cuda()


@contextmanager
def no_drawing() -> Iterator[None]:
    """Megatron draws weights on the CPU, which takes minutes at 8B width: `draw` does it on the GPU."""
    drawn, nn.init.normal_ = nn.init.normal_, lambda tensor, *_, **__: tensor.zero_()
    try:
        yield
    finally:
        nn.init.normal_ = drawn


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """The same weights, but for their order, in both models."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.02)


KERNELS: dict[str, Callable[..., nn.Module]] = {"stock": stock_model, "ours": our_model}
PRECISIONS = ("bf16", "fp8")


def median_milliseconds(step: Callable[[], Any]) -> float:
    for _ in range(WARMUPS):
        step()
    times = []
    for _ in range(STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def steps(model: nn.Module, captured: bool) -> Iterator[Callable[[], Tensor]]:
    """Forward and backward alone, then the whole step, each a function that returns the loss; a generator, since the
    first's memory must go before the second's comes."""
    sequences = torch.randint(model.vocab_size, (model.batch_size, model.max_sequence_length + 1)).cuda()

    def forward_backward(module: nn.Module, sequences: Tensor) -> list[Tensor]:
        input_ids, labels = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        model.set_is_first_microbatch()             # Megatron's schedule says so before every step
        loss = module(input_ids, None, None, labels=labels).mean()
        loss.backward()
        return [loss.detach()]

    def alone(sequences: Tensor) -> list[Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        return forward_backward(model, sequences)

    run = StepGraph(model, alone) if captured else alone
    yield lambda: run(sequences)[0]
    del run
    for parameter in model.parameters():
        parameter.grad = None
    release()

    def accumulate(sequences: Tensor) -> list[Tensor]:
        losses = forward_backward(ddp, sequences)
        finalize_model_grads([ddp])
        return losses

    run = StepGraph(model, accumulate) if captured else accumulate
    with run.on_stream() if captured else nullcontext():
        ddp = data_parallel(RECIPE, model, 1)
    optimizer = build_optimizer(RECIPE, ddp)

    def whole() -> Tensor:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        (loss,) = run(sequences)
        optimizer.step()
        return loss

    yield whole


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(config: ModelConfig, batch: int, kernels: str, precision: str) -> dict[str, Any]:
    """A row. What fails leaves its error in it."""
    row: dict[str, Any] = {"kernels": kernels, "precision": precision}
    tokens = batch * config.sequence_length
    flops = 3 * tokens * costs.flops_per_token(config, config.sequence_length // 2)
    started = time.monotonic()
    try:
        model = KERNELS[kernels](config, precision)
        draw(model)
        model.batch_size = batch
        for name, step in zip(("forward_backward", "step"), steps(model, captured=kernels == "ours"), strict=True):
            milliseconds = median_milliseconds(step)
            row[f"{name}_loss"] = float(step())
            row[f"{name}_ms"] = milliseconds
            row[f"{name}_tokens_per_second"] = tokens / milliseconds * 1e3
            row[f"{name}_flops_per_second"] = flops / milliseconds * 1e3
            row[f"{name}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except Exception as error:
        traceback.print_exc()
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    row["seconds"] = time.monotonic() - started
    return row


def print_row(geometry: str, row: dict[str, Any], peak: float) -> None:
    line = f"{geometry:5} {row['kernels']:6} {row['precision']:5}"
    for name in ("forward_backward", "step"):
        if f"{name}_ms" in row:
            line += (f" | {row[f'{name}_ms']:8.1f} {row[f'{name}_tokens_per_second']:9.0f} "
                     f"{row[f'{name}_flops_per_second'] / peak:5.1%} {row[f'{name}_peak_gib']:6.1f} "
                     f"{row[f'{name}_loss']:7.3f}")
    print(line + (f" | {row['error']}" if "error" in row else "") + f"  [{row['seconds']:.0f} s]", flush=True)


def stop_on_errors(rows: Iterable[dict[str, Any]]) -> None:
    """Raise SystemExit where a row has an error in place of its figures."""
    if failed := sum("error" in row for row in rows):
        raise SystemExit(f"{failed} failed; why is said above.")


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Stock's time over ours at each precision, and our BF16's over our FP8's."""
    times = {(row["kernels"], row["precision"], name): row[f"{name}_ms"]
             for row in rows for name in ("forward_backward", "step") if f"{name}_ms" in row}
    pairs = {"ours over stock, bf16": (("stock", "bf16"), ("ours", "bf16")),
             "ours over stock, fp8": (("stock", "fp8"), ("ours", "fp8")),
             "fp8 over bf16, ours": (("ours", "bf16"), ("ours", "fp8")),
             "fp8 over bf16, stock": (("stock", "bf16"), ("stock", "fp8"))}
    return {f"{label}, {name.replace('_', ' and ')}": times[(*slow, name)] / times[(*fast, name)]
            for label, (slow, fast) in pairs.items() for name in ("forward_backward", "step")
            if (*slow, name) in times and (*fast, name) in times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="write the figures as JSON")
    parser.add_argument("--only", default="222m,8b", help="geometries, by comma (default: %(default)s)")
    parser.add_argument("--kernels", default="ours,stock", help="by comma (default: %(default)s)")
    parser.add_argument("--precisions", default="bf16,fp8", help="by comma (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    arguments = parser.parse_args()
    for name, known in (("only", GEOMETRIES), ("kernels", KERNELS), ("precisions", PRECISIONS)):
        if unknown := sorted(set(getattr(arguments, name).split(",")) - set(known)):
            parser.error(f"--{name}: {', '.join(unknown)} is none of {', '.join(known)}")
    if not torch.cuda.is_available():
        raise SystemExit("No GPU was found.\nThis measures a training step on one: `make reproduce` trains on a CPU.")
    from benchmarks.gpu_timing import ceilings, parallel_compilation

    _, peak = ceilings()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; BF16 matrix product {peak / 1e12:.0f} TFLOP/s: utilisation is of that")
    print(f"{'':19} | forward and backward: ms, tokens/s, utilisation, GiB, loss | whole step: the same")
    figures: dict[str, Any] = {"machine": machine, "bf16_flops_per_second": peak, "geometries": {}}
    with process_groups(), parallel_compilation():
        for geometry in arguments.only.split(","):
            config, batch = GEOMETRIES[geometry]
            if arguments.tiny:
                config = config.model_copy(update=TINY)
            rows = []
            for kernels in arguments.kernels.split(","):
                for precision in arguments.precisions.split(","):
                    release()
                    rows.append(measure(config, batch, kernels, precision))
                    print_row(geometry, rows[-1], peak)
            figures["geometries"][geometry] = {"parameters": costs.parameters(config), "batch": batch, "rows": rows,
                                               "ratios": ratios(rows)}
            if arguments.out:
                arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
        print("\nratios of time")
        for geometry, found in figures["geometries"].items():
            for label, ratio in found["ratios"].items():
                print(f"{geometry:5} {label:45} {ratio:5.2f}")
    stop_on_errors(row for found in figures["geometries"].values() for row in found["rows"])


if __name__ == "__main__":
    main()
