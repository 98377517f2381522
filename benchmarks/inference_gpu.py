"""The paper's throughput claims at the true geometry, in one run on one GPU (paper Figures 1 and 12).

    python -m benchmarks.inference_gpu [--only 8b,56b,transformers] [--out FILE.json] [--tiny]

    8b            Nemotron-H-8B beside the Transformer of its size and 8 KV heads, BF16 weights
    56b           Nemotron-H-47B beside the 56B model it is cut from, FP8 weights
    transformers  our decoding beside transformers' `generate`, a small hybrid from one export directory

Both models of a pair run in our engine with random weights: 65,536 tokens in, 1,024 out, the largest batch that fits.
The prompt of ONE sequence is read and timed, in the caches of the whole batch; the others' are filled with random
numbers. Decoding is timed at the full batch, 64 steps that end half-way through the output. From these

    output tokens/s = batch x output / (batch x prompt seconds + output x step seconds)

since prompts are read one after another. Floors are operations and bytes (model.roofline) over this machine's measured
ceilings. `--tiny` runs small sizes, on a CPU too, to see whether all works.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model import hub
from model.config import ModelConfig
from model.decode_benchmark import fill_caches, prefill_seconds, step_seconds
from model.hybrid_lm import HybridLM
from model.inference import PREFILL_TOKENS, Decoder
from model.presets import PRESETS
from model.random_weights import random_model
from model.roofline import (
    Ceilings,
    decode_floor,
    measure_ceilings,
    prefill_floor,
    seconds,
    sequence_bytes,
    weights_bytes,
)

DTYPE, STATE_DTYPE = torch.bfloat16, torch.float32
TINY = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16,
        "mamba_num_heads": 16, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 2, "vocab_size": 512}
SMALL = ModelConfig(
    pattern="M-M-M-M*-M-M-M-M-M-", hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=8,
    head_dim=64, mamba_num_heads=32, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=8, sequence_length=4096,
    vocab_size=32_768,
)
MARGIN = 2**30                  # bytes left free beside weights, caches and activations


class Pair(NamedTuple):
    models: tuple[str, str]     # presets; the first is meant to be faster
    float8: bool
    total_asked: float          # times the second's output tokens/s, prompts included
    decode_asked: float | None


PAIRS = {
    "8b": Pair(("nemotron_h_8b", "nemotron_t_8b"), False, 2.2, 5.0),
    "56b": Pair(("nemotron_h_47b", "nemotron_h_56b"), True, 1.2, None),
}


class Size(NamedTuple):
    context: int                # tokens in
    output: int                 # tokens out
    steps: int                  # timed in a run
    repeats: int
    largest_batch: int


PAPER = Size(context=65_536, output=1024, steps=64, repeats=3, largest_batch=1024)
SMOKE = Size(context=512, output=16, steps=4, repeats=2, largest_batch=3)


class Served(NamedTuple):
    model: str
    weights: str
    batch: int
    context: int
    output: int
    weights_gib: float
    cache_gib_per_sequence: float
    peak_gib: float
    time_to_first_token: float
    prefill_tokens_per_second: float
    prefill_of_floor: float
    step_milliseconds: float
    decode_tokens_per_second: float
    decode_of_floor: float
    output_tokens_per_second: float


def serve(
    name: str, config: ModelConfig, float8: bool, size: Size, device: torch.device, ceilings: Ceilings
) -> Served:
    model = random_model(config, DTYPE, device, float8)
    length = size.context + size.output
    per_sequence = sequence_bytes(config, length, DTYPE, STATE_DTYPE)
    batch = size.largest_batch
    if device.type == "cuda":
        activations = prompt_activations(model, min(2 * PREFILL_TOKENS, size.context))
        free = torch.cuda.mem_get_info()[0] - activations - MARGIN
        batch = min(batch, free // (per_sequence + 6 * config.vocab_size))      # logits of a step, and to choose by
        if batch < 1:
            raise SystemExit(f"{name}: {size.context} tokens do not fit this GPU: {free / 2**30:.1f} GiB beside the "
                             f"weights, {per_sequence / 2**30:.1f} needed.")
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, length, int(batch), STATE_DTYPE)
    prompt = prefill_seconds(decoder, size.context, size.repeats - 1)
    fill_caches(decoder, 0)
    middle = size.context + size.output // 2
    step = step_seconds(decoder, middle, size.steps, size.repeats)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    floors = (prefill_floor(config, size.context, ceilings),
              decode_floor(config, decoder.batch, middle, DTYPE, STATE_DTYPE, float8, ceilings))
    return Served(
        model=name, weights="fp8" if float8 else "bf16", batch=decoder.batch, context=size.context, output=size.output,
        weights_gib=weights_bytes(config, DTYPE, float8) / 2**30, cache_gib_per_sequence=per_sequence / 2**30,
        peak_gib=peak / 2**30, time_to_first_token=prompt, prefill_tokens_per_second=size.context / prompt,
        prefill_of_floor=floors[0] / prompt, step_milliseconds=step * 1e3,
        decode_tokens_per_second=decoder.batch / step, decode_of_floor=floors[1] / step,
        output_tokens_per_second=decoder.batch * size.output / (decoder.batch * prompt + size.output * step),
    )


def prompt_activations(model: HybridLM, tokens: int) -> int:
    """Bytes that reading a prompt takes beside weights and caches; compiles what it uses."""
    decoder = Decoder(model, tokens, 1, STATE_DTYPE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    decoder.prefill_rows(torch.zeros(1, tokens, dtype=torch.int64, device=decoder.device), slice(0, 1))
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    del decoder
    release()
    return taken


def measure_pair(name: str, tiny: bool, device: torch.device) -> dict[str, Any]:
    pair, size = PAIRS[name], SMOKE if tiny else PAPER
    ceilings = measure_ceilings(device, DTYPE, pair.float8)
    release()
    print(f"copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, products {ceilings.flops_per_second / 1e12:.0f} TFLOP/s "
          f"BF16, {ceilings.layer_flops_per_second / 1e12:.0f} as the layers'")
    print(f"{'model':15} {'weights':>7} {'batch':>5} {'peak GiB':>8} {'first token s':>13} {'floor':>6} {'step ms':>8} "
          f"{'floor':>6} {'decode tok/s':>12} {'output tok/s':>12}", flush=True)
    rows = []
    for model in pair.models:
        config = PRESETS[model]
        if tiny:
            changes = {key: value for key, value in TINY.items() if "M" in config.pattern or "mamba" not in key}
            config = config.model_copy(update=changes | {"pattern": config.pattern[:9]})
        row = serve(model, config, pair.float8, size, device, ceilings)
        release()
        print(f"{row.model:15} {row.weights:>7} {row.batch:5} {row.peak_gib:8.1f} {row.time_to_first_token:13.3f} "
              f"{row.prefill_of_floor:6.2f} {row.step_milliseconds:8.2f} {row.decode_of_floor:6.2f} "
              f"{row.decode_tokens_per_second:12.1f} {row.output_tokens_per_second:12.1f}", flush=True)
        rows.append(row)
    total = rows[0].output_tokens_per_second / rows[1].output_tokens_per_second
    decode = rows[0].decode_tokens_per_second / rows[1].decode_tokens_per_second
    asked = f", {pair.decode_asked:g} asked" if pair.decode_asked else ""
    print(f"{pair.models[0]} / {pair.models[1]}: output tokens/s {total:.2f} times, {pair.total_asked:g} asked; "
          f"decoding alone {decode:.2f} times{asked}\n", flush=True)
    return {"ceilings": ceilings._asdict(), "rows": [row._asdict() for row in rows], "output_ratio": total,
            "decode_ratio": decode}


def beside_transformers(tiny: bool, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of a decoding step, both reading one export directory; `generate` at its defaults, greedy."""
    from transformers import AutoModelForCausalLM

    config = SMALL.model_copy(update=TINY) if tiny else SMALL
    prompt, few, many = (16, 2, 6) if tiny else (1024, 16, 80)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        hub.save(Path(folder), config, HybridLM(config).state_dict(), {}, "bfloat16")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(device).eval()
        ours = HybridLM.from_state(*hub.load(Path(folder)), DTYPE).to(device)
    for batch in (1, 2) if tiny else (1, 32):
        ids = torch.randint(config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1)).to(device)
        decoder = Decoder(ours, prompt + many, batch)
        with torch.inference_mode():
            expected = theirs(ids).logits[:, -1].float()
        differ = float((decoder.prefill(ids).float() - expected).norm() / expected.norm())

        def generate(tokens: int, ids: torch.Tensor = ids) -> float:
            return seconds(lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                                   min_new_tokens=tokens, max_new_tokens=tokens), device)

        generate(few)
        their_step = (generate(many) - generate(few)) / (many - few)
        our_step = step_seconds(decoder, prompt + many, many - few, 3)
        rows.append({"batch": batch, "prompt": prompt, "our_step_milliseconds": our_step * 1e3,
                     "transformers_step_milliseconds": their_step * 1e3, "ratio": their_step / our_step,
                     "logits_relative_difference": differ})
        print(f"batch {batch:3}: a step takes {our_step * 1e3:.2f} ms, transformers' generate {their_step * 1e3:.2f}: "
              f"{their_step / our_step:.1f} times; logits after the prompt differ by {differ:.1e}", flush=True)
    return rows


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--only", default=",".join([*PAIRS, "transformers"]), help="by comma (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU too")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    if unknown := set(only) - {*PAIRS, "transformers"}:
        parser.error(f"--only: no such part: {', '.join(sorted(unknown))}")
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("No GPU was found.\n`--tiny` runs small sizes on a CPU.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    print(f"{machine}, torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    figures: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "tiny": arguments.tiny}
    for part in only:
        if part == "transformers":
            figures[part] = beside_transformers(arguments.tiny, device)
        else:
            figures[part] = measure_pair(part, arguments.tiny, device)
        release()
        if arguments.out:
            arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
