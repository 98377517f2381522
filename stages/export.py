"""Export one model to a Hugging Face directory, and check that transformers computes what our model computes.

Reads   data/PROFILE/checkpoints/VARIANT/, data/PROFILE/tokenizer/
Writes  data/PROFILE/hub/VARIANT/: config.json, safetensors, tokenizer.json, model card
        runs/PROFILE/export/VARIANT/metrics.json: size, and the largest difference of logits between the two

The check reads the new directory back both ways and gives both models a few tokens of text in float32. A difference
beyond 1e-4 of the largest logit, or a text that the two tokenizers encode differently, is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common import Stage, run_stage

if TYPE_CHECKING:
    from torch import Tensor

LOGITS_TOLERANCE = 1e-4      # of the largest logit
COMPARED_TOKENS = 256


def export(stage: Stage) -> dict[str, Any]:
    from data_pipeline import fast_tokenizer
    from data_pipeline.tokenizer import MODEL_FILE, Tokenizer
    from model import checkpoint, hub

    assert stage.variant is not None
    weights = stage.input("checkpoints", stage.variant)
    tokenizer_path = stage.input("tokenizer", MODEL_FILE)
    config, state, training = checkpoint.load_weights(weights)
    with stage.output("hub", stage.variant) as out:
        hub.save(out, config, state, training, stage.params.export.dtype)
        fast_tokenizer.export(tokenizer_path, out)
        ids = check_tokenizer(out, Tokenizer(tokenizer_path), config.vocab_size)
        difference, compared = check_logits(out, ids[: min(config.sequence_length, COMPARED_TOKENS)])
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "megabytes": size / 1e6,
        "logits_max_relative_difference": difference,
        "tokens_compared": compared,
    }


def check_tokenizer(directory: Path, tokenizer: Any, vocab_size: int) -> list[int]:
    """Ids of the model card, which both tokenizers must give. Raises ModelError where they or vocabularies differ."""
    from transformers import AutoTokenizer

    from model.config import ModelError

    exported = AutoTokenizer.from_pretrained(directory)
    if not tokenizer.vocab_size == len(exported) == vocab_size:
        raise ModelError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, tokenizer.json {len(exported)}, the model "
            f"{vocab_size}.\nTrain the model on tokens of this tokenizer: `dvc repro tokenize pretrain`."
        )
    text = (directory / "README.md").read_text()
    ids: list[int] = tokenizer.encode(text)
    if exported(text)["input_ids"] != ids or exported.decode(ids) != text or exported.eos_token_id != tokenizer.eod_id:
        raise ModelError(
            f"{directory / 'tokenizer.json'}: does not encode and decode the model card as the tokenizer does.\n"
            "Train the tokenizer with the `tokenizer` stage, and report this if it was."
        )
    return ids


def check_logits(directory: Path, ids: list[int]) -> tuple[float, int]:
    """Largest difference of logits between transformers and HybridLM, over the largest logit; tokens compared.

    Both read `directory`, in float32 on the CPU. Raises ModelError beyond LOGITS_TOLERANCE, or where transformers
    finds weights missing or too many.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from model import hub
    from model.config import ModelError
    from model.hybrid_lm import HybridLM

    inputs = torch.tensor([ids])
    with torch.no_grad():
        ours: Tensor = HybridLM.from_state(*hub.load(directory)).eval()(inputs)
        loader: Any = AutoModelForCausalLM
        model, found = loader.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        theirs: Tensor = model.eval()(inputs, use_cache=False).logits
    if wrong := {kind: sorted(names) for kind, names in found.items() if names}:
        raise ModelError(f"{directory}: transformers loads it with {wrong}.\nReport this; the export is wrong.")
    difference = ((ours - theirs).abs().max() / ours.abs().max()).item()
    if not difference <= LOGITS_TOLERANCE:
        raise ModelError(
            f"{directory}: transformers' logits differ from ours by {difference:.1e} of the largest, allowed is "
            f"{LOGITS_TOLERANCE:.0e}.\nCheck the version of transformers; report this if it is the locked one."
        )
    return difference, len(ids)


if __name__ == "__main__":
    run_stage(export, __doc__, sections=("export",), members=lambda params: params.models)
