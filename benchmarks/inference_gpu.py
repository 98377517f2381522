"""The paper's throughput claims at the true geometry, in one run on one GPU (paper Figures 1 and 12).

    python -m benchmarks.inference_gpu [--only 8b,47b,transformers] [--out FILE.json] [--tiny]

    8b            Nemotron-H-8B beside the Transformer of its size and 8 KV heads, BF16 weights
    47b           Nemotron-H-47B beside the 56B model it is cut from, FP8 weights
    transformers  our decoding beside transformers' `generate`, a small hybrid from one export directory

How the first two are measured: `model.benchmark.serving`. `--tiny` runs small sizes, on a CPU too, to see whether all
works.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model import hub
from model.benchmark.decode import step_seconds
from model.benchmark.roofline import measure_ceilings, seconds
from model.benchmark.serving import DTYPE, PAIRS, PAPER, Size, serve_pair
from model.config import ModelConfig
from model.hybrid_lm import HybridLM
from model.inference.decoder import Decoder
from model.presets import PRESETS
from model.processes import release_memory
from stages.frame.common import out_file

TINY = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16,
        "mamba_num_heads": 16, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 2, "vocab_size": 512}
SMOKE = Size(context=512, output=16, steps=4, repeats=2, largest_batch=3)
SMALL = ModelConfig(
    pattern="M-M-M-M*-M-M-M-M-M-", hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=8,
    head_dim=64, mamba_num_heads=32, mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=8, sequence_length=4096,
    vocab_size=32_768,
)
RUNS = 3                        # of ours and of transformers'


class Asked(NamedTuple):
    output: float               # times the second model's output tokens/s, prompts included
    decode: float | None        # and of decoding alone


ASKED = {"8b": Asked(2.2, 5.0), "47b": Asked(1.2, None)}


def measure_pair(name: str, tiny: bool, device: torch.device) -> dict[str, Any]:
    ceilings = measure_ceilings(device, DTYPE, PAIRS[name].fp8)
    release_memory()
    print(f"copy {ceilings.bytes_per_second / 1e12:.2f} TB/s, products {ceilings.flops_per_second / 1e12:.0f} TFLOP/s "
          f"BF16, {ceilings.layer_flops_per_second / 1e12:.0f} as the layers'")
    print(f"{'model':15} {'weights':>7} {'batch':>5} {'peak GiB':>8} {'first token s':>13} {'floor':>6} {'step ms':>8} "
          f"{'floor':>6} {'decode tok/s':>12} {'output tok/s':>12}", flush=True)
    rows = []
    geometries = {model: _shrink(PRESETS[model]) if tiny else PRESETS[model] for model in PAIRS[name].models}
    for row in serve_pair(name, SMOKE if tiny else PAPER, device, ceilings, geometries):
        print(f"{row.model:15} {row.weights:>7} {row.batch:5} {row.peak_gib:8.1f} {row.time_to_first_token:13.3f} "
              f"{row.prefill_of_floor:6.2f} {row.step_milliseconds:8.2f} {row.decode_of_floor:6.2f} "
              f"{row.decode_tokens_per_second:12.1f} {row.output_tokens_per_second:12.1f}", flush=True)
        rows.append(row)
    total = rows[0].output_tokens_per_second / rows[1].output_tokens_per_second
    decode = rows[0].decode_tokens_per_second / rows[1].decode_tokens_per_second
    asked = ASKED[name]
    print(f"{rows[0].model} / {rows[1].model}: output tokens/s {total:.2f} times, {asked.output:g} asked; "
          f"decoding alone {decode:.2f} times" + (f", {asked.decode:g} asked\n" if asked.decode else "\n"), flush=True)
    return {"ceilings": ceilings._asdict(), "rows": [row._asdict() for row in rows], "output_ratio": total,
            "decode_ratio": decode}


def _shrink(config: ModelConfig) -> ModelConfig:
    changes = {key: value for key, value in TINY.items() if "M" in config.pattern or "mamba" not in key}
    return config.model_copy(update=changes | {"pattern": config.pattern[:9]})


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

        # The fastest of as many runs as ours, after one of that length that is not counted.
        least, most = (min([generate(tokens) for _ in range(RUNS + 1)][1:]) for tokens in (few, many))
        their_step = (most - least) / (many - few)
        our_step = step_seconds(decoder, prompt + many, many - few, RUNS)
        rows.append({"batch": batch, "prompt": prompt, "our_step_milliseconds": our_step * 1e3,
                     "transformers_step_milliseconds": their_step * 1e3, "ratio": their_step / our_step,
                     "logits_relative_difference": differ})
        print(f"batch {batch:3}: a step takes {our_step * 1e3:.2f} ms, transformers' generate {their_step * 1e3:.2f}: "
              f"{their_step / our_step:.1f} times; logits after the prompt differ by {differ:.1e}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_file, help="write the figures as JSON")
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
        release_memory()
        if arguments.out:
            arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
