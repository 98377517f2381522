"""Host memory and time of what is done to a checkpoint on disk: cut, export, the check of an export, import.

    python -m benchmarks.shards --directory DIR [--model nemotron_h_8b] [--layers 52] [--only cut,export] [--out FILE]

A checkpoint of BF16 weights, random numbers over and over, is written to DIR (2 bytes a parameter), cut to about five
sixths of its layers and 15/16 of its FFN neurons, as 56B is to 47B, exported to the Hub's form, compared there with
transformers layer by layer, and imported again, which must give the file one began with. Each step is a process of its
own, whose peak of resident memory the system reports; DIR needs room for three times the checkpoint. Memory follows the
largest tensors and the files of an export (5 GB), not the layers: `--layers` takes fewer of a model that the disk does
not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

GIB = 2**30


def write(directory: Path, model: str, layers: int | None) -> dict[str, Any]:
    import torch

    from model import costs
    from model.checkpoint import save_weights
    from model.hybrid_lm import FLOAT32_PARAMETERS, HybridLM
    from model.inference.random_weights import draw
    from model.lazy_state import LazyState
    from model.presets import PRESETS, hybrid_pattern

    config = PRESETS[model]
    if layers is not None:
        config = config.model_copy(update={"pattern": hybrid_pattern(layers)})
    shapes = {name: tensor.to(torch.float32 if name.endswith(FLOAT32_PARAMETERS) else torch.bfloat16)
              for name, tensor in HybridLM.skeleton(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2**22, generator=generator).bfloat16()

    def make(name: str) -> torch.Tensor:
        value = torch.empty_like(shapes[name], device="cpu")
        if value.numel() < len(drawn):
            return draw(name.rpartition(".")[2], value, config, generator)
        for part in value.view(-1).split(len(drawn)):
            torch.mul(drawn[: len(part)], config.init_method_std, out=part)
        return value

    save_weights(directory / "parent", config, LazyState(shapes, make), {})
    return {"parameters": costs.parameters(config), "pattern": config.pattern}


def cut(directory: Path) -> dict[str, Any]:
    import torch

    from model import costs
    from model.checkpoint import open_weights
    from model.compression.candidates import random_selection
    from model.compression.prune import cut_checkpoint

    config = open_weights(directory / "parent")[0]
    shape = config.model_copy(update={"pattern": config.pattern[: math.ceil(5 / 6 * len(config.pattern))],
                                      "ffn_hidden_size": config.ffn_hidden_size * 15 // 16})
    selection = random_selection(config, shape, torch.Generator().manual_seed(1))
    return {"parameters": costs.parameters(cut_checkpoint(directory / "parent", directory / "cut", selection, {}))}


def export(directory: Path) -> dict[str, Any]:
    from model import hub
    from model.checkpoint import open_weights

    config, state, training = open_weights(directory / "parent")
    hub.save(directory / "hub", config, state, training, "bfloat16")
    return {"files": len(list((directory / "hub").glob("*.safetensors")))}


def check(directory: Path, tokens: int) -> dict[str, Any]:
    from stages import export

    with patch.object(export, "WHOLE_BYTES", math.inf):
        difference, _, way = export.check_logits(directory / "hub", list(range(tokens)))
    return {"logits_max_relative_difference": difference, "tokens": tokens, "models_compared": way}


def import_(directory: Path) -> dict[str, Any]:
    from model import hub
    from model.checkpoint import save_weights

    save_weights(directory / "imported", *hub.open_weights(directory / "hub"), {})
    sums = [(directory / name / "SHA256SUMS").read_text() for name in ("parent", "imported")]
    return {"same_bytes": sums[0] == sums[1]}


# Steps in order, and the directories that are not needed after each.
STEPS: dict[str, tuple[Callable[..., dict[str, Any]], list[str]]] = {
    "write": (write, []), "cut": (cut, ["cut"]), "export": (export, []), "check": (check, []),
    "import": (import_, ["imported", "hub"]),
}


def measure(step: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """In a new process: what `step` finds, its seconds and the most memory that was resident."""
    started = time.monotonic()
    found = step(*arguments)
    return found | {"seconds": time.monotonic() - started,
                    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="to work in; must not exist, is removed")
    parser.add_argument("--model", default="nemotron_h_8b", help="a preset")
    parser.add_argument("--layers", type=int, help="of the published pattern's kind; all without it")
    parser.add_argument("--tokens", type=int, default=256, help="of the check")
    parser.add_argument("--only", default=",".join(STEPS), help="steps after the first, by comma")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    for name in ("parent", "cut", "imported"):
        (options.directory / name).mkdir(parents=True)
    rows: dict[str, dict[str, Any]] = {}
    try:
        for name, (step, unneeded) in STEPS.items():
            if name != "write" and name not in options.only.split(","):
                continue
            arguments = {"write": (options.model, options.layers), "check": (options.tokens,)}.get(name, ())
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
                rows[name] = row = executor.submit(measure, step, options.directory, *arguments).result()
            print(f"{name:<8} {row['seconds']:8.1f} s {row['peak_gib']:7.2f} GiB  "
                  + json.dumps({key: value for key, value in row.items() if key not in ("seconds", "peak_gib")}),
                  flush=True)
            for directory in unneeded:
                shutil.rmtree(options.directory / directory)
    finally:
        shutil.rmtree(options.directory)
    if options.out:
        options.out.write_text(json.dumps({"model": options.model, "python": platform.python_version(), "steps": rows},
                                          indent=1) + "\n")


if __name__ == "__main__":
    main()
