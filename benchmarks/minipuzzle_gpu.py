"""MiniPuzzle of a model of the published sizes on the GPUs at hand: seconds, tokens/s and memory of each step.

    python -m benchmarks.minipuzzle_gpu --scratch DIR [--layers 26] [--out FILE]
    torchrun --nproc-per-node=2 -m benchmarks.minipuzzle_gpu --scratch DIR --tensor 2 [--tokens TOKENS]

The funnel of `model.compression` itself on weights at random: importance of all layers, of all FFN neurons, ten
candidates of 83 % of the parameters compared with the parent, the best of them cut, and FP8 distillation at the model's
sequence length. `--layers` takes the first of the pattern. Without token files the text is random ids. Memory is the
most that PyTorch held allocated on the first GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.step_gpu import RECIPE, TINY, draw, no_drawing
from data_pipeline.tokenize.indexed_dataset import IndexedDatasetWriter
from model import checkpoint, costs
from model.compression.comparison import compare
from model.compression.data import read_data
from model.compression.funnel import Funnel
from model.compression.resume import ResultCache, from_main_process
from model.config import ModelConfig
from model.integrity import is_whole
from model.megatron.distributed import Parallelism, device, is_main_process, process_groups
from model.megatron.engine_checkpoint import save_model
from model.megatron.precision import Precision
from model.megatron.spec import build_model
from model.presets import PRESETS
from model.processes import release_memory
from stages.frame.common import out_file
from stages.frame.params import load_params

GIB = 2**30
CANDIDATES = 10
PARAMETERS_KEPT = 0.83
GLOBAL_BATCH = 2                # sequences a step of distillation, one at a time


def write_random_tokens(directory: Path, config: ModelConfig, sequences: int) -> None:
    """A tokens directory of random ids, one domain."""
    generator = np.random.default_rng(1)
    files = {}
    for name, count in {"train/random-high": sequences, "validation/random": 8}.items():
        documents = generator.integers(0, config.vocab_size - 1, (count, config.sequence_length + 1))
        with IndexedDatasetWriter(directory / name, config.vocab_size) as writer:
            for document in documents.tolist():
                writer.add([*document, config.vocab_size - 1])
        tokens = documents.size + count
        files[name] = {"documents": count, "tokens": tokens, "bytes": 4 * tokens}
    np.save(directory / "token_bytes.npy", np.full(config.vocab_size, 4, np.uint16))
    (directory / "tokens.json").write_text(json.dumps({
        "vocab_size": config.vocab_size, "eod_id": config.vocab_size - 1, "tokenizer_digest": "0", "corpus_digest": "0",
        "dtype": "uint16" if config.vocab_size < 2**16 else "int32", "files": files}))
    phase = {"until": 1.0, "weights": {"train/random-high": 1.0}}
    (directory / "blend.json").write_text(json.dumps({"phases": [phase]}))


class Steps:
    """What each step took: rows of the table, on the first process."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Measure a block that works on `tokens` tokens."""
        release_memory()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier()
        self.add(name, time.perf_counter() - started, tokens)

    def add(self, name: str, seconds: float, tokens: int) -> None:
        """A row; memory is the device's, or without one the process's."""
        held = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        row = {"step": name, "seconds": seconds, "tokens_per_second": tokens / seconds, "gib": held,
               "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
        self.rows.append(row)
        if is_main_process():
            print(f"{name:24} {seconds:9.2f} s {row['tokens_per_second']:10,.0f} tokens/s {held:7.1f} GiB "
                  f"{row['host_gib']:6.1f} GiB host", flush=True)


def measure(options: argparse.Namespace, config: ModelConfig, parallelism: Parallelism) -> dict[str, Any]:
    """All steps, within open process groups."""
    steps, scratch = Steps(), options.scratch
    base, length = load_params(Path("params.yaml")).compress, config.sequence_length
    recipe = RECIPE.model_copy(update={
        "distributed_optimizer": dist.get_world_size() > parallelism.tensor, "recompute": options.recompute,
        "bf16_layers_at_start": options.bf16_ends, "bf16_layers_at_end": options.bf16_ends,
        "adam_betas": (0.9, 0.95), "weight_decay": 0.1, "clip_grad": 1.0,
        "grad_reduce_in_fp32": not options.bf16_gradients,
    })
    distilled = max(1, options.steps) * GLOBAL_BATCH * length
    settings = base.model_copy(update={
        "importance_samples": options.samples, "ffn_importance_samples": options.samples, "finalists": 1,
        "ffn_widths": [config.ffn_hidden_size * part // 12 // 64 * 64 for part in (9, 10, 11, 12)], "latency": None,
        "parameters_fraction": PARAMETERS_KEPT, "validation_samples": 4, "ranking_samples": 4,
        "micro_batch_size": 1, "global_batch_size": GLOBAL_BATCH, "checkpoint_every": 10**6,
        "precision": options.precision, "distillation_tokens": distilled, "short_distillation_tokens": distilled,
    })
    parent, tokens = scratch / "parent", options.tokens or scratch / "tokens"
    if from_main_process(lambda: not (is_whole(parent) and checkpoint.read_description(parent)[0] == config)):
        with steps.step("parent drawn and written"):
            with no_drawing():
                model = build_model(config, Precision("bf16" if torch.cuda.is_available() else "float32"), parallelism,
                                    1).to(device())
            with torch.no_grad():
                draw(model)
            save_model(parent, model)
            if is_main_process():
                checkpoint.describe(parent, config, {})
            del model
    if is_main_process() and not options.tokens:
        shutil.rmtree(tokens, ignore_errors=True)
        write_random_tokens(tokens, config, (options.steps + 4) * GLOBAL_BATCH + 2 * options.samples)
    dist.barrier()
    data = read_data(tokens, length, settings, 1, scratch / "index")

    def timed(step: int, total: int, **figures: float) -> None:
        marks.append(time.perf_counter())

    marks: list[float] = []
    run = Funnel(parent, tokens, data, settings, recipe, 1, ResultCache(scratch / "funnel"), timed, parallelism)
    with steps.step("parent read"):
        _ = run.teacher
    passes = options.samples * length
    with steps.step("importance of layers", passes):
        _ = run.layer_scores
    took = [after - before for before, after in pairwise(marks)]
    steps.add("a sample of it, median", median(took), length)
    with steps.step("importance of neurons", passes):
        _ = run.widths
    candidates = sorted(run.candidates(), key=lambda candidate: -candidate.importance)
    masks = {str(index): run.mask(candidate.selection) for index, candidate in enumerate(candidates[:CANDIDATES])}
    with steps.step("ten candidates ranked", len(masks) * data.validation[:, 1:].numel()):
        close = compare(run.teacher, masks, data.validation, 1, lambda *_, **__: None)
    best = candidates[min(map(int, close), key=lambda index: close[str(index)].kl)]
    run.release()
    found = {
        "model": options.model, "layers": len(config.pattern), "parameters": costs.parameters(config),
        "student_parameters": costs.parameters(best.config), "student_pattern": best.config.pattern,
        "student_ffn_hidden_size": best.config.ffn_hidden_size, "candidates": len(candidates),
        "processes": dist.get_world_size(), "tensor": parallelism.tensor, "precision": options.precision,
        "recompute": options.recompute, "global_batch": GLOBAL_BATCH, "rows": steps.rows,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    if not options.steps:
        return found
    with steps.step("cut"):
        start = run.cut(best.selection, "best")
    marks.clear()
    with steps.step("distillation, whole", distilled):
        student = run.school.distil(start, distilled, "best")
    took = [after - before for before, after in pairwise(marks)]
    steps.add("a step of it, median", median(took[len(took) // 4 :]), GLOBAL_BATCH * length)
    return found | {"kl": [loss for _, _, loss in student.curve]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemotron_h_8b", choices=[*PRESETS, "tiny"])
    parser.add_argument("--layers", type=int, help="of the pattern, the first")
    parser.add_argument("--tokens", type=Path, help="token files; without, random ids")
    parser.add_argument("--scratch", type=Path, required=True, help="for weights; a parent that lies there is taken")
    parser.add_argument("--samples", type=int, default=8, help="sequences for importance")
    parser.add_argument("--steps", type=int, default=50, help="of distillation; 0 leaves it out")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--recompute", default="", help="symbols of layers that recompute their activations")
    parser.add_argument("--bf16-gradients", action="store_true", help="added up in BF16, half the memory")
    parser.add_argument("--bf16-ends", type=int, default=4)
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="fp8")
    parser.add_argument("--out", type=out_file)
    options = parser.parse_args()
    config = PRESETS["nemotron_h_8b"].model_copy(update=TINY) if options.model == "tiny" else PRESETS[options.model]
    if options.layers:
        config = config.model_copy(update={"pattern": config.pattern[: options.layers]})
    parallelism = Parallelism(options.tensor, sequence=options.tensor > 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("WORLD_SIZE", "1"))))
    if os.environ.get("RANK", "0") == "0":
        for name in ("funnel", "index"):
            shutil.rmtree(options.scratch / name, ignore_errors=True)
        options.scratch.mkdir(parents=True, exist_ok=True)
    with process_groups(parallelism):
        found = measure(options, config, parallelism)
    if os.environ.get("RANK", "0") == "0" and options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
