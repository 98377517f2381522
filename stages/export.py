"""Export one model to a Hugging Face directory, and check that transformers computes what our model computes.

Reads   data/PROFILE/checkpoints/VARIANT/, data/PROFILE/tokenizer/
Writes  data/PROFILE/hub/VARIANT/: config.json, safetensors, tokenizer.json, training.json, model card
        runs/PROFILE/export/VARIANT/metrics.json: size, and the largest difference of logits between the two

The check reads the new directory back both ways and gives both models a few tokens of text in float32. A difference
beyond 1e-5 of the largest logit, a weight that is not the checkpoint's, or a text that the two tokenizers encode
differently, is an error.

By hand, outside the pipeline (DIR must not exist yet):

    python -m stages.export --from-hub DOWNLOADED --out DIR
        a Nemotron-H in Hugging Face form becomes a training checkpoint, for compression; its tokenizer goes with it
    python -m stages.export --from-megatron SAVED --out DIR [--tokenizer HUB_DIR]
        so does a hybrid that Megatron-LM or Megatron-Bridge saved (torch_dist), with the tokenizer of a Hub directory
    python -m stages.export --from-checkpoint CHECKPOINT --out DIR [--tokenizer tokenizer.model] [--dtype bfloat16]
        and back: the same weights, tokenizer and training record give the same bytes. Without --dtype none is rounded
    python -m stages.export --from-checkpoint CHECKPOINT --to megatron --out DIR
        or back to Megatron-LM: a release with args, in the checkpoint's dtypes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from durable import new_directory
from stages.frame.common import OWN_TOKENIZER, Stage, StageError, out_directory, plain_errors, run_stage

if TYPE_CHECKING:
    from torch import Tensor, nn

LOGITS_TOLERANCE = 1e-5      # of the largest logit; the claim of the report (claims.toml) asks the same
COMPARED_TOKENS = 256
WHOLE_BYTES = 10             # a parameter takes while two float32 models are loaded: one, its copy and what is read


def export(stage: Stage) -> dict[str, Any]:
    """Write and check the Hub form of one model; metrics."""
    from data_pipeline.tokenize.tokenizer import MODEL_FILE

    assert stage.variant is not None
    weights = stage.input("checkpoints", stage.variant)
    imported = (weights / OWN_TOKENIZER).exists()
    tokenizer = weights / OWN_TOKENIZER if imported else stage.input("tokenizer", MODEL_FILE)
    config = stage.params.export
    with stage.output("hub", stage.variant) as out:
        return to_hub(weights, tokenizer, out, config.dtype, config.shard_gigabytes)


def to_hub(
    weights: Path, tokenizer: Path, out: Path, dtype: Literal["float32", "bfloat16"] | None, shard_gigabytes: float
) -> dict[str, Any]:
    """Write and check the Hub form of a training checkpoint in the directory `out`; its metrics.

    Args:
        tokenizer: the SentencePiece model, or the folder of an imported tokenizer.
        dtype: None is the checkpoint's, float32 where it has several.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")     # read when the libraries are imported
    from data_pipeline.tokenize import fast_tokenizer
    from data_pipeline.tokenize.tokenizer import Tokenizer
    from model import checkpoint, hub
    from model.integrity import write_sums

    config, state, training = checkpoint.open_weights(weights)
    if not tokenizer.exists():
        raise StageError(f"{tokenizer}: not found.\nGive the tokenizer: --tokenizer tokenizer.model.")
    dtype = dtype or hub.dtype_of(state)
    if tokenizer.is_dir():
        hub.check_vocabulary(tokenizer, config.vocab_size)
        special_tokens = hub.special_tokens(tokenizer, config.vocab_size)
        hub.save(out, config, state, training, dtype, special_tokens=special_tokens, shard_gigabytes=shard_gigabytes)
        copy_tokenizer(tokenizer, out)
        ids = encoded_card(out)
    else:
        pieces = Tokenizer(tokenizer)
        if pieces.vocab_size != config.vocab_size:
            raise hub.other_vocabulary(str(tokenizer), pieces.vocab_size, config.vocab_size)
        hub.save(out, config, state, training, dtype, shard_gigabytes=shard_gigabytes)
        fast_tokenizer.export(tokenizer, out)
        ids = check_tokenizer(out, pieces, config.vocab_size)
    check_weights(out, state)
    difference, compared, way = check_logits(out, ids[: min(config.sequence_length, COMPARED_TOKENS)])
    write_sums(out, files="*.safetensors")
    return {
        "parameters": sum(tensor.numel() for tensor in state.skeleton.values()),
        "megabytes": sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6,
        "logits_max_relative_difference": difference,
        "tokens_compared": compared,
        "models_compared": way,
    }


def from_hub(source: Path, out: Path) -> dict[str, Any]:
    """Write the training checkpoint of a Hub directory to the directory `out`; what was read.

    Names, shapes and vocabulary are checked before any tensor is read. Raises ModelError.
    """
    from model import checkpoint, hub

    hub.check_files(source, config := hub.read_config(source))
    hub.check_vocabulary(source, config.vocab_size)
    special_tokens = hub.special_tokens(source, config.vocab_size)
    if (source / "training.json").exists():
        training = hub.read_json(source / "training.json")
    else:
        training = {"imported_from": _name_of(source)}
    config, state = hub.open_weights(source)
    checkpoint.save_weights(out, config, state, training)
    keep_tokenizer(source, out / OWN_TOKENIZER, special_tokens)
    return {"pattern": config.pattern, "parameters": sum(tensor.numel() for tensor in state.skeleton.values())}


def from_megatron(source: Path, tokenizer: Path | None, out: Path) -> dict[str, Any]:
    """Write the training checkpoint of a Megatron-LM or Megatron-Bridge checkpoint to the directory `out`; what was
    read.

    Args:
        tokenizer: a Hub directory whose tokenizer the model was trained with; without one `export` must be given it.

    Names, shapes and vocabulary are checked before any tensor is read. Raises ModelError.
    """
    from model import checkpoint, hub
    from model.megatron_lm import open_megatron

    imported = open_megatron(source)
    if tokenizer:
        hub.check_vocabulary(tokenizer, imported.config.vocab_size)
        special_tokens = hub.special_tokens(tokenizer, imported.config.vocab_size)
    checkpoint.save_weights(out, imported.config, imported.state, {"imported_from": imported.origin})
    if tokenizer:
        keep_tokenizer(tokenizer, out / OWN_TOKENIZER, special_tokens)
    return {
        "pattern": imported.config.pattern,
        "parameters": sum(tensor.numel() for tensor in imported.state.skeleton.values()),
        "padding_rows_left_out": imported.padding_rows,
        "tied_embeddings_untied": imported.tied,
        "entries_left_out": imported.left_out,
    }


def to_megatron(weights: Path, out: Path) -> dict[str, Any]:
    """Write the Megatron-LM release of a training checkpoint to the directory `out`; what was written."""
    from model import checkpoint
    from model.megatron_lm import save_megatron

    config, state, training = checkpoint.open_weights(weights)
    save_megatron(out, config, state, training)
    return {"pattern": config.pattern, "parameters": sum(tensor.numel() for tensor in state.skeleton.values())}


def keep_tokenizer(source: Path, own: Path, special_tokens: dict[str, Any]) -> None:
    """Make the directory `own` of the tokenizer files of a Hub directory and of its special ids."""
    own.mkdir()
    copy_tokenizer(source, own)
    (own / "generation_config.json").write_text(json.dumps(special_tokens, indent=2) + "\n")


def _name_of(directory: Path) -> str:
    """Whose weights they are: `owner/model` in the Hub's cache, or as config.json says, else the directory's name.

    No commit, and no path of whoever trained it (`/lustre/...`), is a model's name.
    """
    from model.hub import read_json

    if cached := re.search(r"/models--([^/]+)/snapshots/", f"{directory.resolve().as_posix()}/"):
        return cached[1].replace("--", "/")
    said = read_json(directory / "config.json").get("_name_or_path")
    if isinstance(said, str) and re.fullmatch(r"[\w.-]*\w/[\w.-]+", said):
        return said
    parts = [part for part in directory.absolute().parts[1:] if not re.fullmatch(r"[0-9a-f]{7,64}|snapshots", part)]
    return parts[-1] if parts else directory.name


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy those of the tokenizer's files that there are: a chat template only where the model came with one."""
    from model.hub import TOKENIZER_FILES

    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, out)


def encoded_card(directory: Path) -> list[int]:
    """Ids of the model card by the directory's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    ids: list[int] = tokenizer((directory / "README.md").read_text())["input_ids"]
    return ids


def check_tokenizer(directory: Path, tokenizer: Any, vocab_size: int) -> list[int]:
    """Ids of the model card, which both tokenizers must give. Raises ModelError where they or vocabularies differ."""
    from transformers import AutoTokenizer

    from model.config import ModelError
    from model.hub import other_vocabulary

    exported: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if len(exported) != vocab_size:
        raise other_vocabulary(str(directory / "tokenizer.json"), len(exported), vocab_size)
    text = (directory / "README.md").read_text()
    ids: list[int] = tokenizer.encode(text)
    if exported(text)["input_ids"] != ids or exported.decode(ids) != text or exported.eos_token_id != tokenizer.eod_id:
        raise ModelError(
            f"{directory / 'tokenizer.json'}: does not encode and decode the model card as the tokenizer does.\n"
            "Train the tokenizer with the `tokenizer` stage, and report this if it was."
        )
    return ids


def check_weights(directory: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ModelError where a weight of the Hub directory is not that of `state`, in the dtype it is stored in."""
    import torch

    from model import hub
    from model.config import ModelError

    _, exported = hub.open_weights(directory)
    for name in state:
        if not torch.equal(stored := exported[name], state[name].to(stored.dtype)):
            raise ModelError(f"{directory}: {name} is not the checkpoint's.\nReport this; the export is wrong.")


def check_logits(directory: Path, ids: list[int]) -> tuple[float, int, str]:
    """Largest difference of logits between transformers and HybridLM, over the largest logit; tokens compared; how.

    Both read `directory`, in float32 on the CPU: "whole", or "layer by layer" where memory is short, for which our
    reading fills transformers' model. Raises ModelError beyond LOGITS_TOLERANCE, or where transformers finds weights
    missing or too many.
    """
    import psutil
    import torch

    from model import costs, hub
    from model.config import ModelError

    needed = WHOLE_BYTES * costs.parameters(hub.read_config(directory))
    way, models = ("whole", whole_models) if needed <= psutil.virtual_memory().available else (
        "layer by layer", lazy_models)
    with without_packages("causal_conv1d", "mamba_ssm"):            # taken on a CPU as well, where they cannot run
        our_model, their_model = models(directory)
    inputs = torch.tensor([ids])
    with torch.no_grad():
        ours: Tensor = our_model.eval()(inputs)
        theirs: Tensor = their_model.eval()(inputs, use_cache=False).logits
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= LOGITS_TOLERANCE:
        raise ModelError(
            f"{directory}: transformers' logits differ from ours by {difference:.1e} of the largest, allowed is "
            f"{LOGITS_TOLERANCE:.0e}.\nCheck the version of transformers; report this if it is the locked one."
        )
    return difference, len(ids), way


def whole_models(directory: Path) -> tuple[nn.Module, nn.Module]:
    """Ours and transformers' model, each loaded as its own users do. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    from model import hub
    from model.config import ModelError
    from model.hybrid_lm import HybridLM

    loader: Any = AutoModelForCausalLM
    theirs, found = loader.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    if wrong := {kind: sorted(names) for kind, names in found.items() if names}:
        raise ModelError(f"{directory}: transformers loads it with {wrong}.\nReport this; the export is wrong.")
    return HybridLM.from_state(*hub.open_weights(directory)), theirs


def lazy_models(directory: Path) -> tuple[nn.Module, nn.Module]:
    """Ours and transformers' model, whose layers get their weights when they run. Raises ModelError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from model import hub
    from model.hybrid_lm import HybridLM, check_shapes
    from model.lazy_state import compute_lazily

    config, state = hub.open_weights(directory)
    settings = AutoConfig.from_pretrained(directory, local_files_only=True)
    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):
        theirs = loader.from_config(settings, dtype=torch.float32)
    if hasattr(theirs.model, "rotary_emb"):
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(settings)       # computed, in no file
    names = hub.names_there(config)
    shapes = {names(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    check_shapes(config, shapes, f"transformers' model of {directory / 'config.json'}")
    return compute_lazily(HybridLM.skeleton(config), state), compute_lazily(theirs, state, names)


@contextlib.contextmanager
def without_packages(*names: str) -> Iterator[None]:
    """Importing one of `names` fails within the block."""
    hidden = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]      # None: not to be imported
    try:
        yield
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def convert(arguments: list[str]) -> None:
    """`--from-hub`, `--from-megatron` and `--from-checkpoint`."""
    parser = argparse.ArgumentParser(prog="python -m stages.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from-hub", type=Path, metavar="DIR", help="a Hugging Face directory")
    source.add_argument("--from-megatron", type=Path, metavar="DIR",
                        help="a torch_dist checkpoint of Megatron-LM or Megatron-Bridge")
    source.add_argument("--from-checkpoint", type=Path, metavar="DIR", help="a training checkpoint")
    parser.add_argument("--out", type=out_directory, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--to", choices=("hub", "megatron"), help="form of a training checkpoint (default: hub)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH",
                        help="tokenizer.model, for a checkpoint without one; of --from-megatron, a Hub directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="of weights in Hugging Face form; elsewhere, and without it, they stay as they are")
    options = parser.parse_args(arguments)
    exported = options.from_checkpoint and options.to != "megatron"
    for name, used in (("to", options.from_checkpoint), ("dtype", exported),
                       ("tokenizer", exported or options.from_megatron)):
        if getattr(options, name) and not used:
            raise StageError(f"--{name} {getattr(options, name)}: would have no effect on this conversion.\n"
                             "Leave it out, or see --help for what has it.")
    if options.out.exists():
        raise StageError(f"{options.out}: exists.\nGive --out a new directory, or remove it.")
    with plain_errors(), new_directory(options.out) as out:
        if options.from_hub:
            facts = from_hub(options.from_hub, out)
        elif options.from_megatron:
            facts = from_megatron(options.from_megatron, options.tokenizer, out)
        elif options.to == "megatron":
            facts = to_megatron(options.from_checkpoint, out)
        else:
            from model.hub import SHARD_GIGABYTES

            tokenizer = options.tokenizer or options.from_checkpoint / OWN_TOKENIZER
            facts = to_hub(options.from_checkpoint, tokenizer, out, options.dtype, SHARD_GIGABYTES)
    print(options.out, json.dumps(facts))


if __name__ == "__main__":
    if any(argument.startswith("--from-") for argument in sys.argv[1:]):
        convert(sys.argv[1:])
    else:
        run_stage(export, __doc__, sections=("export",), members=lambda params: params.models)
